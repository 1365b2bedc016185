"""Flow matching of a causal network by teacher forcing, and its many-step sampler, without a cache in sight.

B batch, C channel, T frames, H W space.
"""

from itertools import pairwise

import mlp
import pytest
import torch
from causal_reference import CONFIG
from test_wan import randomized
from torch import Tensor

from fastdmd.batch import Batch, Cond
from fastdmd.causal import ode_blocks
from fastdmd.denoiser import Denoiser
from fastdmd.methods.flow import Config, Flow
from fastdmd.models.net import Call
from fastdmd.models.wan.causal import CausalWan
from fastdmd.rng import Rng
from fastdmd.schedule import FlowSchedule

SHAPE = (3, 6, 4, 4)
SCHEDULE = FlowSchedule(3.0)
BLOCKS = [slice(0, 2), slice(2, 4), slice(4, 6)]


def make_rng(step: int) -> Rng:
    return Rng(0, step, "student0", range(2), "cpu")


def step_at(block: int) -> int:
    """Return a step whose draw is that block."""
    return next(step for step in range(99) if make_rng(step).shared_integer(3) == block)


@pytest.fixture
def student(float64) -> Denoiser:
    torch.manual_seed(0)
    net = CausalWan(CONFIG)
    randomized(net)
    return Denoiser(net.double(), SCHEDULE)


@pytest.fixture
def batch() -> Batch:
    g = torch.Generator().manual_seed(1)
    text, x0 = (torch.randn(2, *size, generator=g).double() for size in ((5, CONFIG.text_dim), SHAPE))
    return Batch(Cond(text), Cond(torch.zeros_like(text)), SHAPE, x0)


def gradient(net: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("block", [0, 1, 2])
def test_loss_and_gradient_are_those_of_one_block_after_clean_ones(student, batch, block):
    """Gradient flows into the keys and values of the clean blocks too, unlike in a rollout."""
    step, frames = step_at(block), BLOCKS[block]
    method = Flow(Config(name="flow", frames_per_block=2), SCHEDULE)
    loss, _ = mlp.loss(method, "student", {"student": student}, batch, make_rng(step), {})
    loss.backward()
    got = gradient(student.net)
    student.net.zero_grad()

    rng = make_rng(step)
    rng.shared_integer(3)
    u = rng.uniform()
    t = 3 * u / (1 + 2 * u)
    x0 = batch.x0[:, :, frames]
    eps = rng.normal(x0.shape[1:]).double()
    c = t.view(-1, 1, 1, 1, 1)
    video = torch.cat([batch.x0[:, :, : frames.start], (1 - c) * x0 + c * eps], dim=2)
    model_t = torch.zeros(2, block + 1, dtype=torch.float64)
    model_t[:, block] = 1000 * t
    F = student.net(video, model_t, batch.cond, Call(blocks=(2,) * (block + 1))).F[:, :, frames]
    want = (F - (eps - x0)).square().mean()
    want.backward()
    torch.testing.assert_close(loss, want, rtol=1e-9, atol=0)
    expected = gradient(student.net)
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-7, atol=1e-10)


def test_every_block_has_its_turn():
    drawn = {make_rng(step).shared_integer(3) for step in range(30)}
    assert drawn == {0, 1, 2}


def test_the_many_step_sampler_is_euler_after_clean_blocks(student, batch):
    grid = torch.tensor([1.0, 0.6, 0.3, 0.0], dtype=torch.float64)
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(2)).double()
    with torch.no_grad():
        got = ode_blocks(student, noise, grid, BLOCKS, batch.cond)
        made: list[Tensor] = []
        for i, frames in enumerate(BLOCKS):
            x = noise[:, :, frames]
            for t, t_next in pairwise(grid.tolist()):
                model_t = torch.tensor([[0.0] * i + [1000 * t]] * 2, dtype=torch.float64)
                video = torch.cat([*made, x], dim=2)
                v = student.net(video, model_t, batch.cond, Call(blocks=(2,) * (i + 1))).F[:, :, frames]
                x = x + (t_next - t) * v
            made.append(x)
    torch.testing.assert_close(got, torch.cat(made, dim=2), rtol=1e-9, atol=1e-9)
