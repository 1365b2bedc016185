"""Self-forcing: the rollout and the sampler of a block-causal student.

They are compared with a float64 definition without a cache.
B batch, C channel, T frames, H W space.
"""

from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

import causal_reference as reference
import mlp
import pytest
import torch
from causal_reference import CONFIG
from test_wan import DeviceWatch, MetaRng, randomized, relative
from torch import Tensor

from fastdmd.batch import Batch, Cond
from fastdmd.causal import frame_blocks, sample_blocks
from fastdmd.denoiser import Denoiser
from fastdmd.flops import Shapes
from fastdmd.methods.dmd import DMD
from fastdmd.methods.score_distillation import CriticConfig
from fastdmd.models import net
from fastdmd.models.wan.causal import CausalWan
from fastdmd.models.wan.net import Wan
from fastdmd.rng import Rng
from fastdmd.rollout import Config, Window
from fastdmd.schedule import FlowSchedule

TIMES = torch.tensor([1.0, 0.8, 0.5], dtype=torch.float64)
SHAPE = (3, 6, 4, 4)
TOKENS = 5  # of text
BASE: dict[str, Any] = {"mode": "causal", "frames_per_block": 2}
CASES: list[dict[str, Any]] = [
    {},
    {"frames_per_block": 3},
    {"independent_first_frame": True, "frames_per_block": 5},  # 6 frames are no multiple of 5
    {"shared_exit_step": False},
    {"exit": "last"},
    {"context_noise": 0.3},
    {"grad_frames": 2},
    {"grad_frames": 3},  # a block with a frame that carries the loss keeps its gradient
    {"independent_first_frame": True, "frames_per_block": 1, "shared_exit_step": False, "context_noise": 0.1},
]
LENGTHS = {1: [1] * 6, 2: [2] * 3, 3: [3] * 2, 5: [1, 5]}  # of the blocks, by frames_per_block


class Call(NamedTuple):
    """One call of a block after a cache, as it came in."""

    x_t: Tensor
    model_t: list[float]
    first: int  # token of the block
    write: bool
    grad: bool


class Recorded(CausalWan):
    def __init__(self) -> None:
        super().__init__(CONFIG)
        self.calls: list[Call] = []

    def forward(self, x_t: Tensor, model_t: Tensor, cond: Cond, call: net.Call = net.PLAIN) -> net.Out:
        made = Call(x_t, model_t.tolist(), call.cache.tokens, call.write, torch.is_grad_enabled())
        self.calls.append(made)
        return super().forward(x_t, model_t, cond, call)


def make_rng(step: int = 0, samples: range = range(2)) -> Rng:
    return Rng(0, step, "student0", samples, "cpu")


def draws(step: int, n: int) -> list[int]:
    rng = make_rng(step)
    return [rng.shared_integer(len(TIMES)) for _ in range(n)]


# its three blocks exit at different steps, and a shared exit is neither the first nor the last
STEP = next(step for step in range(999) if draws(step, 3) == [1, 2, 0])


@pytest.fixture
def student(float64) -> Denoiser:
    torch.manual_seed(0)
    recorded = Recorded()
    randomized(recorded)
    return Denoiser(recorded.double(), FlowSchedule(3.0))


def make_batch(B: int = 2) -> Batch:
    text = Rng(0, 0, "data", range(B), "cpu").normal((TOKENS, CONFIG.text_dim)).double()
    return Batch(Cond(text), Cond(torch.zeros_like(text)), SHAPE)


def roll(student: Denoiser, step: int = STEP, grad: bool = True, **change: Any) -> mlp.Rolled:
    return mlp.roll(student, make_batch(), TIMES, Config(**BASE | change), make_rng(step), grad)


def definition(student: Denoiser, step: int = STEP, leak: bool = False, **change: Any) -> Tensor:
    keys = (
        {"exit": "uniform", "shared_exit_step": True, "context_noise": 0.0, "grad_frames": None}
        | BASE
        | change
    )

    def exits(rng: Rng, n: int) -> list[int]:
        if keys["exit"] == "last":
            return [2] * n
        return (
            [rng.shared_integer(3)] * n
            if keys["shared_exit_step"]
            else [rng.shared_integer(3) for _ in range(n)]
        )

    lengths = LENGTHS[keys["frames_per_block"]]
    assert sum(lengths) == SHAPE[1]
    text, rest = make_batch().cond.text, (keys["context_noise"], keys["grad_frames"], leak)
    return reference.rollout(student.net, text, SHAPE, TIMES.tolist(), make_rng(step), exits, lengths, *rest)


def gradient(student: Denoiser, x0_g: Tensor) -> Tensor:
    """Of all parameters in one vector, for a fixed random cotangent."""
    cotangent = torch.randn(x0_g.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((x0_g * cotangent).sum(), list(student.net.parameters()))
    return torch.cat([g.flatten() for g in found])


@pytest.mark.parametrize("change", CASES, ids=str)
def test_rollout_is_that_of_the_definition(student, change):
    """Values and gradients, with each key changed; and a key that were not read would leave it as it was."""
    made = roll(student, **change)
    got, wanted, base = gradient(student, made.x0_g), definition(student, **change), definition(student)
    assert relative(made.x0_g, wanted) <= 1e-10
    assert relative(got, gradient(student, wanted)) <= 1e-10
    assert (relative(got, gradient(student, base)) > 1e-3) == bool(change)


@pytest.mark.parametrize(
    "change", [{}, {"context_noise": 0.3}, {"exit": "last", "frames_per_block": 1}], ids=str
)
def test_no_gradient_flows_from_a_block_into_those_before(student, change):
    """The test above would tell: with the leak, values are the same and gradients are elsewhere."""
    kept, leaking = (definition(student, leak=leak, **change) for leak in (False, True))
    assert relative(kept, leaking) <= 1e-12
    assert relative(gradient(student, leaking), gradient(student, kept)) > 0.2


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("exit_step", range(3))
def test_calls(student, exit_step, first):
    """Call each block's steps to the exit, the last with gradient, and a context pass but for the last."""
    step = next(step for step in range(999) if draws(step, 1) == [exit_step])
    lengths = [1, 5] if first else [2, 2, 2]
    roll(student, step, frames_per_block=lengths[-1], independent_first_frame=bool(first), context_noise=0.25)
    expected, start = [], 0
    for length in lengths:
        walk = [
            (length, t, 4 * start, False, i == exit_step)
            for i, t in enumerate((1000, 800, 500)[: exit_step + 1])
        ]
        expected += [*walk, (length, 250, 4 * start, True, False)]
        start += length
    assert [(c.x_t.shape[2], c.model_t[0], c.first, c.write, c.grad) for c in student.net.calls] == expected[
        :-1
    ]
    assert all(c.model_t == [c.model_t[0]] * 2 for c in student.net.calls)


def test_what_is_held_is_the_clean_block_at_the_context_noise(student):
    """With fresh noise: not that of the walk, nor of another block."""
    x0_g = roll(student, context_noise=0.25).x0_g.detach()
    writes = [call for call in student.net.calls if call.write]
    noises = [(c.x_t - 0.75 * x0_g[:, :, 2 * i : 2 * i + 2]) / 0.25 for i, c in enumerate(writes)]
    assert len(noises) == 2
    assert all(0.8 < float(noise.std()) < 1.2 for noise in noises)
    seen = [*noises, *(c.x_t for c in student.net.calls if c.model_t[0] == 1000)]
    for i, one in enumerate(seen):
        for other in seen[:i]:
            assert abs(float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])) < 0.3
    assert torch.equal(*(roll(student, context_noise=0).x0_g[:, :, :2], x0_g[:, :, :2]))


def test_grad_frames_limits_gradient(student):
    """Blocks wholly before the last `grad_frames` frames keep none; a block in which they begin does."""
    for grad_frames, grads in (
        (2, [0, 0, 1]),
        (3, [0, 1, 1]),
        (4, [0, 1, 1]),
        (5, [1, 1, 1]),
        (None, [1, 1, 1]),
    ):
        student.net.calls.clear()
        x0_g = roll(student, grad_frames=grad_frames).x0_g
        exits = [call.grad for call in student.net.calls if call.model_t[0] == 800]
        assert exits == [bool(g) for g in grads]
        for i, g in enumerate(grads):
            found = torch.autograd.grad(
                x0_g[:, :, 2 * i : 2 * i + 2].sum(),
                student.net.proj_out.weight,
                retain_graph=True,
                allow_unused=True,
            )
            assert (found[0] is not None and bool(found[0].abs().max() > 0)) == bool(g)


def test_no_gradient_when_none_is_asked_for(student):
    made = roll(student, grad=False)
    assert not made.x0_g.requires_grad
    assert not any(call.grad for call in student.net.calls)
    assert torch.equal(made.x0_g, roll(student).x0_g)


def test_exits_are_drawn_for_the_video_or_for_each_block(student):
    def steps(**change: Any) -> tuple[list[int], mlp.Rolled]:
        student.net.calls.clear()
        made = roll(student, **change)
        walks = [[c for c in student.net.calls if c.first == 8 * i and not c.write] for i in range(3)]
        return [len(walk) - 1 for walk in walks], made

    shared, made = steps()
    assert shared == [1, 1, 1]
    assert made.window == Window(0.8, 0.5)
    own, made = steps(shared_exit_step=False)
    assert own == [1, 2, 0]
    assert made.window == Window(1.0, 0.0)  # holds every block's own window
    last, made = steps(shared_exit_step=False, exit="last")
    assert last == [2, 2, 2]
    assert made.window == Window(0.5, 0.0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_samples_do_not_know_of_one_another(student, checkpointing):
    """A batch of two is two batches of one, values and gradients, in one cache after the other."""
    student.net.recompute_blocks("full" if checkpointing else "none")
    config, both = Config(**BASE, context_noise=0.1), make_batch()
    made = mlp.roll(student, both, TIMES, config, make_rng(STEP)).x0_g
    total = gradient(student, made)
    cotangent = torch.randn(made.shape, generator=torch.Generator().manual_seed(1))
    for i in range(2):
        alone = Batch(Cond(both.cond.text[i : i + 1]), Cond(both.uncond.text[i : i + 1]), SHAPE)
        one = mlp.roll(student, alone, TIMES, config, make_rng(STEP, range(i, i + 1))).x0_g
        assert relative(one, made[i : i + 1]) <= 1e-12
        grads = torch.autograd.grad((one * cotangent[i : i + 1]).sum(), list(student.net.parameters()))
        total = total - torch.cat([g.flatten() for g in grads])
    assert float(total.abs().max().detach()) <= 1e-10


def test_videos_share_a_cache_and_nothing_else(student):
    first = roll(student, context_noise=0.1)
    cache = student.net._cache
    other = roll(student, STEP + 1)
    again = roll(student, context_noise=0.1)
    assert student.net._cache is cache
    assert torch.equal(first.x0_g, again.x0_g)
    assert not torch.equal(first.x0_g, other.x0_g)
    # three graphs are alive, and the later videos wrote to the cache
    assert relative(gradient(student, first.x0_g), gradient(student, again.x0_g)) == 0


def test_a_block_does_not_depend_on_what_comes_after(student):
    """The first four frames of six are a video of four, so the exits apart videos may go on for ever."""
    longer = roll(student).x0_g
    noise = make_rng(STEP)
    noise.shared_integer(3)
    short = noise.normal(SHAPE)[:, :, :4]
    blocks = frame_blocks(4, 2)
    x0 = sample_blocks(student, short, TIMES[:2], blocks, 0.0, make_batch().cond, noise)
    assert relative(x0, longer[:, :, :4]) <= 1e-12


def test_sampling_is_the_rollout_to_the_last_step(student):
    """What training simulates is what validation does."""
    change: dict[str, Any] = {"independent_first_frame": True, "frames_per_block": 5, "context_noise": 0.1}
    made, rng = roll(student, exit="last", **change), make_rng(STEP)
    blocks = Config(**BASE | change).blocks(6)
    sampled = sample_blocks(student, rng.normal(SHAPE), TIMES, blocks, 0.1, make_batch().cond, rng)
    assert torch.equal(sampled, made.x0_g)
    assert not sampled.requires_grad


def test_flops_are_counted(student):
    """By the tokens that each call sees; the exit step's backward is two forwards more."""

    def forward(shape: Sequence[int], tokens: int) -> int:
        return student.net.flops(shape, TOKENS, net.Call(cache=SimpleNamespace(tokens=tokens)))

    roll(student)
    counted = Shapes(student.net, True, torch.device("cpu"))
    roll(Denoiser(counted, student.schedule))
    calls = student.net.calls
    assert sum(counted.count) == sum(forward(c.x_t.shape, c.first) * (3 if c.grad else 1) for c in calls)
    L, width, layers = 8, CONFIG.width, CONFIG.num_layers
    alone = student.net.flops((2, 3, 2, 4, 4), TOKENS)
    assert forward((2, 3, 2, 4, 4), 8) - alone == 2 * layers * 4 * L * 8 * width


@pytest.mark.parametrize(
    ("frames", "k", "independent", "lengths"),
    [
        (21, 3, False, [3] * 7),
        (6, 6, False, [6]),
        (22, 3, True, [1] + [3] * 7),
        (1, 3, True, [1]),
        (3, 1, True, [1] * 3),
    ],
)
def test_layout(frames, k, independent, lengths):
    blocks = frame_blocks(frames, k, independent)
    assert [b.stop - b.start for b in blocks] == lengths
    assert (blocks[0].start, blocks[-1].stop) == (0, frames)
    assert all(a.stop == b.start for a, b in pairwise(blocks))


@pytest.mark.parametrize(
    ("frames", "independent", "reason"), [(7, False, "not a"), (6, True, r"not 1 \+ a"), (0, True, "")]
)
def test_layout_that_does_not_come_out_even(frames, independent, reason):
    with pytest.raises(ValueError, match=rf"{frames} latent frames .*{reason}.*frames_per_block = 3"):
        frame_blocks(frames, 3, independent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_self_forcing_has_no_float64_and_no_sync(dtype):
    """On the meta device, which refuses whatever would have to read a value."""
    method = DMD(
        DMD.Config(name="dmd", denoising_timesteps=(1000, 757, 522), guidance=3.0),
        FlowSchedule(5.0),
        rollout=Config(**BASE, shared_exit_step=False, context_noise=0.1, grad_frames=3),
        critic=CriticConfig(),
    )
    nets = {}
    for role in method.config.roles:
        with torch.device("meta"):
            made = (CausalWan if role == "student" else Wan)(CONFIG)
        net.cast(made, dtype)
        made.recompute_blocks("full")
        nets[role] = Denoiser(made, FlowSchedule(5.0))
    text = Cond(torch.empty(3, TOKENS, CONFIG.text_dim, device="meta"))
    carry = {}
    with DeviceWatch() as watch:
        for phase in ("student", "critic"):
            for role, denoiser in nets.items():
                denoiser.learn(role == phase)
            loss, _ = mlp.loss(method, phase, nets, Batch(text, text, SHAPE), MetaRng(3), carry)
            loss.backward()
            assert all(p.grad is not None for p in nets[phase].net.parameters())
    assert {"addmm", "native_layer_norm_backward", "copy_"} <= watch.names
    assert torch.float64 not in watch.dtypes
    assert "_local_scalar_dense" not in watch.names
