"""Low-rank adapters (2106.09685) in a role's network, by peft: W x becomes W x + alpha / rank B A x.

The names of a network change: a target's own weight is at `TARGET.base_layer.weight`, its adapter at
`TARGET.lora_A.default.weight` and `TARGET.lora_B.default.weight`. Layers outside the targets keep theirs.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

ADAPTER = "default"
# a target is the end of a module's name
WAN_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
SDXL_TARGETS = (  # LCM-LoRA (2311.05556)
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)


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


def add_lora(module: nn.Module, rank: int, alpha: float, targets: Sequence[str], seed: int) -> None:
    """Put adapters into every layer whose name ends in a target; nothing else of the module stays trainable.

    A is drawn from the seed and B is zero: the network starts as it was. ValueError for a target that is no layer.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d)]
    if absent := [t for t in targets if not any(f".{name}".endswith(f".{t}") for name in names)]:
        raise ValueError(f"lora.targets: no layer is called {', '.join(absent)}; the last is called {names[-1]}")
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, module, ADAPTER)
    adapters = lora_parameters(module)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in adapters)


def lora_parameters(module: nn.Module, whole: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """The adapters' parameters by name, and those of the modules that are trained whole."""
    found = {}
    for name, parameter in module.named_parameters():
        if ".lora_A." in name or ".lora_B." in name or any(name.startswith(f"{part}.") for part in whole):
            found[name] = parameter
    return found


def merged(module: nn.Module) -> dict[str, Tensor]:
    """The parameters of a network without adapters that computes the same: W + alpha / rank B A."""
    from peft.tuners.lora import LoraLayer

    found = {
        name.replace(".base_layer", ""): p.detach().clone()
        for name, p in module.named_parameters()
        if ".lora_A." not in name and ".lora_B." not in name
    }
    for name, layer in module.named_modules():
        if isinstance(layer, LoraLayer):
            found[f"{name}.weight"] += layer.get_delta_weight(ADAPTER)  # type: ignore[attr-defined]
    return found


@contextmanager
def lora_off(module: nn.Module) -> Iterator[None]:
    """The network without its adapters: a teacher that shares the student's base.

    Gradient checkpoints taken inside would be recomputed with the adapters on, which torch refuses in the backward:
    call it under no_grad, or without checkpointing.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    trained = {p: p.requires_grad for p in lora_parameters(module).values()}  # peft sets it as it likes
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, on in trained.items():
            parameter.requires_grad_(on)


def export_lora(path: Path, weights: Mapping[str, Tensor], rank: int, alpha: float, prefix: str = "") -> None:
    """A safetensors file for `load_lora_weights` of diffusers' pipelines, from adapters by the names of a network.

    Those of SDXL begin with "unet." as they have to; Wan's take the prefix "transformer.". A reader takes alpha for the
    rank, so the file's B has alpha / rank in it.
    """
    tensors = {}
    for name, value in weights.items():
        scale = alpha / rank if ".lora_B." in name else 1.0
        tensors[prefix + name.replace(f".{ADAPTER}.weight", ".weight")] = (scale * value.detach()).cpu().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"format": "pt"})
