"""A family that fastdmd does not have: its folder and its row. Run as a script, this is `fastdmd` with it.

The network is three convolutions over images of 12 x 12 pixels; a pixel is its own latent.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from diffusers.schedulers.scheduling_flow_match_lcm import FlowMatchLCMScheduler
from torch import nn

from fastdmd.data import shapes
from fastdmd.models import component, family
from fastdmd.models.families import FAMILIES
from fastdmd.models.net import PLAIN, Net, Out
from fastdmd.schedule import FlowSchedule


@dataclass(frozen=True, kw_only=True)
class Architecture:
    width: int = 16
    in_channels: int = 3
    out_channels: int = 3
    text_dim: int = 32
    grain = (1, 1)

    def shallow(self, depth: int) -> "Architecture":
        return self

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.width < 1:
            yield "width", f"{self.width} is not positive; use 1 or more"


class Dots(Net):
    def __init__(self, config: Architecture) -> None:
        super().__init__()
        D = config.width
        self.config, self.widths = config, (D,)
        self.first = nn.Conv2d(config.in_channels, D, 3, padding=1)
        self.conditioning = nn.Linear(config.text_dim + 1, D)
        self.blocks = nn.ModuleList([nn.Conv2d(D, D, 3, padding=1)])
        self.last = nn.Conv2d(D, config.out_channels, 3, padding=1)

    def forward(self, x_t, model_t, cond, call=PLAIN) -> Out:
        inputs = torch.cat([cond.text.sum(1), model_t[:, None] / 1000], dim=1).to(self.first.weight.dtype)
        h = self.first(x_t.to(inputs.dtype)) + self.conditioning(inputs)[:, :, None, None]
        h = h + self.blocks[0](h.sin())
        return Out(self.last(h.sin()), [h.float() for _ in call.layers])

    def flops(self, shape, text_tokens, call=PLAIN) -> int:
        B, C, H, W = shape
        return 2 * 9 * B * H * W * self.config.width * (2 * C + self.config.width)

    def start_from_scratch(self) -> "Dots":
        return self


@dataclass(frozen=True, kw_only=True)
class Config(family.ModelConfig):
    family: Literal["dots"]
    architecture: Architecture | None = None


class DotsFamily(family.Family[Architecture, Dots, FlowSchedule]):
    Config, component, frozen = Config, "dots", ()
    latents = shapes.latents(video=False)
    conditioning, text_tokens, is_flow, lora_prefix = ("text_dim",), shapes.TEXT_TOKENS, True, ""

    def read_config(self, folder):
        raw = component.read_config(folder, "dots", "Dots", "dots")
        return Architecture(**component.known(raw, Architecture))

    def make(self, architecture, options):
        return Dots(architecture)

    def open_weights(self, folder, net):
        weights = component.open_weights(folder / "dots")
        weights.check(net.state_dict())
        return weights

    def make_schedule(self, flow_shift, folder):
        return FlowSchedule(flow_shift)

    def encoder(self, path, device, dtype, codes=None):
        return lambda prompts: family.Cond(shapes.embed(list(prompts)))

    def decode(self, path, x0, device, dtype):
        return shapes.pixels(x0)

    def make_scheduler(self, times, schedule, source):
        return FlowMatchLCMScheduler()

    def export(self, out, architecture, weights, scheduler, source):
        component.write(out / "dots", {"_class_name": "Dots", **asdict(architecture)}, weights)
        component.write_index(out, {"_class_name": "DotsPipeline"}, {}, source)


FAMILIES["dots"] = DotsFamily()

if __name__ == "__main__":
    from fastdmd.cli import main

    main()
