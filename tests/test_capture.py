"""What a captured step needs: a phase's loss is one graph per exit step, without reads and new constants.

It is traced with aot_eager, which is quick; host reads and device constants are counted on the meta device,
where a read is refused.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import DETAIL, make_config
from torch import Tensor

from fastdmd.batch import Batch, Cond
from fastdmd.capture import Transfers
from fastdmd.denoiser import Denoiser
from fastdmd.models.wan.layers import WanConfig
from fastdmd.models.wan.net import Wan
from fastdmd.rng import Rng
from fastdmd.run import Run, build
from fastdmd.schedule import FlowSchedule, coeffs
from fastdmd.warm import MetaRng, empty_cond, nets_on_meta

GAN = ("method.gan_weight=0.005", "method.gan_layers=[0]", "optim.disc.lr=1e-3")
VSA = ("vsa={sparsity=0.5, tile=[2, 2, 2]}", "model.attention.student='vsa'", "model.attention.critic='vsa'")
CASES: dict[str, tuple[str, ...]] = {
    "flow": ("flow",),
    "causal_flow": ("causal_flow",),
    "dmd": ("dmd",),
    "dmd_gan": ("dmd", *GAN),
    "dmd_vsa": ("dmd", *VSA),
    "dmd_data": ("dmd", "rollout.mode='data'"),
    "causal_sid": ("causal_sid",),
    "dcm": ("dcm",),
    "dcm_detail": ("dcm", *DETAIL),
    "dmd_lora": ("dmd_lora",),
    "lcm": ("lcm",),
    "lcm_lora": ("lcm_lora",),
    "sdxl_dmd": ("sdxl_dmd",),
    "sdxl_dmd_gan": ("sdxl_dmd", *GAN),
    "sdxl_lcm": ("sdxl_lcm",),
    "sdxl_lcm_lora": ("sdxl_lcm_lora",),
}
SHORT = ("dmd", "lcm")  # in `make test`; the others in `make capture`
B = 2


class Graphs:
    """A compiler that counts what it is given, and runs it as it is."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        self.count += 1
        return aot_eager(graph, inputs)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def steps(run: Run, count: int) -> Iterator[tuple[int, str, Batch, Any, dict[str, Any]]]:
    """(step, phase, batch, draws, carry) of steps as the trainer makes them."""
    for step in range(count):
        batch, carry = run.world.batch(Rng(0, step, "data", range(B), "cpu")), {}
        for index, phase in enumerate(run.method.phases(step)):
            rng = Rng(0, step, f"{phase}{index}", range(B), "cpu")
            for role, denoiser in run.nets.items():
                denoiser.learn(role in run.method.trains(phase))
            yield step, phase, batch, run.method.draw(phase, rng, batch.latent_shape, carry), carry


def exits(draws: Any) -> Any:
    """Return what a graph may depend on: where a rollout is left, and how many clean blocks come before."""
    rollout = getattr(draws, "rollout", None)
    if rollout is not None:
        return tuple(rollout.exits)
    return len(getattr(draws, "before", ()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case if case in SHORT else pytest.param(case, marks=pytest.mark.campaign) for case in CASES]
)
def test_a_phase_is_one_graph_per_exit_step(tmp_path, case):
    """Without a break, over some steps; and it computes what the uncompiled loss does, with its gradients."""
    torch.manual_seed(0)
    run = build(make_config(tmp_path, *CASES[case]))
    compiled, graphs, seen = {}, {}, {}
    for step, phase, batch, draws, carry in steps(run, 4 if case in SHORT else 10):
        if phase not in compiled:
            graphs[phase] = Graphs()
            compiled[phase] = torch.compile(
                run.method.loss, fullgraph=True, dynamic=False, backend=graphs[phase]
            )
            seen[phase] = Counter()
        kept = dict(carry)
        plain, _ = run.method.loss(phase, run.nets, batch, draws, kept)
        before = graphs[phase].count
        loss, _ = compiled[phase](phase, run.nets, batch, draws, carry)
        torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-7)
        seen[phase][exits(draws)] += graphs[phase].count - before
        if step < 2:
            trained = [p for role in run.method.trains(phase) for p in run.nets[role].trainable.values()]
            ours = torch.autograd.grad(loss, trained, allow_unused=True)
            theirs = torch.autograd.grad(plain, trained, allow_unused=True)
            far = [
                (a - b).norm() for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None
            ]
            size = torch.stack([b.norm() for b in theirs if b is not None]).norm()
            assert torch.stack(far).norm() <= 1e-5 * size
    for phase, counted in seen.items():
        assert set(counted.values()) == {1}, (phase, counted)


@pytest.mark.slow
def test_six_calls_of_a_denoiser_are_one_graph_and_ten_sparsities_two():
    config = WanConfig(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, ffn_dim=40, in_channels=3,
        out_channels=3, text_dim=24,
        freq_dim=32,
    )  # fmt: skip
    schedule, x_t = FlowSchedule(3.0), torch.randn(B, 3, 4, 12, 12)
    cond = Cond(torch.randn(B, 7, 24))
    for tile, most in ((None, 1), ((2, 2, 2), 2)):
        denoiser, graphs = Denoiser(Wan(config, tile), schedule), Graphs()
        denoiser.net.prepare(x_t.shape, torch.device("cpu"), torch.float32)
        raw = torch.compile(denoiser.raw, fullgraph=True, backend=graphs)
        for i in range(10 if tile else 6):
            denoiser.keep(i / 12, x_t.shape[1:])
            c = coeffs(schedule, torch.full((B,), 0.1 + i / 12, dtype=torch.float64), x_t)
            torch.testing.assert_close(raw(x_t, c, cond), denoiser.raw(x_t, c, cond), rtol=1e-4, atol=1e-5)
        assert graphs.count <= most


@pytest.mark.parametrize("case", CASES)
def test_a_phase_reads_nothing_and_makes_no_constant(tmp_path, case):
    """Run on the meta device from the draws to the end of the backward; coefficients come by one copy."""
    config = make_config(tmp_path, *CASES[case])
    method, nets = config.make_method(), nets_on_meta(config, config.make_method())
    shape = config.latent_shape()
    with torch.device("meta"):
        cond = empty_cond(B, config.family, nets["student"].net.config, config.data.resolution)
        if config.method.guidance_embedding:
            cond = Cond(cond.text, cond.pooled, cond.time_ids)
        x0 = torch.empty(B, *shape)
    batch, carry = Batch(cond, cond, shape, x0), {}
    for index, phase in enumerate(dict.fromkeys(method.phases(0))):
        for role, denoiser in nets.items():
            denoiser.learn(role in method.trains(phase))
        with Transfers() as drawing:
            draws = method.draw(phase, MetaRng(0, 0, f"{phase}{index}", range(B), "cpu"), shape, carry)
        assert sum(drawing.constants.values()) == (0 if draws is None else 1)
        with Transfers() as watch:
            loss, _ = method.loss(phase, nets, batch, draws, carry)
            loss.backward()
        assert not watch.reads
        assert not +watch.constants
