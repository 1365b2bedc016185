"""Check how DCM samples, what its teacher and its export take, and what its configuration refuses.

The samplers are compared with an independent implementation in float64.
"""

from collections.abc import Mapping
from copy import deepcopy
from itertools import pairwise

import mlp
import pytest
import torch
from dcm_definition import (
    ADVERSARIAL,
    BATCH,
    DETAIL_BASE,
    SEMANTIC,
    S,
    calls,
    make,
    make_nets,
    make_rng,
    name_case,
)
from score_definition import close
from tiny import DETAIL, make_config
from torch import Tensor

from fastdmd import config as configs
from fastdmd import train
from fastdmd.batch import Cond
from fastdmd.config.schema import StudentConfig, TeacherConfig
from fastdmd.denoiser import Denoiser
from fastdmd.evaluation import evaluate
from fastdmd.export import exported_scheduler
from fastdmd.methods.dcm import DCM, Config
from fastdmd.models.family import ModelConfig
from fastdmd.rng import Rng
from fastdmd.run import build
from fastdmd.schedule import VPSchedule

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
