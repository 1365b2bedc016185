"""The only loop. It never asks which method it runs."""

import json
import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastdmd import checkpoint
from fastdmd import config as configs
from fastdmd.config import Config
from fastdmd.data import World, make_world
from fastdmd.denoiser import Batch, Denoiser
from fastdmd.evaluate import finish, validate_step
from fastdmd.hardware import peak_flops, peak_memory_gb
from fastdmd.log import Progress, RunLog
from fastdmd.methods import Method
from fastdmd.methods.method import TRAINABLE
from fastdmd.models.lora import add_lora, export_lora, lora_parameters, merged
from fastdmd.optim import EMA, Optimizer
from fastdmd.precision import pick_device
from fastdmd.rng import Rng
from fastdmd.schedule import Schedule


class Diverged(RuntimeError):
    """A loss or gradient that is not finite; the update was not made."""


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


def train(config: Config) -> Run:
    """Run to max_steps, from the newest checkpoint if there is one; Interrupted or Diverged stop it earlier."""
    exported_scheduler(config)  # no days of training for a student that cannot be exported
    run = build(config)
    checkpoint.make_folder(run.folder)
    with checkpoint.locked(run.folder):
        restore(run)
        checkpoint.write_atomic(run.folder / "config.toml", configs.dump(config))
        max_steps, peak = config.run.max_steps, peak_flops(run.device, config.precision.dtype)
        log = RunLog(config.logging, run.folder, run.step)
        with stop_on_signals(run), log:
            if config.validation.every and run.step == 0:  # what the student's sampler alone is worth
                validate_step(run, log)
            with Progress("step", max_steps, run.step) as progress:
                while run.step < max_steps:
                    start, flops = time.perf_counter(), count_flops(run)
                    values = take_step(run)
                    seconds = time.perf_counter() - start
                    run.seconds += seconds
                    run.recent |= values
                    if run.step % config.logging.every == 0 or run.step == max_steps:
                        mfu = (count_flops(run) - flops) / seconds / peak
                        perf = {"perf/step_s": seconds, "perf/mfu": mfu, "perf/mem_gb": peak_memory_gb(run.device)}
                        log.write(run.step, run.recent | perf)
                        run.recent = {}
                    progress.show(
                        run.step, "  ".join(f"{k.split('/')[1]} {v:.4g}" for k, v in values.items() if "loss" in k)
                    )
                    if config.validation.every and run.step % config.validation.every == 0 and run.step < max_steps:
                        validate_step(run, log)
                    stop = run.stop  # read once: a signal may come at any moment
                    if run.step % config.checkpoint.every == 0 or run.step == max_steps or stop:
                        log.sync()
                        save(run)
                    if stop:
                        raise Interrupted(f"stopped at step {run.step} of {max_steps}; checkpoint saved")
        # a kill may have come between save and prune
        checkpoint.prune(run.folder / "checkpoints", config.checkpoint.keep)
        finish(run)
    return run


def take_step(run: Run) -> dict[str, float]:
    """One step: every phase of the method on the same micro-batches, then the EMA. -> metrics by their full names."""
    config, values = run.config.run, {}
    samples = [range(i * config.batch_size, (i + 1) * config.batch_size) for i in range(config.grad_accum)]
    batches = [run.world.batch(Rng(config.seed, run.step, "data", s, "cpu")) for s in samples]
    carries: list[dict[str, Any]] = [{} for _ in batches]
    phases = run.method.phases(run.step)
    for index, phase in enumerate(phases):
        trained = run.method.trains(phase)
        for role, denoiser in run.nets.items():
            denoiser.learn(role in trained)
        losses = []
        for micro, batch, carry in zip(samples, batches, carries, strict=True):
            rng = Rng(config.seed, run.step, f"{phase}{index}", micro, run.device)
            loss, metrics = run.method.loss(phase, run.nets, batch, rng, carry)
            (loss / config.grad_accum).backward()
            losses.append({f"loss_{phase}": loss.detach(), **metrics})
        found = {name: torch.stack([each[name] for each in losses]).mean() for name in losses[0]}
        found |= {f"grad_norm_{role}": run.optimizers[role].clip() for role in trained}
        # the one read of the device in a phase: nothing that is not finite may reach the weights
        read = dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))
        if not all(map(math.isfinite, read.values())):
            raise Diverged(dump_nonfinite(run, phase, index, read, batches))
        for role in trained:
            run.optimizers[role].step(run.step)
        values |= {f"train/{name}": value for name, value in read.items()}
    run.step += 1
    set_sparsity(run)
    if run.ema and "student" in phases:
        run.ema.update(run.step)
        follow_average(run)
    return values


def dump_nonfinite(run: Run, phase: str, index: int, read: Mapping[str, float], batches: list[Batch]) -> str:
    """Save what reproduces a step that was not finite, and say which tensor it was."""
    grads = {
        f"{role}.{name}": p.grad for role in run.method.trains(phase) for name, p in run.optimizers[role].params.items()
    }
    bad = [f"gradient of {name}" for name, grad in grads.items() if grad is not None and not grad.isfinite().all()]
    bad = [name for name, value in read.items() if not math.isfinite(value)] + bad
    path = run.folder / f"nonfinite_{run.step + 1:08d}"
    path.mkdir(parents=True, exist_ok=True)
    facts = {
        "step": run.step + 1,
        "seed": run.config.run.seed,
        "phase": phase,
        "stream": f"{phase}{index}",  # of Rng
        "read": {k: repr(v) for k, v in read.items()},
    }
    checkpoint.write_atomic(path / "dump.json", json.dumps({**facts, "not_finite": bad}, indent=1))
    tensors = {f"text.{i}": b.cond.text for i, b in enumerate(batches)}
    tensors |= {f"uncond.{i}": b.uncond.text for i, b in enumerate(batches)}
    tensors |= {f"x0.{i}": b.x0 for i, b in enumerate(batches) if b.x0 is not None}
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path / "batch.safetensors")
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    return f"step {run.step + 1}, phase {phase}: {', '.join(bad[:3])}{more} not finite; no update made, see {path}"


def count_flops(run: Run) -> int:
    return sum(denoiser.flops for denoiser in run.nets.values())


def save(run: Run) -> Path:
    tensors: dict[str, Mapping[str, Tensor]] = {}
    for role, optimizer in run.optimizers.items():
        tensors[role], tensors[f"optim_{role}"] = optimizer.masters, optimizer.moments()
    if run.ema:
        tensors["ema"] = run.ema.shadow
    state: dict[str, Any] = {"samples": run.step * run.config.run.batch_size * run.config.run.grad_accum}
    state |= {"seconds": run.seconds, "recent": run.recent, "ema_updates": run.ema.updates if run.ema else 0}
    return checkpoint.save(run.folder / "checkpoints", run.step, tensors, state, run.config.checkpoint.keep)


def restore(run: Run) -> None:
    """Go on from the checkpoint that `checkpoint.resume` names, if there is one."""
    found = checkpoint.find(run.folder / "checkpoints", run.config.checkpoint.resume)
    if found is None:
        return
    manifest, tensors = checkpoint.load(found)
    remedy = "resume with the configuration that it was saved under"
    wanted = {role: optimizer.masters for role, optimizer in run.optimizers.items()}
    wanted |= {"ema": run.ema.shadow} if run.ema else {}
    if missing := {*wanted, *(f"optim_{role}" for role in run.optimizers)} - set(tensors):
        raise ValueError(f"{found} has no {', '.join(sorted(missing))}; {remedy}")
    if other := [name for name, values in wanted.items() if shapes(tensors[name]) != shapes(values)]:
        raise ValueError(f"{found}: {', '.join(other)} has another architecture; {remedy}")
    for role, optimizer in run.optimizers.items():
        optimizer.load(tensors[role], tensors[f"optim_{role}"])
    if run.ema:
        run.ema.load(tensors["ema"], manifest["ema_updates"])
    run.step, run.seconds, run.recent = manifest["step"], manifest["seconds"], manifest["recent"]
    follow_average(run)
    set_sparsity(run)


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in tensors.items()}


def reopen(path: Path) -> Run:
    """A run from its folder, at its newest checkpoint."""
    if not (path / "config.toml").is_file():
        raise ValueError(f"{path} has no config.toml; name the output_dir of a run")
    if not checkpoint.complete(path / "checkpoints"):
        raise ValueError(f"{path} has no checkpoint yet; train it first")
    # the run may have been started from elsewhere, and the folder may have been moved
    config = configs.load(path / "config.toml", ['checkpoint.resume="latest"'])
    run = build(replace(config, run=replace(config.run, output_dir=str(path))))
    restore(run)
    return run


def exported_scheduler(config: Config) -> Any:
    """diffusers' scheduler for the student's steps; ValueError when none has them."""
    method = config.make_method()
    times = method.times.tolist() if method.renoises and method.times is not None else None
    return config.family.make_scheduler(times, config.make_schedule(), exported_from(config))


def exported_from(config: Config) -> Path | None:
    """The folder whose frozen parts an export copies."""
    return Path(config.model.path) if config.model.path else None


def export_student(path: Path, out: Path) -> None:
    """The student of a run's newest checkpoint, under its validation weights, as a diffusers pipeline folder.

    Adapters are merged into it, and stand beside it as pytorch_lora_weights.safetensors where they are all there is.
    """
    run = reopen(path)
    config, net = run.config, run.nets["student"].net
    averaged = run.ema if config.validation.weights == "ema" else None
    weights = learned = averaged.shadow if averaged else run.optimizers["student"].masters
    if config.lora:
        parameters = dict(net.float().named_parameters())  # in bf16 W + B A would lose what is under W / 256 of B A
        for name, value in learned.items():
            parameters[name].data.copy_(value)
        weights = merged(net)
    config.family.export(out, net.config, weights, exported_scheduler(config), exported_from(config))
    if config.lora and not config.lora.modules:
        file = out / "pytorch_lora_weights.safetensors"
        export_lora(file, learned, config.lora.rank, config.lora.alpha, config.family.lora_prefix)


@contextmanager
def stop_on_signals(run: Run) -> Iterator[None]:
    """SIGINT and SIGTERM end the run after the step in progress."""

    def request(signum: int, frame: object) -> None:
        run.stop = True

    old = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)
