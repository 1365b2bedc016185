"""Checkpoints of a run: what is saved, and how a run goes on from it."""

import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdmd import checkpoint
from fastdmd import config as configs
from fastdmd.config import Config
from fastdmd.optim import Form, forms
from fastdmd.run import Diverged, Run, build, follow_average, set_sparsity

# what a resume may change: where it runs, how long, how fast it learns, what it shows. All else is another run
FREE = (
    *("run.output_dir", "run.max_steps", "run.device", "optim.*.lr", "optim.*.min_lr", "optim.*.schedule"),
    *("optim.*.warmup_steps", "memory.*", "checkpoint.*", "validation.*", "logging.*"),
)
Tensors = Mapping[str, Mapping[str, Tensor]]  # by file, by name


def save(run: Run) -> Path:
    """Save a run at its step; raise Diverged, and save nothing, when a number in it is not finite."""
    tensors: dict[str, Mapping[str, Tensor]] = {}
    for role, optimizer in run.optimizers.items():
        tensors[role], tensors[f"optim_{role}"] = optimizer.masters, optimizer.moments()
    if run.ema:
        tensors["ema"] = run.ema.shadow
    if bad := not_finite(tensors):
        raise Diverged(
            f"step {run.step}: {shortened(bad)} not finite; nothing saved, the checkpoint before it stands"
        )
    state: dict[str, Any] = {"samples": run.step * run.config.run.batch_size * run.config.run.grad_accum}
    state |= {
        "seconds": run.seconds,
        "recent": run.recent,
        "ema_updates": run.ema.updates if run.ema else 0,
    }
    return checkpoint.save(run.folder / "checkpoints", run.step, tensors, state, run.config.checkpoint.keep)


def not_finite(tensors: Tensors) -> list[str]:
    """Return the tensors with a number that is not finite, "file.name"; one read of the device where all are."""
    named = {f"{file}.{name}": x for file, each in tensors.items() for name, x in each.items() if x.numel()}
    by_device: dict[torch.device, list[Tensor]] = {}
    for x in named.values():
        by_device.setdefault(x.device, []).append(x)
    largest = [
        torch.stack(torch._foreach_norm(group, torch.inf)).max().cpu()  # pyright: ignore[reportPrivateImportUsage]
        for group in by_device.values()
    ]
    if not largest or torch.stack(largest).isfinite().all():
        return []
    return [name for name, x in named.items() if not x.isfinite().all()]


def shortened(names: Sequence[str]) -> str:
    """Return the first three of some names and how many more there are, with their verb."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} {'is' if len(names) == 1 else 'are'}"


def restore(run: Run) -> None:
    """Go on from the checkpoint that `checkpoint.resume` names, if there is one.

    Raise ValueError for one that is not of this run, or not whole; nothing of the run is changed then.
    """
    found = checkpoint.find(run.folder / "checkpoints", run.config.checkpoint.resume)
    if found is None:
        return
    check_identity(found, run.config)
    manifest, tensors = checkpoint.load(found)
    if faults := list(state_faults(run, tensors)):
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ValueError(
            f"{found}: {', '.join(faults[:3])}{more}; resume with the configuration that it was saved under"
        )
    if bad := not_finite(tensors):
        raise ValueError(
            f"{found}: {shortened(bad)} not finite; remove it to go on from the checkpoint before it"
        )
    for role, optimizer in run.optimizers.items():
        optimizer.load(tensors[role], tensors[f"optim_{role}"])
    if run.ema:
        run.ema.load(tensors["ema"], manifest["ema_updates"])
    run.step, run.seconds, run.recent = manifest["step"], manifest["seconds"], manifest["recent"]
    follow_average(run)
    set_sparsity(run)


def check_identity(found: Path, config: Config) -> None:
    """Raise ValueError when a checkpoint's run was configured otherwise in what makes it that run."""
    saved = found.parent.parent / "config.toml"
    if not saved.is_file():
        return
    before = identity(tomllib.loads(saved.read_text(encoding="utf-8")))
    now = identity(tomllib.loads(configs.dump(configs.resolved(config))))
    other = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if other:
        shown = [f"{key} = {show(before.get(key))} there and {show(now.get(key))} here" for key in other]
        raise ValueError(
            f"{found} is of another run: {'; '.join(shown)}. Use its values, or name another run.output_dir"
        )


def show(value: Any) -> str:
    """Return a value as TOML has it, or that it is absent."""
    return "absent" if value is None else repr(value)


def identity(tables: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return the values that make a run what it is, by their dotted keys."""
    found: dict[str, Any] = {}
    for name, value in tables.items():
        key = f"{above}{name}"
        if isinstance(value, Mapping):
            found |= identity(value, f"{key}.")
        elif not any(fnmatch(key, free) for free in FREE):
            found[key] = value
    return found


def state_faults(run: Run, tensors: Tensors) -> Iterator[str]:
    """Yield what a checkpoint lacks or has otherwise than this run would save it: names, shapes and dtypes."""
    wanted: dict[str, Mapping[str, Tensor]] = {role: opt.masters for role, opt in run.optimizers.items()}
    if run.ema:
        wanted["ema"] = run.ema.shadow
    for file in (*wanted, *(f"optim_{role}" for role in run.optimizers)):
        if file not in tensors:
            yield f"there is no {file}"
    for file, values in wanted.items():
        yield from tensor_faults(
            file, tensors.get(file, values), {name: forms(x) for name, x in values.items()}
        )
    for role, optimizer in run.optimizers.items():
        moments = tensors.get(f"optim_{role}", {})
        yield from tensor_faults(f"optim_{role}", moments, optimizer.moment_forms(moments))


def tensor_faults(file: str, given: Mapping[str, Tensor], wanted: Mapping[str, Form]) -> Iterator[str]:
    """Yield the tensors of a file that are missing, unknown, or of another shape or dtype."""
    for name in sorted(wanted.keys() - given.keys()):
        yield f"{file} has no {name}"
    for name, value in given.items():
        if name not in wanted:
            yield f"{file} has {name}, which is unknown"
        elif forms(value) != wanted[name]:
            shape, dtype = wanted[name]
            yield f"{file}: {name} is {value.dtype} {list(value.shape)}, not {dtype} {list(shape)}"


def reopen(path: Path, overrides: Sequence[str] = (), only: Collection[str] | None = None) -> Run:
    """Return a run from its folder, at its newest checkpoint; of the roles `only`, absent: of all."""
    if not (path / "config.toml").is_file():
        raise ValueError(f"{path} has no config.toml; name the output_dir of a run")
    if not checkpoint.complete(path / "checkpoints"):
        raise ValueError(f"{path} has no checkpoint yet; train it first")
    # the run may have been started from elsewhere, and the folder may have been moved
    config = configs.load(path / "config.toml", [*overrides, 'checkpoint.resume="latest"'])
    run = build(replace(config, run=replace(config.run, output_dir=str(path))), only)
    restore(run)
    return run
