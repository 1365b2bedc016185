"""Low-rank adapters (2106.09685) in a role's network, by peft: W x becomes W x + alpha / rank B A x.

The names of a network change: a target's own weight is at `TARGET.base_layer.weight`, its adapter at
`TARGET.lora_A.default.weight` and `TARGET.lora_B.default.weight`. Layers outside the targets keep theirs.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

ADAPTER = "default"
# a target is the end of a module's name
WAN_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """[lora]: what a student trains in place of its own weights."""

    rank: int
    alpha: float
    targets: tuple[str, ...]  # ends of layers' names
    modules: tuple[str, ...] = ()  # beginnings of names of what is trained whole beside the adapters

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.rank < 1:
            yield "rank", f"{self.rank} is not positive; LCM-LoRA uses 64, DCM 128"
        if self.alpha <= 0:
            yield "alpha", f"{self.alpha} is not positive; as much as the rank is usual"
        if not self.targets:
            yield "targets", f"is empty; e.g. {list(WAN_TARGETS)}"


def modules_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return a module and all inside it by name; torch's own generator has no types."""
    return list(module.named_modules())  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]


def add_lora(module: nn.Module, rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Put adapters into every layer whose name ends in a target.

    Their values mean nothing until `start_lora`. Raise ValueError for a target that is no layer.
    """
    from peft import LoraConfig, inject_adapter_in_model

    kinds = nn.Linear | nn.Conv2d | nn.Conv3d
    names = [name for name, layer in modules_of(module) if isinstance(layer, kinds)]
    if absent := [t for t in targets if not any(f".{name}".endswith(f".{t}") for name in names)]:
        raise ValueError(
            f"lora.targets: no layer is called {', '.join(absent)}; the last is called {names[-1]}"
        )
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))  # type: ignore[arg-type]
    inject_adapter_in_model(config, module, ADAPTER)


def start_lora(module: nn.Module, seed: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Draw A of every adapter from the seed and set B to zero, so that the network starts as it was.

    Return the float32 masters by name, where dtype is another. A is drawn uniform as a linear layer's weight
    (Kaiming, a = sqrt(5)); first A and B are drawn in vain, as peft does, whose draws these are.
    """
    masters: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]):  # pyright: ignore[reportUnknownMemberType]
        torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]
        for name, _ in modules_of(module):
            if not name.endswith(f".lora_A.{ADAPTER}"):
                continue
            layer = name.removesuffix(f".lora_A.{ADAPTER}")
            b_name = f"{layer}.lora_B.{ADAPTER}"
            parts = {each: module.get_submodule(each) for each in (name, b_name)}
            a, b = (torch.empty(part.get_parameter("weight").shape) for part in parts.values())
            for drawn in (a, b, a):
                nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
            for (each, part), value in zip(parts.items(), (a, b.zero_()), strict=True):
                master = value.to(device)
                part.weight = nn.Parameter(master.to(dtype, copy=True), requires_grad=False)
                if dtype != torch.float32:
                    masters[f"{each}.weight"] = master
    return masters


def lora_parameters(module: nn.Module, whole: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """Return the adapters' parameters by name, and those of the modules that are trained whole."""
    parameters: dict[str, nn.Parameter] = {}
    for name, parameter in module.named_parameters():
        if ".lora_A." in name or ".lora_B." in name or any(name.startswith(f"{part}.") for part in whole):
            parameters[name] = parameter
    return parameters


def merged(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a network without adapters that computes the same: W + alpha / rank B A."""
    from peft.tuners.lora import LoraLayer

    weights = {
        name.replace(".base_layer", ""): p.detach().clone()
        for name, p in module.named_parameters()
        if ".lora_A." not in name and ".lora_B." not in name
    }
    for name, layer in modules_of(module):
        if isinstance(layer, LoraLayer):
            weights[f"{name}.weight"] += layer.get_delta_weight(ADAPTER)  # type: ignore[attr-defined]
    return weights


def export_lora(path: Path, weights: Mapping[str, Tensor], rank: int, alpha: float, prefix: str = "") -> None:
    """Write adapters, by the names of a network, for `load_lora_weights` of diffusers' pipelines.

    The names of SDXL begin with "unet." as they have to; Wan's take the prefix "transformer.". A reader takes
    alpha for the rank, so the file's B has alpha / rank in it.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in weights.items():
        scale = alpha / rank if ".lora_B." in name else 1.0
        tensors[prefix + name.replace(f".{ADAPTER}.weight", ".weight")] = (
            (scale * value.detach()).cpu().contiguous()
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"format": "pt"})
