"""Which number types a run stores and computes in, and what each of them becomes on a device.

| | storage | products |
|---|---|---|
| network that a role trains whole | masters float32, or bf16 rounded at random (`master`) | `linear` |
| base under adapters, teacher | `frozen` | `linear`: forward and input gradient |
| adapters, copies of modules, embedders, modulation, norms, heads | as `compute`, or float32 | the same |
| text encoder | `text_encoder`; no gradient passes | `compute` |

Rejected: int8 products of a base (torchao's dynamic form returns no gradient), float8 weight gradients (they
sum over tokens, which would have to be a multiple of 16), int8 codes with float8 products and one-byte codes
with MXFP8 (rounded twice), bf16 masters with moments of 8 bits (nobody has shown that both together train).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

Stored = Literal["compute", "int8", "float8"]
FLOAT8_GPUS = ("gfx942", "gfx950")  # of AMD; NVIDIA's from sm_89 on
FIRST_FLOAT8, FIRST_MXFP8 = 89, 100


@dataclass(frozen=True, kw_only=True)
class Config:
    compute: Literal["bf16", "fp32"] = "bf16"  # weights and activations of the networks
    # of linear layers that no role trains: as `compute`, or one byte a weight, which saves memory and no time
    frozen: Stored = "compute"
    # of products of the linear layers of blocks, which are large; weight gradients stay in `compute`. For
    # compiled blocks: in eager ones rounding to eight bits moves more bytes than the products save
    linear: Literal["compute", "float8", "mxfp8"] = "compute"
    text_encoder: Stored = "compute"  # of its linear layers
    # of what trains: float32 beside the rounded weights, or the weights themselves, rounded at random
    master: Literal["fp32", "bf16-sr"] = "fp32"

    @property
    def dtype(self) -> torch.dtype:
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[self.compute]

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield what does not go together."""
        if self.linear == "float8" and self.frozen == "int8":
            yield "frozen", "'int8' weights would be rounded again to float8 for products; use 'float8'"
        if self.linear == "mxfp8" and self.frozen != "compute":
            yield (
                "frozen",
                f"'{self.frozen}' weights would be rounded again to MXFP8 for products; use 'compute'",
            )
        if self.master == "bf16-sr" and self.compute == "fp32":
            yield "master", "'bf16-sr' weights that compute in float32 train no better; use compute = 'bf16'"


def target_of(device: torch.device) -> str:
    """Return what code for a device is made for: "cpu", "mps", "sm_90", "gfx942"."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def has_float8(target: str) -> bool:
    """Return whether a target has numbers and products in e4m3."""
    return target == "cpu" or target in FLOAT8_GPUS or capability(target) >= FIRST_FLOAT8


def has_mxfp8(target: str) -> bool:
    """Return whether a target has products with a scale for each 32 numbers."""
    return capability(target) >= FIRST_MXFP8


def capability(target: str) -> int:
    """Return the compute capability of an NVIDIA GPU, 0 of any other target."""
    return int(target.removeprefix("sm_")) if target.startswith("sm_") else 0


def became(config: Config, target: str) -> list[str]:
    """Return a line for each option that is not the default: what it is on a target.

    Raise ValueError for what the target cannot do, with the nearest that it can.
    """
    faults = list(refused(config, target))
    if faults:
        raise ValueError("\n".join(f"precision.{key} = {text}" for key, text in faults))
    lines: list[str] = []
    if config.frozen != "compute":
        products = f"products in {config.compute if config.linear == 'compute' else config.linear}"
        lines.append(
            f"precision.frozen = '{config.frozen}': a byte for each weight of linear layers that no role "
            f"trains, and {products}"
        )
    if config.linear != "compute":
        scales = "a scale for each row" if config.linear == "float8" else "a scale for each 32 numbers"
        where = "emulated, which saves nothing" if target == "cpu" else f"tensor cores of {target}"
        lines.append(
            f"precision.linear = '{config.linear}': products of linear layers of blocks in e4m3, {scales} "
            f"({where}); weight gradients in {config.compute}"
        )
    if config.text_encoder != "compute":
        lines.append(
            f"precision.text_encoder = '{config.text_encoder}': a byte for each weight of its linear layers, "
            f"and products in {config.compute}"
        )
    if config.master == "bf16-sr":
        lines.append("precision.master = 'bf16-sr': no float32 masters; updates round the weights at random")
    return lines


def refused(config: Config, target: str) -> Iterator[tuple[str, str]]:
    """Yield the keys that a target cannot do, with the nearest that it can."""
    for key, value in (("frozen", config.frozen), ("text_encoder", config.text_encoder)):
        if value == "float8" and not has_float8(target):
            yield key, f"'float8': {target} has no such numbers; use 'int8'"
    if config.linear == "float8" and not has_float8(target):
        yield "linear", f"'float8': {target} has no such products; use 'compute'"
    if config.linear == "mxfp8" and not has_mxfp8(target):
        nearest = "float8" if has_float8(target) else "compute"
        yield "linear", f"'mxfp8': {target} has no such products; use '{nearest}'"
    elif config.linear != "compute" and config.compute == "fp32" and target != "cpu":
        yield "linear", f"'{config.linear}': {target} has results in bf16 only; use compute = 'bf16'"
