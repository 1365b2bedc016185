"""Which device a run is on and which number types it computes in."""

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, kw_only=True)
class Config:
    compute: Literal["bf16", "fp32"] = "bf16"  # weights and activations of the networks; masters are float32

    @property
    def dtype(self) -> torch.dtype:
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[self.compute]


def pick_device(name: str) -> torch.device:
    """ "auto": CUDA or ROCm, then MPS, then CPU. ValueError when a named device is not there."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in present.items() if there)
    if not present[name.split(":")[0]]:
        raise ValueError(f"run.device = '{name}' is not on this machine; use 'auto'")
    return torch.device(name)
