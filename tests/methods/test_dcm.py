"""DCM on perceptrons, against an independent implementation in float64, and on known flows.

The implementation reads every key of its configuration; the flows have known consistency functions.
B batch; latents [B, C, T, H, W].
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from itertools import pairwise
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
from tiny import DETAIL, make_config
from torch import Tensor

from fastdmd import config as configs
from fastdmd import train
from fastdmd.batch import Batch, Cond
from fastdmd.config.schema import StudentConfig, TeacherConfig
from fastdmd.denoiser import Denoiser
from fastdmd.evaluation import evaluate
from fastdmd.export import exported_scheduler
from fastdmd.methods import dcm
from fastdmd.methods.consistency import errors, huber
from fastdmd.methods.dcm import DCM, Config
from fastdmd.models.family import ModelConfig
from fastdmd.models.net import PLAIN, Call, Out
from fastdmd.rng import Rng
from fastdmd.run import build
from fastdmd.schedule import Coeffs, FlowSchedule, VPSchedule

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


# --------------------------------------------------------------------------- fixed points

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


# -------------------------------------------------------------------------------- sampling


def euler(nets: Mapping[str, Denoiser], x: Tensor, steps: list[tuple[str, float, float, float]]) -> Tensor:
    """In float64, steps (role, guidance, from, to)."""
    x = x.double()
    for role, w, now, then in steps:
        net = deepcopy(nets[role].net).double()
        model_t = torch.full((len(x),), 1000 * now, dtype=torch.float64)
        c, u = (net(x, model_t, Cond(cond.text.double())).F for cond in (BATCH.cond, BATCH.uncond))
        x = x + (then - now) * (u + w * (c - u))
    return x


@torch.no_grad()
def test_both_experts_sample_in_turn():
    method = make(DETAIL_BASE, semantic_timesteps=(1000.0, 950.0, 900.0), detail_timesteps=(700.0, 400.0))
    nets, noise = make_nets(method), make_rng().normal(mlp.SHAPE)
    got = method.sample(nets, noise, BATCH.cond, BATCH.uncond, make_rng())
    early = [("semantic", 1.0, a, b) for a, b in pairwise((1.0, 0.95, 0.9, 0.7))]
    want = euler(nets, noise, [*early, ("student", 1.0, 0.7, 0.4), ("student", 1.0, 0.4, 0.0)])
    assert close(got, want)
    assert not calls(nets, "teacher")
    assert [len(call.x_t) for role in ("semantic", "student") for call in calls(nets, role)] == [4] * 5
    assert method.times.tolist() == pytest.approx([1, 0.95, 0.9, 0.7, 0.4])
    assert method.sampled == ("semantic", "student")


@torch.no_grad()
def test_alone_the_semantic_expert_hands_over_to_the_teacher_at_the_boundary():
    """And the teacher that it is compared with takes the same steps."""
    method = make(semantic_timesteps=(1000.0, 950.0, 900.0))
    nets, noise = make_nets(method), make_rng().normal(mlp.SHAPE)
    got = method.sample(nets, noise, BATCH.cond, BATCH.uncond, make_rng())
    boundary = S(0.6)
    early = [("student", 1.0, a, b) for a, b in pairwise((1.0, 0.95, 0.9, boundary))]
    late = [("teacher", 4.0, a, b) for a, b in pairwise([S(j / 10) for j in range(6, -1, -1)])]
    assert close(got, euler(nets, noise, early + late))
    assert method.times.tolist() == pytest.approx([1, 0.95, 0.9])
    assert method.few_grid().tolist() == pytest.approx([1, 0.95, 0.9, *(S(j / 10) for j in range(6, -1, -1))])
    assert method.sampled == ("student", "teacher")


@pytest.mark.parametrize(("expert", "steps"), [("semantic", 3 + 35), ("detail", 3 + 2)])
def test_the_teacher_is_compared_at_the_student_s_steps(tmp_path, expert, steps):
    run = build(make_config(tmp_path, "dcm", *(DETAIL if expert == "detail" else ())))
    grid = run.method.few_grid()
    assert len(grid) == steps + 1
    assert (float(grid[0]), float(grid[-1])) == (1.0, 0.0)
    if expert == "semantic":
        assert grid[:4].tolist() == pytest.approx([1, 0.992, 0.982, S(0.7)])
    else:
        assert torch.equal(grid, run.schedule.solver_grid(5))
    shape = run.world.latent_shape
    rng, cond = Rng(0, 0, "sample", range(2), "cpu"), run.world.cond(run.world.prompts[:2])
    with torch.no_grad():
        for name, sampler in evaluate.samplers(run.config).items():
            assert sampler.steps == (2 if name == "teacher" else steps)
            assert sampler.run(run.nets, rng.normal(shape), cond, cond, rng).isfinite().all()


@pytest.mark.parametrize(
    ("method", "name"), [("dcm", "UniPCMultistepScheduler"), ("dmd", "FlowMatchLCMScheduler")]
)
def test_an_export_s_scheduler_is_that_of_the_method(tmp_path, method, name):
    """Diffusers' LCM scheduler re-noises between its steps; DMD's student does, and neither expert of DCM."""
    scheduler = exported_scheduler(make_config(tmp_path, method))
    assert type(scheduler).__name__ == name
    if method == "dmd":
        scheduler.set_timesteps(3)
        assert scheduler.timesteps.tolist() == pytest.approx([1000, 757, 522], abs=1e-3)


# ---------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        ({"temporal_weight": -1.0}, ["temporal_weight"]),
        ({"temporal_lag": 0}, ["temporal_lag"]),
        ({"phases": 0}, ["phases"]),
        ({"huber_c": 0.0}, ["huber_c"]),
        ({"solver_steps": 1, "boundary_index": 1}, ["solver_steps"]),
        ({"solver_steps": 1000}, ["solver_steps"]),
        ({"boundary_index": 0}, ["boundary_index"]),
        ({"boundary_index": 10}, ["boundary_index"]),
        ({"solver_steps": 50, "boundary_index": 35, "phases": 2}, ["phases"]),  # starts 35 and 60
        ({"solver_steps": 50, "boundary_index": 35, "phases": 4}, []),
        ({"solver_steps": 50, "boundary_index": 25, "phases": 2}, ["phases"]),
        ({"expert": "detail", "solver_steps": 50, "boundary_index": 25, "phases": 2}, ["phases"]),
        ({"expert": "detail", "solver_steps": 50, "boundary_index": 26, "phases": 2}, []),
        ({"semantic_timesteps": ()}, ["semantic_timesteps"]),
        ({"semantic_timesteps": (1000.0, 0.0)}, ["semantic_timesteps"]),
        ({"semantic_timesteps": (990.0, 980.0)}, ["semantic_timesteps"]),
        ({"semantic_timesteps": (1000.0, 980.0, 990.0)}, ["semantic_timesteps"]),
        ({"expert": "detail", "detail_timesteps": (500.0, 500.0)}, ["detail_timesteps"]),
        ({"expert": "detail", "adversarial_weight": -1.0}, ["adversarial_weight"]),
        ({"expert": "detail", "disc_layers": ()}, ["disc_layers"]),
        ({"expert": "detail", "disc_layers": (2, 1)}, ["disc_layers"]),
        *(({key: value}, [key]) for key, value in (ADVERSARIAL | {"detail_timesteps": (800.0,)}).items()),
    ],
    ids=str,
)
def test_problems_name_the_key(change, keys):
    assert [key for key, _ in Config(name="dcm", **SEMANTIC | change).problems()] == keys


@pytest.mark.parametrize("base", [SEMANTIC, DETAIL_BASE], ids=name_case)
def test_no_problems(base):
    assert not list(Config(name="dcm", **base).problems())


def test_times_of_sampling_stay_on_their_expert_s_side():
    """The boundary is S(0.6) = 0.818182."""
    with pytest.raises(
        ValueError, match=r"^method.semantic_timesteps: 818 is not above the boundary, 818.182 at"
    ):
        make(semantic_timesteps=(1000.0, 818.0))
    with pytest.raises(ValueError, match=r"^method.detail_timesteps: 819 is above the boundary, 818.182 at"):
        make(DETAIL_BASE, detail_timesteps=(819.0,))
    make(semantic_timesteps=(1000.0, 819.0))
    make(DETAIL_BASE, detail_timesteps=(818.0,))


def test_only_flow_models():
    schedule = VPSchedule(torch.linspace(0.99, 0.01, 1000).double(), "eps")
    with pytest.raises(ValueError, match="'dcm' is for flow models"):
        DCM(Config(name="dcm", **SEMANTIC), schedule)


def test_the_detail_expert_starts_from_the_semantic_one():
    """It is the student's start: student.path, or model.path where the teacher has a path of its own."""
    teacher, model = TeacherConfig(path="teacher"), ModelConfig(family="wan2.1", path="semantic")
    config = configs.Config(
        model=model, teacher=teacher, **dict.fromkeys(("run", "schedule", "method", "data"))
    )
    paths = {role: config.role_path(role) for role in ("student", "semantic", "target", "teacher")}
    assert paths == {
        "student": "semantic",
        "semantic": "semantic",
        "target": "semantic",
        "teacher": "teacher",
    }
    model, student = ModelConfig(family="wan2.1", path="teacher"), StudentConfig(path="semantic")
    rest = dict.fromkeys(("run", "schedule", "method", "data"))
    config = configs.Config(model=model, student=student, **rest)
    assert paths == {role: config.role_path(role) for role in paths}


@pytest.mark.parametrize(("extra", "trained"), [((), {"student"}), (DETAIL, {"student", "disc"})])
def test_a_run_moves_what_it_trains_and_its_average(tmp_path, extra, trained):
    run = build(make_config(tmp_path, "dcm", "ema.start_step=0", *extra))
    before = {role: deepcopy(net.net.state_dict()) for role, net in run.nets.items()}
    train.take_step(run)
    now = {role: net.net.state_dict() for role, net in run.nets.items()}
    moved = {role for role in now if any(not torch.equal(now[role][k], v) for k, v in before[role].items())}
    assert moved == trained | {"target"}
