"""The network families, by `model.family`: what the trainer asks of each, in one form."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdmd.batch import Cond
from fastdmd.models.component import Weights
from fastdmd.models.net import Net
from fastdmd.models.sdxl import folder as sdxl_folder
from fastdmd.models.sdxl import frozen as frozen_sdxl
from fastdmd.models.sdxl.net import SDXL
from fastdmd.models.wan import folder as wan_folder
from fastdmd.models.wan import frozen
from fastdmd.models.wan.causal import CausalWan
from fastdmd.models.wan.net import Wan
from fastdmd_kernels.tiles import Grid

GUIDANCE_EMBEDDING = 256  # width; LCM's
Encoder = Callable[[Sequence[str]], Cond]  # on the host


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a role asks of its network beside the weights."""

    tile: Grid | None = None  # of sparse attention
    causal: bool = False  # a video block by block
    guidance_embedding: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    component: str  # the network's folder in a diffusers folder
    frozen: tuple[str, ...]  # the folders that prompts need beside it
    encoder: Callable[[str, torch.device, torch.dtype], Encoder]  # of a folder's prompts
    # latents to uint8 [B, T, H, W, 3] on the host
    decode: Callable[[str, Tensor, torch.device, torch.dtype], Tensor]
    told: tuple[str, ...]  # of an architecture, the widths of prompts' embeddings: of Cond.text, Cond.pooled
    latent_axes: tuple[str, ...]  # of latents [B, C, ..], by the data's keys
    read_config: Callable[[Path], Any]
    make: Callable[[Any, Options], Net]  # random weights, on torch's current device
    open_weights: Callable[[Path, Any], Weights]  # of a folder, by the names of a network
    # (a re-noising student's times or None, schedule, folder of the frozen parts) -> diffusers' scheduler;
    # ValueError where there is none
    make_scheduler: Callable[[Sequence[float] | None, Any, Path | None], Any]
    # (out, architecture, weights, scheduler, folder of the frozen parts)
    export: Callable[[Path, Any, Mapping[str, Tensor], Any, Path | None], None]
    lora_prefix: str  # of names in a file of adapters


def _make_wan(config: Any, options: Options) -> Wan:
    return (CausalWan if options.causal else Wan)(config, options.tile)


def _guidance_width(config: Any, options: Options) -> int | None:
    """Return the width of the guidance embedding; None where there is none."""
    return (config.time_cond_proj_dim or GUIDANCE_EMBEDDING) if options.guidance_embedding else None


def _make_sdxl(config: Any, options: Options) -> SDXL:
    return SDXL(sdxl_folder.with_guidance(config, _guidance_width(config, options)))


FAMILIES: Mapping[str, Family] = {
    "wan2.1": Family(
        component="transformer",
        frozen=("text_encoder", "tokenizer", "vae"),
        encoder=frozen.TextEncoder,
        decode=frozen.decode,
        told=("text_dim",),
        latent_axes=("frames", "resolution", "resolution"),
        read_config=wan_folder.read_config,
        make=_make_wan,
        open_weights=wan_folder.open_weights,
        make_scheduler=wan_folder.make_scheduler,
        export=wan_folder.export,
        lora_prefix="transformer.",
    ),
    "sdxl": Family(
        component="unet",
        frozen=("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae"),
        encoder=frozen_sdxl.TextEncoder,
        decode=frozen_sdxl.decode,
        told=("text_dim", "pooled_dim"),
        latent_axes=("resolution", "resolution"),
        read_config=sdxl_folder.read_config,
        make=_make_sdxl,
        open_weights=sdxl_folder.open_weights,
        make_scheduler=sdxl_folder.make_scheduler,
        export=sdxl_folder.export,
        lora_prefix="",  # the names have "unet." already
    ),
}
