"""Score-distillation losses in plain PyTorch; the contract is in api.py, and the fused kernels have to match.

x0_g student output, z = alpha(s) x0_g + sigma(s) eps, F raw outputs at (z, s): F_fake of the critic, F_c and
F_u of the teacher with and without the condition; x0 = a z + b F. Tensors [B, ..]; a, b, w are [B] or
scalars. All arithmetic is at least float32, whatever the inputs are.
"""

import torch
from torch import Tensor

Scalar = Tensor | float
Metrics = dict[str, Tensor]


def guide(u: Tensor, c: Tensor, w: Scalar) -> Tensor:
    """Guide without a classifier: u + w (c - u), where w = 1 is off.

    Published c + g (c - u) is w = g + 1.
    """
    return u + w * (c - u)


def _per_sample(value: Scalar, like: Tensor) -> Scalar:
    if isinstance(value, Tensor) and value.ndim:
        return value.to(like.dtype).view(-1, *[1] * (like.ndim - 1))
    return value


def _mean_per_sample(x: Tensor) -> Tensor:
    """Return the mean over all dimensions but the batch, kept as [B, 1, ..]."""
    return x.mean(dim=tuple(range(1, x.ndim)), keepdim=True)


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _inputs(
    x0_g: Tensor, z: Tensor, F_fake: Tensor, F_c: Tensor, F_u: Tensor | None, w: Scalar
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (x0_g, z, F_fake, F_real) upcast, F_real the guided teacher."""
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
    """Compute what `api.dmd_loss` means (DMD 2311.18828, eq. 7 and 8), for inputs that it has checked."""
    x0, z, F_fake, F_real = _inputs(x0_g, z, F_fake, F_c, F_u, w)
    with torch.no_grad():
        a, b = _per_sample(a, z), _per_sample(b, z)
        gap = F_fake - F_real
        normalizer = _mean_per_sample((x0 - (a * z + b * F_real)).abs())
        grad = torch.nan_to_num(b * gap / normalizer)
        target = x0 - grad
        metrics = {
            "dmd_grad_abs": grad.abs().mean(),
            "normalizer": normalizer.mean(),
            "score_gap": gap.abs().mean(),
        }
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
    """Compute what `api.sid_loss` means (SiD 2404.04057, eq. 23), for inputs that it has checked."""
    x0, z, F_fake, F_real = _inputs(x0_g, z, F_fake, F_c, F_u, w)
    a, b = _per_sample(a, z), _per_sample(b, z)
    p = a * z + b * F_real - x0
    gap = b * (F_real - F_fake)  # x0_real - x0_fake, without the rounding of a z
    normalizer = _mean_per_sample(p.detach().abs())
    loss = (gap * (p - alpha * gap) / normalizer).mean()
    with torch.no_grad():
        metrics = {"normalizer": normalizer.mean(), "score_gap": (F_fake - F_real).abs().mean()}
    return loss, metrics
