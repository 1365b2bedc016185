"""Wan 2.1 as a family: videos, by flow matching."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fastdmd.latents import LatentSpec
from fastdmd.models import family
from fastdmd.models.component import Weights
from fastdmd.models.wan import folder as diffusers_folder
from fastdmd.models.wan import frozen as frozen_parts
from fastdmd.models.wan.causal import CausalWan
from fastdmd.models.wan.layers import WanConfig
from fastdmd.models.wan.net import Wan
from fastdmd.schedule import FlowSchedule


@dataclass(frozen=True, kw_only=True)
class Config(family.ModelConfig):
    family: Literal["wan2.1"]
    architecture: WanConfig | None = None


class WanFamily(family.Family[WanConfig, Wan, FlowSchedule]):
    Config = Config
    component = "transformer"
    frozen = ("text_encoder", "tokenizer", "vae")
    latents = LatentSpec(
        channels=16,
        spatial=8,
        temporal=4,
        multiple=16,
        least=16,
        usual_frames=81,
        usual_resolution=(480, 832),
    )
    conditioning = ("text_dim",)
    text_tokens = frozen_parts.TEXT_TOKENS
    is_flow = True
    lora_prefix = "transformer."
    gate = "to_gate_compress"

    def read_config(self, folder: Path) -> WanConfig:
        return diffusers_folder.read_config(folder)

    def make(self, architecture: WanConfig, options: family.Options) -> Wan:
        kind = CausalWan if options.causal else Wan
        return kind(architecture, options.tile)

    def open_weights(self, folder: Path, net: Wan) -> Weights:
        return diffusers_folder.open_weights(folder, net)

    def make_schedule(self, flow_shift: float | None, folder: Path | None) -> FlowSchedule:
        assert flow_shift is not None  # the configuration was checked
        return FlowSchedule(flow_shift)

    def encoder(
        self, path: str, device: torch.device, dtype: torch.dtype, codes: torch.dtype | None = None
    ) -> family.Encoder:
        return frozen_parts.TextEncoder(path, device, dtype, codes)

    def decode(self, path: str, x0: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        return frozen_parts.decode(path, x0, device, dtype)

    def make_scheduler(
        self, times: Sequence[float] | None, schedule: FlowSchedule, source: Path | None
    ) -> family.Scheduler:
        return diffusers_folder.make_scheduler(times, schedule, source)

    def export(
        self,
        out: Path,
        architecture: WanConfig,
        weights: Mapping[str, Tensor],
        scheduler: family.Scheduler,
        source: Path | None,
    ) -> None:
        diffusers_folder.export(out, architecture, weights, scheduler, source)

    def refuses(self, options: family.Options) -> family.Problems:
        """Yield the guidance embedding, which Wan has not, and gates in a causal network."""
        if options.guidance_embedding:
            yield "guidance_embedding", "Wan has no guidance embedding; remove the key"
        if options.causal and options.tile is not None:
            yield "tile", "a network that makes a video block by block has no sparse attention; use 'dense'"
