"""What a run resumes with and what it refuses, and that it loses nothing: other runs' folders stay."""

import os
import re
import shlex
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest
from tiny import LORA, TEXTS, make_config, reopen, write_toml, write_wan
from typer.testing import CliRunner

from fastdmd import config as configs
from fastdmd import train
from fastdmd.cli import app
from fastdmd.files import locked
from fastdmd.resume import FREE, identity, refuse_another

DMD = ("dmd", "run.max_steps=2", "validation.teacher_reference=false")
# what is given to the second start, and the line for each key
OTHER = {
    "method": (("method.guidance=5.0",), ["method.guidance = 5.0, and CHECKPOINT has 3.0"]),
    "steps of the sampler": (
        ("method.denoising_timesteps=[1000, 500]",),
        ["method.denoising_timesteps = [1000.0, 500.0], and CHECKPOINT has [1000.0, 757.0, 522.0]"],
    ),
    "two at once": (
        ("run.seed=7", "run.grad_accum=2"),
        ["run.seed = 7, and CHECKPOINT has 0", "run.grad_accum = 2, and CHECKPOINT has 1"],
    ),
    "batch": (("run.batch_size=1",), ["run.batch_size = 1, and CHECKPOINT has 2"]),
    "precision": (("precision.compute='bf16'",), ['precision.compute = "bf16", and CHECKPOINT has "fp32"']),
    "schedule": (("schedule.flow_shift=5.0",), ["schedule.flow_shift = 5.0, and CHECKPOINT has 3.0"]),
    "data": (("data.resolution=[12, 12]",), ["data.resolution = [12, 12], and CHECKPOINT has [8, 8]"]),
    "optimizer": (
        ("optim.critic.betas=[0.0, 0.9]",),
        ["optim.critic.betas = [0.0, 0.9], and CHECKPOINT has [0.9, 0.999]"],
    ),
    "average": (("ema.decay=0.5",), ["ema.decay = 0.5, and CHECKPOINT has 0.9"]),
    "teacher": (("teacher.path='HERE/other'",), ['teacher.path = "HERE/other", and CHECKPOINT has none']),
    "model": (("model.path='HERE/other'",), ['model.path = "HERE/other", and CHECKPOINT has "HERE/wan"']),
    "start": (("student.path='HERE/other'",), ['student.path = "HERE/other", and CHECKPOINT has none']),
    "critic": (("critic.path='HERE/other'",), ['critic.path = "HERE/other", and CHECKPOINT has none']),
    "attention": (
        ("model.attention.student='vsa'", "vsa.sparsity=0.5"),
        [
            'model.attention.student = "vsa", and CHECKPOINT has "dense"',
            "vsa.sparsity = 0.5, and CHECKPOINT has none",
        ],
    ),
    "rollout": (
        ("rollout.exit='last'",),
        ['rollout.exit = "last", and CHECKPOINT has "uniform"'],
    ),
}
FREELY = (
    *("run.max_steps=9", "run.device='auto'", "optim.student.lr=1e-5", "optim.critic.warmup_steps=1"),
    *(
        "optim.student.schedule='constant'",
        "memory.checkpointing='full'",
        "compile.mode='blocks'",
        "checkpoint.every=1",
        "checkpoint.keep=1",
    ),
    *("validation.samples=3", "validation.weights='student'", "logging.every=2", "logging.run_name='again'"),
)


@pytest.fixture
def done(tmp_path: Path) -> Path:
    """Make a run of two steps; tmp_path/other has another teacher."""
    train.train(make_config(tmp_path, *DMD))
    write_wan(tmp_path / "other")
    return tmp_path / "run"


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start(here: Path, *overrides: str):
    return CliRunner().invoke(app, ["train", str(here / "dmd.toml"), *DMD[1:], *overrides])


@pytest.mark.parametrize("what", OTHER)
def test_another_run_is_named_by_its_keys_and_left_alone(tmp_path, done, monkeypatch, what):
    """Before anything is built."""
    overrides, lines = OTHER[what]
    before, found = content(done), done / "checkpoints" / "step_00000002"
    monkeypatch.setattr(train, "build", None)
    result = start(tmp_path, *(each.replace("HERE", str(tmp_path)) for each in overrides))
    assert result.exit_code == 2
    *keys, remedy = result.stderr.splitlines()
    expected = [line.replace("CHECKPOINT", str(found)).replace("HERE", str(tmp_path)) for line in lines]
    expected = [f"error: {line}" for line in expected]
    assert set(expected) <= set(keys)
    assert {line.split(".")[0] for line in keys} == {line.split(".")[0] for line in expected}
    assert remedy.startswith("error: this is another run: name another run.output_dir, or take what ")
    assert content(done) == before


@pytest.mark.parametrize("override", FREELY)
def test_a_run_goes_on_with_what_may_change(tmp_path, done, override):
    refuse_another(make_config(tmp_path, *DMD, override))


def test_what_may_change_is_no_longer_than_it_has_to_be(tmp_path):
    """Each pattern is of keys that there are, and no key of [method] or [data] is among them."""
    keys = set()
    for i, method in enumerate(TEXTS):
        text = configs.dump(make_config(tmp_path / str(i), method))
        tables = re.findall(r"(?ms)^\[(.*?)\]\n(.*?)(?=^\[|\Z)", text)
        keys |= {
            f"{table}.{line.split(' =')[0]}" for table, lines in tables for line in lines.split("\n") if line
        }
    for pattern in FREE:
        assert any(fnmatch(key, pattern) for key in keys), pattern
    free = {key for key in keys if any(fnmatch(key, pattern) for pattern in FREE)}
    assert {key.partition(".")[0] for key in free} == {
        *("run", "optim", "memory", "compile", "checkpoint", "validation", "logging"),
    }
    assert {key for key in free if key.startswith(("run.", "optim.student."))} == {
        *("run.output_dir", "run.max_steps", "run.device"),
        *(f"optim.student.{name}" for name in ("lr", "schedule", "warmup_steps", "min_lr")),
    }
    assert LORA in TEXTS["lcm_lora"]
    assert {"lora.rank", "method.guidance", "data.sources"} <= set(
        identity(make_config(tmp_path, "lcm_lora"))
    )


def test_a_link_to_the_same_teacher_is_the_same_teacher(tmp_path, done):
    (tmp_path / "link").symlink_to(tmp_path / "wan")
    refuse_another(make_config(tmp_path, *DMD, f"model.path='{tmp_path}/link'"))
    refuse_another(make_config(tmp_path, *DMD, f"model.path='{tmp_path}/other/../wan'"))


def test_the_folder_of_an_older_version_goes_on(tmp_path, done, monkeypatch):
    """Its paths are relative, a key that is new has its default, and its device may not be here."""
    monkeypatch.chdir(tmp_path)
    text = (done / "config.toml").read_text()
    older = (
        text.replace(f'"{tmp_path}/', '"')
        .replace("caption_dropout = 0.0\n", "")
        .replace('"cpu"', '"cuda:77"')
    )
    assert older.count("\n") == text.count("\n") - 1
    (done / "config.toml").write_text(older)
    refuse_another(make_config(tmp_path, *DMD))
    with pytest.raises(ValueError, match=r"^data.caption_dropout = 0.1, and .* has 0.0"):
        refuse_another(make_config(tmp_path, *DMD, "data.caption_dropout=0.1"))


def test_a_table_that_is_gone_makes_another_run_too(tmp_path, done):
    with (done / "config.toml").open("a") as file:
        file.write(f"\n[teacher]\npath = '{tmp_path}/wan'\n")
    with pytest.raises(ValueError, match=r"^teacher.path = none, and .*step_00000002 has .*wan"):
        refuse_another(make_config(tmp_path, *DMD))


def test_the_way_to_go_on_all_the_same(tmp_path, done):
    """The remedy's last words: what is in the run's config.toml is what it is."""
    path = done / "config.toml"
    with pytest.raises(ValueError, match=re.escape(f"; {path} says what that is")):
        refuse_another(make_config(tmp_path, *DMD, "method.guidance=5.0"))
    path.write_text(path.read_text().replace("\nguidance = 3.0", "\nguidance = 5.0"))
    assert train.train(make_config(tmp_path, *DMD, "method.guidance=5.0", "run.max_steps=3")).step == 3


def test_a_checkpoint_of_no_known_run_is_refused(tmp_path, done):
    (done / "config.toml").rename(done / "config.toml.mine")
    with pytest.raises(
        ValueError, match=r"step_00000002 has no .*config.toml, which says what run it is of; put it"
    ):
        refuse_another(make_config(tmp_path, *DMD))


def test_a_named_checkpoint_is_of_its_own_run(tmp_path, done):
    """Not of the folder that goes on from it."""
    elsewhere = (
        f"run.output_dir='{tmp_path}/elsewhere'",
        f"checkpoint.resume='{done}/checkpoints/step_00000002'",
    )
    refuse_another(make_config(tmp_path, *DMD, *elsewhere))
    with pytest.raises(ValueError, match=r"^method.guidance = 5.0, and "):
        refuse_another(make_config(tmp_path, *DMD, *elsewhere, "method.guidance=5.0"))


def test_a_run_without_a_checkpoint_starts_again_as_it_likes(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train, "take_step", None)
        with pytest.raises(TypeError):
            train.train(make_config(tmp_path, *DMD))
    assert (tmp_path / "run" / "config.toml").is_file()
    assert train.train(make_config(tmp_path, *DMD, "method.guidance=5.0")).step == 2


@pytest.mark.parametrize("left", ["checkpoints", "metrics.jsonl"])
def test_to_start_anew_deletes_no_run(tmp_path, done, left):
    """The line that it prints moves the run away, and then it starts; a folder in the way is passed over."""
    for name in ("checkpoints", "metrics.jsonl"):
        if name != left:
            (done / name).rename(tmp_path / name)
    (tmp_path / "run.1").mkdir()
    before = content(done)
    result = start(tmp_path, "checkpoint.resume=false")
    assert result.exit_code == 2
    [line] = result.stderr.splitlines()
    assert line.startswith(
        f"error: checkpoint.resume = false, and {done} has a run; name another run.output_dir"
    )
    assert content(done) == before
    move = line.partition("move it away: ")[2]
    assert shlex.split(move) == ["mv", str(done), str(tmp_path / "run.2")]
    subprocess.run(move, shell=True, check=True)
    assert content(tmp_path / "run.2") == before
    assert start(tmp_path, "checkpoint.resume=false").exit_code == 0


def test_a_second_start_is_told_before_it_builds(tmp_path, done, monkeypatch):
    monkeypatch.setattr(train, "build", None)
    with locked(done):
        result = start(tmp_path, "run.max_steps=9")
    assert result.exit_code == 2
    assert "another process trains there" in result.stderr


def test_a_runs_folder_opens_from_anywhere(tmp_path, monkeypatch):
    """From relative paths and `~`: what is written is absolute."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_toml(tmp_path, "dmd")
    relative = "run.output_dir='runs/one'", "model.path='~/wan'", "teacher.path='./wan'"
    train.train(configs.load("dmd.toml", [*DMD[1:], *relative]))
    text = (tmp_path / "runs" / "one" / "config.toml").read_text()
    assert re.findall(r'(?:path|output_dir) = "(.*)"', text) == [
        *(str(tmp_path / name) for name in ("runs/one", "wan", "wan")),
    ]
    assert text == configs.dump(
        configs.load("dmd.toml", [*DMD[1:], *relative])
    )  # as bench.proof compares them
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    os.rename(tmp_path / "runs", tmp_path / "moved")
    assert reopen(Path("../moved/one")).step == 2


def test_a_runs_folder_is_opened_with_other_values(tmp_path, done):
    """As train takes them: a model that has moved, say. A wrong key is blamed on the command line."""
    (tmp_path / "wan").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"config.toml:\d+: model.path: '.*wan' has no transformer"):
        reopen(done)
    run = reopen(done, [f"model.path='{tmp_path}/moved'", "validation.samples=3"])
    assert (run.step, run.config.validation.samples, run.folder) == (2, 3, done)
    with pytest.raises(
        ValueError, match=r"^command line: validation.sample: unknown key; did you mean 'samples'"
    ):
        reopen(done, [f"model.path='{tmp_path}/moved'", "validation.sample=3"])
