"""The launchers of video sparse attention (VSA, arXiv 2505.13389); their torch twins are in torch.py."""

from fastdmd_kernels.vsa.triton_bwd import fine_bwd
from fastdmd_kernels.vsa.triton_fwd import fine_fwd
from fastdmd_kernels.vsa.triton_invert import invert
from fastdmd_kernels.vsa.triton_pool import pool
from fastdmd_kernels.vsa.triton_select import select

__all__ = ["fine_bwd", "fine_fwd", "invert", "pool", "select"]
