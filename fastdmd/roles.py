"""The roles of a run, and the one builder of their networks, for all that needs them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdmd.config import Config
from fastdmd.denoiser import Denoiser
from fastdmd.methods import Method
from fastdmd.methods.method import How
from fastdmd.models.component import read_into
from fastdmd.models.family import Options
from fastdmd.models.lora import LoraConfig, add_lora, lora_parameters, start_lora
from fastdmd.models.net import Net, cast
from fastdmd.schedule import Schedule


@dataclass(frozen=True)
class Role:
    """What one network of a run is made of."""

    name: str
    how: How  # it gets its weights: trained, frozen, the student's average, or heads at random
    path: str | None  # the diffusers folder that its weights are read from; None: at random from the seed
    options: Options  # what it has beside its weights
    lora: LoraConfig | None  # adapters that it trains in place of its own weights


@dataclass(frozen=True)
class Place:
    """Where networks are built, and in which type they compute."""

    device: torch.device
    dtype: torch.dtype

    @property
    def is_meta(self) -> bool:
        """Return whether networks have shapes only: nothing is read, and nothing drawn."""
        return self.device.type == "meta"


@dataclass(frozen=True)
class Built:
    """A role's network, and the float32 originals of what it trains in another type, by name."""

    denoiser: Denoiser
    masters: Mapping[str, Tensor]


def roles_of(config: Config) -> dict[str, Role]:
    """Return the roles of a configuration by name, in the order in which they are built."""
    return {
        name: Role(name, how, config.role_path(name), config.role_options(name), config.role_lora(name))
        for name, how in config.method.roles.items()
    }


def build_nets(
    config: Config,
    roles: Mapping[str, Role],
    method: Method,
    schedule: Schedule,
    place: Place,
    depths: Mapping[str, int] | None = None,
) -> dict[str, Built]:
    """Build the network of each role.

    depths: by role, at most so many of the blocks that are alike; on the meta device only.
    """
    built: dict[str, Built] = {}
    for name, role in roles.items():
        if role.how == "heads":
            net = make_heads(config, method, {k: b.denoiser for k, b in built.items()}, place)
            masters = {}
        else:
            net, masters = make_net(config, role, place, (depths or {}).get(name))
        trainable = lora_parameters(net, role.lora.modules) if role.lora else None
        denoiser = Denoiser(net, schedule, trainable)
        denoiser.learn(False)
        built[name] = Built(denoiser, masters)
    return built


def make_heads(config: Config, method: Method, nets: Mapping[str, Denoiser], place: Place) -> Any:
    """Return a discriminator's heads, with random weights from the seed."""
    if place.is_meta:
        with place.device:
            return method.make_heads(nets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        return method.make_heads(nets).to(place.device)


def make_net(config: Config, role: Role, place: Place, depth: int | None) -> tuple[Net, dict[str, Tensor]]:
    """Return a role's network and its masters, prepared in this one order.

    On the meta device: adapters. Then its weights, tensor by tensor, each cast as it is read.
    """
    family, lora = config.family, role.lora
    if role.path is None and not place.is_meta:
        return from_scratch(config, role, place)
    architecture = read_architecture(config, role)
    with torch.device("meta"):
        net = family.make(architecture if depth is None else architecture.shallow(depth), role.options)
    weights = None if place.is_meta else family.open_weights(Path(str(role.path)), net)
    if lora:
        with torch.device("meta"):
            add_lora(net, lora.rank, lora.alpha, lora.targets)
    masters: dict[str, Tensor] = {}
    if weights is None:
        cast(net, place.dtype)
    else:
        masters = read_into(net, weights, place.device, place.dtype, trained_names(net, role))
        if lora:
            masters |= start_lora(net, config.run.seed, place.device, place.dtype)
    prepare(config, net, place)
    return net, masters


def from_scratch(config: Config, role: Role, place: Place) -> tuple[Net, dict[str, Tensor]]:
    """Return a network with random weights from the seed, and its masters."""
    assert role.lora is None  # the configuration was checked
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        net = config.family.make(read_architecture(config, role), role.options).start_from_scratch()
    net.to(place.device)
    masters = cast(net, place.dtype)
    prepare(config, net, place)
    return net, masters


def prepare(config: Config, net: Net, place: Place) -> None:
    """Checkpoint the blocks, of frozen networks too: SiD's pass gradient on; and make what calls share."""
    net.recompute_blocks(config.memory.checkpointing == "full")
    shape = (config.run.batch_size, *config.latent_shape())
    net.prepare(shape, place.device, place.dtype)


def trained_names(net: Net, role: Role) -> frozenset[str]:
    """Return the names of a role's own weights that are trained: those need masters."""
    if role.how != "train":
        return frozenset()
    if role.lora:
        return frozenset(lora_parameters(net, role.lora.modules))
    return frozenset(name for name, _ in net.named_parameters())


def read_architecture(config: Config, role: Role) -> Any:
    """Return the architecture of a role's network."""
    if role.path is not None:
        return config.family.read_config(Path(role.path))
    assert config.model.architecture is not None  # the configuration was checked
    return config.model.architecture
