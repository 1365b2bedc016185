"""Checkpoints: what is on the disk, in which order it gets there, and what is refused."""

import os
import re
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from tiny import ARCHITECTURE, make_config, write_wan

import fastdmd
from fastdmd import checkpoint, train
from fastdmd.models.wan.layers import WanConfig
from fastdmd.resume import restore
from fastdmd.resume import save as save_run
from fastdmd.run import Run, build

TENSORS = {
    "student": {"weight": torch.arange(12.0).view(3, 4), "odd": torch.arange(10, dtype=torch.bfloat16)[::3]},
    "optim_student": {"step.weight": torch.tensor(3.0), "exp_avg.weight": torch.full((3, 4), 1e-30)},
}


def save(folder: Path, step: int, keep: int = 3, value: float = 0.0) -> Path:
    tensors = {name: {key: each + value for key, each in values.items()} for name, values in TENSORS.items()}
    return checkpoint.save(folder, step, tensors, {"seconds": 0.1}, keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_loaded(tmp_path):
    path = save(tmp_path / "checkpoints", 7)
    manifest, tensors = checkpoint.load(path)
    assert path.name == "step_00000007"
    assert (manifest["step"], manifest["seconds"]) == (7, 0.1)
    assert names(path) == ["manifest.json", "optim_student.safetensors", "student.safetensors"]
    assert manifest["files"] == {n: sha256((path / n).read_bytes()).hexdigest() for n in names(path)[1:]}
    assert tensors.keys() == TENSORS.keys()
    for name, values in TENSORS.items():
        assert tensors[name].keys() == values.keys()
        for key, value in values.items():
            assert tensors[name][key].dtype == value.dtype
            assert torch.equal(tensors[name][key], value)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    """Flip the last bit of the last tensor."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink, lambda path: path.write_text("not this")])
@pytest.mark.parametrize("name", ["student.safetensors", "optim_student.safetensors", "manifest.json"])
def test_a_damaged_file_is_named(tmp_path, name, damage):
    path = save(tmp_path, 1)
    damage(path / name)
    with pytest.raises(ValueError, match=re.escape(f"{path / name} is damaged; remove {path} to go on")):
        checkpoint.load(path)


def test_half_written_checkpoints_are_passed_over_and_swept(tmp_path):
    save(tmp_path, 1)
    for name in (".part-00000002", ".part-old-step_00000000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "student.safetensors").write_text("half")
    (tmp_path / "step_00000001.mine").mkdir()
    assert checkpoint.find(tmp_path, "latest") == tmp_path / "step_00000001"
    save(tmp_path, 2)
    assert names(tmp_path) == ["step_00000001", "step_00000001.mine", "step_00000002"]


def test_the_newest_are_kept(tmp_path):
    for step in (9, 10, 99, 100, 101):
        save(tmp_path, step, keep=2)
        assert checkpoint.find(tmp_path, "latest") == tmp_path / f"step_{step:08d}"
    assert names(tmp_path) == ["step_00000100", "step_00000101"]


def test_a_rewound_run_drops_what_it_makes_again(tmp_path):
    """Else the old future would push the new present out, or be resumed from."""
    for step in (2, 4, 6):
        save(tmp_path, step)
    for step, left in ((1, [1]), (4, [1, 4]), (4, [1, 4])):
        path = save(tmp_path, step, value=step)
        assert names(tmp_path) == [f"step_{n:08d}" for n in left]
        assert torch.equal(checkpoint.load(path)[1]["student"]["weight"], TENSORS["student"]["weight"] + step)


def test_what_resume_names(tmp_path):
    assert checkpoint.find(tmp_path / "none", "latest") is None
    path = save(tmp_path, 1)
    save(tmp_path, 2)
    assert checkpoint.find(tmp_path, "latest") == tmp_path / "step_00000002"
    assert checkpoint.find(tmp_path, str(path)) == path
    assert checkpoint.find(tmp_path, False) is None
    with pytest.raises(
        ValueError, match=r"checkpoint.resume = '.*' has no manifest.json; give a step_NNNNNNNN folder"
    ):
        checkpoint.find(tmp_path, str(tmp_path))


def test_a_run_resumes_from_what_it_names(tmp_path):
    steps = {"'latest'": 6, "false": 0, f"'{tmp_path}/run/checkpoints/step_00000004'": 4}
    train.train(make_config(tmp_path, "flow"))
    for resume, step in steps.items():
        run = build(make_config(tmp_path, "flow", f"checkpoint.resume={resume}"))
        restore(run)
        assert run.step == step


@pytest.mark.parametrize(
    ("saved", "resumed", "message"),
    [
        (("flow",), ("flow", "ema.decay=0.5"), None),
        (("dmd", "ema.start_step=0"), ("dmd",), None),
        (("flow", "no ema"), ("flow",), "there is no ema"),
        (("flow",), ("dmd",), "there is no critic, there is no optim_critic"),
        (("flow",), ("flow", "wide"), "student: blocks.0.ffn.net.0.proj.bias is torch.float32 .*more"),
    ],
)
def test_another_configuration_is_refused(tmp_path, saved, resumed, message):
    def make(method: str, *overrides: str) -> Run:
        config = make_config(tmp_path, method, *(each for each in overrides if "=" in each))
        if "wide" in overrides:
            write_wan(tmp_path / "wan", WanConfig(**{**vars(ARCHITECTURE), "ffn_dim": 16}))
        run = build(config)
        if "no ema" in overrides:
            run.ema = None
        return run

    first = make(*saved)
    train.take_step(first)
    save_run(first)
    second = make(*resumed)
    if message is None:
        restore(second)
        assert second.step == 1
        return
    with pytest.raises(
        ValueError, match=f"step_00000001:? {message}; resume with the configuration that it was saved"
    ):
        restore(second)


def test_everything_is_flushed_before_it_counts(tmp_path, monkeypatch):
    """Files and their folder before the rename, the folder above after it; a rename keeps the inode."""
    events: list[tuple[str, int | str]] = []

    def watched(name: str, note) -> None:
        real = getattr(os, name)

        def call(*args):
            events.append((name, note(*args)))
            return real(*args)

        monkeypatch.setattr(os, name, call)

    watched("fsync", lambda fd: os.fstat(fd).st_ino)
    watched("rename", lambda source, target: Path(target).name)
    watched("replace", lambda source, target: Path(target).name)
    folder = tmp_path / "runs" / "one" / "checkpoints"
    save(folder, 1)
    path = save(folder, 2, keep=1)

    made = events.index(("rename", path.name))
    before, after = events[:made], events[made + 1 :]
    for part in (*path.iterdir(), path):
        assert ("fsync", part.stat().st_ino) in before, part
    manifest = before.index(("replace", "manifest.json"), before.index(("rename", "step_00000001")))
    assert ("fsync", (path / "manifest.json").stat().st_ino) in before[:manifest]
    assert ("fsync", path.stat().st_ino) in before[manifest:]
    dropped = after.index(("rename", ".part-old-step_00000001"))
    assert ("fsync", folder.stat().st_ino) in after[:dropped]
    for new in (folder, folder.parent, folder.parent.parent):
        assert ("fsync", new.parent.stat().st_ino) in before, new


def test_nothing_is_pickled():
    wrong = re.compile(r"\bpickle\b|torch\.(save|load)\b|weights_only|\bjoblib\b|\bdill\b|\bmarshal\b")
    sources = [path.read_text() for path in Path(fastdmd.__file__).parent.rglob("*.py")]
    assert len(sources) > 20
    assert not [line for source in sources for line in source.splitlines() if wrong.search(line)]
