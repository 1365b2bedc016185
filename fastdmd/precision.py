"""Which number types a run computes in."""

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, kw_only=True)
class Config:
    compute: Literal["bf16", "fp32"] = "bf16"  # weights and activations of the networks; masters are float32
    # of linear layers that no role trains: as `compute`, or one byte a weight, which saves memory and no time
    frozen: Literal["compute", "int8", "float8"] = "compute"

    @property
    def dtype(self) -> torch.dtype:
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[self.compute]


def notice(config: Config, device: torch.device) -> str | None:
    """Return what a run's first lines say of its number types; ValueError for what a device cannot do."""
    if config.frozen == "compute":
        return None
    if config.frozen == "float8" and device.type == "mps":
        raise ValueError("precision.frozen = 'float8': mps has no such numbers; use 'int8'")
    return (
        f"precision.frozen = '{config.frozen}': a byte for each weight of linear layers that no role trains, "
        f"and products in {config.compute}"
    )
