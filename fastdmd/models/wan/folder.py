"""Diffusers folders of Wan: a transformer in and out with no key map, and a whole pipeline."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdmd.models import component
from fastdmd.models.wan.layers import WanConfig
from fastdmd.models.wan.net import Wan
from fastdmd.schedule import FlowSchedule
from fastdmd_kernels.tiles import Grid

# keys of diffusers' config.json that fastdmd's Wan fixes, with the value it has
FIXED = {
    "qk_norm": "rms_norm_across_heads",
    "image_dim": None,
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
}
GATE = ".attn1.to_gate_compress."
FASTVIDEO_GATE = re.compile(r"^(blocks\.\d+\.)to_gate_compress\.")
COMPONENTS = {
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


def read_config(folder: Path) -> WanConfig:
    """Return the architecture of `folder/transformer`; ValueError for no text-to-video Wan 2.1."""
    raw = component.read_config(folder, "transformer", "WanTransformer3DModel", "Wan 2.1")
    if (folder / "transformer_2").exists():
        raise ValueError(f"{folder}: has a transformer_2/, as Wan 2.2 has; name a text-to-video Wan 2.1")
    for key, value in FIXED.items():
        if raw.get(key, value) != value:
            raise ValueError(f"{folder}: transformer has {key} = {raw[key]!r}; name a text-to-video Wan 2.1")
    keys = component.known(raw, WanConfig)
    if absent := [f.name for f in fields(WanConfig) if f.default is MISSING and f.name not in keys]:
        raise ValueError(
            f"{folder / 'transformer' / 'config.json'} has no {', '.join(absent)}; "
            "download or save the folder again"
        )
    config = WanConfig(**keys)
    if (
        config.in_channels != config.out_channels
    ):  # the rest is an image (Wan 2.2 image-to-video has no other mark)
        raise ValueError(
            f"{folder}: transformer has in_channels = {config.in_channels} but "
            f"out_channels = {config.out_channels}; name a text-to-video Wan 2.1"
        )
    return config


def open_weights(folder: Path, net: Wan) -> component.Weights:
    """Return the weights of a diffusers folder by the names of a Wan.

    Gates of the sparse attention are zero where the folder has none, and are read under FastVideo's names
    too. A folder that has them was trained with them: a dense network of it is refused.
    """
    weights = component.open_weights(folder / "transformer")
    weights = weights.renamed(lambda name: FASTVIDEO_GATE.sub(r"\1attn1.to_gate_compress.", name))
    expected = net.state_dict()
    gates = {name for name in weights.shapes if GATE in name}
    if gates and net.tile is None:
        raise ValueError(
            f"{folder}: transformer has gates of video sparse attention ({min(gates)}); "
            "set model.attention of the role that reads it to 'vsa'"
        )
    if not gates:
        weights = weights.with_zeros({name: tuple(x.shape) for name, x in expected.items() if GATE in name})
    weights.check(expected)
    return weights


def load(folder: str | Path, tile: Grid | None = None, kind: type[Wan] = Wan) -> Wan:
    """Return the Wan of a diffusers folder in float32 on the CPU; sparse if it is given a `tile`."""
    with torch.device("meta"):
        net = kind(read_config(Path(folder)), tile)
    component.read_into(net, open_weights(Path(folder), net), torch.device("cpu"), torch.float32)
    return net


def save(folder: str | Path, config: WanConfig, weights: Mapping[str, Tensor]) -> None:
    """Write `folder/transformer` as diffusers does."""
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    raw = {"_class_name": "WanTransformer3DModel", **FIXED, "rope_max_seq_len": 1024, **values}
    component.write(Path(folder) / "transformer", raw, weights)


def lcm_scheduler_config(times: Sequence[float]) -> dict[str, Any]:
    """Return the `FlowMatchLCMScheduler` config whose grid is `times` (descending, in (0, 1], first 1).

    Its step is the re-noising sampler. The grid is a straight line from 1, shifted and stretched to end at
    the last time: two numbers, so three steps always fit and more fit only when they lie on such a curve.
    Raise ValueError otherwise.
    """
    from diffusers.schedulers.scheduling_flow_match_lcm import FlowMatchLCMScheduler

    def grid(shift: float) -> Tensor:
        scheduler: Any = FlowMatchLCMScheduler(**settings(shift))
        scheduler.set_timesteps(len(times))
        return scheduler.timesteps.double() / 1000

    def settings(shift: float) -> dict[str, Any]:
        terminal = times[-1] if len(times) > 1 else None
        return {"num_train_timesteps": 1000, "shift": shift, "shift_terminal": terminal}

    # the interior rises with the shift
    low, high = 1e-3, 1e3
    for _ in range(80):
        middle = (low * high) ** 0.5
        if len(times) > 2 and float(grid(middle)[1]) < times[1]:
            low = middle
        else:
            high = middle
    shift = (low * high) ** 0.5 if len(times) > 2 else 1.0
    error = float((grid(shift) - torch.tensor(times, dtype=torch.float64)).abs().max())
    if error > 1e-6:
        raise ValueError(
            f"method.denoising_timesteps = {[round(1000 * t, 3) for t in times]} are not a grid of "
            f"diffusers' FlowMatchLCMScheduler (off by {1000 * error:.3g}); three steps always are, and so "
            "are warped even lists"
        )
    return settings(shift)


def make_scheduler(times: Sequence[float] | None, schedule: FlowSchedule, source: Path | None) -> Any:
    """Return diffusers' scheduler of a student that re-noises at `times`, else Wan's own of many steps."""
    from diffusers.schedulers.scheduling_flow_match_lcm import FlowMatchLCMScheduler
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    if times is not None:
        return FlowMatchLCMScheduler(**lcm_scheduler_config(times))
    # FlowMatchEulerDiscreteScheduler would shift its grid twice
    flow: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    return UniPCMultistepScheduler(**flow, flow_shift=schedule.flow_shift)


def export(
    folder: Path, config: WanConfig, weights: Mapping[str, Tensor], scheduler: Any, source: Path | None
) -> None:
    """Write a diffusers folder; text encoder, tokenizer and VAE are copied from `source` if it has them."""
    from diffusers import __version__

    save(folder, config, weights)
    scheduler.save_pretrained(folder / "scheduler")
    index: dict[str, object] = {"_class_name": "WanPipeline", "_diffusers_version": __version__}
    index |= {
        "scheduler": ["diffusers", type(scheduler).__name__],
        "transformer": ["diffusers", "WanTransformer3DModel"],
    }
    component.write_index(folder, index, COMPONENTS, source)
