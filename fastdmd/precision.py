"""Which number types a run computes in."""

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, kw_only=True)
class Config:
    compute: Literal["bf16", "fp32"] = "bf16"  # weights and activations of the networks; masters are float32

    @property
    def dtype(self) -> torch.dtype:
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[self.compute]
