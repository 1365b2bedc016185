"""dmd_loss in one reduction pass and one write pass (DMD 2311.18828); the contract is in api.py.

B samples of n elements.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdmd_kernels.aot_spec import Spec
from fastdmd_kernels.losses.triton_shared import (
    BLOCK,
    CHUNKS,
    COUNTS,
    FINISH,
    PASS,
    Scalar,
    ceil_div,
    check,
    chunks_of,
    load,
    load_keep,
    load_real,
    load_scalar,
    mask_args,
    number,
    scalar_args,
    specs_of,
    sum_partials,
    tensor_args,
)


@triton.jit(do_not_specialize=COUNTS)
def _dmd_reduce(
    x0_ptr,
    z_ptr,
    fake_ptr,
    c_ptr,
    u_ptr,
    s_x0,
    s_z,
    s_fake,
    s_c,
    s_u,
    a_ptr,
    b_ptr,
    w_ptr,
    s_a,
    s_b,
    s_w,
    a_value,
    b_value,
    w_value,
    mask_ptr,
    m_b,
    m_0,
    m_1,
    m_2,
    mid,
    inner,
    part_ptr,  # [6, B, chunks]
    n,
    chunks,
    iters,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    sample, chunk = pid // chunks, pid % chunks
    a = load_scalar(a_ptr, s_a, a_value, sample)
    b = load_scalar(b_ptr, s_b, b_value, sample)
    w = load_scalar(w_ptr, s_w, w_value, sample)
    norm = tl.zeros([BLOCK], tl.float32)
    square = tl.zeros([BLOCK], tl.float32)
    size = tl.zeros([BLOCK], tl.float32)
    gaps = tl.zeros([BLOCK], tl.float32)
    broken = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    for i in range(iters):
        o = (chunk * iters + i) * BLOCK + tl.arange(0, BLOCK)
        x0, z = load(x0_ptr, s_x0, sample, o, n), load(z_ptr, s_z, sample, o, n)
        F_real = load_real(c_ptr, u_ptr, s_c, s_u, w, sample, o, n)
        gap = load(fake_ptr, s_fake, sample, o, n) - F_real
        keep = load_keep(mask_ptr, m_b, m_0, m_1, m_2, mid, inner, sample, o, n, WIDE)
        clean = tl.where(gap == gap, gap, 0.0)  # nan_to_num: no gradient where there is no gap
        norm += tl.abs(x0 - (a * z + b * F_real))
        square += tl.where(keep, clean * clean, 0.0)
        size += tl.abs(clean)
        gaps += tl.abs(gap)
        broken += tl.where(keep, x0 - x0, 0.0)  # NaN where x0_g is not finite, as x0 - target is
        count += tl.where(keep, 1.0, 0.0)
    part_ptr += pid
    programs = tl.num_programs(0).to(tl.int64)
    tl.store(part_ptr, tl.sum(norm, 0))
    tl.store(part_ptr + programs, tl.sum(square, 0))
    tl.store(part_ptr + 2 * programs, tl.sum(size, 0))
    tl.store(part_ptr + 3 * programs, tl.sum(gaps, 0))
    tl.store(part_ptr + 4 * programs, tl.sum(broken, 0))
    tl.store(part_ptr + 5 * programs, tl.sum(count, 0))


@triton.jit(do_not_specialize=COUNTS)
def _dmd_finish(
    part_ptr, b_ptr, s_b, b_value, loss_ptr, metrics_ptr, stats_ptr, B, n, chunks, CHUNKS: tl.constexpr
):
    """Write loss, metrics [3] and stats [B + 1] in one program.

    The stats are each sample's normaliser, then the number of elements that count.
    """
    loss, count, grad_abs, normalizer, gaps = 0.0, 0.0, 0.0, 0.0, 0.0
    for i in range(B):
        norm = sum_partials(part_ptr, 0, i, B, chunks, CHUNKS) / n
        square = sum_partials(part_ptr, 1, i, B, chunks, CHUNKS)
        size = sum_partials(part_ptr, 2, i, B, chunks, CHUNKS)
        b = tl.abs(load_scalar(b_ptr, s_b, b_value, i))
        # nan_to_num of the whole sample: nothing of a normaliser that is not finite, nor of 0 / 0
        some = (norm < float("inf")) & (square > 0) & (b > 0)
        loss += tl.where(some, square * (b / norm) * (b / norm), 0.0)
        loss += sum_partials(part_ptr, 4, i, B, chunks, CHUNKS)
        grad_abs += tl.where((norm < float("inf")) & (size > 0) & (b > 0), size * (b / norm), 0.0)
        normalizer += norm
        gaps += sum_partials(part_ptr, 3, i, B, chunks, CHUNKS)
        count += sum_partials(part_ptr, 5, i, B, chunks, CHUNKS)
        tl.store(stats_ptr + i, norm)
    total = (B * 1.0) * n
    tl.store(stats_ptr + B, count)
    tl.store(loss_ptr, 0.5 * loss / count)
    tl.store(metrics_ptr, grad_abs / total)
    tl.store(metrics_ptr + 1, normalizer / B)
    tl.store(metrics_ptr + 2, gaps / total)


@triton.jit(do_not_specialize=COUNTS)
def _dmd_write(
    upstream_ptr,
    stats_ptr,
    fake_ptr,
    c_ptr,
    u_ptr,
    s_fake,
    s_c,
    s_u,
    b_ptr,
    w_ptr,
    s_b,
    s_w,
    b_value,
    w_value,
    mask_ptr,
    m_b,
    m_0,
    m_1,
    m_2,
    mid,
    inner,
    grad_ptr,
    B,
    n,
    blocks,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    sample = pid // blocks
    b, w = load_scalar(b_ptr, s_b, b_value, sample), load_scalar(w_ptr, s_w, w_value, sample)
    o = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    gap = load(fake_ptr, s_fake, sample, o, n) - load_real(c_ptr, u_ptr, s_c, s_u, w, sample, o, n)
    keep = load_keep(mask_ptr, m_b, m_0, m_1, m_2, mid, inner, sample, o, n, WIDE)
    grad = b * gap / tl.load(stats_ptr + sample)
    largest = 3.4028234663852886e38  # torch.nan_to_num
    grad = tl.where(grad == grad, tl.minimum(tl.maximum(grad, -largest), largest), 0.0)
    grad *= tl.load(upstream_ptr) / tl.load(stats_ptr + B)
    tl.store(grad_ptr + sample * n + o, tl.where(keep, grad, 0.0).to(grad_ptr.dtype.element_ty), mask=o < n)


# ----------------------------------------------------------------------------------------------------- the op

_SCORES = "Tensor F_fake, Tensor F_c, Tensor? F_u"
torch.library.define(
    "fastdmd::dmd_loss",
    f"(Tensor x0_g, Tensor z, {_SCORES}, Tensor? a, Tensor? b, Tensor? w, float a_value, float b_value,"
    " float w_value, Tensor? mask) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "fastdmd::dmd_loss_backward",
    f"(Tensor upstream, Tensor stats, {_SCORES}, Tensor? b, Tensor? w, float b_value, float w_value,"
    " Tensor? mask, ScalarType dtype) -> Tensor",
)


@torch.library.impl("fastdmd::dmd_loss", ("cuda", "cpu"))
def _forward(x0_g, z, F_fake, F_c, F_u, a, b, w, a_value, b_value, w_value, mask):
    B = x0_g.shape[0]
    n, chunks, iters = chunks_of(x0_g)
    part = x0_g.new_empty(6, B, chunks, dtype=torch.float32)
    loss, metrics, stats = _forward_fake(x0_g)
    b_args = scalar_args(b=(b, b_value))
    with torch.cuda.device_of(x0_g):
        _dmd_reduce[(B * chunks,)](
            **tensor_args(x0=x0_g, z=z, fake=F_fake, c=F_c, u=F_u),
            **scalar_args(a=(a, a_value), w=(w, w_value)),
            **b_args,
            **mask_args(mask, x0_g),
            part_ptr=part,
            n=n,
            chunks=chunks,
            iters=iters,
            **PASS,
        )
        _dmd_finish[(1,)](
            part_ptr=part,
            **b_args,
            loss_ptr=loss,
            metrics_ptr=metrics,
            stats_ptr=stats,
            B=B,
            n=n,
            chunks=chunks,
            **FINISH,
        )
    return loss, metrics, stats


@torch.library.register_fake("fastdmd::dmd_loss")
def _forward_fake(x0_g, *_):
    return tuple(x0_g.new_empty(shape, dtype=torch.float32) for shape in ((), (3,), (x0_g.shape[0] + 1,)))


@torch.library.impl("fastdmd::dmd_loss_backward", ("cuda", "cpu"))
def _backward(upstream, stats, F_fake, F_c, F_u, b, w, b_value, w_value, mask, dtype):
    B, n = F_fake.shape[0], F_fake[0].numel()
    blocks = ceil_div(n, BLOCK)
    grad = F_fake.new_empty(F_fake.shape, dtype=dtype)
    with torch.cuda.device_of(F_fake):
        _dmd_write[(B * blocks,)](
            upstream_ptr=upstream,
            stats_ptr=stats,
            **tensor_args(fake=F_fake, c=F_c, u=F_u),
            **scalar_args(b=(b, b_value), w=(w, w_value)),
            **mask_args(mask, F_fake),
            grad_ptr=grad,
            B=B,
            n=n,
            blocks=blocks,
            **PASS,
        )
    return grad


@torch.library.register_fake("fastdmd::dmd_loss_backward")
def _backward_fake(upstream, stats, F_fake, F_c, F_u, b, w, b_value, w_value, mask, dtype):
    return F_fake.new_empty(F_fake.shape, dtype=dtype)


def _save(ctx, inputs, output):
    x0_g, _, F_fake, F_c, F_u, _, b, w, _, b_value, w_value, mask = inputs
    ctx.save_for_backward(output[2], F_fake, F_c, F_u, b, w, mask)
    ctx.numbers, ctx.dtype = (b_value, w_value), x0_g.dtype


def _autograd(ctx, upstream, *_):
    *tensors, mask = ctx.saved_tensors
    grad = torch.ops.fastdmd.dmd_loss_backward(upstream, *tensors, *ctx.numbers, mask, ctx.dtype)
    return grad, *[None] * 11


torch.library.register_autograd("fastdmd::dmd_loss", _autograd, setup_context=_save)


def dmd_loss(
    x0_g: Tensor,
    z: Tensor,
    F_fake: Tensor,
    F_c: Tensor,
    F_u: Tensor | None,
    a: Scalar,
    b: Scalar,
    w: Scalar,
    mask: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute `api.dmd_loss`, which has checked the shapes; dtypes and devices are checked here.

    Where x0_g is not finite the loss is NaN, as the reference's, and the gradient zero.
    """
    check(x0_g, z, F_fake, F_c, F_u)
    tensors, values = zip(*(number(value) for value in (a, b, w)), strict=True)
    loss, metrics, _ = torch.ops.fastdmd.dmd_loss(x0_g, z, F_fake, F_c, F_u, *tensors, *values, mask)
    names = ("dmd_grad_abs", "normalizer", "score_gap")
    return loss, dict(zip(names, metrics.detach().unbind(), strict=True))


def specs(target: str) -> Iterator[Spec]:
    """Yield the variants with guidance, with and without a mask."""
    kernels = (_dmd_reduce, _dmd_finish, _dmd_write)
    constants = {"BLOCK": BLOCK, "CHUNKS": CHUNKS, "WIDE": False}
    yield from specs_of("dmd_loss", kernels, {**constants, "mask_ptr": None})
    yield from specs_of("dmd_loss_masked", (_dmd_reduce, _dmd_write), constants)
