"""The only loop. It never asks which method it runs."""

import json
import math
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fastdmd import capture, checkpoint
from fastdmd import config as configs
from fastdmd.batch import Batch
from fastdmd.config import Config
from fastdmd.device import pick_device
from fastdmd.evaluation.evaluate import finish, validate_step
from fastdmd.export import exported_scheduler
from fastdmd.files import locked, make_folder, write_atomic
from fastdmd.flops import step_flops
from fastdmd.hardware import peak_flops, peak_memory_gb
from fastdmd.log import Progress, RunLog
from fastdmd.methods.method import mean_metrics
from fastdmd.plan.preflight import gpu_of, preflight
from fastdmd.precision import became, target_of
from fastdmd.resume import refuse_another, restore, save
from fastdmd.rng import Rng
from fastdmd.run import Diverged, Interrupted, Run, build, follow_average, set_sparsity


def train(config: Config, force: bool = False) -> Run:
    """Run to max_steps, from the newest checkpoint if there is one.

    Interrupted or Diverged stop it earlier. On a GPU a run that cannot fit is refused, unless `force`.
    """
    exported_scheduler(config)  # no days of training for a student that cannot be exported
    folder = Path(config.run.output_dir)
    last = config.run.max_steps
    every = config.validation.every
    make_folder(folder)
    with locked(folder):
        run = start(config, folder, force)
        peak = peak_flops(run.device, config.precision.dtype)
        with stop_on_signals(run), RunLog(config.logging, folder, run.step) as log:
            if every and run.step == 0:  # what the student's sampler alone is worth
                validate_step(run, log)
            with Progress("step", last, run.step) as progress:
                while run.step < last:
                    logged = (run.step + 1) % config.logging.every == 0 or run.step + 1 == last
                    flops = step_flops(run) if logged and peak else 0
                    began = time.perf_counter()
                    with run.capture.step():
                        values = take_step(run)
                    seconds = time.perf_counter() - began
                    run.seconds += seconds
                    run.recent |= values
                    # Report.
                    if logged:
                        report(run, log, seconds, flops / seconds / peak if peak else None)
                    progress.show(run.step, losses(values))
                    # Validate.
                    if every and run.step % every == 0 and run.step < last:
                        validate_step(run, log)
                    # Save. Stop?
                    stop = run.stop  # read once: a signal may come at any moment
                    if run.step % config.checkpoint.every == 0 or run.step == last or stop:
                        log.sync()
                        save(run)
                    if stop:
                        raise Interrupted(f"stopped at step {run.step} of {last}; checkpoint saved")
        # a kill may have come between save and prune
        checkpoint.prune(folder / "checkpoints", config.checkpoint.keep)
        finish(run)
    return run


def start(config: Config, folder: Path, force: bool = False) -> Run:
    """Build a run and bring it to its newest checkpoint; raise ValueError where the folder has another."""
    refuse_another(config)
    device = pick_device(config.run.device)
    if device.type == "cuda":
        config = preflight(config, *gpu_of(device), force)
    compiled = capture.notice(config.compile, device)
    for line in [*([compiled] if compiled else []), *became(config.precision, target_of(device))]:
        print(line, file=sys.stderr)
    run = build(config)
    for line in run.method.warnings():
        print(f"warning: {line}", file=sys.stderr)
    restore(run)
    write_atomic(folder / "config.toml", configs.dump(config))
    return run


def report(run: Run, log: RunLog, seconds: float, mfu: float | None) -> None:
    """Write the newest value of each metric since the last row, with the cost of the newest step."""
    perf = {"perf/step_s": seconds, "perf/mem_gb": peak_memory_gb(run.device)}
    if mfu is not None:
        perf["perf/mfu"] = mfu
    log.write(run.step, run.recent | perf)
    run.recent = {}


def losses(values: Mapping[str, float]) -> str:
    """Return the losses of a step in a line."""
    return "  ".join(f"{name.split('/')[1]} {value:.4g}" for name, value in values.items() if "loss" in name)


def take_step(run: Run) -> dict[str, float]:
    """Take one step, and return its metrics by their full names.

    It is every phase of the method on the same micro-batches, then the EMA.
    """
    config, values = run.config.run, {}
    samples = [range(i * config.batch_size, (i + 1) * config.batch_size) for i in range(config.grad_accum)]
    batches = [run.world.batch(Rng(config.seed, run.step, "data", s, "cpu")) for s in samples]
    carries: list[dict[str, Any]] = [{} for _ in batches]
    phases = run.method.phases(run.step)
    for index, phase in enumerate(phases):
        trained = run.method.trains(phase)
        for role, denoiser in run.nets.items():
            denoiser.learn(role in trained)
        parts = []
        for micro, batch, carry in zip(samples, batches, carries, strict=True):
            rng = Rng(config.seed, run.step, f"{phase}{index}", micro, run.device)
            draws = run.method.draw(phase, rng, batch.latent_shape, carry)
            if run.capture.mode == "step":
                loss, metrics = run.capture.backward(
                    phase, run.nets, run.optimizers, batch, draws, carry, config.grad_accum
                )
            else:
                loss, metrics = run.method.loss(phase, run.nets, batch, draws, carry)
                (loss / config.grad_accum).backward()
            parts.append({f"loss_{phase}": loss.detach(), **metrics})
        found, samples_of = mean_metrics(parts)
        found |= {f"grad_norm_{role}": run.optimizers[role].clip() for role in trained}
        # the one read of the device in a phase: nothing that is not finite may reach the weights
        numbers = torch.stack([*found.values(), *samples_of.values()]).tolist()
        read = dict(zip(found, numbers[: len(found)], strict=True))
        absent = [name for name, n in zip(samples_of, numbers[len(found) :], strict=True) if n == 0]
        if not all(map(math.isfinite, read.values())):
            raise Diverged(dump_nonfinite(run, phase, index, read, batches))
        for role in trained:
            run.optimizers[role].step(run.step)
        # a metric of some samples only has no value in a step that draws none of them
        values |= {f"train/{name}": value for name, value in read.items() if name not in absent}
    run.step += 1
    set_sparsity(run)
    if run.ema and "student" in phases:
        run.ema.update(run.step)
        follow_average(run)
    return values


def dump_nonfinite(run: Run, phase: str, index: int, read: Mapping[str, float], batches: list[Batch]) -> str:
    """Save what reproduces a step that was not finite, and say which tensor it was."""
    grads = [
        (role, *item) for role in run.method.trains(phase) for item in run.optimizers[role].grads().items()
    ]
    bad = [f"gradient of {role}.{name}" for role, name, grad in grads if not grad.isfinite().all()]
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
    write_atomic(path / "dump.json", json.dumps({**facts, "not_finite": bad}, indent=1))
    tensors = {f"text.{i}": b.cond.text for i, b in enumerate(batches)}
    tensors |= {f"uncond.{i}": b.uncond.text for i, b in enumerate(batches)}
    tensors |= {f"x0.{i}": b.x0 for i, b in enumerate(batches) if b.x0 is not None}
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path / "batch.safetensors")
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    where = f"step {run.step + 1}, phase {phase}"
    return f"{where}: {', '.join(bad[:3])}{more} not finite; no update made, see {path}"


@contextmanager
def stop_on_signals(run: Run) -> Iterator[None]:
    """End the run after the step in progress on SIGINT and SIGTERM."""

    def request(signum: int, frame: object) -> None:
        run.stop = True

    old = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)
