"""Test that an export or samples cost no run, no teacher and no earlier export, and open as they say."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from diffusers import StableDiffusionXLPipeline, WanPipeline
from refusals import QUICK, refused
from tiny import make_config, write_wan
from typer.testing import CliRunner

from fastdmd import train
from fastdmd.cli import app
from fastdmd.config.schema import TeacherConfig
from fastdmd.export import check_out, check_samples, export_student, opening
from fastdmd.models import component


def digests(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Make a folder with a run of two steps at `run`, and its teacher at `wan`."""
    here = tmp_path_factory.mktemp("finished")
    write_wan(here / "wan")
    (here / "wan" / "transformer").rename(here / "elsewhere")  # as a cache of models has it
    (here / "wan" / "transformer").symlink_to(here / "elsewhere")
    (here / "link").symlink_to(here / "wan")
    train.train(make_config(here, "dmd", *QUICK))
    return here


OUTS = (
    "wan",
    "run",
    "wan/transformer",
    "wan/new",
    "run/checkpoints",
    "run/checkpoints/step_00000009",
    ".",
    "link",
)


@pytest.mark.parametrize("out", [*OUTS, "run/../wan", "elsewhere", "elsewhere/new"])
def test_an_export_writes_over_nothing_that_the_run_reads_or_is(finished, out, monkeypatch):
    """Refuse --force too, and before a weight is loaded; and where a link in the teacher's folder leads."""
    monkeypatch.setattr(component, "open_weights", lambda *_: pytest.fail("loaded"))
    before = digests(finished)
    for force in ([], ["--force"]):
        line = refused("export", finished / "run", "--out", finished / out, *force)
        assert "would write over" in line
        assert "name another" in line
    assert digests(finished) == before


@pytest.mark.parametrize("key", ["model", "student", "teacher", "critic", "data", "checkpoint"])
def test_every_path_of_a_configuration_is_kept(finished, tmp_path, key):
    config, folder = make_config(finished, "dmd"), tmp_path / "mine" / "inner"
    folder.mkdir(parents=True)
    name, value = {"data": ("sources", (str(folder),)), "checkpoint": ("resume", str(folder))}.get(
        key, ("path", str(folder))
    )
    table = replace(vars(config)[key] or TeacherConfig(path="."), **{name: value})
    config, name = replace(config, **{key: table}), f"{key}.{name}"
    for out in (folder, folder.parent, folder / "new", folder / "a" / ".."):
        with pytest.raises(ValueError, match=f"would write over {name} = "):
            check_out(str(out), config, force=True)
    for out in (folder, folder / "new"):
        with pytest.raises(ValueError, match=f"lies in {name} = "):
            check_samples(str(out), config)
    assert check_out(str(tmp_path / "other"), config, force=False) == tmp_path / "other"
    assert check_samples(str(folder.parent), config) == folder.parent  # beside it


def test_samples_do_not_mix_with_what_the_run_reads(finished, monkeypatch):
    monkeypatch.setattr(component, "open_weights", lambda *_: pytest.fail("loaded"))
    before = digests(finished)
    for out in ("wan", "link/new", "run/checkpoints", "run/checkpoints/step_00000002"):
        assert "which the run reads; name another" in refused(
            "sample", finished / "run", "--out", finished / out
        )
    assert "--out is empty" in refused("sample", finished / "run", "--out", "")
    assert digests(finished) == before
    monkeypatch.undo()
    monkeypatch.setenv("HOME", str(finished / "run"))
    result = CliRunner().invoke(app, ["sample", str(finished / "run"), "--out", "~/samples/mine"])
    assert result.exit_code == 0, result.stderr
    assert (finished / "run" / "samples" / "mine" / "00.webp").is_file()


def test_a_home_is_expanded_in_out(finished, monkeypatch):
    monkeypatch.setenv("HOME", str(finished))
    assert "would write over model.path" in refused("export", finished / "run", "--out", "~/wan")


def test_an_export_needs_a_name_and_a_place(finished, tmp_path):
    assert "--out is empty" in refused("export", finished / "run", "--out", "")
    (tmp_path / "file").write_text("mine")
    for out in ("file", "file/under"):
        assert f"{tmp_path / 'file'} is a file" in refused(
            "export", finished / "run", "--out", tmp_path / out
        )
    (tmp_path / "empty").mkdir()
    export_student(finished / "run", tmp_path / "empty")
    assert (tmp_path / "empty" / "model_index.json").is_file()


@pytest.mark.parametrize("name", ["mine.txt", "README.md", "model_index.json"])
def test_force_replaces_an_export_and_nothing_else(finished, tmp_path, name):
    """A folder with something of the user's in it would be gone whole: a home, or another model."""
    for folder in ("other", "student"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text("{}")
    for force in ([], ["--force"]):
        line = refused("export", finished / "run", "--out", tmp_path / "other", *force)
        assert "is not empty, and no export of fastdmd; name another" in line
    assert (tmp_path / "other" / name).read_text() == "{}"

    (tmp_path / "student" / name).unlink()
    command = ["export", str(finished / "run"), "--out", str(tmp_path / "student")]
    assert CliRunner().invoke(app, command).exit_code == 0
    (tmp_path / "student" / "transformer" / "old").write_text("")
    assert "replace it with --force" in refused(*command)
    assert (tmp_path / "student" / "transformer" / "old").exists()
    assert CliRunner().invoke(app, [*command, "--force"]).exit_code == 0
    assert not (tmp_path / "student" / "transformer" / "old").exists()


def test_an_export_that_fails_or_is_killed_leaves_nothing_half_written(finished, tmp_path, monkeypatch):
    """And the earlier one where it was, also after a kill between the two renames."""
    out = tmp_path / "out"

    def fail(*_):
        raise KeyboardInterrupt

    def export_fails() -> None:
        with monkeypatch.context() as patch:
            patch.setattr("fastdmd.export.card", fail)
            with pytest.raises(KeyboardInterrupt):
                export_student(finished / "run", out, force=True)

    export_fails()
    assert list(tmp_path.iterdir()) == []
    assert export_student(finished / "run", out) == []
    (out / "earlier").write_text("")
    export_fails()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "earlier").exists()

    out.rename(tmp_path / ".out.old")
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part" / "half").write_text("")
    export_fails()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "earlier").exists()
    export_student(finished / "run", out, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (out / "earlier").exists()


def test_an_export_is_on_the_disk_before_it_is_there(finished, tmp_path, monkeypatch):
    events: list[int | str] = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.fstat(fd).st_ino), fsync(fd))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append(Path(b).name), rename(a, b))[1])
    export_student(finished / "run", tmp_path / "out")
    before, after = events[: events.index("out")], events[events.index("out") :]
    assert {path.stat().st_ino for path in (tmp_path / "out").rglob("*")} <= set(before)
    assert tmp_path.stat().st_ino in after


def test_an_export_of_a_base_that_is_not_finite_is_refused(tmp_path):
    """Under adapters it is no part of what learns, so no checkpoint tells."""
    train.train(make_config(tmp_path, "lcm_lora", *QUICK))
    write_wan(tmp_path / "wan", nan=True)
    line = refused("export", tmp_path / "run", "--out", tmp_path / "out")
    assert "student.proj_out.weight is not finite; nothing exported" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["dmd", "sdxl_dmd"])
def test_the_line_that_opens_an_export_opens_it_in_stock_diffusers(tmp_path, how):
    """The built-in world's has no text encoder and no VAE: null in the index, and None for the pipeline."""
    train.train(make_config(tmp_path, how, *QUICK))
    out = tmp_path / "student"
    result = CliRunner().invoke(app, ["export", str(tmp_path / "run"), "--out", str(out)])
    assert result.exit_code == 0, result.stderr
    index = json.loads((out / "model_index.json").read_text())
    assert index["vae"] == index["text_encoder"] == index["tokenizer"] == [None, None]
    line = result.stdout.splitlines()[-1].removeprefix("open it with diffusers: ")
    pipelines = {each.__name__: each for each in (WanPipeline, StableDiffusionXLPipeline)}
    pipe = eval(line, pipelines)
    assert pipe.vae is None
    assert pipe.scheduler.config.num_train_timesteps == 1000
    page = (out / "README.md").read_text()
    assert f"\npipe = {line.replace(str(out), 'student')}\n" in page
    assert "not sample" not in page


def test_a_whole_export_opens_with_its_name_alone(tmp_path):
    for name in ("text_encoder", "vae"):
        (tmp_path / name).mkdir()
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "P", "vae": ["a", "b"], "x": [None, None]})
    )
    assert opening(tmp_path, "a b") == "P.from_pretrained('a b', x=None)"
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "P", "vae": ["a", "b"]}))
    assert opening(tmp_path, "a b") == "P.from_pretrained('a b')"


@pytest.mark.parametrize(("how", "extra", "what"), [
    ("causal_sid", (), "block by block"),
    ("dmd", ("vsa={sparsity=0.5, tile=[2, 2, 2]}", "model.attention.student='vsa'"), "sparse attention"),
])  # fmt: skip
def test_an_export_that_stock_diffusers_samples_otherwise_says_so(tmp_path, how, extra, what):
    train.train(make_config(tmp_path, how, *QUICK, *extra))
    result = CliRunner().invoke(app, ["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.stderr
    [warning] = [line for line in result.stderr.splitlines() if line.startswith("warning: the student")]
    assert what in warning
    page = (tmp_path / "out" / "README.md").read_text()
    assert "Stock diffusers does not sample this right" in page
    assert what in page
