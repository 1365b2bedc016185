"""Launch configurations: warps and pipeline stages by (target, kernel, dtype, head dim, triton's version)."""

from collections.abc import Mapping
from typing import Any

import torch
import triton
from triton.runtime import driver

POINTERS = "sm_80"  # the configurations that need no TMA

# (num_warps, num_stages) of vsa_fwd, vsa_bwd_dq, vsa_bwd_dkdv in 16 bits, and what they compile to in
# bfloat16 with triton 3.7.1: registers, KB of shared memory, CTAs per SM; nowhere a spill. Compiled and never
# timed.
_ATTENTION = {
    ("sm_80", 64): ((4, 2), (4, 2), (4, 2)),  # 172 24 2, 255 32 2, 255 33 2
    ("sm_80", 128): ((8, 2), (8, 2), (8, 2)),  # 128 56 2, 170 72 1, 168 73 1; 4 warps forward: 255 registers
    ("sm_90", 64): ((4, 2), (4, 2), (4, 2)),  # 100 40 4, 132 48 3, 175 49 2
    ("sm_90", 128): ((4, 3), (4, 2), (4, 2)),  # 128 112 2, 178 96 2, 243 97 2; forward in one stage: 132 48 3
    ("sm_100", 64): ((4, 2), (4, 2), (4, 2)),  # 125 40 4, 118 56 2, 110 65 2
    ("sm_100", 128): ((4, 3), (4, 2), (4, 1)),  # 168 112 2, 148 112 2, 136 64 2; dkdv in 2 stages: 128 129 1
    ("sm_120", 64): ((4, 2), (8, 2), (8, 2)),  # dq with 4 warps spills 80 bytes, dk and dv 255 registers
    ("sm_120", 128): ((8, 2), (8, 2), (8, 2)),  # 130 56 1, 172 72 1, 172 72 1; 4 warps forward and dq spill
    ("gfx942", 64): ((4, 2), (4, 1), (4, 1)),  # 178 16, 184 8, 200 8
    ("gfx942", 128): ((8, 1), (4, 1), (4, 1)),  # 188 16, 296 16, 312 16; dq with 8 warps spills
    ("gfx950", 64): ((4, 2), (4, 2), (4, 1)),  # 140 16, 172 16, 174 8
    ("gfx950", 128): ((4, 2), (4, 2), (4, 1)),  # 220 32, 326 32, 296 16; dk and dv in two stages: 402
}
# (num_warps, num_stages) of what has float32 products and spills with the usual ones, by the first triton
# that the row is for. Compiled with 3.6.0, 3.7.1, 3.8.0 and 3.9.0, and never timed. Spills are in bytes, with
# the usual ones where nothing else is said, of 3.9.0.
_USUAL = {"vsa_fwd": (4, 1), "vsa_bwd_dq": (4, 1), "vsa_bwd_dkdv": (4, 1), "vsa_select": (16, 2)}
_SINCE_3_6 = {
    ("sm_100", "vsa_bwd_dq", 128): (8, 1),
    ("sm_120", "vsa_fwd", 128): (16, 1),
    ("sm_120", "vsa_bwd_dq", 128): (8, 1),
    ("sm_120", "vsa_bwd_dkdv", 64): (16, 1),
}
_SINCE_3_8 = _SINCE_3_6 | {
    ("sm_80", "vsa_fwd", 128): (8, 1),  # spills 608
    ("sm_80", "vsa_bwd_dq", 128): (8, 2),  # 728; with 8 warps in one stage 24
    ("sm_90", "vsa_bwd_dq", 128): (8, 1),  # 48
    ("sm_90", "vsa_bwd_dkdv", 128): (8, 1),  # 6,404, and nothing with 3.8.0
    ("sm_100", "vsa_bwd_dkdv", 64): (16, 1),  # 4,144; with 8 warps 280
    ("sm_100", "vsa_bwd_dkdv", 128): (8, 1),  # 6,164
    ("sm_120", "vsa_bwd_dkdv", 128): (8, 1),  # 4,408; with 16 warps 60
    # 8 each; with 32 warps sm_80 and sm_120 spill 32 and 88
    ("sm_90", "vsa_select", 64): (32, 2),
    ("sm_90", "vsa_select", 128): (32, 2),
    ("sm_100", "vsa_select", 64): (32, 2),
    ("sm_100", "vsa_select", 128): (32, 2),
}
_FLOAT32 = {(3, 6): _SINCE_3_6, (3, 8): _SINCE_3_8}
_KERNELS = ("vsa_fwd", "vsa_bwd_dq", "vsa_bwd_dkdv")


def device_target(device: torch.device) -> str:
    """Return the target whose configurations a device takes.

    Raises ValueError for a GPU that none was made for. The meta device is the GPU that triton aims at: `warm`
    compiles for one that is not there.
    """
    if device.type == "cpu":
        return "sm_90"  # triton's interpreter: the code of Hopper
    target: Any = driver.active.get_current_target()  # its base class says None
    arch = target.arch
    if isinstance(arch, str):
        if arch in ("gfx942", "gfx950"):
            return arch
        raise ValueError(f"no kernels for {arch}; there are for gfx942 and gfx950")
    if arch in (80, 90):
        return f"sm_{arch}"
    if arch in (100, 103):
        return "sm_100"
    if arch in (86, 87, 89, 120, 121):
        return "sm_120"  # 99 KB of shared memory
    raise ValueError(f"no kernels for sm_{arch}; there are for sm_80 and newer")


def float32_row(version: str) -> Mapping[tuple[str, str, int], tuple[int, int]]:
    """Return the row of a triton such as "3.9.0": the newest that is not newer than it, else the oldest."""
    major, minor = map(int, version.split(".")[:2])
    return _FLOAT32[max((since for since in _FLOAT32 if since <= (major, minor)), default=min(_FLOAT32))]


def config(
    op: str, target: str, dtype: str, head_dim: int, version: str = triton.__version__
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (constexprs, options) of a kernel, as this version of triton compiles it."""
    options: dict[str, Any] = {"enable_fp_fusion": True}
    K = max(head_dim, 64)
    warps, stages = float32_row(version).get((target, op, K), _USUAL.get(op, (4, 2)))
    if op in _KERNELS and dtype != "fp32":
        warps, stages = _ATTENTION[target, K][_KERNELS.index(op)]
    options |= {"num_warps": warps, "num_stages": stages}
    if op not in _KERNELS:
        return {}, options
    if target.startswith("gfx"):
        options["matrix_instr_nonkdim"] = 16
    exact = {} if op == "vsa_fwd" else {"EXACT": dtype == "fp32"}
    if dtype == "fp32":
        # 16 rows a program: with 64, sm_90 spills 424 bytes forward and 21,904 backward
        return {"ROWS": 16, "USE_DESC": False, "PRECISION": "ieee", **exact}, options
    return {"ROWS": 64, "USE_DESC": target in ("sm_90", "sm_100"), "PRECISION": "ieee", **exact}, options


def uses_tensor_cores(target: str, dtype: str) -> bool:
    """Return whether a kernel must use tensor cores.

    Float32 products are exact: AMD has instructions for them, NVIDIA has not.
    """
    return dtype != "fp32" or target.startswith("gfx")


def has_async_copies(target: str, dtype: str) -> bool:
    """Return whether a kernel must copy asynchronously.

    In 16 bits: TMA on sm_90 and sm_100, cp.async on the others of NVIDIA.
    """
    return dtype != "fp32" and target.startswith("sm_")
