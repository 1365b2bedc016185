"""Flow matching against its definition. B batch."""

from types import SimpleNamespace

import mlp
import pytest
import torch

from fastdmd.batch import Batch
from fastdmd.methods.flow import Config, Flow
from fastdmd.rng import Rng
from fastdmd.schedule import FlowSchedule

BATCH = mlp.make_batch()


def make_rng(step: int = 0) -> Rng:
    return Rng(0, step, "student0", range(4), "cpu")


def make(distribution: str = "uniform", flow_shift: float = 3.0) -> Flow:
    return Flow(Config(name="flow", timestep_distribution=distribution), FlowSchedule(flow_shift))


def times(method: Flow, u: torch.Tensor) -> torch.Tensor:
    """Return the t, in [0, 1], that the network is conditioned on for draws u of the uniform law."""
    nets, batch = mlp.three_nets(FlowSchedule(3.0)), mlp.make_batch(len(u))
    rng = SimpleNamespace(uniform=lambda: u, normal=lambda shape: torch.zeros(len(u), *shape))
    mlp.loss(method, "student", nets, batch, rng, {})
    return nets["student"].net.calls[0].model_t.double() / 1000


def test_loss_and_gradient_are_those_of_the_definition():
    """mean((F((1 - t) x0 + t eps, 1000 t) - (eps - x0))^2), t shifted, one a sample."""
    nets, other = mlp.three_nets(FlowSchedule(3.0)), mlp.MLP(seed=0)
    loss, _ = mlp.loss(make(), "student", nets, BATCH, make_rng(), {})
    loss.backward()
    rng = make_rng()
    u, eps = rng.uniform().float(), rng.normal(mlp.SHAPE)
    t = 3 * u / (1 + 2 * u)
    assert len(t.unique()) == 4
    c = t.view(-1, 1, 1, 1, 1)
    F = other((1 - c) * BATCH.x0 + c * eps, 1000 * t, BATCH.cond).F
    want = (F - (eps - BATCH.x0)).square().mean()
    want.backward()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(mlp.gradient(nets["student"].net), mlp.gradient(other))


@pytest.mark.parametrize("flow_shift", [1.0, 5.0])
def test_timestep_distributions(flow_shift):
    """Shifting multiplies the odds; logit-normal: the logit is standard normal."""
    u = torch.linspace(0.01, 0.99, 41, dtype=torch.float64)
    uniform, logit_normal = (times(make(name, flow_shift), u) for name in ("uniform", "logit_normal"))
    torch.testing.assert_close(uniform / (1 - uniform), flow_shift * u / (1 - u), rtol=1e-4, atol=0)
    normal = torch.distributions.Normal(torch.tensor(0.0).double(), 1.0).icdf(u)
    torch.testing.assert_close(
        logit_normal.logit(), normal + torch.tensor(flow_shift).log(), rtol=1e-4, atol=1e-4
    )


def test_a_draw_of_zero_is_finite():
    assert times(make("logit_normal"), torch.zeros(1, dtype=torch.float64)).isfinite().all()


def test_one_phase_and_no_few_step_sampler():
    method = make()
    assert method.phases(0) == method.phases(7) == ("student",)
    assert method.config.roles == {"student": "train"}
    assert method.times is None


def test_needs_latents():
    with pytest.raises(ValueError, match="trains on latents"):
        mlp.loss(
            make(),
            "student",
            mlp.three_nets(FlowSchedule(3.0)),
            Batch(BATCH.cond, BATCH.uncond, mlp.SHAPE),
            make_rng(),
            {},
        )
