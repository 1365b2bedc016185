"""dmd_loss and sid_loss against closed forms in float64: gradients, not only values.

In the Gaussian world the student samples N(m_g, s_g^2) and the teacher's data are N(m, s^2), so every score
is known. B batch, C channel, T frames, H W space.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdmd_kernels import dmd_loss, guide, sid_loss

SHAPE = (3, 2, 4, 2, 3)  # B, C, T, H, W
TENSORS = ("x0_g", "z", "F_fake", "F_c", "F_u")


def column(values: Tensor | float) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64).view(-1, 1, 1, 1, 1)


@pytest.fixture
def given() -> dict[str, Tensor]:
    """Arguments of either loss: tensors [B, ..] and per-sample a, b, w [B], float64."""
    g = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(SHAPE, generator=g, dtype=torch.float64) for name in TENSORS}
    scalars = {"a": [1.0, 0.8, 1.3], "b": [-0.2, -0.5, -0.9], "w": [1.5, 4.0, 6.0]}
    return {**tensors, **{name: torch.tensor(value, dtype=torch.float64) for name, value in scalars.items()}}


def predictions(given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(x0_fake, x0_real), the definition: guidance between two denoised samples."""
    a, b, w = (column(given[name]) for name in "abw")
    fake, cond, uncond = (a * given["z"] + b * given[name] for name in ("F_fake", "F_c", "F_u"))
    return fake, uncond + w * (cond - uncond)


def leaves(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.clone().requires_grad_(name in TENSORS) for name, x in given.items()}


def dmd_gradient(given: dict[str, Tensor], **more: Tensor) -> Tensor:
    x = leaves(given)
    dmd_loss(**x, **more)[0].backward()
    assert x["x0_g"].grad is not None
    return x["x0_g"].grad


# --------------------------------------------------------------------------------------------------- dmd_loss


def test_dmd_gradient_is_that_of_the_definition(given):
    fake, real = predictions(given)
    sums = [float((given["x0_g"][i] - real[i]).abs().sum()) for i in range(3)]
    want = (fake - real) / column(sums)  # mean|p| times numel of a sample is a sum
    torch.testing.assert_close(dmd_gradient(given), want / 3, rtol=1e-12, atol=0)


def test_dmd_value_and_metrics(given):
    fake, real = predictions(given)
    normalizer = (given["x0_g"] - real).abs().mean((1, 2, 3, 4))
    grad = (fake - real) / column(normalizer)
    loss, metrics = dmd_loss(**given)
    torch.testing.assert_close(loss, 0.5 * grad.square().mean(), rtol=1e-12, atol=0)
    want = {
        "dmd_grad_abs": grad.abs().mean(),
        "normalizer": normalizer.mean(),
        "score_gap": ((fake - real) / column(given["b"])).abs().mean(),
    }
    assert metrics.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(metrics[name], value, rtol=1e-12, atol=0)


def test_dmd_gradient_is_a_finite_difference_of_the_loss_to_a_fixed_target(given):
    fake, real = predictions(given)
    target = given["x0_g"] - (fake - real) / (given["x0_g"] - real).abs().mean((1, 2, 3, 4), keepdim=True)

    def loss(x0: Tensor) -> Tensor:
        return 0.5 * (x0 - target).square().mean()

    gradient, h = dmd_gradient(given), 1e-5
    for index in [(0, 0, 0, 0, 0), (1, 1, 2, 0, 1), (2, 1, 3, 1, 2)]:
        step = torch.zeros(SHAPE, dtype=torch.float64)
        step[index] = h
        difference = (loss(given["x0_g"] + step) - loss(given["x0_g"] - step)) / (2 * h)
        torch.testing.assert_close(gradient[index], difference, rtol=1e-7, atol=1e-12)


def test_dmd_gradient_reaches_the_student_only(given):
    x = leaves(given)
    loss, metrics = dmd_loss(**x)
    loss.backward()
    assert [name for name in TENSORS if x[name].grad is not None] == ["x0_g"]
    assert not any(value.requires_grad for value in metrics.values())


def test_dmd_normalizer_is_of_each_sample_alone(given):
    before = dmd_gradient(given)
    louder = dict(
        given, x0_g=given["x0_g"] * torch.tensor([1.0, 1.0, 9.0], dtype=torch.float64).view(-1, 1, 1, 1, 1)
    )
    after = dmd_gradient(louder)
    assert torch.equal(after[:2], before[:2])
    assert not torch.allclose(after[2], before[2])


def test_dmd_mask_keeps_the_mean_over_what_is_left(given):
    mask = torch.tensor([False, False, True, True]).view(1, 1, -1, 1, 1)
    full, masked = dmd_gradient(given), dmd_gradient(given, mask=mask)
    assert not masked[:, :, :2].any()
    torch.testing.assert_close(masked[:, :, 2:], 2 * full[:, :, 2:], rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss", [dmd_loss, lambda **x: sid_loss(**x, alpha=1.2)], ids=["dmd", "sid"])
class TestArguments:
    """What both losses promise of their arguments."""

    def test_scalars_may_be_numbers_or_per_sample(self, given, loss):
        same = {"a": 0.7, "b": -0.4, "w": 3.0}
        numbers = loss(**(given | same))[0]
        columns = loss(
            **given | {name: torch.full((3,), v, dtype=torch.float64) for name, v in same.items()}
        )[0]
        assert torch.equal(numbers, columns)
        one_by_one = [loss(**{name: x[i : i + 1] for name, x in given.items()})[0] for i in range(3)]
        torch.testing.assert_close(loss(**given)[0], torch.stack(one_by_one).mean(), rtol=1e-12, atol=0)

    def test_bfloat16_is_computed_in_float32(self, given, loss):
        short = {name: x.bfloat16() if name in TENSORS else x.float() for name, x in given.items()}
        long = {name: x.float() for name, x in short.items()}
        short, long = leaves(short), leaves(long)
        results = [loss(**x) for x in (short, long)]
        for value, _ in results:
            assert value.dtype == torch.float32
            value.backward()
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(short["x0_g"].grad, long["x0_g"].grad.bfloat16())

    def test_without_guidance_the_unconditional_output_is_left_out(self, given, loss):
        off = given | {"w": 1.0}
        torch.testing.assert_close(loss(**off | {"F_u": None})[0], loss(**off)[0], rtol=1e-12, atol=0)
        # a tensor is not looked at: that would wait for the device
        for w in (4.0, given["w"], torch.ones(3)):
            with pytest.raises(ValueError, match="needs F_u"):
                loss(**given | {"F_u": None, "w": w})

    @pytest.mark.parametrize("name", TENSORS)
    def test_shapes_that_differ_raise(self, given, loss, name):
        with pytest.raises(ValueError, match="shapes differ"):
            loss(**given | {name: given[name][:, :, :1]})  # would broadcast

    @pytest.mark.parametrize("name", ["a", "b", "w"])
    def test_per_sample_scalars_of_another_batch_raise(self, given, loss, name):
        with pytest.raises(ValueError, match="per-sample"):
            loss(**given | {name: given[name][:1]})


def test_dmd_where_student_critic_and_teacher_agree_exactly_the_gradient_is_zero(given):
    """0 / 0 of one sample stays its own: no update from it, and no harm to the others."""
    _, real = predictions(given)
    agree = {name: x.clone() for name, x in given.items()}
    agree["F_fake"][1] = guide(given["F_u"][1], given["F_c"][1], float(given["w"][1]))
    agree["x0_g"][1] = (column(given["a"]) * given["z"] + column(given["b"]) * agree["F_fake"])[1]
    assert torch.allclose(agree["x0_g"][1], real[1])
    gradient, before = dmd_gradient(agree), dmd_gradient(given)
    assert not gradient[1].any()
    assert torch.equal(gradient[[0, 2]], before[[0, 2]])


def test_dmd_score_gap_at_a_normalizer_of_zero_is_not_hidden():
    """The loss overflows, and a trainer that looks at it stops."""
    x0, F = torch.ones(1, 4), torch.zeros(1, 4)
    assert dmd_loss(x0, x0, F + 1, F, None, 1.0, -1.0, 1.0)[0].isinf()


def test_guidance_is_of_the_unconditional_side():
    u, c = torch.tensor([1.0]), torch.tensor([3.0])
    assert [guide(u, c, w).item() for w in (0.0, 1.0, 4.0)] == [1.0, 3.0, 9.0]


# ----------------------------------------------------------------------------------------- the Gaussian world

ALPHA, SIGMA = 0.35, 0.65  # flow, t = 0.65: x0 = z - sigma F
TEACHER = (0.4, 0.7)  # mean and standard deviation of its data
STUDENT = (1.1, 0.5)


def quadrature() -> tuple[Tensor, Tensor, Tensor]:
    """Return Gauss-Hermite nodes (xi, eps) [N] of two standard normals, and weights, exact up to degree 7."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(4)
    x, w = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
    xi, eps = torch.cartesian_prod(x, x).T
    return xi, eps, torch.outer(w, w).flatten()


def optimal_F(z: Tensor, mean: Tensor | float, std: Tensor | float) -> Tensor:
    """Return the velocity E[eps - x0 | z] of x0 ~ N(mean, std^2), in float64."""
    variance = ALPHA**2 * std**2 + SIGMA**2
    x0 = mean + ALPHA * std**2 * (z - ALPHA * mean) / variance
    eps = SIGMA * (z - ALPHA * mean) / variance
    return eps - x0


def noised_kl(m_g: Tensor, s_g: Tensor, mean: float, std: float) -> Tensor:
    """KL(N(alpha m_g, v_g) || N(alpha m, v)) of the noised laws, closed form."""
    v_g, v = ALPHA**2 * s_g**2 + SIGMA**2, ALPHA**2 * std**2 + SIGMA**2
    return 0.5 * (v_g / v + ALPHA**2 * (m_g - mean) ** 2 / v - 1 - torch.log(v_g / v))


@pytest.mark.parametrize("w", [1.0, 4.0])
def test_dmd_gradient_is_that_of_the_kl_of_the_noised_laws(w):
    """Times its normaliser, and (alpha / sigma)^2 from x0 to score.

    With the pathwise dx0/d(m_g, s_g), to 1e-9. Two teachers N(m_u, s^2) and N(m_c, s^2) guide to the Gaussian
    N(m_u + w (m_c - m_u), s^2).
    """
    m_g, s_g = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in STUDENT)
    m_u, s = -0.3, TEACHER[1]
    m_real = m_u + w * (TEACHER[0] - m_u)
    xi, eps, weights = quadrature()
    x0 = (m_g + s_g * xi).detach().requires_grad_()
    z = ALPHA * x0.detach() + SIGMA * eps
    F_fake, F_c, F_u, F_real = (
        optimal_F(z, *law)[:, None] for law in (STUDENT, (TEACHER[0], s), (m_u, s), (m_real, s))
    )
    # a sample each: the normaliser is |x0 - x0_real|
    dmd_loss(x0[:, None], z[:, None], F_fake, F_c, F_u if w != 1 else None, 1.0, -SIGMA, w)[0].backward()
    per_sample = x0.grad * len(x0) * (x0.detach() - (z - SIGMA * F_real[:, 0])).abs() * (ALPHA / SIGMA) ** 2
    got = torch.stack([(weights * per_sample).sum(), (weights * per_sample * xi).sum()])
    want = torch.stack(torch.autograd.grad(noised_kl(m_g, s_g, m_real, s), (m_g, s_g)))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)

    def kl(dm: float, ds: float) -> Tensor:
        return noised_kl(m_g.detach() + dm, s_g.detach() + ds, m_real, s)

    h = 1e-5
    differences = torch.stack([kl(h, 0) - kl(-h, 0), kl(0, h) - kl(0, -h)]) / (2 * h)
    torch.testing.assert_close(got, differences, rtol=0, atol=1e-8)


# --------------------------------------------------------------------------------------------------- sid_loss


def sid_flow(given: dict[str, Tensor], alpha: float) -> Tensor:
    """sigma^2 (v_f - v_r) [(u - v_f) + (1 - alpha)(v_f - v_r)] / normaliser, u = eps - x0_g."""
    sigma, v_f = -column(given["b"]), given["F_fake"]
    v_r = given["F_u"] + column(given["w"]) * (given["F_c"] - given["F_u"])
    u = (given["z"] - given["x0_g"]) / sigma
    normalizer = (sigma * (u - v_r)).abs().detach().mean((1, 2, 3, 4), keepdim=True)
    return (sigma**2 * (v_f - v_r) * ((u - v_f) + (1 - alpha) * (v_f - v_r)) / normalizer).mean()


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_sid_is_its_flow_form_in_value_and_in_every_gradient(given, alpha):
    given["a"] = torch.ones(3, dtype=torch.float64)
    x, y = leaves(given), leaves(given)
    got, want = sid_loss(**x, alpha=alpha)[0], sid_flow(y, alpha)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-14)
    got.backward()
    want.backward()
    for name in TENSORS:
        assert y[name].grad.any()
        torch.testing.assert_close(x[name].grad, y[name].grad, rtol=1e-10, atol=1e-14)


def test_sid_of_eps_prediction_is_its_x0_form(given):
    """a is not 1: the definition in x0, with a fixed normaliser under finite differences."""
    alpha, h = 1.2, 1e-6
    _, real = predictions(given)
    normalizer = (given["x0_g"] - real).abs().mean((1, 2, 3, 4), keepdim=True)

    def loss(given: dict[str, Tensor]) -> Tensor:
        fake, real = predictions(given)
        return ((real - fake) * ((real - given["x0_g"]) - alpha * (real - fake)) / normalizer).mean()

    x = leaves(given)
    got, metrics = sid_loss(**x, alpha=alpha)
    torch.testing.assert_close(got, loss(given), rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(metrics["normalizer"], normalizer.mean(), rtol=1e-12, atol=0)
    got.backward()
    for name in TENSORS:
        step = h * torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        difference = loss(given | {name: given[name] + step}) - loss(given | {name: given[name] - step})
        torch.testing.assert_close(2 * (x[name].grad * step).sum(), difference, rtol=1e-7, atol=1e-14)


def gaussian_sid(
    alpha: float, critic: tuple[float, float], stop_scores: bool = False
) -> tuple[Tensor, Tensor]:
    """SiD in the Gaussian world: its value times the normaliser, in expectation; and d(loss)/d(m_g, s_g)."""
    m_g, s_g = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in STUDENT)
    xi, eps, weights = quadrature()
    x0 = m_g + s_g * xi
    z = ALPHA * x0 + SIGMA * eps
    F_fake, F_c = optimal_F(z, *critic), optimal_F(z, *TEACHER)
    if stop_scores:
        z, F_fake, F_c = z.detach(), F_fake.detach(), F_c.detach()
    rows = (x[:, None, None] for x in (x0, z, F_fake, F_c))
    losses = torch.stack(
        [sid_loss(*row, None, 1.0, -SIGMA, 1.0, alpha)[0] for row in zip(*rows, strict=True)]
    )
    normalizers = (x0 - (z - SIGMA * F_c)).abs().detach()
    gradient = torch.autograd.grad((weights * losses).sum(), (m_g, s_g))
    return (weights * losses * normalizers).sum().detach(), torch.stack(gradient)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2])
def test_sid_with_a_true_critic_is_the_fisher_divergence(alpha):
    """The loss is (1 - alpha) E[(x0_real - x0_fake)^2].

    E[(x0_fake - x0_g) f(z)] = 0 for x0_fake = E[x0_g | z].
    """
    xi, eps, weights = quadrature()
    z = ALPHA * (STUDENT[0] + STUDENT[1] * xi) + SIGMA * eps
    gap = SIGMA * (optimal_F(z, *STUDENT) - optimal_F(z, *TEACHER))
    value, _ = gaussian_sid(alpha, critic=STUDENT)
    torch.testing.assert_close(value, (1 - alpha) * (weights * gap**2).sum(), rtol=0, atol=1e-12)


def test_sid_is_zero_at_the_optimum():
    value, gradient = gaussian_sid(1.0, critic=TEACHER)
    assert value == 0
    assert gradient.abs().max() < 1e-15


def test_sid_gradient_flows_through_the_scores():
    value, through = gaussian_sid(1.0, critic=(0.9, 0.6))
    same, stopped = gaussian_sid(1.0, critic=(0.9, 0.6), stop_scores=True)
    assert value == same
    assert (through - stopped).norm() / through.norm() > 0.05
