"""Which query tiles chose each key tile: the lists of `vsa_select` inverted, for dk and dv.

B batch, N heads, nq query tiles, nk key tiles. One bit per pair (1/32 of an int32 map) and one count per key
tile, by integer atomics: or and add give the same whatever their order. Then each key tile writes the
positions of its bits.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# (a launch takes more than the kernel's own arguments, and its constexprs as plain values)

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdmd_kernels.aot_spec import Spec
from fastdmd_kernels.triton_config import config, device_target

LIST_BLOCK = 128  # entries of a list at a time


@triton.jit
def _vsa_mark(
    lists_ptr,
    row_start_ptr,
    bits_ptr,
    counts_ptr,
    nk,
    words,
    topk,
    STEPS: tl.constexpr,
    LIST_BLOCK: tl.constexpr,
):
    """Set bit `tile` of each key tile in a query tile's list, and count it at counts[key tile + 1]."""
    tile, o_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    nq = tl.num_programs(0)
    list_ptr = lists_ptr + (o_head * nq + tile) * topk
    for start in range(0, topk, LIST_BLOCK):
        o_j = start + tl.arange(0, LIST_BLOCK)
        entry = tl.load(list_ptr + o_j, mask=o_j < topk, other=0)
        # how many key tiles start at or before the entry's row: the last of them is the one
        row = entry >> 7
        low = tl.zeros([LIST_BLOCK], tl.int32)
        high = low + nk
        for _ in range(STEPS):
            middle = (low + high) // 2
            m_open = low < high
            right = tl.load(row_start_ptr + middle, mask=m_open, other=0) <= row
            low = tl.where(m_open & right, middle + 1, low)
            high = tl.where(m_open & (right == 0), middle, high)
        # a tile without rows has no gradient, and shares its start with the next
        m_j = (o_j < topk) & ((entry & 127) > 0)
        o_k = o_head * nk + low - 1
        bit = tl.zeros([LIST_BLOCK], tl.int32) + (1 << (tile % 32))
        tl.atomic_or(bits_ptr + o_k * words + tile // 32, bit, mask=m_j, sem="relaxed")
        one = tl.zeros([LIST_BLOCK], tl.int32) + 1
        tl.atomic_add(counts_ptr + o_head * (nk + 1) + low, one, mask=m_j, sem="relaxed")


@triton.jit
def _vsa_fill(bits_ptr, offsets_ptr, entries_ptr, words, capacity, WORDS: tl.constexpr):
    """Write the set bits of one key tile, ascending, from its offset on."""
    tile, o_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    nk = tl.num_programs(0)
    o_q = tl.arange(0, WORDS * 32)
    word = tl.load(bits_ptr + (o_head * nk + tile) * words + o_q // 32, mask=o_q // 32 < words, other=0)
    chosen = (word >> (o_q % 32)) & 1
    place = tl.load(offsets_ptr + o_head * (nk + 1) + tile) + tl.cumsum(chosen, 0) - 1
    tl.store(entries_ptr + o_head * capacity + place, o_q, mask=chosen == 1)


def invert(lists: Tensor, row_start_k: Tensor, nq: int) -> tuple[Tensor, Tensor]:
    """Return (offsets int32 [B, N, nk + 1], entries int32 [B, N, nq * topk]).

    Key tile i was chosen by the query tiles entries[offsets[i] : offsets[i + 1]], ascending. `row_start_k`
    ascends. Tiles without rows get no entries, so that the end of `entries` may be unused, then 0.
    """
    B, N, _, topk = lists.shape
    if lists.shape[2] != nq:
        raise ValueError(f"lists {list(lists.shape)} for {nq} query tiles")
    nk = row_start_k.shape[0]
    words = triton.cdiv(nq, 32)
    bits = torch.zeros(B, N, nk, words, dtype=torch.int32, device=lists.device)
    counts = torch.zeros(B, N, nk + 1, dtype=torch.int32, device=lists.device)
    entries = torch.zeros(B, N, nq * topk, dtype=torch.int32, device=lists.device)
    _, options = config("vsa_invert", device_target(lists.device), "fp32", 64)
    _vsa_mark[(nq, B * N)](
        lists,
        row_start_k,
        bits,
        counts,
        nk,
        words,
        topk,
        STEPS=nk.bit_length(),
        LIST_BLOCK=LIST_BLOCK,
        **options,
    )
    offsets = counts.cumsum(-1, dtype=torch.int32)
    _vsa_fill[(nk, B * N)](
        bits, offsets, entries, words, nq * topk, WORDS=triton.next_power_of_2(words), **options
    )
    return offsets, entries


def specs(target: str) -> Iterator[Spec]:
    """Yield the variants for 1,025 to 2,047 tiles, as at 720p."""
    _, options = config("vsa_invert", target, "fp32", 64)
    pointers = ("lists_ptr", "row_start_ptr", "bits_ptr", "counts_ptr", "offsets_ptr", "entries_ptr")
    types = dict.fromkeys(pointers, "*i32") | dict.fromkeys(("nk", "words", "topk", "capacity"), "i32")
    for kernel, constexprs in (
        (_vsa_mark, {"STEPS": 11, "LIST_BLOCK": LIST_BLOCK}),
        (_vsa_fill, {"WORDS": 64}),
    ):
        yield Spec(
            op="vsa_invert",
            kernel=kernel,
            dtype="fp32",
            head_dim=0,
            signature={name: types.get(name, "constexpr") for name in kernel.arg_names},
            constexprs=constexprs,
            options=options,
            tensor_cores=False,
            async_copies=False,
            unaligned=("nk", "words", "topk", "capacity"),
        )
