"""Low-rank adapters (2106.09685) of the roles on a network, by peft: W x becomes W x + alpha / rank B A x.

Roles that read the same weights share one network, and what each owns is in it under the role's name: its
adapters at `TARGET.lora_A.ROLE.weight` and `TARGET.lora_B.ROLE.weight`, its copies of modules trained whole
at `MODULE.own.ROLE`. What is shared is at `TARGET.base_layer` and `MODULE.shared`. Outside of the network a
role's parameters go by names without the role: `TARGET.lora_A.weight`, and those of a network without copies.
A role is an argument of a call, as a block that is recomputed in the backward must see the one of its
forward; peft's own switches are global, and flip what learns.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

# what a name in a network has more than outside of it
INSIDE = re.compile(r"\.(base_layer|shared|own\.[^.]+)(?=\.|$)|(?<=\.lora_[AB])\.[^.]+(?=\.)")
# a target is the end of a module's name
WAN_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """[lora]: what a role with train = "lora" trains in place of its own weights."""

    rank: int
    alpha: float
    targets: tuple[str, ...]  # ends of layers' names
    modules: tuple[str, ...] = ()  # beginnings of names of what is trained whole beside the adapters
    path: str | None = None  # a file of adapters that the student starts from; absent: they start at nothing

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.rank < 1:
            yield "rank", f"{self.rank} is not positive; LCM-LoRA uses 64, DCM 128"
        if self.alpha <= 0:
            yield "alpha", f"{self.alpha} is not positive; as much as the rank is usual"
        if not self.targets:
            yield "targets", f"is empty; e.g. {list(WAN_TARGETS)}"


class Owned(nn.Module):
    """A module that some roles train whole: each has a copy, the others take the shared one."""

    def __init__(self, shared: nn.Module, roles: Collection[str], acting: list[str]) -> None:
        super().__init__()
        self.shared = shared
        self.own = nn.ModuleDict({role: deepcopy(shared) for role in roles})
        self.acting = acting  # the role of a call, of networks that cannot hand it on

    def of(self, role: str | None) -> nn.Module:
        return self.shared if role is None or role not in self.own else self.own[role]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.of(self.acting[0] if self.acting else None)(*args, **kwargs)


class Zero(nn.Module):
    """A linear layer of zeros, without weights: what adapters stand on where there is nothing to adapt."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)


def own(module: nn.Module, role: str | None) -> Any:
    """Return the module that a role's call takes: its own copy, if it has one."""
    return module.of(role) if isinstance(module, Owned) else module


def base_of(module: nn.Module) -> Any:
    """Return the layer under copies and adapters."""
    shared = own(module, None)
    return shared.base_layer if hasattr(shared, "base_layer") else shared


def linear(layer: nn.Module, x: Tensor, role: str | None) -> Any:
    """Return what a role's linear layer makes of x [.., D]; of a convolution, x has its patches."""
    adapted: Any = own(layer, role)
    base: Any = base_of(adapted)
    y: Tensor = nnf.linear(x, base.weight.flatten(1), base.bias) if isinstance(base, nn.Conv3d) else base(x)
    if role is None or base is adapted or role not in adapted.lora_A:
        return y
    A: Tensor = adapted.lora_A[role].weight.flatten(1)
    B: Tensor = adapted.lora_B[role].weight.flatten(1)
    return y + (nnf.linear(nnf.linear(x.to(A.dtype), A), B) * adapted.scaling[role]).to(y.dtype)


def modules_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return a module and all inside it by name; torch's own generator has no types."""
    return list(module.named_modules())  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]


def add_lora(
    net: nn.Module, role: str, config: LoraConfig, targets: Sequence[str], acting: list[str]
) -> None:
    """Put a role's adapters into every layer whose name ends in a target, and copies beside its modules.

    Their values mean nothing until `start_lora`. Raise ValueError for a target that is no layer, and for one
    inside of a module that is trained whole.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    kinds = nn.Linear | nn.Conv2d | nn.Conv3d
    layers = [clean(name) for name, layer in modules_of(net) if isinstance(layer, kinds)]
    layers = [name for name in layers if ".lora_" not in name]
    if absent := [t for t in targets if not any(f".{name}".endswith(f".{t}") for name in layers)]:
        raise ValueError(
            f"lora.targets: no layer is called {', '.join(absent)}; the last is called {layers[-1]}"
        )
    inside = tuple(f"{module}." for module in config.modules)
    both = [
        n for n in layers if f"{n}.".startswith(inside) and any(f".{n}".endswith(f".{t}") for t in targets)
    ]
    if both:
        raise ValueError(f"lora.modules: {both[0]} is trained whole, and a target too; remove one of the two")
    for name in config.modules:
        add_copy(net, name, role, acting)
    settings = PeftConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(targets))  # type: ignore[arg-type]
    inject_adapter_in_model(settings, net, role)
    delattr(net, "peft_config")  # of one role; the next would be warned of it
    for _, layer in modules_of(net):
        if isinstance(layer, LoraLayer):
            setattr(layer, "_active_adapter", acting)  # noqa: B010  # peft reads it at each call


def add_copy(net: nn.Module, name: str, role: str, acting: list[str]) -> None:
    """Give a role its own copy of a module; ValueError where there is no such module."""
    above, _, leaf = name.rpartition(".")
    try:
        parent, module = net.get_submodule(above), net.get_submodule(name)
    except AttributeError:
        raise ValueError(f"lora.modules: no module is called {name!r}; name one of the network's") from None
    if isinstance(module, Owned):
        module.own[role] = deepcopy(module.shared)
    else:
        setattr(parent, leaf, Owned(module, [role], acting))


def clean(name: str) -> str:
    """Return the name that a parameter or module has outside of the network: without the role."""
    return INSIDE.sub("", name)


def is_own(name: str) -> bool:
    """Return whether a parameter is a role's own: of its adapters, or of its copy of a module."""
    return any(mark in name for mark in (".lora_A.", ".lora_B.", ".own."))


def own_names(net: nn.Module, role: str) -> dict[str, str]:
    """Return the names in a network of the parameters that a role owns, by their names without it."""
    mark = re.compile(rf"\.(lora_A|lora_B|own)\.{role}\.")
    return {clean(name): name for name, _ in net.named_parameters() if mark.search(name)}


def own_parameters(net: nn.Module, role: str) -> dict[str, nn.Parameter]:
    """Return the parameters that a role owns: its adapters, and its copies of modules trained whole."""
    return {name: net.get_parameter(full) for name, full in own_names(net, role).items()}


def start_lora(
    net: nn.Module, role: str, seed: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Draw A of a role's adapters from the seed and set B to zero, so that the role starts as it was.

    Return the float32 masters by the names of `own_names`, where dtype is another. A is drawn uniform as a
    linear layer's weight (Kaiming, a = sqrt(5)); first A and B are drawn in vain, as peft does, whose draws
    these are.
    """
    names = own_names(net, role)
    masters: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]):  # pyright: ignore[reportUnknownMemberType]
        torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]
        for a_name in [name for name in names if name.endswith(".lora_A.weight")]:
            pair = (a_name, a_name.replace(".lora_A.", ".lora_B."))
            a, b = (torch.empty(net.get_parameter(names[each]).shape) for each in pair)
            for drawn in (a, b, a):
                nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
            for each, value in zip(pair, (a, b.zero_()), strict=True):
                set_parameter(net, names[each], value.to(device, dtype))
                if dtype != torch.float32:
                    masters[each] = value.to(device)
    return masters


def set_parameter(net: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter, which may be on the meta device, by one that does not learn."""
    owner, _, leaf = name.rpartition(".")
    setattr(net.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def read_lora(
    path: Path, prefix: str, config: LoraConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Return the adapters of a file as `export_lora` writes it, by the names of `own_names`, in float32.

    Raise ValueError for a file of other adapters, or of another rank. What the file has of alpha / rank is in
    its B, or in its `.alpha` values, and is taken out again.
    """
    wanted = {name: f"{prefix}{name}" for name in shapes if ".lora_" in name}
    try:
        file = load_file(path)
    except (OSError, SafetensorError) as e:
        raise ValueError(f"lora.path: {path} cannot be read ({e}); name a file of adapters") from None
    alphas = {name: value for name, value in file.items() if name.endswith(".alpha")}
    wrong = [f"{there} is missing" for there in wanted.values() if there not in file]
    wrong += [f"{there} is unknown" for there in sorted(file.keys() - set(wanted.values()) - alphas.keys())]
    wrong += [
        f"{there} is {list(file[there].shape)}, not {list(shapes[name])}"
        for name, there in wanted.items()
        if there in file and file[there].shape != shapes[name]
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"lora.path: {path} does not fit [lora]: {', '.join(wrong[:3])}{more}; name a file of these"
        )
    weights: dict[str, Tensor] = {}
    for name, there in wanted.items():
        value = file[there].float()
        if ".lora_B." in name:
            alpha = alphas.get(there.replace(".lora_B.weight", ".alpha"))
            theirs = 1.0 if alpha is None else float(alpha) / value.shape[1]
            value = value * (theirs * config.rank / config.alpha)
        weights[name] = value
    return weights


def merged(net: nn.Module, role: str) -> dict[str, Tensor]:
    """Return the parameters of a network without adapters that computes what a role does.

    A target's weight is W + alpha / rank B A.
    """
    from peft.tuners.lora import LoraLayer

    weights = {clean(name): p.detach().clone() for name, p in net.named_parameters() if not is_own(name)}
    for name, layer in modules_of(net):
        if hasattr(layer, "packed"):  # of one byte a weight: what it computes with
            for part in ("packed", "scale"):
                del weights[f"{clean(name)}.{part}"]
            low: Any = layer
            weights[f"{clean(name)}.weight"] = low.dense().detach()
    for name, p in own_parameters(net, role).items():
        if ".lora_" not in name:
            weights[name] = p.detach().clone()
    for name, layer in modules_of(net):
        if isinstance(layer, LoraLayer) and role in layer.lora_A:
            delta: Any = layer.get_delta_weight(role)  # type: ignore[attr-defined]
            where = f"{clean(name)}.weight"
            weights[where] = weights[where] + delta if where in weights else delta
            if isinstance(layer.base_layer, Zero):
                weights[f"{clean(name)}.bias"] = weights[where].new_zeros(layer.base_layer.out_features)
    return weights


def export_lora(path: Path, weights: Mapping[str, Tensor], rank: int, alpha: float, prefix: str = "") -> None:
    """Write adapters, by the names of a network, for `load_lora_weights` of diffusers' pipelines.

    The names of SDXL begin with "unet." as they have to; Wan's take the prefix "transformer.". A reader takes
    alpha for the rank, so the file's B has alpha / rank in it.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in weights.items():
        scale = alpha / rank if ".lora_B." in name else 1.0
        tensors[prefix + name] = (scale * value.detach()).cpu().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"format": "pt"})
