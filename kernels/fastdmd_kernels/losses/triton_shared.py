"""What dmd_loss and sid_loss share: how a program reads its inputs, and how a launcher passes them.

B samples of n elements, each sample contiguous in memory, whatever the strides between samples.

Forward is the one reduction pass: per chunk the sums of |x0_g - x0_real| and of what the loss is made of,
with guidance and x0 conversion folded in. The normaliser is one number per sample, so the loss needs no
second pass. Backward is the one write pass. In element passes, guidance on: DMD 5 read, then 3 read and 1
written = 9; a gradient made in forward and scaled in backward is 10, and holds memory in between. SiD 5 read,
then 5 read and 5 written = 15; the other way 24. No atomics: every sum is taken in one fixed order, that of a
sample alone whatever the batch.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdmd_kernels.aot_spec import DTYPES, Spec

Scalar = Tensor | float

BLOCK = 1024  # elements that a program holds at once: 8 a thread, 16-byte loads of bfloat16
CHUNKS = 1024  # of a sample, at most: one program sums their partials in one load
OPTIONS: dict[str, Any] = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
PASS: dict[str, Any] = {"BLOCK": BLOCK, **OPTIONS}  # of a kernel over the elements
FINISH: dict[str, Any] = {"CHUNKS": CHUNKS, **OPTIONS}  # of one over the partial sums
# that no variant is compiled for: not because one of them is 1, or divisible by 16
COUNTS = ("s_a", "s_b", "s_w", "m_b", "m_0", "m_1", "m_2", "mid", "inner", "B", "chunks", "iters", "blocks")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def load(x_ptr, s_b, b, o, n):
    """Load elements o of sample b in float32, zero past n."""
    return tl.load(x_ptr + b * s_b + o, mask=o < n, other=0.0).to(tl.float32)


@triton.jit
def load_scalar(x_ptr, s_b, value, b):
    """Return a per-sample scalar: from memory, or the number."""
    if x_ptr is not None:
        value = tl.load(x_ptr + b * s_b).to(tl.float32)
    return value


@triton.jit
def load_real(c_ptr, u_ptr, s_c, s_u, w, b, o, n):
    """Load the guided teacher, u + w (c - u)."""
    F_real = load(c_ptr, s_c, b, o, n)
    if u_ptr is not None:
        F_u = load(u_ptr, s_u, b, o, n)
        F_real = F_u + w * (F_real - F_u)
    return F_real


@triton.jit
def load_keep(mask_ptr, m_b, m_0, m_1, m_2, mid, inner, b, o, n, WIDE: tl.constexpr):
    """Return which of the elements o the mask keeps.

    Strides m_0, m_1, m_2 are over [.., mid, inner], zero where the mask is broadcast.
    """
    keep = o < n
    if mask_ptr is not None:
        i = o if WIDE else o.to(tl.int32)  # a 64-bit division is many times dearer
        rest = i // inner
        offset = (
            (rest // mid).to(tl.int64) * m_0
            + (rest % mid).to(tl.int64) * m_1
            + (i % inner).to(tl.int64) * m_2
        )
        keep = tl.load(mask_ptr + b * m_b + offset, mask=keep, other=0) != 0
    return keep


@triton.jit
def sum_partials(part_ptr, slot, i, B, chunks, CHUNKS: tl.constexpr):
    """Add up a sample's partials, always in the same order."""
    o = tl.arange(0, CHUNKS)
    return tl.sum(tl.load(part_ptr + (slot * B + i).to(tl.int64) * chunks + o, mask=o < chunks, other=0.0), 0)


# ---------------------------------------------------------------------------------------------- for launchers


def check(*tensors: Tensor | None) -> None:
    """Raise ValueError for tensors that no loss kernel here reads; shapes are checked before."""
    present = [x for x in tensors if x is not None]
    if any(x.dtype not in FLOATS for x in present):
        dtypes = [x.dtype for x in present]
        raise ValueError(f"{dtypes} of shape {list(present[0].shape)}: want float32, float16 or bfloat16")
    if any(x.device != present[0].device for x in present):
        raise ValueError(f"tensors on different devices: {[str(x.device) for x in present]}")
    if present[0].numel() == 0:
        raise ValueError(f"no elements in {list(present[0].shape)}")


def number(value: Scalar) -> tuple[Tensor | None, float]:
    """Return a scalar as an op takes it: a tensor, or a float where that is None."""
    return (value, 0.0) if isinstance(value, Tensor) else (None, float(value))


def rows(x: Tensor) -> Tensor:
    """Return x with each sample contiguous.

    It is x itself, or a copy of one that is not so (channels last, say).
    """
    dense = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        if size > 1 and stride != dense:
            return x.contiguous()
        dense *= size
    return x


def chunks_of(x: Tensor) -> tuple[int, int, int]:
    """Return (n, chunks, blocks of a chunk) of one sample.

    They do not depend on the batch, and so a sample's sums do not.
    """
    n = x[0].numel()
    iters = ceil_div(n, BLOCK * CHUNKS)
    return n, ceil_div(n, BLOCK * iters), iters


def ceil_div(x: int, y: int) -> int:
    """Divide and round up."""
    return -(-x // y)


def tensor_args(**tensors: Tensor | None) -> dict[str, Any]:
    """Turn x into x_ptr and s_x, its stride between samples.

    An input that is left out is None.
    """
    dense = {name: None if x is None else rows(x) for name, x in tensors.items()}
    pointers = {f"{name}_ptr": x for name, x in dense.items()}
    return pointers | {f"s_{name}": 0 if x is None else x.stride(0) for name, x in dense.items()}


def scalar_args(**scalars: tuple[Tensor | None, float]) -> dict[str, Any]:
    """Turn b into b_ptr, s_b and b_value."""
    args = {}
    for name, (x, value) in scalars.items():
        stride = x.stride(0) if x is not None and x.ndim else 0
        args |= {f"{name}_ptr": x, f"s_{name}": stride, f"{name}_value": value}
    return args


def mask_args(mask: Tensor | None, like: Tensor) -> dict[str, Any]:
    """Describe a broadcastable mask over [B, .., mid, inner] by strides.

    It is not copied unless it needs more than three of them.
    """
    names = ("mask_ptr", "m_b", "m_0", "m_1", "m_2", "mid", "inner")
    wide = {"WIDE": like[0].numel() + BLOCK >= 2**31}
    if mask is None:
        return dict(zip(names, (None, 0, 0, 0, 0, 1, 1), strict=True)) | wide
    mask = mask.view(torch.uint8).expand(like.shape)
    dims = _merged(mask)
    if len(dims) > 3:
        mask = mask.contiguous()
        dims = _merged(mask)
    missing = [(1, 0)] * (3 - len(dims))
    (_, m_0), (mid, m_1), (inner, m_2) = missing + dims
    return dict(zip(names, (mask, mask.stride(0), m_0, m_1, m_2, mid, inner), strict=True)) | wide


def _merged(x: Tensor) -> list[tuple[int, int]]:
    """Return (size, stride) of the dims of a sample, with neighbours that run on merged into one."""
    dims: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
    return dims


def specs_of(op: str, kernels: tuple[Any, ...], given: Mapping[str, object]) -> Iterator[Spec]:
    """Yield what to compile ahead of time.

    Scores F are in each dtype, x0_g and z in float32, as in mixed precision; a and b are per sample, w is a
    number; `given` are constants and arguments that are left out.
    """
    for dtype in DTYPES:
        scores = {f"{name}_ptr": f"*{dtype}" for name in ("fake", "c", "u", "dfake", "dc", "du")}
        for kernel in kernels:
            if dtype != "fp32" and not scores.keys() & set(kernel.arg_names):
                continue  # it reads partial sums
            known = {
                name: value for name, value in {"w_ptr": None, **given}.items() if name in kernel.arg_names
            }
            signature = {
                name: "constexpr" if name in known else _type(name, scores) for name in kernel.arg_names
            }
            yield Spec(op, kernel, dtype, 0, signature, known, OPTIONS, False, False, unaligned=COUNTS)


def _type(name: str, pointers: Mapping[str, str]) -> str:
    if name.endswith("_ptr"):
        return "*u8" if name == "mask_ptr" else pointers.get(name, "*fp32")
    return "fp32" if name.endswith("_value") or name == "alpha" else "i32"
