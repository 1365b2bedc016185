"""The command line as a user meets it: quick help, what doctor shows, exit codes, and a run that goes on."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import FLOW
from typer.testing import CliRunner

from fastdmd.cli import app
from fastdmd.doctor import try_candidates
from fastdmd.files import locked
from fastdmd_kernels import attention, dispatch, norm
from fastdmd_kernels.trial import Choice, installed

COMMANDS = ("train", "sample", "eval", "export", "warm", "doctor")
HELP = [sys.executable, "-c", "from fastdmd.cli import main; main()", "--help"]
TINY = (
    FLOW.format(here=".")
    .replace(
        'path = "./wan"',
        """
[model.architecture]
num_attention_heads = 1
attention_head_dim = 12
num_layers = 1
ffn_dim = 12
in_channels = 3
out_channels = 3
text_dim = 32
freq_dim = 8""",
    )
    .replace("max_steps = 6", "max_steps = 400")
    .replace("[checkpoint]\nevery = 2", "")
)


def cpu_seconds(command):
    """User and system time of a process and its children."""
    before = os.times()
    subprocess.run(command, check=True, capture_output=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def test_help_answers_at_once():
    assert min(cpu_seconds(HELP) for _ in range(4)) < 0.5


def test_help_imports_no_framework():
    code = (
        "import sys; from fastdmd.cli import app; app(['--help'], standalone_mode=False); print(*sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    *lines, modules = shown.splitlines()
    assert all(any(f" {command} " in line for line in lines) for command in COMMANDS), shown
    assert "fastdmd.cli" in modules.split()
    assert not {"torch", "diffusers", "transformers", "numpy"} & set(modules.split())


def test_doctor_lists_versions_device_and_backends():
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    report = {line.split()[0]: line.split(maxsplit=1)[1] for line in result.stdout.splitlines()}
    assert report["torch"] == torch.__version__
    assert "triton" in report
    assert report["device"].split()[0] in {"cpu", "cuda", "mps"}
    for op in dispatch.OPS:
        assert report[op].split()[0] in {"torch", "triton"}, op
    assert report["attention"].split()[0] in attention.IMPLEMENTATIONS
    assert report["norms"].split()[0] in norm.IMPLEMENTATIONS
    of_attention, of_norms = (line for line in result.stdout.splitlines() if line.startswith("candidates"))
    assert of_attention.endswith(
        f" attention: cudnn, flash, efficient, xformers ({installed('xformers')}), flex, math"
    )
    assert of_norms.endswith(f" norms: torch, liger ({installed('liger-kernel')})")


def test_doctor_s_trials_on_a_gpu_are_of_all_candidates(monkeypatch):
    asked = []
    monkeypatch.setattr(attention, "_probe", lambda device, *key: asked.append(key) or Choice("flash"))
    monkeypatch.setattr(norm, "_probe", lambda _, kind, *__: asked.append(kind) or Choice("liger"))
    monkeypatch.setattr(attention._choices, "made", {})
    monkeypatch.setattr(norm._choices, "made", {})
    device = torch.device("cuda", 0)
    try_candidates(device)
    assert asked == [(torch.bfloat16, 128), "rms_norm", "layer_norm", "group_norm"]
    assert attention.describe(device) == {"attention bfloat16 128": "flash (pinned)"}
    assert norm.describe(device)["layer_norm float32 1536"] == "liger (pinned)"


@pytest.mark.parametrize(
    "command", [["sample"], ["eval"], ["export", "--out", "exported"]], ids=lambda c: c[0]
)
def test_a_folder_that_is_no_run_is_one_clear_line(command, tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        result = CliRunner().invoke(app, [*command, str(folder)])
        assert result.exit_code == 2
        assert isinstance(result.exception, SystemExit)
        assert result.stderr == f"error: {folder} has no config.toml; name the output_dir of a run\n"


def test_an_output_folder_that_cannot_be_made_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(TINY)
    result = CliRunner().invoke(app, ["train", "tiny.toml", 'run.output_dir="/proc/run"'])
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("error: ")
    assert "/proc/run" in result.stderr


def test_interrupted_while_the_final_samples_are_made(tmp_path, monkeypatch):
    def interrupt(run):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(TINY)
    command = ["train", "tiny.toml", "run.max_steps=2"]
    with monkeypatch.context() as patched:
        patched.setattr("fastdmd.train.finish", interrupt)
        result = CliRunner().invoke(app, command)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-2:] == ["interrupted", f"resume with: fastdmd {' '.join(command)}"]
    assert not Path("run/summary.json").exists()
    assert CliRunner().invoke(app, command).exit_code == 0
    assert json.loads(Path("run/summary.json").read_text())["steps"] == 2


def test_a_second_run_in_the_same_folder_is_turned_away(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(TINY)
    Path("run").mkdir()
    with locked(Path("run")):
        result = CliRunner().invoke(app, ["train", "tiny.toml", "run.max_steps=1"])
    assert result.exit_code == 2
    assert f"run.output_dir = '{tmp_path}/run': another process trains there" in result.stderr
    assert [path.name for path in Path("run").iterdir()] == [".lock"]


@pytest.mark.parametrize("resume", ["latest", False])
def test_an_interrupted_run_goes_on_with_the_line_that_it_prints(resume, tmp_path, monkeypatch):
    """End with 130 after the step that SIGINT meets; the line resumes, from an old `resume` too."""
    monkeypatch.chdir(tmp_path)
    Path("it's tiny.toml").write_text(TINY)
    metrics, override = Path("a run/metrics.jsonl"), f"checkpoint.resume={json.dumps(resume)}"
    command = [*HELP[:-1], "train", "it's tiny.toml", 'run.output_dir="a run"', override]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate()[1]
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    rows = metrics.read_text()
    done = rows.count("\n")
    assert 2 < done < 400
    assert [p.name for p in Path("a run/checkpoints").iterdir()] == [f"step_{done:08d}"]
    stopped, again = stderr.strip().splitlines()[-2:]
    assert stopped == f"stopped at step {done} of 400; checkpoint saved"

    program, *arguments = shlex.split(again.removeprefix("resume with: "))
    assert program == "fastdmd"
    result = CliRunner().invoke(app, [*arguments, f"run.max_steps={done + 2}"])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"report: {tmp_path}/a run/report.html"
    # no step is done twice: the rows hold times, which would differ
    assert metrics.read_text().startswith(rows)
    assert json.loads(Path("a run/summary.json").read_text())["steps"] == done + 2
    for command in (["eval", "a run"], ["sample", "a run"]):
        assert CliRunner().invoke(app, command).exit_code == 0
