"""Diffusers' network beside ours: the same weights and inputs, by turns in one process."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from statistics import median

import torch
from torch import Tensor, nn

from bench.clock import Flush, timer
from fastdmd.batch import Cond
from fastdmd.config import Config
from fastdmd.data.synthetic import make_synthetic
from fastdmd.data.world import Model
from fastdmd.models.family import Options
from fastdmd.models.net import PLAIN
from fastdmd.roles import Place, build_nets, read_architecture, roles_of

ROUNDS = 5
FORWARD, BOTH = "forward", "forward and backward"


@dataclass(frozen=True)
class Side:
    """A network, and how it is called on one batch."""

    net: nn.Module
    call: Callable[[], Tensor]  # F

    def forward(self) -> None:
        with torch.no_grad():
            self.call()

    def both(self) -> None:
        """Compute F and the gradients to all weights, and drop them."""
        self.call().float().square().mean().backward()
        self.net.zero_grad()


def side_by_side(config: Config, device: torch.device) -> dict[str, tuple[float, float]]:
    """Return the median seconds of ours and of diffusers': a forward, and one with its backward.

    Both are dense and whole; ours is compiled and checkpointed as configured, theirs checkpointed where ours
    is. Raise ValueError for a family whose network has other names than diffusers'.
    """
    sides = pair(config, device)
    flush = Flush(device)
    found = {}
    for of in (FORWARD, BOTH):
        times: list[list[float]] = [[] for _ in sides]
        for turn in range(1 + ROUNDS):
            for side, kept in zip(sides, times, strict=True):
                flush()
                start = timer()
                side.forward() if of == FORWARD else side.both()
                seconds = timer() - start
                if turn:  # the first warms up
                    kept.append(seconds)
        ours, theirs = map(median, times)
        found[of] = (ours, theirs)
    return found


def pair(config: Config, device: torch.device) -> tuple[Side, Side]:
    """Return ours and diffusers', with the same weights and inputs."""
    from diffusers import WanTransformer3DModel

    if config.model.family != "wan2.1":
        raise ValueError(f"--diffusers: model.family is '{config.model.family}'; use it with 'wan2.1'")
    dtype, shape, B = config.precision.dtype, config.latent_shape(), config.run.batch_size
    role = replace(roles_of(config)["student"], how="frozen", lora=None, options=Options(), network="student")
    whole = replace(config, precision=replace(config.precision, frozen="compute"))
    place = Place(device, dtype, is_random=True)
    built = build_nets(whole, {"student": role}, config.make_method(), config.make_schedule(), place)
    ours = built["student"].denoiser.net
    architecture = read_architecture(config, role)
    with device:
        keys = {each.name: getattr(architecture, each.name) for each in fields(architecture)}
        theirs = WanTransformer3DModel(**keys)
    theirs.load_state_dict(ours.state_dict())
    for name, parameter in theirs.named_parameters():
        parameter.data = parameter.data.to(ours.get_parameter(name).dtype)
    if config.memory.checkpointing != "none":
        theirs.enable_gradient_checkpointing()
    ours.requires_grad_(True)
    model = Model(config.family, None, device, dtype)
    world = make_synthetic(config.data, model, architecture, shape)
    text = world.cond([""] * B).text.to(dtype)
    x_t, model_t = torch.randn(B, *shape, device=device).to(dtype), torch.full((B,), 500.0, device=device)
    return (
        Side(ours, lambda: ours(x_t, model_t, Cond(text), PLAIN).F),
        Side(theirs, lambda: theirs(x_t, model_t, text, return_dict=False)[0]),
    )
