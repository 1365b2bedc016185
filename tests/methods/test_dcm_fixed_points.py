"""Test on known flows, in float64, that their consistency functions are fixed points of DCM's loss."""

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace

import mlp
import pytest
import torch
from dcm_definition import DETAIL_BASE, SEMANTIC, make, name_case
from score_definition import column
from torch import Tensor

from fastdmd.batch import Batch, Cond
from fastdmd.denoiser import Denoiser
from fastdmd.methods.dcm import DCM
from fastdmd.schedule import Coeffs

Field = Callable[[Tensor, Tensor], Tensor]  # v(x, sigma [B, 1, ..])
EXPERTS = [SEMANTIC, DETAIL_BASE | {"adversarial_weight": 0.0}]


class Exact(Denoiser):
    """A velocity field in a network's place, in float64. Under guidance w its two sides combine to it."""

    def __init__(self, field: Field, w: float = 1.0) -> None:
        self.field, self.w = field, w

    def raw(self, x_t: Tensor, c: Coeffs, cond: Cond) -> Tensor:
        assert x_t.dtype == c.sigma.dtype == torch.float64
        return self.field(x_t, column(c.sigma))

    def raw_pair(self, x_t: Tensor, c: Coeffs, cond: Cond, uncond: Cond) -> tuple[Tensor, Tensor]:
        v = self.raw(x_t, c, cond)
        return v + x_t * (1 - 1 / self.w), v + x_t


def exact_loss(method: DCM, teacher: Field, student: Field) -> float:
    """At every point of the expert's grid, one a sample, in float64 throughout."""
    points, w = len(method.config.points), method.config.guidance
    generator = torch.Generator().manual_seed(0)
    rng = SimpleNamespace(
        integers=torch.arange,
        uniform=lambda: torch.zeros(points).double(),
        normal=lambda shape: torch.randn(points, *shape, generator=generator, dtype=torch.float64),
    )
    nothing = Cond(torch.zeros(points, 1, 1))
    x0 = torch.randn(points, *mlp.SHAPE, generator=generator, dtype=torch.float64)
    nets = {"teacher": Exact(teacher, w), "student": Exact(student), "target": Exact(student)}
    loss, _ = mlp.loss(method, "student", nets, Batch(nothing, nothing, mlp.SHAPE, x0), rng, {})  # type: ignore[arg-type]
    return float(loss)


@pytest.mark.parametrize("target", ["ema", "student"])
@pytest.mark.parametrize("phases", [1, 4])
@pytest.mark.parametrize("base", EXPERTS, ids=name_case)
def test_a_perfect_student_has_no_loss(base, phases, target):
    """Take one point x* for data: v = (x - x*) / sigma is constant along a path, so Euler is exact."""
    point = torch.randn(mlp.SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def v(x: Tensor, sigma: Tensor) -> Tensor:
        return (x - point) / sigma

    method = make(base, phases=phases, target=target, huber_c=1e-3)
    assert exact_loss(method, v, v) < 1e-15
    assert exact_loss(method, v, lambda x, sigma: 1.001 * v(x, sigma)) > 1e-8
    assert exact_loss(method, lambda x, sigma: 1.001 * v(x, sigma), v) > 1e-8


@pytest.mark.parametrize("base", EXPERTS, ids=name_case)
def test_the_true_flow_map_is_the_fixed_point_of_a_fine_grid(base):
    """Take N(0, s^2) for data.

    v = (sigma - (1 - sigma) s^2) x / V, V = (1 - sigma)^2 s^2 + sigma^2, as v = E[eps - x0 | x]; the flow
    keeps x / sqrt(V), as V' = 2 (sigma - (1 - sigma) s^2). What remains is the local error of Euler, of the
    step squared: four times less on twice the points. The teacher's own v in place of the map is wrong by far
    more.
    """
    s = 0.7

    def V(sigma: Tensor) -> Tensor:
        return (1 - sigma) ** 2 * s**2 + sigma**2

    def v(x: Tensor, sigma: Tensor) -> Tensor:
        return (sigma - (1 - sigma) * s**2) / V(sigma) * x

    losses, naive = [], []
    for scale in (4, 8, 16):
        keys = {"solver_steps": 10 * scale, "boundary_index": 6 * scale, "guidance": 3.0}
        method = make(
            base, **keys, huber_c=1e-9, temporal_weight=0.0
        )  # so that it is the mean of |made - wanted|
        sigma_e = method.sigmas[method.config.points.start]

        def to_the_end(x: Tensor, sigma: Tensor, sigma_e: Tensor = sigma_e) -> Tensor:
            there = sigma == sigma_e
            way = torch.where(there, 1.0, sigma_e - sigma)
            return torch.where(there, v(x, sigma), ((V(sigma_e) / V(sigma)).sqrt() - 1) / way * x)

        losses.append(exact_loss(method, v, to_the_end))
        naive.append(exact_loss(method, v, v))
    assert [a / b for a, b in pairwise(losses)] == pytest.approx([4, 4], rel=0.15)
    assert all(1.8 < a / b < 2.2 for a, b in pairwise(naive))
    assert naive[-1] > 10 * losses[-1]
