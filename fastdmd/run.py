"""A run: its configuration, world, method, networks and optimizers, at a step."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from fastdmd.capture import Capture, mode_on
from fastdmd.config import Config
from fastdmd.data.synthetic import make_synthetic
from fastdmd.data.world import Model, World, make_world
from fastdmd.denoiser import Denoiser
from fastdmd.device import pick_device
from fastdmd.methods import Method
from fastdmd.methods.method import TRAINABLE, cycle
from fastdmd.models.lowbit import code_dtype
from fastdmd.optim import EMA, Optimizer
from fastdmd.precision import became, target_of
from fastdmd.rng import seed_of
from fastdmd.roles import Built, Place, build_nets, read_architecture, roles_of
from fastdmd.schedule import Schedule


class Diverged(RuntimeError):
    """A loss, a gradient or a state that is not finite; it was not used."""


class Interrupted(RuntimeError):
    """Stopped by a signal, after a checkpoint."""


@dataclass
class Run:
    """Everything that a step needs."""

    config: Config
    device: torch.device
    world: World
    method: Method
    schedule: Schedule
    nets: dict[str, Denoiser]
    optimizers: dict[str, Optimizer]
    ema: EMA | None
    capture: Capture
    step: int = 0  # finished steps
    seconds: float = 0.0  # of training, over all resumes
    recent: dict[str, float] = field(default_factory=dict)  # newest value of each metric since the last row
    stop: bool = False  # asked to, by a signal

    @property
    def folder(self) -> Path:
        return Path(self.config.run.output_dir)


def build(config: Config, only: Collection[str] | None = None) -> Run:
    """Build the networks, data and optimizers of a run, at step 0; of the roles `only`, absent: of all."""
    place = place_of(config)
    roles = {name: role for name, role in roles_of(config).items() if only is None or name in only}
    built = build_nets(config, roles, config.make_method(), config.make_schedule(), place)
    stored = config.precision.text_encoder
    codes = None if stored == "compute" else code_dtype(stored, place.device)
    model = Model(config.family, config.model.path, place.device, place.dtype, codes)
    world = make_world(config.data, model, config.latent_shape())
    return assemble(config, place, built, world)


def place_of(config: Config) -> Place:
    """Return where a run computes; raise ValueError for a device without its number types."""
    device = pick_device(config.run.device)
    became(config.precision, target_of(device))
    return Place(device, config.precision.dtype)


def build_synthetic(config: Config, depths: Mapping[str, int] | None = None) -> Run:
    """Build a run with random weights and inputs: it computes what the run does, and reads no weights.

    depths: of `build_nets`.
    """
    place = replace(place_of(config), is_random=True)
    roles = roles_of(config)
    built = build_nets(config, roles, config.make_method(), config.make_schedule(), place, depths)
    architecture = read_architecture(config, roles["student"])
    model = Model(config.family, None, place.device, place.dtype)
    world = make_synthetic(config.data, model, architecture, config.latent_shape())
    return assemble(config, place, built, world)


def assemble(config: Config, place: Place, built: Mapping[str, Built], world: World) -> Run:
    """Return a run at step 0 from its networks and data."""
    method = config.make_method()
    nets = {name: each.denoiser for name, each in built.items()}
    optimizers = {
        name: make_optimizer(config, name, each) for name, each in built.items() if name in TRAINABLE
    }
    ema = EMA(optimizers["student"].masters, config.ema) if config.ema and "student" in built else None
    capture = Capture(mode_on(config.compile, place.device), method, len(cycle(method)))
    schedule = config.make_schedule()
    run = Run(config, place.device, world, method, schedule, nets, optimizers, ema, capture)
    set_sparsity(run)
    return run


def make_optimizer(config: Config, role: str, built: Built) -> Optimizer:
    """Return the optimizer of what a role trains."""
    in_bf16 = config.precision.master == "bf16-sr"
    seed = seed_of("cpu", config.run.seed, role) if in_bf16 else None
    parameters, options = built.denoiser.trainable, config.optim[role]
    return Optimizer(parameters, options, config.run.max_steps, built.masters, seed)


def follow_average(run: Run) -> None:
    """Bring the networks that are the student's average up to it."""
    for role, how in run.config.method.roles.items():
        if how == "ema" and role in run.nets:
            assert run.ema
            run.ema.copy_to(run.nets[role].trainable)


def set_sparsity(run: Run) -> None:
    """Set sparse attention to the sparsity of the step to come."""
    for role, denoiser in run.nets.items():
        if run.config.vsa and run.config.role_options(role).tile:
            denoiser.keep(run.config.vsa.sparsity_at(run.step), run.world.latent_shape)
