"""The roles of a run, and the one builder of their networks, for all that needs them.

Roles that read the same weights share one network, where none of them trains those: each owns its adapters,
and tells the network at a call who it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdmd.capture import compile_blocks, mode_on
from fastdmd.config import Config
from fastdmd.denoiser import Denoiser
from fastdmd.methods import Method
from fastdmd.methods.method import How
from fastdmd.models import lora
from fastdmd.models.component import Weights, random_weights, read_into
from fastdmd.models.family import Options
from fastdmd.models.lora import LoraConfig
from fastdmd.models.lowbit import code_dtype, make_low_bit, make_products
from fastdmd.models.net import Net, cast
from fastdmd.models.offload import Offload
from fastdmd.models.stream import Stream, streamed_names
from fastdmd.schedule import Schedule


@dataclass(frozen=True)
class Role:
    """What one role of a run is made of."""

    name: str
    how: How  # it gets its weights: trained, frozen, the student's average, or heads at random
    path: str | None  # the diffusers folder that its weights are read from; None: at random from the seed
    options: Options  # what it has beside its weights
    lora: LoraConfig | None  # adapters that it trains in place of its own weights
    network: str  # the first role on the same network

    @property
    def owns_network(self) -> bool:
        """Return whether it trains or averages the network's own weights, so that no role can share it."""
        return self.lora is None and self.how in ("train", "ema")


@dataclass(frozen=True)
class Place:
    """Where networks are built, and in which type they compute."""

    device: torch.device
    dtype: torch.dtype
    is_random: bool = False  # weights are drawn and not read, of folders too

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
    roles: dict[str, Role] = {}
    for name, how in config.method.roles.items():
        options = config.role_options(name)
        role = Role(name, how, config.role_path(name), options, config.role_lora(name), name)
        roles[name] = replace(role, network=shared_network(config, roles, role))
    return roles


def shared_network(config: Config, roles: Mapping[str, Role], role: Role) -> str:
    """Return the first role whose network a role can share: its own name where there is none."""
    for other in roles.values():
        on_it = [each for each in roles.values() if each.network == other.name]
        if (
            on_it
            and other.path == role.path is not None
            and "heads" not in (role.how, other.how)
            and not (role.owns_network or other.owns_network)
            and merged_options(config, [*on_it, role]) is not None
        ):
            return other.name
    return role.name


def merged_options(config: Config, roles: Sequence[Role]) -> Options | None:
    """Return the options of a network that has what each role asks for; None where there is none."""
    every = [role.options for role in roles]
    tile = next((options.tile for options in every if options.tile is not None), None)
    causal = any(options.causal for options in every)
    merged = Options(tile=tile, causal=causal, guidance_embedding=every[0].guidance_embedding)
    alike = len({options.guidance_embedding for options in every}) == 1
    return merged if alike and not list(config.family.refuses(merged)) else None


def build_nets(
    config: Config,
    roles: Mapping[str, Role],
    method: Method,
    schedule: Schedule,
    place: Place,
    depths: Mapping[str, int] | None = None,
) -> dict[str, Built]:
    """Build the network of each role, once for all roles on it.

    depths: by role, at most so many of the blocks that are alike; where nothing is read.
    """
    built: dict[str, Built] = {}
    for network in dict.fromkeys(role.network for role in roles.values()):
        on_it = [role for role in roles.values() if role.network == network]
        if on_it[0].how == "heads":
            heads = make_heads(config, method, {k: b.denoiser for k, b in built.items()}, place)
            built[network] = Built(Denoiser(heads.requires_grad_(False), schedule), {})
            continue
        net, masters = make_net(config, on_it, place, (depths or {}).get(on_it[0].name))
        net.requires_grad_(False)
        for role in on_it:
            kept = masters if config.precision.master == "fp32" else {}
            built[role.name] = as_role(config, net, role, schedule, kept)
    return {name: built[name] for name in roles}


def as_role(config: Config, net: Net, role: Role, schedule: Schedule, masters: Mapping[str, Tensor]) -> Built:
    """Return a network as one of its roles has it.

    masters: by the names of the network, of all roles on it.
    """
    if role.owns_network:
        names = {name: name for name, _ in net.named_parameters()}
    else:
        names = lora.own_names(net, role.name)
    trainable = {name: net.get_parameter(full) for name, full in names.items()}
    acting = None if role.lora is None else role.name
    dense, two_calls = role.options.tile is None, config.memory.guidance == "two_calls"
    denoiser = Denoiser(net, schedule, trainable, acting, dense, two_calls)
    return Built(denoiser, {name: masters[full] for name, full in names.items() if full in masters})


def make_heads(config: Config, method: Method, nets: Mapping[str, Denoiser], place: Place) -> Any:
    """Return a discriminator's heads, with random weights from the seed."""
    if place.is_meta:
        with place.device:
            return method.make_heads(nets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        return method.make_heads(nets).to(place.device)


def make_net(
    config: Config, roles: Sequence[Role], place: Place, depth: int | None
) -> tuple[Net, dict[str, Tensor]]:
    """Return the network of some roles and their masters, prepared in this one order.

    On the meta device: copies and adapters. Then its weights, tensor by tensor, each cast as it is read.
    """
    family, path, options = config.family, roles[0].path, merged_options(config, roles)
    assert options is not None
    if path is None and not place.is_meta:
        return from_scratch(config, roles, options, place, depth)
    architecture = read_architecture(config, roles[0])
    with torch.device("meta"):
        net = family.make(architecture if depth is None else architecture.shallow(depth), options)
    dense = any(role.options.tile is None for role in roles)
    if place.is_meta:
        weights = None
    elif place.is_random:
        weights = random_weights(net, Path(str(path)) / family.component, family.gate, place.device)
    else:
        weights = family.open_weights(Path(str(path)), net)
    if weights is not None and dense:
        refuse_gates(config, weights, roles)
    with torch.device("meta"):
        for role in roles:
            add_adapters(config, net, role)
    weights = without_gates(config, net, weights)
    take_low_precision(config, net, place, frozen=not any(role.owns_network for role in roles))
    masters: dict[str, Tensor] = {}
    if weights is None:
        cast(net, place.dtype)
    else:
        host = streamed_names(net) if streams(config, roles) else ()
        learns = trained_names(net, roles) if config.precision.master == "fp32" else ()
        masters = read_into(net, weights, place.device, place.dtype, learns, host)
        for role in roles:
            masters |= start_adapters(config, net, role, place)
    if streams(config, roles):
        net.stream = Stream(net.blocks, place.device)
    prepare(config, net, place, dense)
    return net, masters


def take_low_precision(config: Config, net: Net, place: Place, frozen: bool) -> None:
    """Store linear layers of blocks as [precision] says, where no role trains them, and compute them so."""
    c, is_small = config.precision, config.family.is_small
    if c.frozen != "compute" and frozen:
        dtype = code_dtype(c.frozen, place.device)
        make_low_bit(net.blocks, dtype, is_small, in_float8=c.linear == "float8")
    if c.linear != "compute":
        make_products(net.blocks, c.linear, code_dtype("float8", place.device), is_small)


def streams(config: Config, roles: Sequence[Role]) -> bool:
    """Return whether the blocks of some roles' network come from host memory: where none trains them."""
    return config.memory.stream_base and not any(role.owns_network for role in roles)


def refuse_gates(config: Config, weights: Weights, roles: Sequence[Role]) -> None:
    """Raise ValueError for gates of sparse attention in a folder that a dense role reads too."""
    zeros, gate = weights.zeros(), config.family.gate
    trained = [name for name in weights.shapes if gate and f".{gate}." in name and name not in zeros]
    if trained:
        role = next(role.name for role in roles if role.options.tile is None)
        raise ValueError(
            f"{weights.path.parent}: {weights.path.name} has gates of video sparse attention "
            f"({min(trained)}); set model.attention.{role} to 'vsa'"
        )


def add_adapters(config: Config, net: Net, role: Role) -> None:
    """Give a role its adapters, of the gates of its sparse attention too."""
    if role.lora is None:
        return
    targets = role.lora.targets
    if role.options.tile is not None and config.family.gate is not None:
        targets = (*dict.fromkeys((*targets, config.family.gate)),)
    lora.add_lora(net, role.name, role.lora, targets, net.acting)


def without_gates(config: Config, net: Net, weights: Weights | None) -> Weights | None:
    """Leave out gates of sparse attention that adapters stand on and that the folder has none of.

    They are zeros as large as a projection in each block. Without weights there are none.
    """
    absent: set[str] = set()
    for name, layer in lora.modules_of(net):
        is_gate = config.family.gate is not None and name.endswith(config.family.gate)
        names = {f"{name}.weight", f"{name}.bias"}
        if is_gate and hasattr(layer, "base_layer") and (weights is None or names <= weights.zeros()):
            gate: Any = layer
            gate.base_layer = lora.Zero(gate.out_features)
            absent |= names
    return None if weights is None else weights.without(absent)


def start_adapters(config: Config, net: Net, role: Role, place: Place) -> dict[str, Tensor]:
    """Set a role's adapters to where they start, and return their masters by the names of the network."""
    if role.lora is None:
        return {}
    names = lora.own_names(net, role.name)
    masters = lora.start_lora(net, role.name, config.run.seed, place.device, place.dtype)
    if role.lora.path is not None and not place.is_random:
        shapes = {name: tuple(net.get_parameter(full).shape) for name, full in names.items()}
        read = lora.read_lora(Path(role.lora.path), config.family.lora_prefix, role.lora, shapes)
        for name, value in read.items():
            lora.set_parameter(net, names[name], value.to(place.device, place.dtype))
            if place.dtype != torch.float32:
                masters[name] = value.to(place.device)
    return {names[name]: value for name, value in masters.items()}


def from_scratch(
    config: Config, roles: Sequence[Role], options: Options, place: Place, depth: int | None
) -> tuple[Net, dict[str, Tensor]]:
    """Return a network with random weights from the seed, and its masters."""
    assert not any(role.lora for role in roles)  # the configuration was checked
    architecture = read_architecture(config, roles[0])
    if depth is not None:
        architecture = architecture.shallow(depth)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        net = config.family.make(architecture, options).start_from_scratch()
    net.to(place.device)
    masters = cast(net, place.dtype)
    take_low_precision(config, net, place, frozen=False)
    prepare(config, net, place, dense=options.tile is None)
    return net, masters


def prepare(config: Config, net: Net, place: Place, dense: bool) -> None:
    """Checkpoint the blocks, of frozen networks too: SiD's pass gradient on; and make what calls share."""
    net.recompute_blocks(config.memory.checkpointing)
    net.chunk_feed_forward(config.memory.ffn_chunks)
    if config.memory.offload == "block_inputs":
        net.offload = Offload(place.device)
    if not place.is_meta and mode_on(config.compile, place.device) == "blocks":
        compile_blocks(net)
    shape = (config.run.batch_size, *config.latent_shape())
    net.prepare(shape, place.device, place.dtype, dense)


def trained_names(net: Net, roles: Sequence[Role]) -> frozenset[str]:
    """Return the names of the weights that are trained: those need masters."""
    names: set[str] = set()
    for role in roles:
        if role.how == "train" and role.lora is None:
            names |= {name for name, _ in net.named_parameters()}
        elif role.how == "train":
            names |= set(lora.own_names(net, role.name).values())
    return frozenset(names)


def read_architecture(config: Config, role: Role) -> Any:
    """Return the architecture of a role's network."""
    if role.path is not None:
        return config.family.read_config(Path(role.path))
    assert config.model.architecture is not None  # the configuration was checked
    return config.model.architecture
