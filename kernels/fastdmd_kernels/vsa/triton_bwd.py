"""Fine stage of video sparse attention, backward (VSA, arXiv 2505.13389).

B batch, L tokens in tile order, N heads, K head dim, nq query tiles, nk key tiles. Two kernels and no
atomics, so that two runs agree bit for bit: dq walks each query tile's list and first writes delta =
rowsum(dO * O); dk and dv walk the inverse lists. Seven products instead of five, but the fused kernel spills
at one CTA per SM and its sums have no order.
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
from fastdmd_kernels.vsa.triton_invert import invert
from fastdmd_kernels.vsa.triton_tokens import (
    BLOCK,
    NAMES,
    can_describe,
    check_tokens,
    describe,
    describe_stat,
    load_stat,
    load_tile,
    store_tile,
    tile_ptrs,
    token_type,
)


@triton.jit
def _vsa_bwd_dq(
    do,  # descriptors or pointers
    q,
    k,
    v,
    out_ptr,
    lse_ptr,
    delta_ptr,
    share_ptr,
    dq_ptr,
    lists_ptr,
    row_start_ptr,
    n_valid_ptr,
    s_ob,
    s_ol,
    s_on,
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
    scale,  # 1 / sqrt(K)
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,  # of a query tile, per program
    K: tl.constexpr,
    USE_DESC: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):
    h, b = tl.program_id(1), tl.program_id(2)
    nq, N = tl.num_programs(0) // (BLOCK // ROWS), tl.num_programs(1)
    tile = tl.program_id(0) // (BLOCK // ROWS)
    part = tl.program_id(0) % (BLOCK // ROWS) * ROWS
    row, n_valid = tl.load(row_start_ptr + tile) + part, tl.load(n_valid_ptr + tile) - part
    o_m, o_n = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    o_list = (b * N + h).to(tl.int64) * nq + tile

    b_do = load_tile(do, s_ob, s_ol, s_on, b, h, row, Lq, ROWS, K, USE_DESC)
    b_out = tl.load(tile_ptrs(out_ptr, b, h, row, Lq, N, ROWS, K), mask=(o_m < n_valid)[:, None], other=0.0)
    delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), 1)
    delta = tl.where(o_m < n_valid, delta, 0.0)
    tl.store(delta_ptr + o_list * BLOCK + part + o_m, delta)
    # Read back: otherwise the sum is laid out as the loop wants it, whole rows in a thread's registers
    # (float32 on sm_90: 3,336 bytes of spills, and none so).
    tl.debug_barrier()
    delta = tl.load(delta_ptr + o_list * BLOCK + part + o_m)

    b_q = load_tile(q, s_qb, s_ql, s_qn, b, h, row, Lq, ROWS, K, USE_DESC)
    lse = tl.load(lse_ptr + o_list * BLOCK + part + o_m)
    b_dq = tl.zeros([ROWS, K], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    list_ptr = lists_ptr + o_list * topk
    entry = tl.load(list_ptr)
    for j in tl.range(0, topk):
        row_k, n_k = entry >> 7, entry & 127
        b_k = load_tile(k, s_kb, s_kl, s_kn, b, h, row_k, Lk, BLOCK, K, USE_DESC)
        b_v = load_tile(v, s_vb, s_vl, s_vn, b, h, row_k, Lk, BLOCK, K, USE_DESC)
        entry = tl.load(list_ptr + tl.minimum(j + 1, topk - 1))
        bias = tl.where(o_n < n_k, 0.0, -1e30)[None, :]
        s = tl.dot(b_q, b_k.T, acc=tl.broadcast_to(bias, [ROWS, BLOCK]), input_precision=PRECISION)
        dp = tl.dot(b_do, b_v.T, input_precision=PRECISION)
        p = tl.math.exp2(s * (scale * 1.4426950408889634) - lse[:, None])
        if EXACT:
            total += tl.sum(p, 1)
        ds = p * (dp - delta[:, None])
        b_dq = tl.dot(ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    if EXACT:
        # Rows sum to 1 but for the rounding of lse, which is that of the scores: at input scale 4 it is most
        # of the error of dv. 16 bits round p itself by far more.
        share = tl.where(total > 0, 1 / tl.maximum(total, 1e-30), 0.0)
        tl.store(share_ptr + o_list * BLOCK + part + o_m, share)
        b_dq = b_dq * share[:, None]
    store_tile(dq_ptr, b_dq * scale, b, h, row, n_valid, Lq, N, ROWS, K)


@triton.jit
def _vsa_bwd_dkdv(
    do,  # descriptors or pointers
    q,
    k,
    v,
    lse,  # descriptors or pointers, as the four above
    delta,
    share_ptr,
    dk_ptr,
    dv_ptr,
    order_ptr,
    offsets_ptr,
    entries_ptr,
    entry_rows_ptr,
    row_start_ptr,
    n_valid_ptr,
    s_ob,
    s_ol,
    s_on,
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
    nq,
    capacity,
    scale,  # 1 / sqrt(K)
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,  # of a key tile, per program
    K: tl.constexpr,
    USE_DESC: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):
    h, b = tl.program_id(1), tl.program_id(2)
    nk, N = tl.num_programs(0) // (BLOCK // ROWS), tl.num_programs(1)
    o_head = (b * N + h).to(tl.int64)
    # longest first: list lengths differ by a lot, and a long one that starts last is waited for
    tile = tl.load(order_ptr + o_head * nk + tl.program_id(0) // (BLOCK // ROWS))
    part = tl.program_id(0) % (BLOCK // ROWS) * ROWS
    row, n_valid = tl.load(row_start_ptr + tile) + part, tl.load(n_valid_ptr + tile) - part
    first = tl.load(offsets_ptr + o_head * (nk + 1) + tile)
    count = tl.load(offsets_ptr + o_head * (nk + 1) + tile + 1) - first
    last = tl.maximum(count - 1, 0)

    b_k = load_tile(k, s_kb, s_kl, s_kn, b, h, row, Lk, ROWS, K, USE_DESC)
    b_v = load_tile(v, s_vb, s_vl, s_vn, b, h, row, Lk, ROWS, K, USE_DESC)
    b_dk = tl.zeros([ROWS, K], tl.float32)
    b_dv = tl.zeros([ROWS, K], tl.float32)

    list_ptr = entries_ptr + o_head * capacity + first
    list_row_ptr = entry_rows_ptr + o_head * capacity + first
    tile_q = tl.load(list_ptr, mask=count > 0, other=0)
    row_q = tl.load(list_row_ptr, mask=count > 0, other=0)
    for j in tl.range(0, count):
        b_q = load_tile(q, s_qb, s_ql, s_qn, b, h, row_q, Lq, BLOCK, K, USE_DESC)
        b_do = load_tile(do, s_ob, s_ol, s_on, b, h, row_q, Lq, BLOCK, K, USE_DESC)
        b_lse = load_stat(lse, o_head * nq + tile_q, BLOCK, USE_DESC)
        b_delta = load_stat(delta, o_head * nq + tile_q, BLOCK, USE_DESC)
        if EXACT:
            b_share = load_stat(share_ptr, o_head * nq + tile_q, BLOCK, False)
        # both one iteration ahead; a row looked up by its tile here ends the pipelining (sm_90: 64 KB, one
        # buffer)
        tile_q = tl.load(list_ptr + tl.minimum(j + 1, last))
        row_q = tl.load(list_row_ptr + tl.minimum(j + 1, last))
        # No masks: in the columns of pad queries p is 0 by lse = 1e30, the rows of pad keys are not stored.
        # This order of products, dp after dv, spills least.
        s = tl.dot(b_k, b_q.T, input_precision=PRECISION)
        p = tl.math.exp2(s * (scale * 1.4426950408889634) - b_lse[None, :])
        if EXACT:
            p = p * b_share[None, :]
        b_dv = tl.dot(p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
        dp = tl.dot(b_v, b_do.T, input_precision=PRECISION)
        ds = p * (dp - b_delta[None, :])
        b_dk = tl.dot(ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    store_tile(dk_ptr, b_dk * scale, b, h, row, n_valid, Lk, N, ROWS, K)
    store_tile(dv_ptr, b_dv, b, h, row, n_valid, Lk, N, ROWS, K)


def fine_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lists: Tensor,
    row_start_q: Tensor,
    n_valid_q: Tensor,
    row_start_k: Tensor,
    n_valid_k: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv) of `fine_fwd`, from its `out` and `lse`.

    They are contiguous, in the dtype of q.
    """
    if dout.stride(-1) != 1:  # an expanded scalar, as of out.sum()
        dout = dout.contiguous()
    check_tokens(dout=dout, q=q, k=k, v=v, out=out)
    if dout.shape != q.shape or dout.dtype != q.dtype or out.shape != q.shape or not out.is_contiguous():
        raise ValueError(
            f"dout {list(dout.shape)} {dout.dtype}, out {list(out.shape)}, q {list(q.shape)} {q.dtype}"
        )
    tokens = (dout, q, k, v)
    dq, delta, share = _queries(tokens, out, lse, lists, row_start_q, n_valid_q)
    offsets, entries = invert(lists, row_start_k, len(row_start_q))
    inverse = (offsets, entries, row_start_q.index_select(0, entries.flatten()))
    dk, dv = _keys(tokens, (lse, delta, share), inverse, row_start_k, n_valid_k)
    return dq, dk, dv


def _target(tokens: tuple[Tensor, ...]) -> str:
    return device_target(tokens[0].device) if all(map(can_describe, tokens)) else POINTERS


def _strides(tokens: tuple[Tensor, ...]) -> list[int]:
    return [s for x in tokens for s in x.stride()[:3]]


def _queries(
    tokens: tuple[Tensor, Tensor, Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    lists: Tensor,
    row_start: Tensor,
    n_valid: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, delta, share) for tokens (dout, q, k, v); share is unused memory where p is not EXACT."""
    _, q, k, _ = tokens
    B, L, N, K = q.shape
    nq, topk = lists.shape[2:]
    delta = torch.empty_like(lse)
    dq = torch.empty(B, L, N, K, dtype=q.dtype, device=q.device)
    constexprs, options = config("vsa_bwd_dq", _target(tokens), NAMES[q.dtype], K)
    share = torch.empty_like(lse) if constexprs["EXACT"] else delta
    _vsa_bwd_dq[(nq * BLOCK // constexprs["ROWS"], N, B)](
        *(describe(x) if constexprs["USE_DESC"] else x for x in tokens),
        out,
        lse,
        delta,
        share,
        dq,
        lists,
        row_start,
        n_valid,
        *_strides(tokens),
        L,
        k.shape[1],
        topk,
        K**-0.5,
        BLOCK=BLOCK,
        K=K,
        **constexprs,
        **options,
    )
    return dq, delta, share


def _keys(
    tokens: tuple[Tensor, Tensor, Tensor, Tensor],
    statistics: tuple[Tensor, Tensor, Tensor],
    inverse: tuple[Tensor, Tensor, Tensor],
    row_start: Tensor,
    n_valid: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return (dk, dv) for tokens (dout, q, k, v), statistics (lse, delta, share) and the inverse lists.

    The inverse lists are offsets, entries and the first row of each entry.
    """
    _, q, k, _ = tokens
    lse, delta, share = statistics
    offsets, entries, entry_rows = inverse
    B, L, N, K = k.shape
    dk = torch.empty(B, L, N, K, dtype=q.dtype, device=q.device)
    dv = torch.empty(B, L, N, K, dtype=q.dtype, device=q.device)
    order = offsets.diff().argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    constexprs, options = config("vsa_bwd_dkdv", _target(tokens), NAMES[q.dtype], K)
    _vsa_bwd_dkdv[(len(row_start) * BLOCK // constexprs["ROWS"], N, B)](
        *(describe(x) if constexprs["USE_DESC"] else x for x in tokens),
        *(describe_stat(x) if constexprs["USE_DESC"] else x for x in (lse, delta)),
        share,
        dk,
        dv,
        order,
        offsets,
        entries,
        entry_rows,
        row_start,
        n_valid,
        *_strides(tokens),
        q.shape[1],
        L,
        lse.shape[2],
        entries.shape[2],
        K**-0.5,
        BLOCK=BLOCK,
        K=K,
        **constexprs,
        **options,
    )
    return dk, dv


def specs(target: str) -> Iterator[Spec]:
    pointers = (
        "order_ptr",
        "offsets_ptr",
        "entries_ptr",
        "lists_ptr",
        "row_start_ptr",
        "n_valid_ptr",
        "entry_rows_ptr",
    )
    for dtype in DTYPES:
        for K in HEAD_DIMS:
            for op, kernel in (("vsa_bwd_dq", _vsa_bwd_dq), ("vsa_bwd_dkdv", _vsa_bwd_dkdv)):
                constexprs, options = config(op, target, dtype, K)
                desc = constexprs["USE_DESC"]
                types = dict.fromkeys(pointers, "*i32") | dict.fromkeys(
                    ("Lq", "Lk", "nq", "topk", "capacity"), "i32"
                )
                types |= dict.fromkeys(("lse_ptr", "delta_ptr", "share_ptr"), "*fp32") | {"scale": "fp32"}
                types |= dict.fromkeys(("out_ptr", "dq_ptr", "dk_ptr", "dv_ptr"), f"*{dtype}")
                types |= {name: token_type(dtype, K, desc) for name in ("do", "q", "k", "v")}
                types |= dict.fromkeys(("lse", "delta"), f"tensordesc<fp32[1,{BLOCK}]>" if desc else "*fp32")
                types |= {f"s_{x}{dim}": "i32" for x in "oqkv" for dim in "bln"}
                yield Spec(
                    op=op,
                    kernel=kernel,
                    dtype=dtype,
                    head_dim=K,
                    signature={name: types.get(name, "constexpr") for name in kernel.arg_names},
                    constexprs={"BLOCK": BLOCK, "K": K, **constexprs},
                    options=options,
                    tensor_cores=uses_tensor_cores(target, dtype),
                    async_copies=has_async_copies(target, dtype),
                    unaligned=("Lq", "Lk", "nq", "topk", "capacity"),
                )
