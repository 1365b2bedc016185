"""Fine stage of video sparse attention, forward (VSA, arXiv 2505.13389).

B batch, L tokens in tile order, N heads, K head dim, nq query tiles of at most 64 rows; lists [B, N, nq,
topk] of packed key tiles (row_start << 7) | n_valid. One program per query tile and head, query tile fastest:
programs that run together sweep the keys of one head together, through L2.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# (a launch takes more than the kernel's own arguments, and its constexprs as plain values)

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdmd_kernels.aot_spec import DTYPES, HEAD_DIMS, Spec
from fastdmd_kernels.triton_config import POINTERS, config, device_target, has_async_copies, uses_tensor_cores
from fastdmd_kernels.vsa.triton_tokens import (
    BLOCK,
    NAMES,
    can_describe,
    check_tokens,
    describe,
    load_tile,
    store_tile,
    token_type,
)


@triton.jit
def _vsa_fwd(
    q,  # descriptors or pointers
    k,
    v,
    out_ptr,
    lse_ptr,
    lists_ptr,
    row_start_ptr,
    n_valid_ptr,
    s_qb,
    s_ql,
    s_qn,
    s_kb,
    s_kl,
    s_kn,
    s_vb,
    s_vl,
    s_vn,
    Lq,
    Lk,
    topk,
    scale,  # log2(e) / sqrt(K)
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,  # of a query tile, per program
    K: tl.constexpr,
    USE_DESC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    h, b = tl.program_id(1), tl.program_id(2)
    nq, N = tl.num_programs(0) // (BLOCK // ROWS), tl.num_programs(1)
    tile = tl.program_id(0) // (BLOCK // ROWS)
    part = tl.program_id(0) % (BLOCK // ROWS) * ROWS
    row, n_valid = tl.load(row_start_ptr + tile) + part, tl.load(n_valid_ptr + tile) - part
    o_m, o_n = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    o_list = (b * N + h).to(tl.int64) * nq + tile

    b_q = load_tile(q, s_qb, s_ql, s_qn, b, h, row, Lq, ROWS, K, USE_DESC)
    m = tl.full([ROWS], -1e30, tl.float32)  # finite: no inf - inf when a tile has no keys
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, K], tl.float32)

    list_ptr = lists_ptr + o_list * topk
    entry = tl.load(list_ptr)
    for j in tl.range(0, topk):
        row_k, n_k = entry >> 7, entry & 127
        b_k = load_tile(k, s_kb, s_kl, s_kn, b, h, row_k, Lk, BLOCK, K, USE_DESC)
        b_v = load_tile(v, s_vb, s_vl, s_vn, b, h, row_k, Lk, BLOCK, K, USE_DESC)
        # carried one iteration ahead: loaded where it is used, it takes a pipeline stage from K and V
        entry = tl.load(list_ptr + tl.minimum(j + 1, topk - 1))
        # the mask is the accumulator's start: fewer registers than a select on the scores
        bias = tl.where(o_n < n_k, 0.0, -1e30)[None, :]
        s = tl.dot(b_q, b_k.T, acc=tl.broadcast_to(bias, [ROWS, BLOCK]), input_precision=PRECISION)
        m_new = tl.maximum(m, tl.max(s, 1) * scale)
        p = tl.math.exp2(s * scale - m_new[:, None])
        alpha = tl.math.exp2(m - m_new)
        total = total * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(b_v.dtype), b_v, acc * alpha[:, None], input_precision=PRECISION)
        m = m_new

    some = m > -1e28  # no key at all: zeros
    out = tl.where(some[:, None], acc / total[:, None], 0.0)
    store_tile(out_ptr, out, b, h, row, n_valid, Lq, N, ROWS, K)
    # 1e30 makes the backward's exp2(s - lse) zero: in pad slots, so that it needs no mask, and in empty rows
    lse = tl.where(some & (o_m < n_valid), m + tl.math.log2(total), 1e30)
    tl.store(lse_ptr + o_list * BLOCK + part + o_m, lse)


def fine_fwd(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, row_start_q: Tensor, n_valid_q: Tensor
) -> tuple[Tensor, Tensor]:
    """Attend from the queries to the keys of their lists.

    Returns (out [B, Lq, N, K], lse float32 [B, N, nq, 64] to base 2, 1e30 in pad slots).
    """
    check_tokens(q=q, k=k, v=v)
    B, L, N, K = q.shape
    if k.shape != v.shape or (k.shape[0], *k.shape[2:]) != (B, N, K) or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q {list(q.shape)} {q.dtype}, k {list(k.shape)} {k.dtype}, v {list(v.shape)} {v.dtype}"
        )
    nq, topk = lists.shape[2:]
    out = torch.empty(B, L, N, K, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, N, nq, BLOCK, dtype=torch.float32, device=q.device)
    target = device_target(q.device) if all(map(can_describe, (q, k, v))) else POINTERS
    constexprs, options = config("vsa_fwd", target, NAMES[q.dtype], K)
    tokens = [describe(x) if constexprs["USE_DESC"] else x for x in (q, k, v)]
    strides = [s for x in (q, k, v) for s in x.stride()[:3]]
    _vsa_fwd[(nq * BLOCK // constexprs["ROWS"], N, B)](
        *tokens,
        out,
        lse,
        lists,
        row_start_q,
        n_valid_q,
        *strides,
        L,
        k.shape[1],
        topk,
        1.4426950408889634 * K**-0.5,
        BLOCK=BLOCK,
        K=K,
        **constexprs,
        **options,
    )
    return out, lse


def specs(target: str) -> Iterator[Spec]:
    for dtype in DTYPES:
        for K in HEAD_DIMS:
            constexprs, options = config("vsa_fwd", target, dtype, K)
            types = {name: token_type(dtype, K, constexprs["USE_DESC"]) for name in "qkv"}
            types |= {"out_ptr": f"*{dtype}", "lse_ptr": "*fp32", "scale": "fp32"}
            types |= dict.fromkeys(("lists_ptr", "row_start_ptr", "n_valid_ptr"), "*i32")
            types |= dict.fromkeys(("Lq", "Lk", "topk"), "i32") | {
                f"s_{x}{dim}": "i32" for x in "qkv" for dim in "bln"
            }
            yield Spec(
                op="vsa_fwd",
                kernel=_vsa_fwd,
                dtype=dtype,
                head_dim=K,
                signature={name: types.get(name, "constexpr") for name in _vsa_fwd.arg_names},
                constexprs={"BLOCK": BLOCK, "K": K, **constexprs},
                options=options,
                tensor_cores=uses_tensor_cores(target, dtype),
                async_copies=has_async_copies(target, dtype),
                unaligned=("Lq", "Lk", "topk"),
            )
