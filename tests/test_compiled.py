"""A compiled step is the eager one: gradients of every phase, graphs, and what a run says of them."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import ARCHITECTURE, make_config, write_wan
from torch import Tensor

from fastdmd import capture, train
from fastdmd import config as configs
from fastdmd.config import Config
from fastdmd.evaluation import evaluate
from fastdmd.optim import Optimizer
from fastdmd.run import Run, build

ROOT = Path(__file__).parents[1]
TINY = sorted(path.stem for path in (ROOT / "configs").glob("tiny_*.toml"))
VSA = ("vsa={sparsity=0.5, tile=[2, 2, 2]}", "model.attention.student='vsa'", "model.attention.critic='vsa'")
FULL, SELECTIVE = "memory.checkpointing='full'", "memory.checkpointing='selective'"
CASES = {
    "dmd": ("dmd",),
    "dmd_lora": ("dmd_lora",),
    "dmd_lora_selective": ("dmd_lora", SELECTIVE),
    "dmd_lora_full": ("dmd_lora", FULL, "memory.ffn_chunks=2"),
    "dmd_lora_sparse": ("dmd_lora", *VSA, SELECTIVE),
    "causal_sid": ("causal_sid",),
    "sdxl_lcm_lora": ("sdxl_lcm_lora",),
    "sdxl_lcm_lora_full": ("sdxl_lcm_lora", FULL),
}
AS_A_STEP = ("dmd", "dmd_lora", "causal_sid", "sdxl_lcm_lora")


pytestmark = pytest.mark.usefixtures("traced")
Gradients = Mapping[str, Tensor]


def gradients(config: Config, monkeypatch, steps: int = 1) -> list[Gradients]:
    """Return the gradients of each phase of the first steps, where nothing is updated."""
    found: list[Gradients] = []

    def record(optimizer: Optimizer, step: int) -> None:
        found.append({name: grad.clone() for name, grad in optimizer.grads().items()})
        optimizer.adamw.zero_grad()

    run = build(config)
    set_apart(run)
    with monkeypatch.context() as patch:
        patch.setattr(Optimizer, "step", record)
        for _ in range(steps):
            train.take_step(run)
    return found


@torch.no_grad()
def set_apart(run: Run) -> None:
    """Move the trained roles from where they start: between networks that agree DMD has no gradient."""
    generator = torch.Generator().manual_seed(0)
    for optimizer in run.optimizers.values():
        for parameter in optimizer.params.values():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


def far(found: list[Gradients], wanted: list[Gradients]) -> float:
    """Return the largest distance of a phase's gradients, in relative norm over all of them."""
    assert [each.keys() for each in found] == [each.keys() for each in wanted]
    assert all(wanted)
    distances = []
    for one, other in zip(found, wanted, strict=True):
        size = torch.stack([x.norm() for x in other.values()]).norm()
        assert size > 0
        distances.append(float(torch.stack([(one[n] - x).norm() for n, x in other.items()]).norm() / size))
    return max(distances)


def compiled(config: Config, mode: str) -> Config:
    return replace(config, compile=replace(config.compile, mode=mode))


QUICK = (("dmd", "step"), ("dmd_lora_sparse", "blocks"), ("causal_sid", "blocks"), ("sdxl_lcm_lora", "step"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "mode"),
    [
        each if each in QUICK else pytest.param(*each, marks=pytest.mark.campaign)
        for each in (*((case, "blocks") for case in CASES), *((case, "step") for case in AS_A_STEP))
    ],
)
def test_a_compiled_step_has_the_gradients_of_the_eager_one(tmp_path, monkeypatch, case, mode):
    config = make_config(tmp_path, *CASES[case])
    eager, before = gradients(config, monkeypatch), capture.graphs()
    assert capture.graphs() == before
    assert far(gradients(compiled(config, mode), monkeypatch), eager) <= 1e-6
    assert capture.graphs() > before


def tiny(here: Path, name: str) -> Config:
    """Return a configuration of a small batch; of the one that starts from a run's export, from a teacher."""
    changes = [f"run.output_dir='{here}'", "run.batch_size=2", "run.grad_accum=1"]
    if name == "tiny_dcm_detail":
        changes.append("model.path='assets/tiny_wan'")
    return configs.load(f"configs/{name}.toml", changes)


@pytest.mark.slow
@pytest.mark.campaign
@pytest.mark.parametrize("mode", ["blocks", "step"])
@pytest.mark.parametrize("name", TINY)
def test_every_tiny_configuration_compiles(tmp_path, monkeypatch, name, mode):
    monkeypatch.chdir(ROOT)
    config = tiny(tmp_path, name)
    eager = gradients(config, monkeypatch)
    assert far(gradients(compiled(config, mode), monkeypatch), eager) <= 1e-6


INDUCED = [
    *(
        (name, "blocks")
        for name in (
            "tiny_dmd",
            "tiny_dmd_vsa",
            "tiny_sid",
            "tiny_lcm",
            "tiny_sdxl_lcm_lora",
            "tiny_selfforcing_dmd",
        )
    ),
    ("tiny_dmd", "step"),
]


@pytest.mark.slow
@pytest.mark.campaign
@pytest.mark.parametrize(("name", "mode"), INDUCED)
def test_machine_code_has_the_gradients_of_the_eager_step(tmp_path, monkeypatch, name, mode):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(capture, "BACKEND", "inductor")
    config = tiny(tmp_path, name)
    eager = gradients(config, monkeypatch)
    assert far(gradients(compiled(config, mode), monkeypatch), eager) <= 3e-5


def deep(here: Path, *overrides: str, layers: int = 3) -> Config:
    make_config(here, "dmd_lora")
    write_wan(here / "wan", replace(ARCHITECTURE, num_layers=layers))
    return configs.load(here / "dmd_lora.toml", overrides)


@pytest.mark.slow
@pytest.mark.parametrize(
    "memory", [(), *(pytest.param((key,), marks=pytest.mark.campaign) for key in (FULL, SELECTIVE))], ids=str
)
def test_blocks_share_graphs_and_ten_steps_compile_once(tmp_path, capsys, memory):
    """Four blocks have the graphs of two: at most one per role, grad mode, batch and gradient flags.

    The first of a network is one apart, as gradients do not go on from it to its input.
    """
    found = {}
    for layers in (2, 4):
        torch._dynamo.reset()
        run = build(deep(tmp_path / str(layers), *memory, "compile.mode='blocks'", layers=layers))
        for _ in range(10):
            with run.capture.step():
                train.take_step(run)
        found[layers] = run.capture.summary()
    assert found[2] == found[4]
    assert found[4]["breaks"] == found[4]["recompiles"] == 0
    assert 4 <= found[4]["graphs"] <= 8
    assert "warning" not in capsys.readouterr().err


@pytest.mark.slow
def test_a_recompilation_after_the_first_cycle_is_a_warning_with_its_guard(tmp_path, capsys):
    run = build(make_config(tmp_path, "flow", "compile.mode='blocks'"))
    with run.capture.step():
        train.take_step(run)
    assert run.capture.summary()["recompiles"] == 0
    for block in run.nets["student"].net.blocks:
        block.eps = 1e-5  # a constant of the graph
    with run.capture.step():
        train.take_step(run)
    assert run.capture.summary()["recompiles"] > 0
    assert "graphs compiled after the first cycle: " in (said := capsys.readouterr().err)
    assert "eps" in said


@pytest.mark.slow
@pytest.mark.campaign
def test_the_first_graph_of_an_exit_is_no_recompilation(tmp_path, capsys):
    """Three exits of a rollout are not all met in the first cycle."""
    run = build(make_config(tmp_path, "dmd", "compile.mode='step'"))
    after = []
    for _ in range(10):
        with run.capture.step():
            train.take_step(run)
        after.append(run.capture.summary()["graphs"])
    assert after[-1] == len(run.capture.kinds) > after[1]
    assert run.capture.summary()["recompiles"] == 0
    assert "warning" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["blocks", "step"])
def test_a_run_says_what_was_compiled(tmp_path, capsys, mode):
    keys = (f"compile.mode='{mode}'", "run.max_steps=2", "validation.teacher_reference=false")
    run = train.train(make_config(tmp_path, "dmd", *keys))
    assert f"compile.mode = '{mode}': " in capsys.readouterr().err
    summary = json.loads((run.folder / "summary.json").read_text())["capture"]
    assert summary.pop("graphs") > 0
    assert summary == {
        "mode": mode,
        "breaks": 0,
        "recompiles": 0,
        "reads_per_phase": 1,
        "constants": 0,
    }


def test_an_eager_run_counts_nothing(tmp_path):
    run = build(make_config(tmp_path, "dmd"))
    assert run.capture.summary() == {"mode": "off", "graphs": 0, "breaks": 0, "recompiles": 0}
    assert evaluate.transfers(run) == {}


@pytest.mark.slow
def test_a_cache_of_any_length_has_the_same_graphs(tmp_path, monkeypatch):
    """A causal rollout meets no other after its second block: what is held is longer at each."""
    monkeypatch.setattr(capture, "BACKEND", "eager")
    found = []
    for frames in (9, 13):
        torch._dynamo.reset()
        keys = ("compile.mode='blocks'", "rollout.frames_per_block=1", f"data.frames={frames}")
        run, before = build(make_config(tmp_path / str(frames), "causal_sid", *keys)), capture.graphs()
        train.take_step(run)
        found.append((run.config.latent_shape()[1], capture.graphs() - before))
    (few, graphs), (many, same) = found
    assert 2 < few < many
    assert graphs == same


def test_a_device_without_a_compiler_runs_eager_and_says_so():
    config = capture.Config(mode="blocks")
    assert capture.mode_on(config, torch.device("mps")) == "off"
    said = capture.notice(config, torch.device("mps"))
    assert said == "compile.mode = 'blocks': the compiler does not support mps; running eager"
    assert capture.mode_on(config, torch.device("cuda")) == "blocks"
    assert capture.notice(capture.Config(), torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ((SELECTIVE,), "'step' computes nothing anew; use 'blocks', or memory.checkpointing = 'none'"),
        ((FULL, "memory.offload='block_inputs'"), "'step' is one graph, which moves nothing to the host"),
        ((FULL, "memory.stream_base=true"), "'step' is one graph, which moves nothing to the host"),
        (
            ("rollout={mode='causal', frames_per_block=1, shared_exit_step=false}",),
            "'step' has a graph for each choice of exits",
        ),
    ],
)
def test_what_a_step_cannot_be(tmp_path, keys, message):
    with pytest.raises(ValueError, match=r"compile\.mode") as e:
        make_config(tmp_path, "dmd_lora", "compile.mode='step'", *keys)
    assert message in str(e.value)


def test_a_host_read_and_a_constant_are_counted():
    """By the op: what a phase would do if it looked at a number, or made one."""
    with capture.Transfers() as watch:
        x = torch.ones(3)
        float(x.sum())
        torch.tensor([1.0, 2.0]).to("meta")
    assert sum(watch.reads.values()) == 1
    assert sum(watch.constants.values()) == 1
