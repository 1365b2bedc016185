"""Checkpoints of a run: what is saved, and how a run goes on from it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdmd import checkpoint
from fastdmd import config as configs
from fastdmd.run import Run, build, follow_average, set_sparsity


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
