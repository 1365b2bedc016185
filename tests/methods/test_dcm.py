"""DCM on perceptrons, against an independent implementation in float64.

The implementation reads every key of its configuration.
B batch; latents [B, C, T, H, W].
"""

from types import SimpleNamespace

import mlp
import pytest
import torch
from dcm_definition import (
    ADVERSARIAL,
    BATCH,
    BOTH,
    CASES,
    DEFAULTS,
    DETAIL_BASE,
    SAMPLING,
    SEMANTIC,
    Definition,
    S,
    calls,
    make,
    make_nets,
    make_rng,
    name_case,
)
from score_definition import close, column
from torch import Tensor

from fastdmd.batch import Batch, Cond
from fastdmd.denoiser import Denoiser
from fastdmd.methods import dcm
from fastdmd.methods.consistency import errors, huber
from fastdmd.methods.dcm import DCM, Config
from fastdmd.models.net import PLAIN, Call, Out
from fastdmd.schedule import FlowSchedule

# ------------------------------------------------------- the whole loss, from the configuration


@pytest.mark.parametrize(("base", "change"), CASES, ids=name_case)
def test_student_loss_and_gradient_are_those_of_the_definition(base, change):
    """With each key changed, and a key that were not read would leave the base's gradient."""
    method = make(base, **change)
    nets = make_nets(method)
    loss, metrics = mlp.loss(method, "student", nets, BATCH, make_rng(), {})
    loss.backward()
    value, want = Definition(nets, **base | change).student_gradient()
    torch.testing.assert_close(loss.double(), value, rtol=1e-5, atol=0)
    got = mlp.gradient(nets["student"].net)
    assert close(got, want)
    if not {"disc_layers", "target", "adversarial_weight"} & change.keys():  # other networks
        assert close(got, Definition(nets, **base).student_gradient()[1]) == (not change)
    more = {"hinge", "features"} if method.config.adversarial else set()
    assert metrics.keys() == {"huber", "loss_last"} | more


@pytest.mark.parametrize("key", ["target", "adversarial_weight"])
def test_these_keys_matter_too(key):
    """With networks for both values."""
    nets = make_nets(make(DETAIL_BASE))
    gradients = []
    for change in ({}, {key: BOTH.get(key, ADVERSARIAL.get(key))}):
        mlp.loss(make(DETAIL_BASE, **change), "student", nets, BATCH, make_rng(), {})[0].backward()
        gradients.append(mlp.gradient(nets["student"].net).clone())
        nets["student"].net.zero_grad()
    assert not close(*gradients)


@pytest.mark.parametrize(
    "change", [{}, {"disc_layers": (1,)}, {"phases": 4}, {"boundary_index": 7}], ids=name_case
)
def test_discriminator_learns_by_the_definition(change):
    """Hinge on the pair of the student's phase, which is of before its update."""
    method, carry = make(DETAIL_BASE, **change), {}
    nets = make_nets(method)
    value, want = Definition(nets, **DETAIL_BASE | change).disc_gradient()
    mlp.loss(method, "student", nets, BATCH, make_rng(), carry)
    with torch.no_grad():
        for p in nets["student"].net.parameters():
            p.add_(1.0)
    loss, _ = mlp.loss(method, "disc", nets, BATCH, make_rng("disc1"), carry)
    loss.backward()
    torch.testing.assert_close(loss.double(), value, rtol=1e-5, atol=0)
    assert close(mlp.gradient(nets["disc"].net), want)


def test_every_key_has_a_test():
    assert DEFAULTS.keys() == BOTH.keys() | ADVERSARIAL.keys() | SAMPLING | {"name", "expert"}


# --------------------------------------------------------------- who is called, and who learns


@pytest.mark.parametrize(
    ("base", "phase"), [(SEMANTIC, "student"), (DETAIL_BASE, "student"), (DETAIL_BASE, "disc")]
)
@pytest.mark.parametrize("target", ["ema", "student"])
def test_only_what_the_phase_trains_gets_a_gradient(base, phase, target):
    method, carry = make(base, target=target), {}
    nets = make_nets(method)
    assert (
        method.phases(0) == method.phases(5) == (("student", "disc") if base is DETAIL_BASE else ("student",))
    )
    for each in method.phases(0)[: method.phases(0).index(phase) + 1]:
        assert method.trains(each) == (each,)
        for role, net in nets.items():
            net.net.zero_grad()
            net.net.requires_grad_(role == each)
        mlp.loss(method, each, nets, BATCH, make_rng(each), carry)[0].backward()
    assert mlp.with_gradient(nets) == {phase}


@pytest.mark.parametrize("target", ["ema", "student"])
def test_no_gradient_through_the_target_or_the_teacher_s_step(target):
    """Though every parameter asks for one."""
    method = make(target=target)
    nets = make_nets(method)
    mlp.loss(method, "student", nets, BATCH, make_rng(), {})[0].backward()
    assert mlp.with_gradient(nets) == {"student"}
    assert [call.grad for call in calls(nets, "student")] == [True, False][: 1 + (target == "student")]
    assert not calls(nets, "teacher")[0].grad


@pytest.mark.parametrize(("target", "role"), [("ema", "target"), ("student", "student")])
def test_the_target_is_never_the_teacher(target, role):
    """Take one step of the teacher at sigma_i, by one batched call; the target jumps from sigma_prev_i."""
    method = make(target=target)
    nets = make_nets(method)
    mlp.loss(method, "student", nets, BATCH, make_rng(), {})
    [teacher], [student, *again] = calls(nets, "teacher"), calls(nets, "student")
    [jumps] = calls(nets, "target") if target == "ema" else again
    assert (role == "student") == bool(again)
    assert torch.equal(teacher.x_t, student.x_t.repeat(2, 1, 1, 1, 1))
    assert torch.equal(teacher.text, torch.cat([BATCH.cond.text, BATCH.uncond.text]))
    grid = [1000 * s for s in Definition(nets, **SEMANTIC).sigma]
    index = [min(range(10), key=lambda j: abs(grid[j] - float(t))) for t in student.model_t]
    assert all(6 <= i <= 9 for i in index)
    assert len(set(index)) > 1
    assert jumps.model_t.tolist() == pytest.approx([grid[i - 1] for i in index], rel=1e-6)
    assert ("target" in method.config.roles) == (target == "ema")


def test_guidance_of_one_is_one_side_only():
    method = make(guidance=1.0)
    nets = make_nets(method)
    mlp.loss(method, "student", nets, BATCH, make_rng(), {})
    assert torch.equal(calls(nets, "teacher")[0].text, BATCH.cond.text)


def test_roles():
    both = {"student": "train", "teacher": "frozen"}
    assert make().config.roles == {**both, "target": "ema"}
    assert make(target="student").config.roles == both
    assert make(DETAIL_BASE).config.roles == {**both, "target": "ema", "semantic": "frozen", "disc": "heads"}
    assert make(DETAIL_BASE, adversarial_weight=0.0).phases(0) == ("student",)
    assert "disc" not in make(DETAIL_BASE, adversarial_weight=0.0).config.roles


class WrongAtTheEnd(mlp.Deep):
    """A student that is off by a constant at one time."""

    def __init__(self, seed: int, at: float) -> None:
        super().__init__(seed)
        self.at = at

    def there(self, model_t: Tensor) -> Tensor:
        return column((model_t - self.at).abs() < 1e-3)

    def forward(self, x_t: Tensor, model_t: Tensor, cond: Cond, call: Call = PLAIN) -> Out:
        out = super().forward(x_t, model_t, cond, call)
        return out._replace(F=out.F + 3.0 * self.there(model_t).to(x_t.dtype))


@pytest.mark.parametrize(("base", "last"), [(SEMANTIC, 6), (DETAIL_BASE | {"adversarial_weight": 0.0}, 0)])
@pytest.mark.parametrize("phases", [1, 4])
def test_loss_last_is_of_the_expert_s_last_interval(base, last, phases):
    """It ends at the boundary for the semantic expert, close to data for the detail expert."""
    method = make(base, phases=phases, temporal_weight=0.0)
    nets, batch, rng = make_nets(method), mlp.make_batch(200), make_rng(size=200)
    i = method.config.points.start + make_rng(size=200).integers(len(method.config.points))
    at = 1000 * S((last + 1) / 10)
    loss, metrics = mlp.loss(method, "student", nets, batch, rng, {})
    total, count = metrics["loss_last"]
    assert count == (i == last).sum()
    nets["student"] = Denoiser(WrongAtTheEnd(0, at), method.schedule)
    wrong, metrics = mlp.loss(method, "student", nets, batch, make_rng(size=200), {})
    assert wrong > loss
    assert metrics["loss_last"].samples == count
    # nothing else has changed: the whole loss moves by this loss times its share of the samples
    moved = (metrics["loss_last"].total - total) / 200
    torch.testing.assert_close(wrong - loss, moved, rtol=1e-3, atol=0)


@pytest.mark.parametrize("base", [SEMANTIC, DETAIL_BASE], ids=name_case)
def test_a_target_that_is_the_student_is_warned_of(base):
    [line] = make(base, target="student").warnings()
    assert "method.target = 'ema'" in line
    assert not list(make(base, target="ema").warnings())


@pytest.mark.parametrize(("u", "where"), [(0.0, "first"), (1 - 1e-12, "last")])
def test_adversarial_times_span_the_phase_s_end_to_the_boundary(u, where):
    """sigma_prev_j, j ~ U{e .. boundary_index - 1}; both sides are noised alike."""
    method, carry = make(DETAIL_BASE, phases=4), {}
    nets, drawn = make_nets(method), make_rng()
    rng = SimpleNamespace(
        integers=lambda high: torch.tensor([0, 3, 4, 5]),
        uniform=lambda: torch.full((4,), u, dtype=torch.float64),
        normal=drawn.normal,
    )
    draws = method.draw("student", rng, mlp.SHAPE, carry)
    made, wanted = method.pair(nets, BATCH, draws)
    e = [0, 2, 2, 5]  # of 0, 2, 5, 7
    assert draws.to_end.tolist() == pytest.approx((method.sigmas[e] - method.sigmas[[1, 4, 5, 6]]).tolist())
    method.loss("student", nets, BATCH, draws, carry)
    fake, real, c = carry["adversarial"]
    prev = Definition(nets, **DETAIL_BASE).sigma_prev
    assert c.sigma.tolist() == pytest.approx([prev[j if where == "first" else 5] for j in e])
    keep = column((1 - c.sigma.double()) / (1 - method.sigmas[e]))
    gap = (made - wanted).detach()
    torch.testing.assert_close((fake - real).double(), keep * gap, rtol=1e-4, atol=1e-5)
    if where == "first":  # at its end a sample is not noised further
        torch.testing.assert_close(fake, made.detach())


# ---------------------------------------------------------------------- grids, ends, functions


def test_the_published_grid():
    """Check Wan at shift 17: sigma_prev_0 = 0.016732; at sigma_34 = 0.975410 the semantic phase ends."""
    sigmas = dcm.solver_sigmas(50, 17.0)
    assert sigmas.dtype == torch.float64
    assert len(sigmas) == 51
    assert float(sigmas[0]) == pytest.approx(0.016732, abs=5e-7)
    assert float(sigmas[34 + 1]) == pytest.approx(0.975410, abs=5e-7)
    assert sigmas[1:].tolist() == pytest.approx(
        [17 * u / (1 + 16 * u) for u in (20 * (j + 1) / 1000 for j in range(50))]
    )
    keys = {"guidance": 6.0, "target": "ema", "temporal_weight": 1.0}
    for expert, points, end in (("semantic", range(35, 50), 0.975410), ("detail", range(35), 0.016732)):
        method = DCM(Config(name="dcm", expert=expert, **keys), FlowSchedule(17.0))
        assert method.config.points == points
        e = dcm.phase_end(torch.tensor(points), 50, 1, points.start)
        assert method.sigmas[e].tolist() == pytest.approx([end] * len(points), abs=5e-7)


@pytest.mark.parametrize(
    ("phases", "offset", "want"),
    [
        (1, 0, {0: 0, 34: 0, 49: 0}),
        (2, 0, {0: 0, 24: 0, 25: 25, 34: 25}),
        (3, 0, {15: 0, 16: 16, 32: 16, 33: 33}),
        (4, 35, {35: 35, 46: 35, 47: 47, 49: 47}),
        (7, 35, {41: 35, 42: 42, 48: 42, 49: 49}),
    ],
)
def test_phase_ends(phases, offset, want):
    """Of the whole grid, moved to the expert's first point, as the published solver has it."""
    e = dcm.phase_end(torch.tensor(list(want)), 50, phases, offset)
    assert e.tolist() == list(want.values())


def test_noising_further_is_noising_once():
    """Of a sample that has the same noise already."""
    generator = torch.Generator().manual_seed(0)
    rng = SimpleNamespace(
        integers=lambda high: torch.tensor([1, 3, 5]),  # in the phases from 0, 2 and 5 on
        uniform=lambda: torch.tensor([0.4, 0.99, 0.0]).double(),
        normal=lambda shape: torch.randn(3, *shape, generator=generator, dtype=torch.float64),
    )
    method = make(DETAIL_BASE, phases=4)
    method.sigmas = torch.linspace(0, 1, 11).double()
    further = method.draw("student", rng, mlp.SHAPE, {}).adversarial  # type: ignore[arg-type]
    low, high = torch.tensor([0.0, 0.2, 0.5]).double(), torch.tensor([0.2, 0.5, 0.5]).double()
    torch.testing.assert_close(further.c.sigma, high)
    x0, n = torch.randn(3, *mlp.SHAPE, generator=generator, dtype=torch.float64), further.n
    z = (1 - column(low)) * x0 + column(low) * n
    torch.testing.assert_close(further.noised(z), (1 - column(high)) * x0 + column(high) * n)


def test_distances():
    a, b = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([1.0, 1.0, 0.5 + 1e-4])
    d = (a - b).double()
    torch.testing.assert_close(huber(a, b, 1e-3).double(), (d**2 + 1e-6).sqrt() - 1e-3, rtol=1e-6, atol=0)
    assert torch.equal(huber(a, a, 1e-3), torch.zeros(3))
    torch.testing.assert_close(errors("l2", a, b, 1e-3).double(), d**2, rtol=1e-6, atol=0)
    assert torch.equal(errors("huber", a, b, 1e-3), huber(a, b, 1e-3))
    for kind in ("l2", "huber"):  # a bfloat16 would not hold its own mean
        assert errors(kind, a.bfloat16(), b.bfloat16(), 1e-3).dtype == torch.float32
    assert huber(a.double(), b.double(), 1e-3).dtype == torch.float64


def test_temporal_needs_frames():
    with pytest.raises(ValueError, match=r"^method.temporal_lag: 3 is not under the 3 latent frames"):
        mlp.loss(make(temporal_lag=3), "student", make_nets(make()), BATCH, make_rng(), {})
    assert (
        mlp.loss(
            make(temporal_lag=3, temporal_weight=0.0), "student", make_nets(make()), BATCH, make_rng(), {}
        )[0]
        > 0
    )


def test_needs_latents():
    with pytest.raises(ValueError, match="trains on latents"):
        mlp.loss(
            make(), "student", make_nets(make()), Batch(BATCH.cond, BATCH.uncond, mlp.SHAPE), make_rng(), {}
        )
    assert make().config.needs_latents
