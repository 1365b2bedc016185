"""`fastdmd warm` meets every graph of a run, without weights and without a trace in its folder."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import ARCHITECTURE, DETAIL, make_config, write_wan

from fastdmd import capture, train
from fastdmd.config import Config
from fastdmd.rng import Rng
from fastdmd.run import build, build_synthetic
from fastdmd.warm_graphs import levels, meet_graphs, needed_steps, warm

REPOSITORY = Path(__file__).parents[1]
DEEP = replace(ARCHITECTURE, num_layers=4)
# batches of a validation are others than a step's, and the last is smaller
SIZES = ("validation.samples=5", "validation.batch_size=3", "validation.every=1", "run.max_steps=5")
SPARSE = (
    "vsa={sparsity=0.5, tile=[2, 2, 2], warmup_every=2, warmup_step=0.25}",
    "model.attention.student='vsa'",
    "model.attention.critic='vsa'",
)
GAN = ("method.gan_weight=0.005", "method.gan_layers=[3]", "optim.disc.lr=1e-3")
BLOCKS, STEP = "compile.mode='blocks'", "compile.mode='step'"
CASES = {
    "dmd": ("dmd", BLOCKS, "run.grad_accum=2"),
    "dmd_lora_selective": ("dmd_lora", BLOCKS, "memory.checkpointing='selective'"),
    "dmd_gan": ("dmd", BLOCKS, *GAN),
    "dmd_sparse": ("dmd", BLOCKS, *SPARSE),
    "causal_sid": ("causal_sid", BLOCKS, "rollout.shared_exit_step=false", "rollout.grad_frames=2"),
    "causal_flow": ("causal_flow", BLOCKS),
    "dcm": ("dcm", BLOCKS),
    "dcm_detail": ("dcm", BLOCKS, *DETAIL),
    "lcm_lora": ("lcm_lora", BLOCKS),
    "sdxl_lcm_lora": ("sdxl_lcm_lora", BLOCKS),
    "dmd_step": ("dmd", STEP, "run.grad_accum=2", "run.max_steps=10"),
}
SHORT = ("dmd", "dmd_sparse")  # in `make test`; the others in `make compiled`


def deep(here: Path, case: str) -> Config:
    method, *keys = CASES[case]
    config = make_config(here, method, *SIZES, *keys)
    if "sdxl" not in method and config.compile.mode == "blocks":
        write_wan(here / "wan", DEEP)
    return config


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case if case in SHORT else pytest.param(case, marks=pytest.mark.campaign) for case in CASES]
)
def test_a_run_meets_no_graph_that_its_warming_did_not(tmp_path, traced, case):
    """With blocks nothing is traced anew; a phase belongs to its run, so numbers of graphs are equal."""
    config = deep(tmp_path, case)
    before = capture.graphs()
    meet_graphs(config)
    warmed = capture.graphs() - before
    if config.compile.mode == "step":
        torch._dynamo.reset()
    run = train.train(config)
    assert run.step == config.run.max_steps
    met = capture.graphs() - before - warmed
    assert met == (warmed if config.compile.mode == "step" else 0)
    assert warmed > 0


def command(here: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command with an empty cache of its own, and say on stdout what the cache gave."""
    code = (
        "import sys, torch; torch.set_num_threads(1); from fastdmd import cli, capture\n"
        "try:\n    cli.main()\n"
        "finally:\n    print('cache', dict(capture.cached()), file=sys.stderr)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=here,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(here / "cache")},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.campaign
@pytest.mark.parametrize(("method", "mode"), [("dmd", "blocks"), ("flow", "step")])
def test_a_warmed_run_compiles_nothing(tmp_path, method, mode):
    """The warming has a config.json and no weights."""
    config, keys = make_config(tmp_path, method), (f"compile.mode='{mode}'", *SIZES)
    path, weights = tmp_path / f"{method}.toml", list((tmp_path / "wan").rglob("*.safetensors"))
    kept = {file: file.read_bytes() for file in weights}
    for file in weights:
        file.unlink()
    done = command(tmp_path, "warm", str(path), *keys)
    assert done.returncode == 0, done.stderr
    device, compiled, found = counts(done.stdout)
    assert (device, found) == ("cpu", 0)
    assert compiled > 0
    assert f"'hit': 0, 'miss': {compiled}, 'bypass': 0" in done.stderr
    assert counts(command(tmp_path, "warm", str(path), *keys).stdout) == ("cpu", 0, compiled)

    for file, data in kept.items():
        file.write_bytes(data)
    run = command(tmp_path, "train", str(path), *keys)
    assert run.returncode == 0, run.stderr
    assert f"'hit': {compiled}, 'miss': 0, 'bypass': 0" in run.stderr
    assert config.run.max_steps > 1


def counts(said: str) -> tuple[str, int, int]:
    """Return (device, compiled, found in the cache)."""
    words = said.replace(":", "").split()
    assert words[2:4] == ["graphs", "compiled,"], said
    return words[0], int(words[1]), int(words[4])


def test_nothing_is_written_into_the_runs_folder(tmp_path, traced, capsys):
    config = make_config(tmp_path, "flow", BLOCKS, "run.max_steps=1", "validation.teacher_reference=false")
    (tmp_path / "wan" / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    there = sorted(tmp_path.rglob("*"))
    (line,) = warm(config, None)
    assert sorted(tmp_path.rglob("*")) == there
    assert line == "cpu: 0 graphs compiled, 0 were in the cache"  # aot_eager keeps none
    assert "the first cycle compiles" in capsys.readouterr().err


def test_the_steps_of_a_warming_are_a_cycle_and_the_first_of_each_exit(tmp_path):
    """Against the draws of the run itself."""
    config = make_config(tmp_path, "dmd", "run.max_steps=400", "rollout.exit='uniform'")
    steps = needed_steps(config)
    method = config.make_method()
    first: dict[tuple[str, int], int] = {}
    for step in range(400):
        carry = {}
        for index, phase in enumerate(method.phases(step)):
            rng = Rng(config.run.seed, step, f"{phase}{index}", range(2), "cpu")
            rollout = method.draw(phase, rng, config.latent_shape(), carry).rollout
            if rollout is not None:  # the step's first phase makes it
                first.setdefault((phase, rollout.exits[0]), step)
    assert len(first) == 6
    assert set(steps) == {0, 1, *first.values()}
    assert needed_steps(replace(config, run=replace(config.run, max_steps=1))) == [0]


def test_each_sparsity_of_the_warm_up_is_a_level(tmp_path):
    config = make_config(tmp_path, "dmd", *SPARSE, "run.max_steps=9")
    assert list(levels(config)) == [(0, 2), (2, 4), (4, 9)]
    dense = replace(config, vsa=None)
    assert list(levels(dense)) == [(0, 9)]


def forms(net: torch.nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (value.shape, value.dtype) for name, value in net.state_dict().items()}


@pytest.mark.parametrize("method", ["dmd", "dmd_lora", "sdxl_lcm"])
def test_a_synthetic_run_has_the_forms_of_the_real_one(tmp_path, method):
    config = make_config(tmp_path, method, "precision.compute='bf16'")
    ours, real = build_synthetic(config), build(config)
    assert ours.nets.keys() == real.nets.keys()
    for role, denoiser in real.nets.items():
        assert forms(ours.nets[role].net) == forms(denoiser.net)
        assert ours.nets[role].trainable.keys() == denoiser.trainable.keys()
    batches = [run.world.batch(Rng(0, 0, "data", range(2), "cpu")) for run in (ours, real)]
    cond, other = ({k: (v.shape, v.dtype) for k, v in vars(b.cond).items() if v is not None} for b in batches)
    assert cond == other
    x0, rendered = (batch.x0 for batch in batches)
    assert (x0.shape, x0.dtype) == (rendered.shape, rendered.dtype)
    assert all(map(math.isfinite, train.take_step(ours).values()))
