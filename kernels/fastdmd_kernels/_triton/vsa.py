"""The launchers of video sparse attention (VSA, arXiv 2505.13389); their torch twins are in `_torch/vsa.py`."""

from fastdmd_kernels._triton.vsa_bwd import fine_bwd
from fastdmd_kernels._triton.vsa_fwd import fine_fwd
from fastdmd_kernels._triton.vsa_invert import invert
from fastdmd_kernels._triton.vsa_pool import pool
from fastdmd_kernels._triton.vsa_select import select

__all__ = ["fine_bwd", "fine_fwd", "invert", "pool", "select"]
