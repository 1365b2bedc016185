"""A cycle of a run on the meta device: its nets, losses, backwards and optimizers, under `Live`."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastdmd.batch import Batch, Cond
from fastdmd.config import Config
from fastdmd.denoiser import Denoiser
from fastdmd.methods import Method
from fastdmd.methods.method import TRAINABLE, Phases, cycle
from fastdmd.models.net import Net
from fastdmd.optim import EMA, MOMENTS, Optimizer, key_of, on_gradient
from fastdmd.plan.live import Live, Phase, uncollected
from fastdmd.plan.ops import Fused, backward
from fastdmd.plan.replay import Replayed
from fastdmd.plan.validation import sampled
from fastdmd.plan.work import Work
from fastdmd.roles import Built, Place, Role, build_nets, roles_of
from fastdmd.warm import MetaRng, empty_cond

Depths = Mapping[str, int]
# that an update moves for each parameter that learns: AdamW 7 floats, of which moments in codes are 4 bytes,
# clipping 3, a master's rounding 6 bytes
UPDATE_BYTES = {"adamw": 46, "adamw8bit": 34}
STOCHASTIC_BYTES = 80  # of an update without masters: more passes, over a float32 copy of the weight


@dataclass
class Trace:
    """What a cycle of steps takes, by "STEP: phase", where STEP is the phases that a step has."""

    phases: Mapping[str, Phase] = field(default_factory=dict[str, Phase])
    # bytes that are there between steps, by kind
    fixed: Mapping[str, int] = field(default_factory=dict[str, int])
    parameters: Mapping[str, int] = field(default_factory=dict[str, int])  # of each role's network
    trained: Mapping[str, int] = field(default_factory=dict[str, int])  # of those, what learns
    moments: Mapping[str, int] = field(default_factory=dict[str, int])  # bytes of each optimizer's
    # what a step's first phase computes before its backward where the rollout stops at once
    first_exit: Mapping[str, Work] = field(default_factory=dict[str, Work])
    samplers: Mapping[str, Phase] = field(default_factory=dict[str, Phase])  # of a batch of a validation


class ExitRng(MetaRng):
    """Draws of the meta device in which every rollout exits at one end of the student's steps."""

    last = False

    def shared_integer(self, high: int) -> int:
        return high - 1 if self.last else 0


def trace(config: Config, depths: Depths | None, peaks_only: bool = False) -> Trace:
    """Trace every kind of step of a cycle.

    Its draws are the dearest: a rollout walks to its last step.

    Args: depths, of the blocks that are alike, by role (None: all); peaks_only, to leave out the work of
    the first exit, where exits are drawn, and of validations.
    """
    method, schedule = config.make_method(), config.make_schedule()
    place = Place(torch.device("meta"), config.precision.dtype)
    roles = roles_of(config)
    live, found = Live(), Trace()
    with uncollected(), Fused(live.before), live:
        live.begin("build")
        built = build_nets(config, roles, method, schedule, place, depths)
        nets = {name: each.denoiser for name, each in built.items()}
        replay(live, nets)
        hold_networks(live, roles, nets)
        optimizers = {name: hold_role(live, config, name, each) for name, each in built.items()}
        trained = {name: optimizer for name, optimizer in optimizers.items() if optimizer}
        found.parameters = {name: sum(p.numel() for p in d.net.parameters()) for name, d in nets.items()}
        found.trained = {name: sum(m.numel() for m in o.masters.values()) for name, o in trained.items()}
        found.moments = {name: o.moment_bytes() for name, o in trained.items()}
        if config.ema:
            with live.made_as("average, student"):
                ema = EMA(trained["student"].masters, config.ema)
        else:
            ema = None
        sparse(config, nets)
        batch = inputs(live, config, nets["student"])
        found.fixed = {kind: size for kind, size in live.by.items() if size}
        stage = Stage(live, config, method, nets, trained, batch)
        found.phases = stage.steps(first_exit=False)
        if not peaks_only:
            if config.rollout is not None and config.rollout.exit == "uniform":
                first = stage.steps(first_exit=True)
                found.first_exit = {name: phase.work for name, phase in first.items()}
            del stage, batch  # a validation is between steps, and a first exit leaves gradients
            for optimizer in trained.values():
                optimizer.adamw.zero_grad()
            size = config.validation.batch_size
            found.samplers = sampled(
                live, config, method, nets, *conditions(live, config, nets["student"], size)
            )
        for optimizer in trained.values():
            for hook in optimizer.hooks:  # from a parameter to its optimizer and back: it would stay
                hook.remove()
        del ema
    return found


def replay(live: Live, nets: Mapping[str, Denoiser]) -> None:
    """Trace each network's calls without gradient once."""
    for net in {denoiser.net for denoiser in nets.values()}:
        if isinstance(net, Net):  # and no heads
            net.forward = Replayed(live, net)


def hold_networks(live: Live, roles: Mapping[str, Role], nets: Mapping[str, Denoiser]) -> None:
    """Say what the tensors of each network are for: shared weights are of all roles on it."""
    for network in dict.fromkeys(role.network for role in roles.values()):
        on_it = [name for name, role in roles.items() if role.network == network]
        net = nets[network].net
        live.hold([*net.parameters(), *net.buffers()], f"weights, {' + '.join(on_it)}")
        for name in on_it:
            if roles[name].lora:
                live.hold(nets[name].trainable.values(), f"adapters, {name}")


def hold_role(live: Live, config: Config, name: str, built: Built) -> Optimizer | None:
    """Give a role its masters and moments where it learns."""
    denoiser = built.denoiser
    if name not in TRAINABLE:
        return None
    masters: dict[str, Tensor] = {}
    with live.made_as(f"masters, {name}"):
        for key, p in denoiser.trainable.items():
            if p.dtype != torch.float32 and config.precision.master == "fp32":
                masters[key] = torch.empty(p.shape, dtype=torch.float32, device="meta")
    optimizer = Optimizer(denoiser.trainable, config.optim[name], config.run.max_steps, masters)
    for key, p in denoiser.trainable.items():
        optimizer.hooks.append(on_gradient(p, partial(hold_gradient, live, optimizer, key, name)))
    with live.made_as(f"moments, {name}"):
        for master in optimizer.masters.values():
            moments = {
                key_of(kind, part): torch.empty(shape, dtype=dtype, device="meta")
                for kind in MOMENTS
                for part, (shape, dtype) in optimizer.part_forms(master).items()
            }
            optimizer.adamw.state[master] = {**moments, "step": torch.zeros(())}
    return optimizer


def hold_gradient(live: Live, optimizer: Optimizer, key: str, role: str, _: Tensor) -> None:
    """Say what a gradient is for, after the optimizer took it."""
    grad = optimizer.masters[key].grad
    assert grad is not None
    live.hold([grad], f"gradients, {role}")


def sparse(config: Config, nets: dict[str, Denoiser]) -> None:
    """Set the sparsity that a run ends at."""
    for role, denoiser in nets.items():
        if config.vsa and config.role_options(role).tile:
            denoiser.keep(config.vsa.sparsity, config.latent_shape())


def inputs(live: Live, config: Config, student: Denoiser) -> Batch:
    """Return a micro-batch as the data gives it."""
    size, shape = config.run.batch_size, config.latent_shape()
    cond, uncond = conditions(live, config, student, size)
    with live.made_as("inputs"), torch.device("meta"):
        x0 = None if config.data.kind == "prompts" else torch.empty(size, *shape)
    return Batch(cond, uncond, shape, x0)


def conditions(live: Live, config: Config, student: Denoiser, size: int) -> tuple[Cond, Cond]:
    """Return the prompts of some samples, and as many empty ones."""
    arguments = config.family, student.net.config, config.data.resolution, config.text_tokens()
    with live.made_as("inputs"), torch.device("meta"):
        both = (empty_cond(size, *arguments) for _ in range(2))
        cond, uncond = (replace(each, text=each.text.to(config.precision.dtype)) for each in both)
    return cond, uncond


@dataclass(frozen=True)
class Stage:
    """What a step on the meta device takes."""

    live: Live
    config: Config
    method: Method
    nets: Mapping[str, Denoiser]
    optimizers: Mapping[str, Optimizer]
    batch: Batch

    def steps(self, first_exit: bool) -> dict[str, Phase]:
        """Take one step of each kind, and return its phases."""
        self.live.phases.clear()
        for phases in dict.fromkeys(cycle(self.method)):
            self.step(phases, first_exit)
        return {name: phase for name, phase in self.live.phases.items() if name}

    def step(self, phases: Phases, first_exit: bool) -> None:
        """Take one micro-batch through the phases of a step, as its last: the gradients of others are there.

        The optimizer's work is counted and not done: torch has no fused AdamW on the meta device.
        """
        live, run = self.live, self.config.run
        carry: dict[str, Any] = {}
        for index, phase in enumerate(phases):
            learning = self.method.trains(phase)
            for role, denoiser in self.nets.items():
                denoiser.learn(role in learning)
            where = f"{' + '.join(phases)}: {phase}"
            live.begin(f"{where}, forward")
            for role in learning if run.grad_accum > 1 else ():
                with live.made_as(f"gradients, {role}"):
                    for master in self.optimizers[role].masters.values():
                        master.grad = torch.empty_like(master, dtype=torch.float32)
            rng = ExitRng(run.seed, 0, f"{phase}{index}", range(run.batch_size), "cpu")
            rng.last = not first_exit
            draws = self.method.draw(phase, rng, self.batch.latent_shape, carry)
            loss, metrics = self.method.loss(phase, self.nets, self.batch, draws, carry)
            live.hold((x for x in tree_leaves(carry) if live.counts(x)), "inputs")
            if first_exit:
                break
            live.begin(f"{where}, backward")
            backward(loss / run.grad_accum)
            del loss, metrics, draws
            live.begin(f"{where}, optimizer")
            for role in learning:
                self.update(role)
        live.begin("")

    def update(self, role: str) -> None:
        """Count an update of a role, and drop its gradients."""
        optimizer = self.optimizers[role]
        parameters = sum(master.numel() for master in optimizer.masters.values())
        stochastic = self.config.precision.master == "bf16-sr"
        size = STOCHASTIC_BYTES if stochastic else UPDATE_BYTES[self.config.optim[role].name]
        self.live.phase.work += Work(traffic=size * parameters)
        optimizer.adamw.zero_grad()
