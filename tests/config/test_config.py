"""Every fault of a configuration is reported before anything loads: its place, its key and a remedy."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import write_encoded
from typer.testing import CliRunner

from fastdmd import config as configs
from fastdmd.cli import app
from fastdmd.models import component

RUN = """\
[run]
output_dir = "out"
max_steps = 10
batch_size = 2

[model]
family = "wan2.1"
"""

DMD = (
    RUN
    + """\
path = "teacher"

[schedule]
flow_shift = 3.0

[method]
name = "dmd"
denoising_timesteps = [1000, 757, 522]
guidance = 3.5

[critic]
updates_per_generator = 4

[optim.student]
lr = 1e-5

[optim.critic]
lr = 2e-5

[data]
sources = ["prompts.txt"]
frames = 81
resolution = [32, 48]
"""
)

FLOW = (
    RUN
    + """\

[model.architecture]
num_attention_heads = 2
attention_head_dim = 12
num_layers = 1
ffn_dim = 24
in_channels = 3
out_channels = 3
text_dim = 32

[schedule]
flow_shift = 3.0

[method]
name = "flow"

[optim.student]
lr = 1e-5

[data]
sources = ["shapes"]
frames = 5
resolution = [16, 32]
"""
)

SIZES = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 24}
WAN = {"_class_name": "WanTransformer3DModel", **SIZES, "num_layers": 1}
MODELS = {  # transformer/config.json of each
    "teacher": json.dumps(WAN),
    "narrow": json.dumps({**WAN, "in_channels": 8, "out_channels": 8}),
    "sdxl": json.dumps({**WAN, "_class_name": "UNet2DConditionModel"}),
    "half": json.dumps({"_class_name": "WanTransformer3DModel", **SIZES}),
    "broken": "{",
}


def read_faults():
    """Yield edits of a configuration above, each with the lines that report it.

    Edits: `old -> new`, with ⏎ for a new line; `+ a line before the first`; `$ an override`.
    """
    text = (Path(__file__).parent / "golden" / "config_faults.txt").read_text(encoding="utf-8")
    for paragraph in text.strip().split("\n\n"):
        edit, *lines = paragraph.split("\n")
        yield pytest.param(*edit.split(": ", 1), [line.strip() for line in lines], id=edit)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Make a folder with what the configurations name. The weights are none: loading them fails."""
    path = tmp_path_factory.mktemp("place")
    for model, config in MODELS.items():
        for part in ("transformer", "text_encoder", "tokenizer", "vae"):
            (path / model / part).mkdir(parents=True)
        (path / model / "transformer" / "config.json").write_text(config)
        (path / model / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    (path / "prompts.txt").write_text("a cat\na dog\n")
    (path / "empty.txt").write_text("\n")
    (path / "mac.txt").write_bytes("café\n".encode("mac_roman"))
    write_folders(path / "encoded")
    return path


def write_folders(path):
    """Write latents that suit DMD above, and below them some that do not."""
    x0, text, thin = torch.zeros(2, 16, 21, 4, 6), torch.zeros(2, 8, 4096), torch.zeros(2, 8, 32)
    write_encoded(path, {"x0": x0, "text": text}, text[:1])
    write_encoded(path / "thin", {"x0": x0, "text": thin}, thin[:1])
    write_encoded(path / "small", {"x0": torch.zeros(2, 16, 2, 2, 4), "text": thin}, thin[:1])
    write_encoded(path / "pooled", {"x0": x0, "text": text, "pooled": thin[:, 0]}, None)
    write_encoded(path / "one_sided", {"x0": x0, "text": text}, None)
    write_encoded(path / "torn", {"x0": x0, "text": text}, text[:1], shard=1)
    (path / "torn" / "00001.safetensors").unlink()
    write_encoded(path / "short", {"x0": x0, "text": text}, text[:1])
    save_file({"x0": x0[:1], "text": text[:1]}, path / "short" / "00000.safetensors")


@pytest.fixture(autouse=True)
def nothing_loads(place, monkeypatch):
    """Go to that folder, on a machine without an accelerator, where weights and networks fail to load."""

    def load(*_, **__):
        pytest.fail("loaded before the configuration was checked")

    monkeypatch.chdir(place)
    monkeypatch.setattr(component, "open_weights", load)
    monkeypatch.setattr(torch.nn.Module, "__init__", load)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def refused(*arguments):
    """Return the lines that `fastdmd train` refuses with, one per fault."""
    result = CliRunner().invoke(app, ["train", *arguments])
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert (result.exit_code, result.stdout) == (2, "")
    lines = result.stderr.splitlines()
    assert all(line.startswith("error: ") for line in lines), result.stderr
    return [line.removeprefix("error: ") for line in lines]


def faults(text, *overrides):
    Path("run.toml").write_text(text, encoding="utf-8")
    return refused("run.toml", *overrides)


@pytest.mark.parametrize(("base", "edit", "expected"), list(read_faults()))
def test_a_fault_is_one_line(base, edit, expected):
    text, overrides = {"dmd": DMD, "flow": FLOW}[base], []
    if edit.startswith("$ "):
        overrides = [edit[2:]]
    elif edit.startswith("+ "):
        text = f"{edit[2:]}\n{text}"
    else:
        old, new = edit.replace("⏎", "\n").split(" -> " if " -> " in edit else " ->")
        assert text.count(old) == 1, f"{old!r} has to be in the text once"
        text = text.replace(old, new)
    assert faults(text, *overrides) == expected


ENCODED = DMD.replace('"prompts.txt"', '"encoded", "encoded"')


@pytest.mark.parametrize(
    "text", [DMD, FLOW, ENCODED, ENCODED + "[rollout]\nmode = 'data'"], ids=["dmd", "flow", "encoded", "data"]
)
def test_what_has_no_fault_gets_past_the_configuration(text):
    with pytest.raises(pytest.fail.Exception, match="loaded before"):
        faults(text)


def test_a_run_has_a_model_even_if_every_role_has_its_own():
    start = FLOW.index("[model.architecture]")
    text = FLOW[:start] + '[student]\npath = "teacher"\n' + FLOW[FLOW.index("\n[schedule]") :]
    remedy = "name a diffusers folder (the one above transformer/)"
    assert faults(text)[0] == f"run.toml:6: model.path: missing; the run needs weights: {remedy}"


def test_files_that_are_none():
    Path("mac.toml").write_bytes(DMD.replace("[schedule]", "# d\xe9calage\n[schedule]").encode("mac_roman"))
    Path("folder.toml").mkdir(exist_ok=True)
    assert refused("mac.toml") == ["mac.toml:10: byte 0x8e is not UTF-8; save the file as UTF-8"]
    assert refused("no.toml") == ["no.toml: no such file; name a .toml file, such as those in configs/"]
    assert refused("folder.toml") == ["folder.toml: is a folder; name the .toml file in it"]
    assert refused("prompts.txt/run.toml") == [
        "prompts.txt/run.toml: cannot be read (Not a directory); name a .toml file that can"
    ]


def test_all_faults_are_told_at_once_in_the_order_of_the_file():
    text = (
        DMD.replace("lr = 1e-5", "lrr = 1e-5")
        .replace('"dmd"', '"dmb"')
        .replace("batch_size = 2", "batch_size = 0")
    )
    text += "\n[rollout]\nmode = 'causal'\ncontext_noise = 20\nframes_per_block = 3\n"
    assert faults(text.replace("frames = 81", "frames = 121"), "run.seed='a'") == [
        "command line: run.seed: 'a' is not a whole number; e.g. seed = 0",
        "run.toml:4: run.batch_size: 0 is not positive; use 1 or more",
        "run.toml:14: method.name: 'dmb' is not one of dmd, sid, dcm, lcm, flow; did you mean 'dmd'?",
        "run.toml:22: optim.student.lrr: unknown key; did you mean 'lr'?",
        "run.toml:29: data.frames: 121 gives 31 latent frames, not a multiple of "
        "rollout.frames_per_block = 3; nearest: 117 or 129",
        "run.toml:34: rollout.context_noise: 20.0 leaves [0, 1); Self-Forcing uses 0",
    ]


def test_lines_are_found_in_any_layout():
    """Take nothing inside strings and arrays for a key or a table; keys of inline tables have its line."""
    text = """\
run = {output_dir = "out", max_steps = 10, batch_size = 0}
schedule.flow_shift = -1
"data" . sources = [
  "shapes", # ]
]
data.frames = 0
data."resolution" = [
  15,
  16
]
optim.student.lr = 0

[ model ] # [run]
family = 'wan2.1'
path = '''
[method]
name = "dmd"
'''

[method]
name = 'flow'

[[method.x]]
"""
    assert [line.split(": ")[:2] for line in faults(text)] == [
        ["run.toml:1", "run.batch_size"],
        ["run.toml:2", "schedule.flow_shift"],
        ["run.toml:6", "data.frames"],
        ["run.toml:7", "data.resolution"],
        ["run.toml:11", "optim.student.lr"],
        ["run.toml:15", "model.path"],
        ["run.toml:23", "method.x"],
    ]


def test_overrides_win_and_are_toml():
    Path("run.toml").write_text(DMD)
    config = configs.load(
        "run.toml", ["run.seed=3", "run.seed=4", "optim.critic.betas=[0, 0.9]", "ema.decay = 0.5"]
    )
    assert config.run.seed == 4
    assert config.optim["critic"].betas == (0.0, 0.9)
    assert config.ema is not None
    assert config.ema.decay == 0.5
    assert config.optim["student"].lr == 1e-5


@pytest.mark.parametrize("text", [DMD, FLOW], ids=["dmd", "flow"])
def test_the_resolved_configuration_is_a_configuration(text):
    Path("run.toml").write_text(text)
    config = configs.load("run.toml", ['logging.project="\\"a\\\\b\\"\\n\\u007f é"'])
    Path("resolved.toml").write_text(configs.dump(config), encoding="utf-8")
    assert configs.load("resolved.toml") == config
    assert configs.load("resolved.toml", ["run.seed=1"]) != config
