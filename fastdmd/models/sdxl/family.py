"""SDXL as a family: images, with the noise of a folder's scheduler."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastdmd.batch import Cond
from fastdmd.latents import LatentSpec, Resolution
from fastdmd.models import family
from fastdmd.models.component import Weights
from fastdmd.models.sdxl import folder as diffusers_folder
from fastdmd.models.sdxl import frozen
from fastdmd.models.sdxl.net import SDXL, SDXLConfig
from fastdmd.schedule import VPSchedule

GUIDANCE_EMBEDDING = 256  # width; LCM's


@dataclass(frozen=True, kw_only=True)
class Config(family.ModelConfig):
    family: Literal["sdxl"]
    architecture: SDXLConfig | None = None


class SDXLFamily(family.Family[SDXLConfig, SDXL, VPSchedule]):
    Config = Config
    component = "unet"
    frozen = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae")
    latents = LatentSpec(
        channels=4,
        spatial=8,
        temporal=None,
        multiple=16,
        least=16,
        usual_frames=None,
        usual_resolution=(1024, 1024),
    )
    conditioning = ("text_dim", "pooled_dim")
    text_tokens = 77
    is_flow = False
    lora_prefix = ""  # the names have "unet." already

    def read_config(self, folder: Path) -> SDXLConfig:
        return diffusers_folder.read_config(folder)

    def make(self, architecture: SDXLConfig, options: family.Options) -> SDXL:
        width = None
        if options.guidance_embedding:
            width = architecture.time_cond_proj_dim or GUIDANCE_EMBEDDING
        return SDXL(diffusers_folder.with_guidance(architecture, width))

    def open_weights(self, folder: Path, net: SDXL) -> Weights:
        return diffusers_folder.open_weights(folder, net)

    def make_schedule(self, flow_shift: float | None, folder: Path | None) -> VPSchedule:
        return diffusers_folder.make_schedule(folder)

    def encoder(
        self, path: str, device: torch.device, dtype: torch.dtype, codes: torch.dtype | None = None
    ) -> family.Encoder:
        return frozen.TextEncoder(path, device, dtype, codes)

    def decode(self, path: str, x0: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        return frozen.decode(path, x0, device, dtype)

    def make_scheduler(
        self, times: Sequence[float] | None, schedule: VPSchedule, source: Path | None
    ) -> family.Scheduler:
        return diffusers_folder.make_scheduler(times, schedule, source)

    def export(
        self,
        out: Path,
        architecture: SDXLConfig,
        weights: Mapping[str, Tensor],
        scheduler: family.Scheduler,
        source: Path | None,
    ) -> None:
        diffusers_folder.export(out, architecture, weights, scheduler, source)

    def sized(self, cond: Cond, resolution: Resolution) -> Cond:
        """Add time_ids float32 [B, 6] in pixels: original size, crop and target size."""
        H, W = resolution
        size = torch.tensor([H, W, 0, 0, H, W], dtype=torch.float32, device=cond.text.device)
        return replace(cond, time_ids=size.expand(len(cond.text), -1))

    def refuses(self, options: family.Options) -> family.Problems:
        """Yield what is for videos."""
        if options.tile is not None:
            yield "tile", "video sparse attention is for videos, and SDXL makes images; remove the key"
        if options.causal:
            yield "causal", "blocks are of a video's frames, and SDXL makes images; remove the key"

    def is_small(self, name: str) -> bool:
        """Return whether a layer embeds the time, which is added to all pixels alike."""
        return name.endswith("time_emb_proj")

    def refuses_memory(self, memory: Any) -> family.Problems:
        """Yield what is for blocks that are alike."""
        if memory.checkpointing == "selective":
            yield (
                "checkpointing",
                "'selective' is for video, where self-attention is dear; use 'full' or 'none'",
            )
        for key, off in (("offload", "none"), ("stream_base", False), ("ffn_chunks", 1)):
            if getattr(memory, key) != off:
                yield key, "is for blocks that are alike, and those of SDXL are not; remove the key"

    def folder_problems(self, folders: Mapping[str, Path]) -> family.Problems:
        """Yield the folders whose networks were trained on another noise than model.path's.

        A folder of a network alone has no scheduler/ and says nothing.
        """
        noises: dict[str, diffusers_folder.Noise] = {}
        for key, folder in folders.items():
            if key == "model.path" or (folder / "scheduler").is_dir():
                try:
                    noises[key] = diffusers_folder.read_noise(folder)
                except ValueError as e:
                    yield key, str(e)
        ours = noises.get("model.path")
        for key, noise in noises.items():
            if ours and noise != ours:
                yield (
                    key,
                    f"its scheduler/ has {noise}, and that of model.path {ours}; "
                    "name an SDXL with the same noise",
                )
