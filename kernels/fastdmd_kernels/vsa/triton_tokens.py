"""One tile of rows of a [B, L, N, K] tensor, read in place by TMA descriptor or by pointers.

B batch, L tokens in tile order, N heads, K head dim. A tile owns rows row .. row + n_valid, at most 64. A
kernel always works on 64: past n_valid it reads rows of the next tile, or zeros, and masks them where they
could matter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

BLOCK = 64  # rows of a tile
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@triton.jit
def load_tile(x, s_b, s_l, s_n, b, h, row, L, BLOCK: tl.constexpr, K: tl.constexpr, USE_DESC: tl.constexpr):
    """Load rows row .. row + BLOCK of sample b, head h, [BLOCK, K], zeros from L on.

    `x` is a descriptor or a pointer.
    """
    if USE_DESC:
        # leading ones: triton drops them, and the box feeds the tensor cores from shared memory as a 2-D one
        # does
        x_tile = x.load([b, h, row, 0]).reshape([BLOCK, K])
    else:
        o_l = tl.arange(0, BLOCK)
        x_ptrs = x + b.to(tl.int64) * s_b + h.to(tl.int64) * s_n + row.to(tl.int64) * s_l
        x_ptrs = x_ptrs + o_l.to(tl.int64)[:, None] * s_l + tl.arange(0, K)[None, :]
        x_tile = tl.load(x_ptrs, mask=(o_l < L - row)[:, None], other=0.0)
    return x_tile


@triton.jit
def tile_ptrs(x_ptr, b, h, row, L, N, BLOCK: tl.constexpr, K: tl.constexpr):
    """Return [BLOCK, K] pointers to the same rows of a contiguous tensor."""
    o_row = b.to(tl.int64) * L + row + tl.arange(0, BLOCK)
    return x_ptr + ((o_row * N + h) * K)[:, None] + tl.arange(0, K)[None, :]


@triton.jit
def store_tile(x_ptr, x_tile, b, h, row, n_valid, L, N, BLOCK: tl.constexpr, K: tl.constexpr):
    """Store the n_valid first rows of [BLOCK, K] to a contiguous tensor.

    The next rows are another program's.
    """
    m_x = (tl.arange(0, BLOCK) < n_valid)[:, None]
    tl.store(tile_ptrs(x_ptr, b, h, row, L, N, BLOCK, K), x_tile.to(x_ptr.dtype.element_ty), mask=m_x)


@triton.jit
def load_stat(x, tile, BLOCK: tl.constexpr, USE_DESC: tl.constexpr):
    """Load the row statistics of a query tile, [BLOCK].

    Loaded by pointers they end the pipelining on sm_90.
    """
    if USE_DESC:
        b_x = x.load([tile.to(tl.int32), 0]).reshape([BLOCK])
    else:
        b_x = tl.load(x + tile * BLOCK + tl.arange(0, BLOCK))
    return b_x


def check_tokens(**tensors: Tensor) -> None:
    """Raise ValueError for what no kernel here reads.

    That is other ranks, dtypes or head dims, and a last dim that is not contiguous.
    """
    for name, x in tensors.items():
        if x.ndim != 4 or x.dtype not in NAMES or x.shape[-1] not in (16, 32, 64, 128) or x.stride(-1) != 1:
            raise ValueError(
                f"{name}: shape {list(x.shape)}, strides {list(x.stride())}, {x.dtype}; want [B, L, N, K]"
                " with K of 16, 32, 64, 128, the last dim contiguous, in float32, float16 or bfloat16"
            )


def can_describe(x: Tensor) -> bool:
    """Return whether TMA can read x: base and strides are multiples of 16 bytes."""
    strides = [s * x.element_size() for s, n in zip(x.stride()[:3], x.shape[:3], strict=True) if n > 1]
    return x.data_ptr() % 16 == 0 and all(s > 0 and s % 16 == 0 for s in strides)


def describe(x: Tensor) -> TensorDescriptor:
    """Describe x as [B, N, L, K] with a box of one tile of one head.

    Reads past L are zeros, of no other sample.
    """
    B, L, N, K = x.shape
    # the stride of a dim of one is free in torch, not in TMA
    s_b, s_l, s_n = (s if n > 1 else K for s, n in zip(x.stride()[:3], x.shape[:3], strict=True))
    return TensorDescriptor(x, [B, N, L, K], [s_b, s_n, s_l, 1], [1, 1, BLOCK, K])


def describe_stat(x: Tensor) -> TensorDescriptor:
    """Describe [B, N, nq, 64] with a box of one query tile."""
    return TensorDescriptor(x, [x.numel() // BLOCK, BLOCK], [BLOCK, 1], [1, BLOCK])


def token_type(dtype: str, K: int, use_desc: bool) -> str:
    """Return the type of q, k, v and dO in the signature of a kernel."""
    return f"tensordesc<{dtype}[1,1,{BLOCK},{K}]>" if use_desc else f"*{dtype}"
