"""Checkpoints of a run: what is saved, and how a run goes on from it."""

import os
import shlex
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdmd import checkpoint
from fastdmd import config as configs
from fastdmd.config import Config
from fastdmd.config.toml import to_toml
from fastdmd.optim import Form, forms
from fastdmd.run import Diverged, Run, build, follow_average, set_sparsity

# What a resume may change: where a run is, for how long, how fast it learns, what it takes and what it shows.
# Any other key makes another run.
FREE = (
    *("run.output_dir", "run.max_steps", "run.device"),
    *("optim.*.lr", "optim.*.schedule", "optim.*.warmup_steps", "optim.*.min_lr"),
    *("memory.*", "compile.*", "checkpoint.*", "validation.*", "logging.*"),
)
Tensors = Mapping[str, Mapping[str, Tensor]]  # by file, by name


def refuse_another(config: Config) -> None:
    """Raise ValueError where `run.output_dir` has a run that this one would lose, or would not go on with.

    To start anew is refused over any run: nothing is deleted. To go on is refused where the run was
    configured otherwise than this one: each key with both values.
    """
    folder, resume = Path(config.run.output_dir), config.checkpoint.resume
    has_run = checkpoint.complete(folder / "checkpoints") or (folder / "metrics.jsonl").exists()
    if resume is False and has_run:
        names = (folder.with_name(f"{folder.name}.{n}") for n in count(1))
        move = shlex.join(["mv", str(folder), str(next(path for path in names if not path.exists()))])
        raise ValueError(
            f"checkpoint.resume = false, and {folder} has a run; name another run.output_dir, or move it "
            f"away: {move}"
        )
    saved = checkpoint.find(folder / "checkpoints", resume)
    if saved is None:
        return
    path = saved.parent.parent / "config.toml"
    if not path.is_file():
        raise ValueError(f"{saved} has no {path}, which says what run it is of; put it back to go on with it")
    old, new = identity(configs.read_saved(path)), identity(config)
    keys = [key for key in {**old, **new} if same_place(key, old.get(key)) != same_place(key, new.get(key))]
    if keys:
        lines = [f"{key} = {shown(new.get(key))}, and {saved} has {shown(old.get(key))}" for key in keys]
        remedy = f"name another run.output_dir, or take what {saved} has; {path} says what that is"
        raise ValueError("\n".join([*lines, f"this is another run: {remedy}"]))


def identity(config: Config) -> dict[str, Any]:
    """Return the values that make a run what it is, by their dotted keys; absent ones are left out."""

    def flat(table: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
        for name, value in table.items():
            if isinstance(value, dict):
                yield from flat(value, f"{above}{name}.")
            else:
                yield f"{above}{name}", value

    values = flat(tomllib.loads(configs.dump(config)))
    return {key: value for key, value in values if not any(fnmatch(key, free) for free in FREE)}


def same_place(key: str, value: Any) -> Any:
    """Return a value as it is compared: of a path, where its links lead."""
    if key not in configs.PATHS or value is None:
        return value
    return [os.path.realpath(each) for each in ([value] if isinstance(value, str) else value)]


def shown(value: Any) -> str:
    """Return a value as it is written in TOML."""
    return "none" if value is None else to_toml(value)


def save(run: Run) -> Path:
    """Save a run at its step; raise Diverged, and save nothing, when a number in it is not finite."""
    tensors: dict[str, Mapping[str, Tensor]] = {}
    for role, optimizer in run.optimizers.items():
        tensors[role] = optimizer.masters
        tensors[f"optim_{role}"] = optimizer.moments()
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
    """Return the tensors that are not finite, as "file.name"; one read of the device where all are."""
    named = {
        f"{file}.{name}": x
        for file, each in tensors.items()
        for name, x in each.items()
        if x.numel() and x.is_floating_point()  # codes of 8 bits are finite; their scales may be not
    }
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

    Raise ValueError for one that this run's networks cannot have saved, or that is not whole; the run stays
    as it was.
    """
    saved = checkpoint.find(run.folder / "checkpoints", run.config.checkpoint.resume)
    if saved is None:
        return
    manifest, tensors = checkpoint.load(saved)
    if faults := list(state_faults(run, tensors)):
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ValueError(
            f"{saved}: {', '.join(faults[:3])}{more}; resume with the configuration that it was saved under"
        )
    if bad := not_finite(tensors):
        raise ValueError(
            f"{saved}: {shortened(bad)} not finite; remove it to go on from the checkpoint before it"
        )
    for role, optimizer in run.optimizers.items():
        optimizer.load(tensors[role], tensors[f"optim_{role}"])
    if run.ema:
        run.ema.load(tensors["ema"], manifest["ema_updates"])
    run.step = manifest["step"]
    run.seconds = manifest["seconds"]
    run.recent = manifest["recent"]
    follow_average(run)
    set_sparsity(run)


def state_faults(run: Run, tensors: Tensors) -> Iterator[str]:
    """Yield the names, shapes and dtypes in which a checkpoint is not as this run would save it."""
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


def config_of(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration of the run in a folder, which may have moved, at its newest checkpoint."""
    if not (path / "config.toml").is_file():
        raise ValueError(f"{path} has no config.toml; name the output_dir of a run")
    if not checkpoint.complete(path / "checkpoints"):
        raise ValueError(f"{path} has no checkpoint yet; train it first")
    here = (f"run.output_dir={to_toml(str(path))}", 'checkpoint.resume="latest"')
    return configs.load(path / "config.toml", [*overrides, *here])


def restored(config: Config, only: Collection[str] | None = None) -> Run:
    """Return a run at the checkpoint that `checkpoint.resume` names; of the roles `only`, absent: of all."""
    run = build(config, only)
    restore(run)
    return run
