"""Score-distillation losses: contract, arithmetic in plain PyTorch, and fused kernels."""

from fastdmd_kernels.losses.api import dmd_loss, sid_loss
from fastdmd_kernels.losses.reference import guide

__all__ = ["dmd_loss", "guide", "sid_loss"]
