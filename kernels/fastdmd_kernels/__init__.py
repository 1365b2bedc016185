"""The ops of fastdmd: each a contract with a plain PyTorch reference. Imports torch only, and without triton too."""

from fastdmd_kernels.losses import dmd_loss, guide, sid_loss
from fastdmd_kernels.tiles import raster_order, tile_order

__all__ = ["dmd_loss", "guide", "raster_order", "sid_loss", "tile_order"]
