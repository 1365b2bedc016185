"""Which key tiles each query tile attends to: the topk largest scores of tile means (VSA, arXiv 2505.13389).

B batch, N heads, K head dim, nq query tiles, nk key tiles. Scores and top-k in one kernel, the scores of a
few rows in registers: at 1,800 tiles and 40 heads a float32 map would be 518 MB. Products in float32, in one
order whatever the size: one tile flipped by bfloat16 scores moved an output by 20 %.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# (a launch takes more than the kernel's own arguments, and its constexprs as plain values)

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdmd_kernels.aot_spec import HEAD_DIMS, Spec
from fastdmd_kernels.triton_config import config, device_target

ROW_ELEMENTS = 8192  # scores of one program, 16 registers a thread; twice that spills on sm_80 and gfx942
MAX_TILES = 16384  # two counts share an int32 below


@triton.jit
def _vsa_select(
    q_ptr,  # [B, N, nq, K]
    k_ptr,  # [B, N, K, nk]: a row of it is one load
    row_start_ptr,
    n_valid_ptr,
    lists_ptr,
    nq,
    nk,
    topk,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    o_head = tl.program_id(1).to(tl.int64)
    o_q = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_k = tl.arange(0, TILES)
    m_q, m_k = o_q < nq, o_k < nk

    scores = tl.zeros([ROWS, TILES], tl.float32)
    q_ptrs = q_ptr + (o_head * nq + o_q) * K
    k_ptrs = k_ptr + o_head * K * nk + o_k
    for i in range(K):
        b_q = tl.load(q_ptrs + i, mask=m_q, other=0.0)
        b_k = tl.load(k_ptrs + i * nk, mask=m_k, other=0.0)
        scores += b_q[:, None] * b_k[None, :]

    # floats as integers of the same order; -0 as +0, and the smallest integer left to the padding
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    keys = tl.maximum(bits ^ ((bits >> 31) & 0x7FFFFFFF), -0x7FFFFFFF)
    keys = tl.where(m_k[None, :], keys, -0x7FFFFFFF - 1)

    # The topk-th largest key, bit by bit from the sign. Unrolled: triton 3.6 counts twice in a loop, the
    # second time with a row in each thread (sm_90: 28,488 bytes of spills).
    above = tl.sum((keys >= 0).to(tl.int32), 1, keep_dims=True)
    least = tl.where(above >= topk, 0, -0x7FFFFFFF - 1)
    for i in tl.static_range(31):
        bound = least + (1 << (30 - i))
        above = tl.sum((keys >= bound).to(tl.int32), 1, keep_dims=True)
        least = tl.where(above >= topk, bound, least)

    # all keys above it, then its equals from the lowest tile on; one scan counts both
    more, equal = keys > least, keys == least
    need = topk - tl.sum(more.to(tl.int32), 1, keep_dims=True)
    seen = tl.cumsum(more.to(tl.int32) + (equal.to(tl.int32) << 16), 1)
    n_more, n_equal = seen & 0xFFFF, seen >> 16
    chosen = more | (equal & (n_equal <= need))
    place = n_more + tl.minimum(n_equal, need) - 1
    row_start = tl.load(row_start_ptr + o_k, mask=m_k, other=0)
    n_valid = tl.load(n_valid_ptr + o_k, mask=m_k, other=0)
    words = tl.broadcast_to(((row_start << 7) | n_valid)[None, :], [ROWS, TILES])
    o_list = (o_head * nq + o_q) * topk
    tl.store(lists_ptr + o_list[:, None] + place, words, mask=chosen & m_q[:, None] & m_k[None, :])


def _rows(tiles: int) -> int:
    """Return the number of query tiles of one program."""
    return min(4, max(1, ROW_ELEMENTS // tiles))


def select(q_c: Tensor, k_c: Tensor, row_start_k: Tensor, n_valid_k: Tensor, topk: int) -> Tensor:
    """Choose the topk largest scores of each query tile, equal ones from the lowest tile on.

    q_c [B, N, nq, K], k_c [B, N, nk, K] float32 -> int32 [B, N, nq, topk] of (row_start << 7) | n_valid,
    ascending.
    """
    B, N, nq, K = q_c.shape
    nk = k_c.shape[2]
    if (*k_c.shape[:2], k_c.shape[3]) != (B, N, K) or not q_c.dtype == k_c.dtype == torch.float32:
        raise ValueError(f"q_c {list(q_c.shape)} {q_c.dtype}, k_c {list(k_c.shape)} {k_c.dtype}")
    if not 1 <= topk <= nk <= MAX_TILES:
        raise ValueError(f"topk = {topk} of {nk} tiles; want 1 <= topk <= tiles <= {MAX_TILES}")
    tiles = max(triton.next_power_of_2(nk), 32)
    lists = torch.empty(B, N, nq, topk, dtype=torch.int32, device=q_c.device)
    _, options = config("vsa_select", device_target(q_c.device), "fp32", K)
    rows = _rows(tiles)
    _vsa_select[(triton.cdiv(nq, rows), B * N)](
        q_c.contiguous(),
        k_c.transpose(2, 3).contiguous(),
        row_start_k,
        n_valid_k,
        lists,
        nq,
        nk,
        topk,
        K=K,
        ROWS=rows,
        TILES=tiles,
        **options,
    )
    return lists


def specs(target: str) -> Iterator[Spec]:
    """Yield the variants for 1,025 to 2,048 key tiles, as at 720p.

    It is the widest that a run is likely to need.
    """
    signature = dict.fromkeys(("q_ptr", "k_ptr"), "*fp32")
    signature |= dict.fromkeys(("row_start_ptr", "n_valid_ptr", "lists_ptr"), "*i32")
    signature |= {"nq": "i32", "nk": "i32", "topk": "i32"}
    signature |= dict.fromkeys(("K", "ROWS", "TILES"), "constexpr")
    for K in HEAD_DIMS:
        _, options = config("vsa_select", target, "fp32", K)
        yield Spec(
            op="vsa_select",
            kernel=_vsa_select,
            dtype="fp32",
            head_dim=K,
            signature=signature,
            constexprs={"K": K, "ROWS": _rows(2048), "TILES": 2048},
            options=options,
            tensor_cores=False,
            async_copies=False,
            unaligned=("nq", "nk", "topk"),
        )
