"""Score-distillation losses: what they mean, in plain PyTorch. The fused kernels of `_triton` have to match this page.

x0_g student output, z = alpha(s) x0_g + sigma(s) eps, F raw outputs at (z, s): F_fake of the critic, F_c and F_u of the
teacher with and without the condition; x0 = a z + b F. Tensors [B, ..]; a, b, w are [B] or scalars. All arithmetic is
at least float32, whatever the inputs are.
"""

import torch
from torch import Tensor

from fastdmd_kernels.dispatch import backend

Scalar = Tensor | float
Metrics = dict[str, Tensor]


def guide(u: Tensor, c: Tensor, w: Scalar) -> Tensor:
    """Classifier-free guidance u + w (c - u); w = 1 is off. Published c + g (c - u) is w = g + 1."""
    return u + w * (c - u)


def _check(
    x0_g: Tensor, z: Tensor, F_fake: Tensor, F_c: Tensor, F_u: Tensor | None, a: Scalar, b: Scalar, w: Scalar
) -> None:
    """ValueError for shapes that differ or a missing F_u."""
    shapes = [list(x.shape) for x in (x0_g, z, F_fake, F_c, F_u) if x is not None]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"shapes differ: {shapes}")
    if x0_g.ndim < 2:
        raise ValueError(f"tensors of shape {shapes[0]}: want [B, ..]")
    for value in (a, b, w):
        if isinstance(value, Tensor) and value.ndim and value.shape != x0_g.shape[:1]:
            raise ValueError(f"per-sample scalar of shape {list(value.shape)} for tensors {shapes[0]}")
    if F_u is None and (isinstance(w, Tensor) or w != 1):
        raise ValueError(f"guidance w = {w} needs F_u; leave F_u out only with w = 1")


def _check_mask(mask: Tensor, like: Tensor) -> None:
    fits = mask.ndim <= like.ndim and all(
        m in (1, n) for m, n in zip(reversed(mask.shape), reversed(like.shape), strict=False)
    )
    if mask.dtype != torch.bool or not fits:
        raise ValueError(f"mask {list(mask.shape)} {mask.dtype}: want bool, broadcastable to {list(like.shape)}")


def _per_sample(value: Scalar, like: Tensor) -> Scalar:
    if isinstance(value, Tensor) and value.ndim:
        return value.to(like.dtype).view(-1, *[1] * (like.ndim - 1))
    return value


def _mean_per_sample(x: Tensor) -> Tensor:
    """Mean over all but the batch, kept [B, 1, ..]."""
    return x.mean(dim=tuple(range(1, x.ndim)), keepdim=True)


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _inputs(
    x0_g: Tensor, z: Tensor, F_fake: Tensor, F_c: Tensor, F_u: Tensor | None, w: Scalar
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x0_g, z, F_fake, F_real) upcast, F_real the guided teacher."""
    F_real = _upcast(F_c)
    if F_u is not None:
        F_real = guide(_upcast(F_u), F_real, _per_sample(w, F_real))
    return _upcast(x0_g), _upcast(z), _upcast(F_fake), F_real


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
) -> tuple[Tensor, Metrics]:
    """Distribution matching (DMD 2311.18828, eq. 7 and 8): the gradient of KL(student || teacher) at x0_g.

    grad = b (F_fake - F_real) / mean_per_sample|x0_g - x0_real|, (x0_fake - x0_real) / mean|p| with 1.3-7 times less
    bfloat16 rounding; loss = 0.5 mean((x0_g - sg(x0_g - grad))^2). Gradient to x0_g only. `mask`, boolean and
    broadcastable to x0_g, keeps elements in the mean. Raises ValueError for shapes that differ.
    """
    _check(x0_g, z, F_fake, F_c, F_u, a, b, w)
    if mask is not None:
        _check_mask(mask, x0_g)
    if backend(x0_g.device) == "triton":
        from fastdmd_kernels._triton import dmd_loss as fused

        return fused.dmd_loss(x0_g, z, F_fake, F_c, F_u, a, b, w, mask)
    x0, z, F_fake, F_real = _inputs(x0_g, z, F_fake, F_c, F_u, w)
    with torch.no_grad():
        a, b = _per_sample(a, z), _per_sample(b, z)
        gap = F_fake - F_real
        normalizer = _mean_per_sample((x0 - (a * z + b * F_real)).abs())
        grad = torch.nan_to_num(b * gap / normalizer)
        target = x0 - grad
        metrics = {"dmd_grad_abs": grad.abs().mean(), "normalizer": normalizer.mean(), "score_gap": gap.abs().mean()}
    square = (x0 - target).square()
    if mask is None:
        return 0.5 * square.mean(), metrics
    # not square[mask]: its shape depends on values, which the host would wait for
    return 0.5 * torch.where(mask, square, 0).sum() / mask.expand_as(square).sum(), metrics


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
) -> tuple[Tensor, Metrics]:
    """Score identity distillation (SiD 2404.04057, eq. 23) with the normaliser of DMD.

    mean((x0_real - x0_fake) ((x0_real - x0_g) - alpha (x0_real - x0_fake)) / sg(mean_per_sample|x0_g - x0_real|)).
    Nothing but the normaliser is detached: gradients flow to x0_g, z, F_fake, F_c and F_u.
    """
    _check(x0_g, z, F_fake, F_c, F_u, a, b, w)
    if backend(x0_g.device) == "triton":
        from fastdmd_kernels._triton import sid_loss as fused

        return fused.sid_loss(x0_g, z, F_fake, F_c, F_u, a, b, w, alpha)
    x0, z, F_fake, F_real = _inputs(x0_g, z, F_fake, F_c, F_u, w)
    a, b = _per_sample(a, z), _per_sample(b, z)
    p = a * z + b * F_real - x0
    gap = b * (F_real - F_fake)  # x0_real - x0_fake, without the rounding of a z
    normalizer = _mean_per_sample(p.detach().abs())
    loss = (gap * (p - alpha * gap) / normalizer).mean()
    with torch.no_grad():
        metrics = {"normalizer": normalizer.mean(), "score_gap": (F_fake - F_real).abs().mean()}
    return loss, metrics
