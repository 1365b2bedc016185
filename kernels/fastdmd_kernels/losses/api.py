"""Score-distillation losses: what they mean, and who computes them. The arithmetic is in reference.py.

x0_g student output, z = alpha(s) x0_g + sigma(s) eps, F raw outputs at (z, s): F_fake of the critic, F_c and
F_u of the teacher with and without the condition; x0 = a z + b F. Tensors [B, ..]; a, b, w are [B] or
scalars. All arithmetic is at least float32, whatever the inputs are.
"""

import torch
from torch import Tensor

from fastdmd_kernels.dispatch import backend
from fastdmd_kernels.losses import reference
from fastdmd_kernels.losses.reference import Metrics, Scalar


def _check(
    x0_g: Tensor, z: Tensor, F_fake: Tensor, F_c: Tensor, F_u: Tensor | None, a: Scalar, b: Scalar, w: Scalar
) -> None:
    """Raise ValueError for shapes that differ or a missing F_u."""
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
        raise ValueError(
            f"mask {list(mask.shape)} {mask.dtype}: want bool, broadcastable to {list(like.shape)}"
        )


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
    """Match distributions (DMD 2311.18828, eq. 7 and 8): the gradient of KL(student || teacher) at x0_g.

    grad = b (F_fake - F_real) / mean_per_sample|x0_g - x0_real|, (x0_fake - x0_real) / mean|p| with 1.3-7
    times less bfloat16 rounding; loss = 0.5 mean((x0_g - sg(x0_g - grad))^2). The gradient goes to x0_g only.
    `mask`, boolean and broadcastable to x0_g, keeps elements in the mean. Raises ValueError for shapes that
    differ.
    """
    _check(x0_g, z, F_fake, F_c, F_u, a, b, w)
    if mask is not None:
        _check_mask(mask, x0_g)
    if backend(x0_g.device) == "triton":
        from fastdmd_kernels.losses import triton_dmd

        return triton_dmd.dmd_loss(x0_g, z, F_fake, F_c, F_u, a, b, w, mask)
    return reference.dmd_loss(x0_g, z, F_fake, F_c, F_u, a, b, w, mask)


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
    """Distil by score identity (SiD 2404.04057, eq. 23) with the normaliser of DMD.

    mean((x0_real - x0_fake) ((x0_real - x0_g) - alpha (x0_real - x0_fake)) / sg(mean_per_sample|x0_g -
    x0_real|)). Nothing but the normaliser is detached: gradients flow to x0_g, z, F_fake, F_c and F_u.
    """
    _check(x0_g, z, F_fake, F_c, F_u, a, b, w)
    if backend(x0_g.device) == "triton":
        from fastdmd_kernels.losses import triton_sid

        return triton_sid.sid_loss(x0_g, z, F_fake, F_c, F_u, a, b, w, alpha)
    return reference.sid_loss(x0_g, z, F_fake, F_c, F_u, a, b, w, alpha)
