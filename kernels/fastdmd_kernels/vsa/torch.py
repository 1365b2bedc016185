"""Stages of video sparse attention on CPU and MPS: tokens are gathered, so memory and work scale with topk.

B batch, L tokens in tile order, N heads, K head dim, n tiles (nq of queries, nk of keys), w the most tokens
in a tile. All arithmetic is at least float32. A unit is a query tile of one head of one sample; units are
worked off in chunks.

Rows of q, k, v are kept per head with one zero row behind them, [B*N*L + 1, K]: slots that hold no token read
from it and write to it, so ragged tiles need no other path than whole ones.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastdmd_kernels.tiles import N_VALID_BITS

# what one chunk may hold in gathered keys and values, their gradients and scores; at least one unit. 8,192
# tokens, topk 16 of 128, K = 64, N = 2, one thread of an EPYC: forward + backward in 413, 364 and 441 ms with
# 1, 4 and 32 MiB
CHUNK_BYTES = 4 << 20

EMPTY = 1e30  # log-sum-exp of a slot without a token: the backward's exp2(score - EMPTY) is 0
LSE_SLOTS = 64  # at least that many slots in the log-sum-exp, as the GPU kernels have them


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def pool(x: Tensor, row_start: Tensor, n_valid: Tensor) -> Tensor:
    """Return the tile means of x [B, L, N, K], float32 [B, N, n, K].

    A tile without tokens has the mean 0.
    """
    n, w = len(n_valid), int(n_valid.max())
    acc = accumulate_dtype(x.dtype)
    if x.shape[1] == n * w:
        slots = x.unflatten(1, (n, w))
    else:
        slot = torch.arange(w, device=x.device)
        rows = (row_start[:, None] + slot).clamp_(max=x.shape[1] - 1)
        slots = x.index_select(1, rows.flatten()).unflatten(1, (n, w))
        slots = slots.masked_fill_((slot >= n_valid[:, None])[:, :, None, None], 0)
    sums = slots.sum(2, dtype=acc)  # [B, n, N, K]
    return (sums / n_valid.clamp(min=1)[:, None, None]).transpose(1, 2).contiguous()


def select(q_c: Tensor, k_c: Tensor, row_start_k: Tensor, n_valid_k: Tensor, topk: int) -> Tensor:
    """Choose the topk key tiles of each query tile by q_c k_c^T / sqrt(K), ties to the lowest index.

    q_c [B, N, nq, K], k_c [B, N, nk, K] -> int32 [B, N, nq, topk], ascending, (row_start << 7) | n_valid of
    the tile.
    """
    B, N, nq, K = q_c.shape
    nk = k_c.shape[2]
    words = (row_start_k << N_VALID_BITS) | n_valid_k
    lists = torch.empty(B * N, nq, topk, dtype=torch.int32, device=q_c.device)
    # 16 bytes: a score, and what sort makes of it, a value and an int64 index
    heads = max(1, CHUNK_BYTES // (nq * nk * 16))
    for i in range(0, B * N, heads):
        q_i, k_i = q_c.flatten(0, 1)[i : i + heads], k_c.flatten(0, 1)[i : i + heads]
        # not topk: it promises nothing about ties
        best = (q_i @ k_i.mT).mul_(K**-0.5).sort(dim=-1, descending=True, stable=True).indices[..., :topk]
        lists[i : i + heads] = words[best.sort(dim=-1).values]
    return lists.view(B, N, nq, topk)


def _head_rows(x: Tensor) -> Tensor:
    """Copy [B, L, N, K] to [B*N*L + 1, K] in float32 or float64, the last row zero."""
    B, L, N, K = x.shape
    rows = torch.empty(B * N * L + 1, K, dtype=accumulate_dtype(x.dtype), device=x.device)
    rows[:-1].view(B, N, L, K).copy_(x.transpose(1, 2))
    rows[-1] = 0
    return rows


def _from_head_rows(rows: Tensor, like: Tensor) -> Tensor:
    """Undo `_head_rows`: contiguous [B, L, N, K] in the dtype of `like`."""
    B, L, N, K = like.shape
    out = torch.empty(B, L, N, K, dtype=like.dtype, device=like.device)
    return out.copy_(rows[:-1].view(B, N, L, K).transpose(1, 2))


class _Chunk(NamedTuple):
    """Hold u units: their rows of q, and the rows of the keys that they see."""

    units: slice  # of the B * N * nq
    q_rows: Tensor  # int64 [u * w], B*N*Lq where there is no token
    k_rows: Tensor  # int64 [u * topk * w_k], B*N*Lk where there is no token
    pad: Tensor | None  # bool [u, 1, topk * w_k], True where there is no key; None: nowhere


def _chunks(
    lists: Tensor, row_start_q: Tensor, n_valid_q: Tensor, Lq: int, Lk: int, unit_bytes: int
) -> Iterator[_Chunk]:
    B, N, nq, _ = lists.shape
    slot_q = _slots(n_valid_q)
    slot_k, ragged_k = _key_slots(lists)
    step = max(1, CHUNK_BYTES // unit_bytes)
    for start in range(0, B * N * nq, step):
        units = slice(start, min(start + step, B * N * nq))
        unit = torch.arange(units.start, units.stop, device=lists.device)
        head, tile = unit // nq, unit % nq
        q_rows = (head * Lq + row_start_q[tile])[:, None] + slot_q
        q_rows.masked_fill_(slot_q >= n_valid_q[tile][:, None], B * N * Lq)
        word = lists.view(B * N * nq, -1)[units]
        k_rows = (head[:, None] * Lk + (word >> N_VALID_BITS))[..., None] + slot_k
        pad = None
        if ragged_k:
            pad = slot_k >= (word & (1 << N_VALID_BITS) - 1)[..., None]
            k_rows.masked_fill_(pad, B * N * Lk)
            pad = pad.flatten(1)[:, None]
        yield _Chunk(units, q_rows.flatten(), k_rows.flatten(), pad)


def _slots(n_valid: Tensor) -> Tensor:
    return torch.arange(max(1, int(n_valid.max())), device=n_valid.device)


def _key_slots(lists: Tensor) -> tuple[Tensor, bool]:
    """Return the slots of the fullest chosen key tile, and whether some hold no token."""
    n_valid = lists & (1 << N_VALID_BITS) - 1
    slots = _slots(n_valid)
    return slots, bool(n_valid.min() < len(slots))


def _scores(q: Tensor, k: Tensor, pad: Tensor | None) -> Tensor:
    """Return base-2 scores [u, w, keys] of q, which is scaled already; -inf where there is no key."""
    scores = q @ k.mT
    return scores if pad is None else scores.masked_fill_(pad, -math.inf)


def fine_fwd(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, row_start_q: Tensor, n_valid_q: Tensor
) -> tuple[Tensor, Tensor]:
    """Attend from each tile's queries to the keys of its list.

    q [B, Lq, N, K], k, v [B, Lk, N, K], any strides; lists int32 [B, N, nq, topk] -> out [B, Lq, N, K]
    contiguous, log-sum-exp [B, N, nq, max(64, w)], base 2, 1e30 in slots without a token.
    """
    B, Lq, N, K = q.shape
    Lk = k.shape[1]
    nq, topk = lists.shape[2:]
    q_h = _head_rows(q).mul_(K**-0.5 * math.log2(math.e))
    k_h, v_h = _head_rows(k), _head_rows(v)
    w, w_k = len(_slots(n_valid_q)), len(_key_slots(lists)[0])
    out = torch.empty_like(q_h)
    lse = torch.full((B * N * nq, max(LSE_SLOTS, w)), EMPTY, dtype=q_h.dtype, device=q.device)
    unit_bytes = q_h.element_size() * topk * w_k * (2 * K + w)
    for units, q_rows, k_rows, pad in _chunks(lists, row_start_q, n_valid_q, Lq, Lk, unit_bytes):
        u = units.stop - units.start
        q_u = q_h.index_select(0, q_rows).view(u, w, K)
        k_u, v_u = (x.index_select(0, k_rows).view(u, topk * w_k, K) for x in (k_h, v_h))
        p = _scores(q_u, k_u, pad)
        top = p.amax(-1, keepdim=True).clamp_(min=-EMPTY)  # finite when a row has no key
        total = p.sub_(top).exp2_().sum(-1, keepdim=True)  # at least 1, but 0 when a row has no key
        out.index_copy_(0, q_rows, ((p @ v_u) / total.clamp(min=1)).view(-1, K))
        filled = torch.where(total > 0, top + total.log2(), EMPTY)[..., 0]
        lse[units, :w] = filled.masked_fill_((q_rows == len(q_h) - 1).view(u, w), EMPTY)
    return _from_head_rows(out, q), lse.view(B, N, nq, -1)


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
    """Return the gradients (dq, dk, dv) of `fine_fwd`, contiguous.

    The gradients of keys are added unit by unit, in order.
    """
    B, Lq, N, K = q.shape
    Lk = k.shape[1]
    nq, topk = lists.shape[2:]
    scale = K**-0.5 * math.log2(math.e)
    q_h = _head_rows(q).mul_(scale)
    k_h, v_h, do_h = (_head_rows(x) for x in (k, v, dout))
    delta_h = (do_h * _head_rows(out)).sum(-1)
    dq = torch.empty_like(q_h)
    dk, dv = torch.zeros_like(k_h), torch.zeros_like(v_h)
    w, w_k = len(_slots(n_valid_q)), len(_key_slots(lists)[0])
    lse = lse.view(B * N * nq, -1, 1)
    unit_bytes = q_h.element_size() * topk * w_k * (4 * K + 2 * w)
    for units, q_rows, k_rows, pad in _chunks(lists, row_start_q, n_valid_q, Lq, Lk, unit_bytes):
        u = units.stop - units.start
        q_u, do_u = (x.index_select(0, q_rows).view(u, w, K) for x in (q_h, do_h))
        k_u, v_u = (x.index_select(0, k_rows).view(u, topk * w_k, K) for x in (k_h, v_h))
        p = _scores(q_u, k_u, pad).sub_(lse[units, :w]).exp2_()
        # rows sum to 1 but for the rounding of lse, which is large where scores are: put right in what p
        # multiplies
        total = p.sum(-1, keepdim=True)
        share = torch.where(total > 0, 1 / total, 0)
        do_u = do_u.mul_(share)
        delta_u = delta_h[q_rows].view(u, w, 1) * share
        dv.index_add_(0, k_rows, (p.mT @ do_u).view(-1, K))
        ds = (do_u @ v_u.mT).sub_(delta_u).mul_(p)
        dq.index_copy_(0, q_rows, (ds @ k_u).view(-1, K))
        dk.index_add_(0, k_rows, (ds.mT @ q_u).view(-1, K))
    # q carries scale * log2(e): dk has log2(e) too much, dq lacks the scale
    dq, dk = dq.mul_(K**-0.5), dk.mul_(math.log(2))
    return _from_head_rows(dq, q), _from_head_rows(dk, k), _from_head_rows(dv, v)
