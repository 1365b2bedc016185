"""A run: its configuration, world, method, networks and optimizers, at a step."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastdmd.config import Config
from fastdmd.data.world import World, make_world
from fastdmd.denoiser import Denoiser
from fastdmd.device import pick_device
from fastdmd.methods import Method
from fastdmd.methods.method import TRAINABLE
from fastdmd.models.lora import add_lora, lora_parameters
from fastdmd.optim import EMA, Optimizer
from fastdmd.schedule import Schedule


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
    step: int = 0  # finished steps
    seconds: float = 0.0  # of training, over all resumes
    recent: dict[str, float] = field(default_factory=dict)  # newest value of each metric since the last row
    stop: bool = False  # asked to, by a signal

    @property
    def folder(self) -> Path:
        return Path(self.config.run.output_dir)


def build(config: Config) -> Run:
    """Networks, data and optimizers of a run, at step 0."""
    device, dtype = pick_device(config.run.device), config.precision.dtype
    schedule, method = config.make_schedule(), config.make_method()
    nets, optimizers = {}, {}
    for role, how in config.method.roles.items():
        if how == "heads":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.run.seed)
                net, masters = method.make_heads(nets).to(device), {}
        else:
            net = make_net(config, role, device)
            net.checkpointing = config.memory.checkpointing == "full"  # of frozen ones too: SiD's pass gradient on
            net.prepare(device, dtype)
            masters = net.cast(dtype)
        lora = config.role_lora(role)
        nets[role] = Denoiser(net, schedule, lora_parameters(net, lora.modules) if lora else None)
        nets[role].learn(False)
        if role in TRAINABLE:
            optimizers[role] = Optimizer(nets[role].trainable, config.optim[role], config.run.max_steps, masters)
    ema = EMA(optimizers["student"].masters, config.ema) if config.ema else None
    world = make_world(config.data, config.family, config.model.path, device, dtype)
    run = Run(config, device, world, method, schedule, nets, optimizers, ema)
    set_sparsity(run)
    return run


def make_net(config: Config, role: str, device: torch.device) -> Any:
    """A role's network in float32: the weights of its folder, or random ones drawn from the run's seed."""
    path, options = config.role_path(role), config.role_options(role)
    if path is not None:
        net = config.family.load(Path(path), device, options)
    else:
        assert config.model.scratch is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.run.seed)
            net = config.family.make(config.model.scratch[1], options).start_from_scratch().to(device)
    if lora := config.role_lora(role):
        add_lora(net, lora.rank, lora.alpha, lora.targets, config.run.seed)
    return net


def follow_average(run: Run) -> None:
    """Bring the networks that are the student's average up to it."""
    for role, how in run.config.method.roles.items():
        if how == "ema":
            assert run.ema
            run.ema.copy_to(run.nets[role].net)


def set_sparsity(run: Run) -> None:
    """Sparse attention at the sparsity of the step to come."""
    for role, denoiser in run.nets.items():
        if run.config.vsa and run.config.role_options(role).tile:
            denoiser.net.sparsity = run.config.vsa.sparsity_at(run.step)
