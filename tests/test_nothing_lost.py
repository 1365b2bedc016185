"""Faults that used to cost a run or a checkpoint: each is refused, and all is left as it was."""

import ast
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from refusals import QUICK, refused
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
from fastdmd.data.encoded import read_folders, read_sample
from fastdmd.evaluation import evaluate
from fastdmd.models import component
from fastdmd.models.families import FAMILIES
from fastdmd.run import Diverged

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
