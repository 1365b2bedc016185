"""Means of the tiles, for the coarse stage of video sparse attention (VSA, arXiv 2505.13389).

B batch, L tokens in tile order, N heads, K head dim, n tiles. Bound by memory: it reads x once. Heads are the
fastest axis of the grid, since they are neighbours in memory.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# (a launch takes more than the kernel's own arguments, and its constexprs as plain values)

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdmd_kernels.aot_spec import DTYPES, HEAD_DIMS, Spec
from fastdmd_kernels.triton_config import config, device_target
from fastdmd_kernels.vsa.triton_tokens import BLOCK, NAMES, check_tokens, load_tile


@triton.jit
def _vsa_pool(
    x_ptr, mean_ptr, row_start_ptr, n_valid_ptr, s_b, s_l, s_n, BLOCK: tl.constexpr, K: tl.constexpr
):
    h, tile, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    N, n = tl.num_programs(0), tl.num_programs(1)
    row, n_valid = tl.load(row_start_ptr + tile), tl.load(n_valid_ptr + tile)
    b_x = load_tile(x_ptr, s_b, s_l, s_n, b, h, row, row + n_valid, BLOCK, K, False).to(tl.float32)
    mean = tl.sum(b_x, 0) / tl.maximum(n_valid, 1).to(tl.float32)
    o_mean = ((b * N + h).to(tl.int64) * n + tile) * K
    tl.store(mean_ptr + o_mean + tl.arange(0, K), mean)


def pool(x: Tensor, row_start: Tensor, n_valid: Tensor) -> Tensor:
    """Return the mean of each tile's valid rows, x [B, L, N, K] -> float32 [B, N, n, K].

    A tile without rows has the mean 0.
    """
    check_tokens(x=x)
    B, _, N, K = x.shape
    n = row_start.shape[0]
    mean = torch.empty(B, N, n, K, dtype=torch.float32, device=x.device)
    _, options = config("vsa_pool", device_target(x.device), NAMES[x.dtype], K)
    _vsa_pool[(N, n, B)](x, mean, row_start, n_valid, *x.stride()[:3], BLOCK=BLOCK, K=K, **options)
    return mean


def specs(target: str) -> Iterator[Spec]:
    for dtype in DTYPES:
        for K in HEAD_DIMS:
            _, options = config("vsa_pool", target, dtype, K)
            signature = {
                "x_ptr": f"*{dtype}",
                "mean_ptr": "*fp32",
                "row_start_ptr": "*i32",
                "n_valid_ptr": "*i32",
            }
            signature |= {"s_b": "i64", "s_l": "i32", "s_n": "i32", "BLOCK": "constexpr", "K": "constexpr"}
            yield Spec(
                op="vsa_pool",
                kernel=_vsa_pool,
                dtype=dtype,
                head_dim=K,
                signature=signature,
                constexprs={"BLOCK": BLOCK, "K": K},
                options=options,
                tensor_cores=False,
                async_copies=False,
            )
