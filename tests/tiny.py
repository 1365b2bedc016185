"""Runs of milliseconds a step: a random Wan in a folder, and whole configurations on the built-in world."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fastdmd import config as configs
from fastdmd.checkpoint import complete
from fastdmd.config import Config
from fastdmd.log import read_metrics
from fastdmd.models.sdxl import folder as sdxl_folder
from fastdmd.models.sdxl.net import SDXL, SDXLConfig
from fastdmd.models.wan import folder
from fastdmd.models.wan.layers import WanConfig
from fastdmd.models.wan.net import Wan
from fastdmd.resume import config_of, restored
from fastdmd.run import Run

ARCHITECTURE = WanConfig(
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=1,
    ffn_dim=32,
    in_channels=3,
    out_channels=3,
    text_dim=32,
    freq_dim=16,
)


def of_images(text: str) -> str:
    """Return a configuration of Wan as one of SDXL."""
    for old, new in (
        ("wan2.1", "sdxl"),
        ("/wan", "/sdxl"),
        ("frames = 3\n", ""),
        ("[schedule]\nflow_shift = 3.0\n", ""),
    ):
        assert old in text
        text = text.replace(old, new)
    return text


FLOW = """
[run]
output_dir = "{here}/run"
max_steps = 6
batch_size = 2
device = "cpu"

[model]
family = "wan2.1"
path = "{here}/wan"

[schedule]
flow_shift = 3.0

[method]
name = "flow"

[optim.student]
lr = 1e-3
schedule = "cosine"
warmup_steps = 2

[ema]
decay = 0.9
start_step = 1

[precision]
compute = "fp32"

[data]
sources = ["shapes"]
frames = 3
resolution = [8, 8]

[checkpoint]
every = 2

[validation]
samples = 2
batch_size = 2
show = 1
teacher_steps = 2

[logging]
every = 1
"""
# of the semantic expert; for the detail expert see DETAIL
DCM_KEYS = 'expert = "semantic"\nguidance = 3.0\ntarget = "ema"\ntemporal_weight = 1.0\ntemporal_lag = 1'
DCM = FLOW.replace('name = "flow"', f'name = "dcm"\n{DCM_KEYS}')
DETAIL = ("method.expert='detail'", "method.detail_timesteps=[800, 400]", "optim.disc.lr=1e-3")
DMD = (
    FLOW.replace('name = "flow"', 'name = "dmd"\ndenoising_timesteps = [1000, 757, 522]\nguidance = 3.0')
    + """
[critic]
updates_per_generator = 2

[optim.critic]
lr = 2e-3
"""
)
CAUSAL_SID = (
    DMD.replace('"dmd"', '"sid"').replace("frames = 3", "frames = 4")
    + """
[rollout]
mode = "causal"
frames_per_block = 2
"""
)
LCM = FLOW.replace(
    'name = "flow"',
    """name = "lcm"
denoising_timesteps = [1000, 500]
guidance_range = [1.5, 3.0]
guidance = 2.0
""",
)
LORA = """
[student]
train = "lora"

[lora]
rank = 2
alpha = 4.0
targets = ["to_q", "to_v"]
"""
DMD_LORA = DMD.replace("[critic]\n", '[critic]\ntrain = "lora"\n') + LORA
SDXL_LCM = of_images(LCM).replace("guidance = 2.0", "guidance = 2.0\nguidance_embedding = true")
SDXL_DMD = of_images(DMD).replace("[1000, 757, 522]", "[1000, 750, 500]")
TEXTS = {
    "flow": FLOW,
    "dmd": DMD,
    "dmd_lora": DMD_LORA,
    "causal_sid": CAUSAL_SID,
    "dcm": DCM,
    "causal_flow": FLOW.replace('name = "flow"', 'name = "flow"\nframes_per_block = 2').replace(
        "frames = 3", "frames = 4"
    ),
    "lcm": LCM,
    "lcm_lora": LCM.replace("guidance = 2.0", 'guidance = 2.0\ntarget = "student"') + LORA,
    "sdxl_dmd": SDXL_DMD,
    "sdxl_dmd_lora": of_images(DMD_LORA).replace("[1000, 757, 522]", "[1000, 750, 500]"),
    "sdxl_lcm": SDXL_LCM,
    "sdxl_lcm_lora": SDXL_LCM + LORA,
}
UNET = SDXLConfig(
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    transformer_layers_per_block=(1, 1),
    attention_head_dim=(1, 2),
    layers_per_block=1,
    norm_num_groups=4,
    cross_attention_dim=32,
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=32 + 6 * 4,
    in_channels=3,
    out_channels=3,
    sample_size=8,
)


def kept_bytes(call: Callable[[], object]) -> int:
    """Return the bytes of storages that the graph of a call keeps."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        call()
    return sum(kept.values())


def write_sdxl(path: Path) -> Path:
    """Write a diffusers folder of random weights with SDXL's noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = SDXL(UNET).state_dict()
    sdxl_folder.export(path, UNET, weights, sdxl_folder.ddim_scheduler(sdxl_folder.Noise()), None)
    return path


def write_wan(path: Path, architecture: WanConfig = ARCHITECTURE, nan: bool = False) -> Path:
    """Write a diffusers folder of random weights, one of them NaN if asked for."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = Wan(architecture).state_dict()
    if nan:
        weights["proj_out.weight"][0, 0] = torch.nan
    folder.save(path, architecture, weights)
    return path


def write_encoded(path: Path, tensors: Mapping[str, Tensor], uncond: Tensor | None, shard: int = 2) -> Path:
    """Write a folder of encoded latents, `shard` samples per file.

    tensors: x0, text, perhaps pooled, [n, ..]. uncond: [1, S, D].
    """
    path.mkdir(parents=True)
    files = {}
    for first in range(0, len(tensors["x0"]), shard):
        rows = {key: value[first : first + shard].contiguous() for key, value in tensors.items()}
        name = f"{first // shard:05d}.safetensors"
        save_file(rows, path / name)
        files[name] = len(rows["x0"])
    if uncond is not None:
        save_file({"text": uncond.contiguous()}, path / "uncond.safetensors")
    shape = list(tensors["x0"].shape[1:])
    manifest = {"latent_shape": shape, "files": files, "prompts": ["a cat", "a dog"]}
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return path


def write_toml(here: Path, method: str) -> Path:
    """here/METHOD.toml; its model is here/wan or here/sdxl, and its output_dir here/run."""
    if "sdxl" in method:
        write_sdxl(here / "sdxl")
    else:
        write_wan(here / "wan")
    path = here / f"{method}.toml"
    path.write_text(TEXTS[method].format(here=here), encoding="utf-8")
    return path


def make_config(here: Path, method: str, *overrides: str) -> Config:
    return configs.load(write_toml(here, method), overrides)


def reopen(path: Path, overrides: Sequence[str] = ()) -> Run:
    """Return a run from its folder, at its newest checkpoint, with every role."""
    return restored(config_of(path, overrides))


def rows(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the machine."""
    return [
        {k: v for k, v in row.items() if not k.startswith("perf/")}
        for row in read_metrics(run / "metrics.jsonl")
    ]


def manifest(run: Path) -> dict[str, Any]:
    """Of the newest checkpoint; equal "files" are equal bits of every tensor."""
    return json.loads((complete(run / "checkpoints")[-1] / "manifest.json").read_text())
