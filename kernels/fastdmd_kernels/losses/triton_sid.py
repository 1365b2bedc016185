"""sid_loss in one reduction pass and one write pass (SiD 2404.04057); the contract is in api.py.

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
    load_real,
    load_scalar,
    number,
    scalar_args,
    specs_of,
    sum_partials,
    tensor_args,
)


@triton.jit(do_not_specialize=COUNTS)
def _sid_reduce(
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
    alpha,
    part_ptr,  # [3, B, chunks]
    n,
    chunks,
    iters,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    sample, chunk = pid // chunks, pid % chunks
    a = load_scalar(a_ptr, s_a, a_value, sample)
    b = load_scalar(b_ptr, s_b, b_value, sample)
    w = load_scalar(w_ptr, s_w, w_value, sample)
    norm = tl.zeros([BLOCK], tl.float32)
    loss = tl.zeros([BLOCK], tl.float32)
    gaps = tl.zeros([BLOCK], tl.float32)
    for i in range(iters):
        o = (chunk * iters + i) * BLOCK + tl.arange(0, BLOCK)
        x0, z = load(x0_ptr, s_x0, sample, o, n), load(z_ptr, s_z, sample, o, n)
        F_real = load_real(c_ptr, u_ptr, s_c, s_u, w, sample, o, n)
        F_gap = F_real - load(fake_ptr, s_fake, sample, o, n)
        p, gap = a * z + b * F_real - x0, b * F_gap
        norm += tl.abs(p)
        loss += gap * (p - alpha * gap)
        gaps += tl.abs(F_gap)
    part_ptr += pid
    programs = tl.num_programs(0).to(tl.int64)
    tl.store(part_ptr, tl.sum(norm, 0))
    tl.store(part_ptr + programs, tl.sum(loss, 0))
    tl.store(part_ptr + 2 * programs, tl.sum(gaps, 0))


@triton.jit(do_not_specialize=COUNTS)
def _sid_finish(part_ptr, loss_ptr, metrics_ptr, stats_ptr, B, n, chunks, CHUNKS: tl.constexpr):
    """Write loss, metrics [2] and stats [B], each sample's normaliser, in one program."""
    loss, normalizer, gaps = 0.0, 0.0, 0.0
    for i in range(B):
        norm = sum_partials(part_ptr, 0, i, B, chunks, CHUNKS) / n
        loss += sum_partials(part_ptr, 1, i, B, chunks, CHUNKS) / norm
        gaps += sum_partials(part_ptr, 2, i, B, chunks, CHUNKS)
        normalizer += norm
        tl.store(stats_ptr + i, norm)
    total = (B * 1.0) * n
    tl.store(loss_ptr, loss / total)
    tl.store(metrics_ptr, normalizer / B)
    tl.store(metrics_ptr + 1, gaps / total)


@triton.jit(do_not_specialize=COUNTS)
def _sid_write(
    upstream_ptr,
    stats_ptr,
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
    alpha,
    dx0_ptr,
    dz_ptr,
    dfake_ptr,
    dc_ptr,
    du_ptr,
    B,
    n,
    blocks,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    sample = pid // blocks
    a = load_scalar(a_ptr, s_a, a_value, sample)
    b = load_scalar(b_ptr, s_b, b_value, sample)
    w = load_scalar(w_ptr, s_w, w_value, sample)
    o = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    x0, z = load(x0_ptr, s_x0, sample, o, n), load(z_ptr, s_z, sample, o, n)
    F_real = load_real(c_ptr, u_ptr, s_c, s_u, w, sample, o, n)
    p, gap = a * z + b * F_real - x0, b * (F_real - load(fake_ptr, s_fake, sample, o, n))
    # loss = sum gap (p - alpha gap) / (norm B n)
    k = tl.load(upstream_ptr) / ((B * 1.0) * n) / tl.load(stats_ptr + sample)
    dp, dgap = k * gap, k * (p - 2 * alpha * gap)
    dreal = b * (dp + dgap)
    inside, at = o < n, sample * n + o
    tl.store(dx0_ptr + at, (-dp).to(dx0_ptr.dtype.element_ty), mask=inside)
    tl.store(dz_ptr + at, (a * dp).to(dz_ptr.dtype.element_ty), mask=inside)
    tl.store(dfake_ptr + at, (-b * dgap).to(dfake_ptr.dtype.element_ty), mask=inside)
    if u_ptr is not None:
        tl.store(dc_ptr + at, (w * dreal).to(dc_ptr.dtype.element_ty), mask=inside)
        tl.store(du_ptr + at, ((1 - w) * dreal).to(du_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(dc_ptr + at, dreal.to(dc_ptr.dtype.element_ty), mask=inside)


# ----------------------------------------------------------------------------------------------------- the op

_INPUTS = (
    "Tensor x0_g, Tensor z, Tensor F_fake, Tensor F_c, Tensor? F_u,"
    " Tensor? a, Tensor? b, Tensor? w, float a_value, float b_value, float w_value, float alpha"
)
torch.library.define("fastdmd::sid_loss", f"({_INPUTS}) -> (Tensor, Tensor, Tensor)")
torch.library.define(
    "fastdmd::sid_loss_backward",
    f"(Tensor upstream, Tensor stats, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("fastdmd::sid_loss", ("cuda", "cpu"))
def _forward(x0_g, z, F_fake, F_c, F_u, a, b, w, a_value, b_value, w_value, alpha):
    B = x0_g.shape[0]
    n, chunks, iters = chunks_of(x0_g)
    part = x0_g.new_empty(3, B, chunks, dtype=torch.float32)
    loss, metrics, stats = _forward_fake(x0_g)
    with torch.cuda.device_of(x0_g):
        _sid_reduce[(B * chunks,)](
            **tensor_args(x0=x0_g, z=z, fake=F_fake, c=F_c, u=F_u),
            **scalar_args(a=(a, a_value), b=(b, b_value), w=(w, w_value)),
            alpha=alpha,
            part_ptr=part,
            n=n,
            chunks=chunks,
            iters=iters,
            **PASS,
        )
        _sid_finish[(1,)](
            part_ptr=part,
            loss_ptr=loss,
            metrics_ptr=metrics,
            stats_ptr=stats,
            B=B,
            n=n,
            chunks=chunks,
            **FINISH,
        )
    return loss, metrics, stats


@torch.library.register_fake("fastdmd::sid_loss")
def _forward_fake(x0_g, *_):
    return tuple(x0_g.new_empty(shape, dtype=torch.float32) for shape in ((), (2,), (x0_g.shape[0],)))


@torch.library.impl("fastdmd::sid_loss_backward", ("cuda", "cpu"))
def _backward(upstream, stats, x0_g, z, F_fake, F_c, F_u, a, b, w, a_value, b_value, w_value, alpha):
    B, n = x0_g.shape[0], x0_g[0].numel()
    blocks = ceil_div(n, BLOCK)
    grads = _backward_fake(upstream, stats, x0_g, z, F_fake, F_c, F_u)
    names = ("dx0_ptr", "dz_ptr", "dfake_ptr", "dc_ptr", "du_ptr")
    with torch.cuda.device_of(x0_g):
        _sid_write[(B * blocks,)](
            upstream_ptr=upstream,
            stats_ptr=stats,
            **tensor_args(x0=x0_g, z=z, fake=F_fake, c=F_c, u=F_u),
            **scalar_args(a=(a, a_value), b=(b, b_value), w=(w, w_value)),
            alpha=alpha,
            **dict(zip(names, grads, strict=True)),
            B=B,
            n=n,
            blocks=blocks,
            **PASS,
        )
    return grads


@torch.library.register_fake("fastdmd::sid_loss_backward")
def _backward_fake(upstream, stats, x0_g, z, F_fake, F_c, F_u, *_):
    grads = [x.new_empty(x.shape) for x in (x0_g, z, F_fake, F_c)]
    # an op cannot return None for the F_u that was left out
    return *grads, F_c.new_empty(
        0 if F_u is None else F_u.shape, dtype=F_c.dtype if F_u is None else F_u.dtype
    )


def _save(ctx, inputs, output):
    *tensors, ctx.a_value, ctx.b_value, ctx.w_value, ctx.alpha = inputs
    ctx.save_for_backward(output[2], *tensors)


def _autograd(ctx, upstream, *_):
    numbers = (ctx.a_value, ctx.b_value, ctx.w_value, ctx.alpha)
    *grads, du = torch.ops.fastdmd.sid_loss_backward(upstream, *ctx.saved_tensors, *numbers)
    return *grads, du if ctx.saved_tensors[5] is not None else None, *[None] * 7


torch.library.register_autograd("fastdmd::sid_loss", _autograd, setup_context=_save)


def sid_loss(
    x0_g: Tensor,
    z: Tensor,
    F_fake: Tensor,
    F_c: Tensor,
    F_u: Tensor | None,
    a: Scalar,
    b: Scalar,
    w: Scalar,
    alpha: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute `api.sid_loss`, which has checked the shapes.

    Dtypes and devices are checked here, and that a, b, w want no gradient.
    """
    check(x0_g, z, F_fake, F_c, F_u)
    if any(isinstance(value, Tensor) and value.requires_grad for value in (a, b, w)):
        raise ValueError("a, b and w get no gradient: detach them")
    tensors, values = zip(*(number(value) for value in (a, b, w)), strict=True)
    loss, metrics, _ = torch.ops.fastdmd.sid_loss(x0_g, z, F_fake, F_c, F_u, *tensors, *values, alpha)
    return loss, dict(zip(("normalizer", "score_gap"), metrics.detach().unbind(), strict=True))


def specs(target: str) -> Iterator[Spec]:
    """Yield the variants with guidance."""
    kernels = (_sid_reduce, _sid_finish, _sid_write)
    yield from specs_of("sid_loss", kernels, {"BLOCK": BLOCK, "CHUNKS": CHUNKS})
