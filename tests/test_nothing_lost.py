"""Faults that used to cost a run, a teacher or a checkpoint: each is refused, and all is left as it was."""

import ast
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, WanPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_export import frozen_networks
from test_frozen_sdxl import CPU, text_config, tokenizer
from tiny import TEXTS, make_config, reopen, write_encoded, write_toml, write_wan
from transformers import CLIPTextModel, CLIPTextModelWithProjection
from typer.testing import CliRunner

import fastdmd
from fastdmd import checkpoint, resume, train
from fastdmd import config as configs
from fastdmd.cli import app
from fastdmd.config.schema import TeacherConfig
from fastdmd.data.encoded import read_folders, read_sample
from fastdmd.evaluation import evaluate
from fastdmd.export import check_out, check_samples, export_student, opening
from fastdmd.models import component
from fastdmd.models.families import FAMILIES
from fastdmd.run import Diverged

QUICK = ("run.max_steps=2", "validation.teacher_reference=false")


def refused(*arguments, code: int = 2) -> str:
    """Return the one line that a command ends with."""
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
    """Make a folder with a run of two steps at `run`, and its teacher at `wan`."""
    here = tmp_path_factory.mktemp("finished")
    write_wan(here / "wan")
    (here / "wan" / "transformer").rename(here / "elsewhere")  # as a cache of models has it
    (here / "wan" / "transformer").symlink_to(here / "elsewhere")
    (here / "link").symlink_to(here / "wan")
    train.train(make_config(here, "dmd", *QUICK))
    return here


# ------------------------------------------------------------------------------------ export


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
        reopen(run.folder)
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


CODE = """
from pathlib import Path
from transformers import T5Tokenizer
Path({mark!r}).write_text("ran")
Mine = T5Tokenizer
"""


@pytest.mark.parametrize("kind", ["wan", "sdxl"])
def test_no_code_of_a_folder_runs(tmp_path, monkeypatch, kind):
    """Ask nothing, even where the user would say yes; fetch no kernel that a config names."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    mark = tmp_path / "mark"
    parts = write_encoders(tmp_path, kind)
    for part in parts:
        file = tmp_path / part / ("tokenizer_config.json" if "tokenizer" in part else "config.json")
        classes = ("AutoTokenizer", "AutoConfig", "AutoModel", "AutoModelForTextEncoding")
        names = {
            each: ["mine.Mine", "mine.Mine"] if each == "AutoTokenizer" else "mine.Mine" for each in classes
        }
        raw = json.loads(file.read_text()) | {"auto_map": names, "attn_implementation": "someone/kernel"}
        if kind == "wan" and part == "tokenizer":
            # which transformers does not have, so it would look for the code
            raw["tokenizer_class"] = "Mine"
        file.write_text(json.dumps(raw))
        for folder in (tmp_path, tmp_path / part):
            (folder / "mine.py").write_text(CODE.format(mark=str(mark)))
    encode = FAMILIES["wan2.1" if kind == "wan" else "sdxl"].encoder(str(tmp_path), CPU, torch.float32)
    assert encode(["a red fox"]).text.isfinite().all()
    assert not mark.exists()


def write_encoders(path: Path, kind: str) -> list[str]:
    """Write the text encoders of a family, tiny and random, and return the names of their folders."""
    if kind == "wan":
        parts = frozen_networks()
        del parts["vae"]
    else:
        clips = ("", CLIPTextModel, 8, "<|endoftext|>"), ("_2", CLIPTextModelWithProjection, 12, "!")
        parts = {}
        for end, model, width, pad in clips:
            parts |= {f"text_encoder{end}": model(text_config(width)), f"tokenizer{end}": tokenizer(pad)}
    for name, part in parts.items():
        part.save_pretrained(path / name)
    return list(parts)


MEMORY = (
    "out of memory ({}); lower run.batch_size and raise run.grad_accum, or set memory.checkpointing = 'full'"
)
CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB"
HOST = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 400000000000 bytes"
FORESEEN = {
    "device": (
        torch.OutOfMemoryError(f"{CUDA}. GPU 0 has a total capacity of ..\nmore"),
        MEMORY.format(CUDA),
    ),
    "host": (
        RuntimeError(f"{HOST}. Error code 12 (Cannot allocate memory)"),
        MEMORY.format(f"{HOST}. Error code 12"),
    ),
    "python": (MemoryError(), MEMORY.format("the host's")),
    "damaged": (
        SafetensorError("header"),
        "a weights file cannot be read (header); download or save the folder again",
    ),
}


@pytest.mark.parametrize("what", FORESEEN)
def test_what_can_be_foreseen_is_one_line(tmp_path, monkeypatch, what):
    error, words = FORESEEN[what]

    def fail(*_):
        raise error

    monkeypatch.setattr(train, "take_step", fail)
    line = refused("train", write_toml(tmp_path, "flow"))
    assert line.startswith(f"error: {words[:80]}")
    assert line.endswith(words[-40:])


def test_what_cannot_be_foreseen_keeps_its_traceback(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(train, "take_step", fail)
    result = CliRunner().invoke(app, ["train", str(write_toml(tmp_path, "flow"))])
    assert isinstance(result.exception, RuntimeError)


def test_a_file_that_is_damaged_after_it_was_opened_is_named(tmp_path):
    """Truncated while a run starts, or goes on: the header was read, the tensors were not."""
    write_wan(tmp_path / "wan")
    rows = {"x0": torch.zeros(2, 3, 3, 8, 8), "text": torch.zeros(2, 4, 32)}
    write_encoded(tmp_path / "encoded", rows, torch.zeros(1, 4, 32))
    weights = component.open_weights(tmp_path / "wan" / "transformer")
    [folder] = read_folders([str(tmp_path / "encoded")], (3, 3, 8, 8))
    [(shard, _)] = folder.shards
    for path in (
        *(tmp_path / "wan" / "transformer").glob("*.safetensors"),
        *(tmp_path / "encoded").glob("*.s*"),
    ):
        path.write_bytes(path.read_bytes()[:-8])
    for read, file in (
        (lambda: list(weights), "diffusion_pytorch_model.safetensors"),
        (lambda: read_sample(shard, 0, ["x0"]), "00000.safetensors"),
        (folder.uncond, "uncond.safetensors"),
    ):
        with pytest.raises(ValueError, match=rf"{file} cannot be read \(.*\); "):
            read()


def test_a_checkpoint_that_was_written_wrong_is_named(tmp_path):
    """Its hash is right, so it was no safetensors file from the start."""
    path = checkpoint.save(tmp_path, 1, {"student": {"w": torch.zeros(2)}}, {}, keep=1)
    (path / "student.safetensors").write_bytes(b"not this")
    facts = json.loads((path / "manifest.json").read_text())
    facts["files"]["student.safetensors"] = checkpoint.sha256(path / "student.safetensors")
    (path / "manifest.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"student.safetensors \(.*\) is damaged; remove"):
        checkpoint.load(path)


@pytest.mark.parametrize("command", ["train", "sample", "eval", "export", "warm"])
def test_several_processes_are_one_line_before_anything_is_loaded(tmp_path, command):
    """Every one of them would write the same files. torch itself is not imported."""
    words = [command, str(tmp_path / "any"), *(["--out", "x"] if command == "export" else [])]
    code = f"""
import os, sys
os.environ["WORLD_SIZE"] = "2"
sys.modules["torch"] = None  # to import it is an ImportError
from fastdmd.cli import app
app({words})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    line = "error: WORLD_SIZE = 2: several GPUs are not built yet; start one process, without a launcher\n"
    assert done.stderr == line


@pytest.mark.parametrize("world", ["1", ""])
def test_one_process_by_a_launcher_is_one_process(tmp_path, monkeypatch, world):
    monkeypatch.setenv("WORLD_SIZE", world)
    assert "no such file" in refused("train", tmp_path / "any.toml")


def test_python_dash_m_and_the_version():
    command = [sys.executable, "-m", "fastdmd", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.startswith("fastdmd ")
    assert set(TEXTS)
