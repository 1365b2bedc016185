"""The ops of fastdmd, each a contract with a plain PyTorch reference.

Imports torch only, and works without triton.
"""

from fastdmd_kernels.losses import dmd_loss, guide, sid_loss
from fastdmd_kernels.tiles import Tiles, raster_order, tile_order
from fastdmd_kernels.vsa import topk_for, video_sparse_attention, vsa_reference

__all__ = [
    "Tiles",
    "dmd_loss",
    "guide",
    "raster_order",
    "sid_loss",
    "tile_order",
    "topk_for",
    "video_sparse_attention",
    "vsa_reference",
]
