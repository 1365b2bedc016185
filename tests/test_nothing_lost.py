"""Faults that used to cost a run, a teacher or a checkpoint, each planted: what is refused, and that all is left as it was."""

import ast
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TEXTS, make_config, write_toml
from typer.testing import CliRunner

import fastdmd
from fastdmd import checkpoint, resume, train
from fastdmd import config as configs
from fastdmd.cli import app
from fastdmd.evaluation import evaluate
from fastdmd.export import export_student
from fastdmd.models import component
from fastdmd.run import Diverged

QUICK = ("run.max_steps=2", "validation.teacher_reference=false")


def refused(*arguments, code: int = 2) -> str:
    """The one line that a command ends with."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert (result.exit_code, isinstance(result.exception, SystemExit)) == (code, True), repr(
        result.exception
    )
    *progress, line = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert not any(other.startswith("error: ") for other in progress)
    return line


def digests(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with a run of two steps at `run`, and its teacher at `wan`."""
    here = tmp_path_factory.mktemp("finished")
    train.train(make_config(here, "dmd", *QUICK))
    return here


# ------------------------------------------------------------------------------------ export


@pytest.mark.parametrize(
    "out", ["wan", "run", "wan/transformer", "run/checkpoints", ".", "link", "run/../wan"]
)
def test_an_export_writes_over_nothing_that_the_run_reads_or_is(finished, out, monkeypatch):
    """Not even with --force, and before a weight is loaded."""
    monkeypatch.setattr(component, "open_weights", lambda *_: pytest.fail("loaded"))
    link = finished / "link"
    if not link.exists():
        link.symlink_to(finished / "wan")
    before = digests(finished)
    for force in ([], ["--force"]):
        line = refused("export", finished / "run", "--out", finished / out, *force)
        assert "would write over" in line
        assert "name another" in line
    assert digests(finished) == before


def test_a_home_is_expanded_in_out(finished, monkeypatch):
    monkeypatch.setenv("HOME", str(finished))
    assert "would write over model.path" in refused("export", finished / "run", "--out", "~/wan")


def test_an_export_needs_a_name_and_a_place(finished, tmp_path):
    assert "--out is empty" in refused("export", finished / "run", "--out", "")
    (tmp_path / "file").write_text("mine")
    assert "is a file" in refused("export", finished / "run", "--out", tmp_path / "file")
    there = tmp_path / "there"
    there.mkdir()
    (there / "mine.txt").write_text("mine")
    assert "--force" in refused("export", finished / "run", "--out", there)
    assert (there / "mine.txt").read_text() == "mine"
    result = CliRunner().invoke(app, ["export", str(finished / "run"), "--out", str(there), "--force"])
    assert result.exit_code == 0, result.stderr
    assert not (there / "mine.txt").exists()
    assert (there / "transformer" / "config.json").is_file()


def test_a_killed_export_leaves_nothing_half_written(finished, tmp_path, monkeypatch):
    def kill(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastdmd.export.card", kill)
    with pytest.raises(KeyboardInterrupt):
        export_student(finished / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert export_student(finished / "run", tmp_path / "out") == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_exported_pipeline_opens_without_the_parts_that_the_teacher_lacks(finished, tmp_path):
    """A built-in world's has no text encoder and no VAE: null in the index, and None for the pipeline."""
    from diffusers.pipelines.wan.pipeline_wan import WanPipeline

    result = CliRunner().invoke(app, ["export", str(finished / "run"), "--out", str(tmp_path / "student")])
    assert result.exit_code == 0, result.stderr
    index = json.loads((tmp_path / "student" / "model_index.json").read_text())
    assert index["text_encoder"] == index["tokenizer"] == index["vae"] == [None, None]
    absent = dict.fromkeys(
        ("text_encoder", "tokenizer", "vae")
    )  # which WanPipeline does not do without by itself
    pipe = WanPipeline.from_pretrained(tmp_path / "student", **absent)
    assert len(pipe.transformer.blocks) == 1


@pytest.mark.parametrize(("how", "extra", "what"), [
    ("causal_sid", (), "block by block"),
    ("dmd", ("vsa={sparsity=0.5, tile=[2, 2, 2]}", "model.attention.student='vsa'"), "sparse attention"),
])  # fmt: skip
def test_an_export_that_stock_diffusers_samples_otherwise_says_so(tmp_path, how, extra, what):
    train.train(make_config(tmp_path, how, *QUICK, *extra))
    result = CliRunner().invoke(app, ["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.stderr
    assert "warning: this student" in result.stderr
    assert what in result.stderr
    assert what in (tmp_path / "out" / "README.md").read_text()


# ------------------------------------------------------------------------------------ states


@pytest.mark.parametrize(
    ("file", "name", "value", "words"),
    [
        ("optim_student", "exp_avg.proj_out.bias", torch.zeros(3), "torch.float32 [12]"),
        ("optim_student", "exp_avg_sq.proj_out.bias", torch.zeros(12, dtype=torch.int64), "torch.int64"),
        ("optim_student", "exp_avg.nobody", torch.zeros(3), "nobody, which is unknown"),
        ("optim_critic", "exp_avg_sq.proj_out.bias", None, "has no exp_avg_sq.proj_out.bias"),
        (
            "student",
            "proj_out.bias",
            torch.zeros(12, dtype=torch.int64),
            "torch.int64 [12], not torch.float32",
        ),
        ("ema", "proj_out.bias", torch.zeros(12, dtype=torch.float64), "torch.float64"),
        ("ema", "proj_out.bias", torch.full((12,), math.nan), "ema.proj_out.bias is not finite"),
        ("optim_student", "exp_avg.proj_out.bias", torch.full((12,), math.inf), "not finite"),
    ],
)
def test_a_state_that_is_not_this_run_s_is_not_loaded(tmp_path, file, name, value, words):
    """Before a tensor is written to: a moment of another shape corrupts memory in the fused optimizer."""
    run = train.train(make_config(tmp_path, "dmd", *QUICK))
    newest = checkpoint.complete(run.folder / "checkpoints")[-1]
    path = newest / f"{file}.safetensors"
    tensors = load_file(path)
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    save_file(tensors, path)
    facts = json.loads((newest / "manifest.json").read_text())
    facts["files"][path.name] = __import__("hashlib").sha256(path.read_bytes()).hexdigest()
    (newest / "manifest.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=newest.name) as e:
        resume.reopen(run.folder)
    assert words in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("where", ["master", "moment", "average"])
def test_a_poisoned_state_is_never_saved(tmp_path, where, monkeypatch):
    """The run stops with status 1, and the last good checkpoint stands."""
    toml = write_toml(tmp_path, "dmd")
    real = train.take_step

    def take_step(run):
        values = real(run)
        if run.step == 4:
            optimizer = run.optimizers["student"]
            tensors = {
                "master": optimizer.masters["proj_out.bias"],
                "moment": optimizer.moments()["exp_avg_sq.proj_out.bias"],
                "average": run.ema.shadow["proj_out.bias"],
            }
            with torch.no_grad():
                tensors[where][0] = math.nan
        return values

    monkeypatch.setattr(train, "take_step", take_step)
    line = refused("train", toml, code=1)
    assert "step 4" in line
    assert "proj_out.bias is not finite; nothing saved, the checkpoint before it stands" in line
    assert [p.name for p in checkpoint.complete(tmp_path / "run" / "checkpoints")] == ["step_00000002"]
    monkeypatch.setattr(train, "take_step", real)
    assert train.train(configs.load(toml)).step == 6


def test_large_numbers_are_finite():
    """Whose squares are not, in float32."""
    big = {"a": {"x": torch.tensor([3e38, -3e38]), "none": torch.zeros(0)}}
    assert resume.not_finite(big) == []
    assert resume.not_finite({**big, "b": {"y": torch.tensor([1.0, math.inf]), "n": torch.ones(2)}}) == [
        "b.y"
    ]
    assert issubclass(Diverged, RuntimeError)


# ---------------------------------------------------------------------------- the rest of it


def test_summaries_are_json_whatever_the_scores(tmp_path, monkeypatch):
    """JSON has no NaN and no Infinity."""
    monkeypatch.setattr(
        "fastdmd.data.world.ShapesWorld.scores", lambda *_: {"oracle": math.nan, "swd": math.inf}
    )
    run = train.train(make_config(tmp_path, "dmd", *QUICK, "validation.every=1"))

    def no_constant(name):
        pytest.fail(f"{name} is no JSON")

    summary = json.loads((run.folder / "summary.json").read_text(), parse_constant=no_constant)
    assert summary["scores"]["student"] == {"oracle": None, "swd": None}
    for line in (run.folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=no_constant)
    assert evaluate.NOT_SCORED == {"oracle": None, "swd": None}


def test_every_load_of_a_library_is_safe():
    """No code of a folder runs, only safetensors are read, nothing is fetched."""
    calls = [
        node
        for path in Path(fastdmd.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained")
    ]
    assert len(calls) >= 6
    for call in calls:
        assert "**SAFE" in ast.unparse(call), ast.unparse(call)
    wanted = {"trust_remote_code": False, "use_safetensors": True, "local_files_only": True}
    assert wanted == component.SAFE


@pytest.mark.parametrize(
    "code",
    [
        "torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0')",
        "SafetensorError('header')",
    ],
)
def test_what_can_be_foreseen_is_one_line(tmp_path, monkeypatch, code):
    from safetensors import SafetensorError

    def fail(*_):
        raise {"t": torch.OutOfMemoryError, "S": SafetensorError}[code[0]](code.split("'")[1])

    monkeypatch.setattr(train, "take_step", fail)
    line = refused("train", write_toml(tmp_path, "flow"))
    assert ("memory.checkpointing" if code[0] == "t" else "download or save it again") in line


def test_several_processes_are_one_line_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(configs, "load", lambda *_: pytest.fail("loaded"))
    assert "WORLD_SIZE = 2" in refused("train", tmp_path / "any.toml")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.undo()


def test_python_dash_m_and_the_version():
    command = [sys.executable, "-m", "fastdmd", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.startswith("fastdmd ")
    assert set(TEXTS)
