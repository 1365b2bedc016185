"""A student as a diffusers folder and as a file of adapters."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastdmd.config import Config
from fastdmd.files import written_beside
from fastdmd.models.lora import export_lora, merged
from fastdmd.resume import config_of, restored

RUN = "the run"


def exported_scheduler(config: Config) -> Any:
    """diffusers' scheduler for the student's steps; ValueError when none has them."""
    method = config.make_method()
    times = method.times.tolist() if method.renoises and method.times is not None else None
    return config.family.make_scheduler(times, config.make_schedule(), exported_from(config))


def exported_from(config: Config) -> Path | None:
    """The folder whose frozen parts an export copies."""
    return Path(config.model.path) if config.model.path else None


def export_student(
    path: Path, out: str | Path, force: bool = False, overrides: Sequence[str] = ()
) -> list[str]:
    """Write the student of a run's newest checkpoint as a diffusers pipeline folder, and return what to know of it.

    It has its validation weights. Adapters are merged into it, and stand beside it as
    pytorch_lora_weights.safetensors where they are all there is. `force` replaces a folder that is there.
    """
    config = config_of(path, overrides)
    target = check_out(str(out), path, config, force)  # before anything is loaded
    run = restored(config, only=("student",))
    net = run.nets["student"].net
    averaged = run.ema if config.validation.weights == "ema" else None
    weights = learned = averaged.shadow if averaged else run.optimizers["student"].masters
    if config.lora:
        # in bf16 W + B A would lose what is under W / 256 of B A
        parameters = dict(net.float().named_parameters())
        for name, value in learned.items():
            parameters[name].data.copy_(value)
        weights = merged(net)
    notes = list(limits(config))
    with written_beside(target) as part:
        config.family.export(part, net.config, weights, exported_scheduler(config), exported_from(config))
        if config.lora and not config.lora.modules:
            file = part / "pytorch_lora_weights.safetensors"
            export_lora(file, learned, config.lora.rank, config.lora.alpha, config.family.lora_prefix)
        (part / "README.md").write_text(card(config, run.step, notes), encoding="utf-8")
    return notes


def check_out(out: str, path: Path, config: Config, force: bool) -> Path:
    """Return the resolved folder of an export; ValueError when it would write over what the run reads or is."""
    if not out.strip():
        raise ValueError("--out is empty; name a folder to write")
    target = Path(out).expanduser().resolve()
    for key, folder in reads(path, config).items():
        read = folder.expanduser().resolve()
        if target == read or read.is_relative_to(target) or (key != RUN and target.is_relative_to(read)):
            raise ValueError(
                f"--out {out!r} would write over {key} = {str(folder)!r}, which the run reads; name another"
            )
    if target.exists() and not target.is_dir():
        raise ValueError(f"--out {out!r} is a file; name a folder")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise ValueError(f"--out {out!r} is there and not empty; name another, or replace it with --force")
    return target


def reads(path: Path, config: Config) -> dict[str, Path]:
    """Return the folders and files that a run is made of and reads, by the key that names them."""
    found = {RUN: path} | {
        f"{RUN}/{part}": path / part for part in ("checkpoints", "samples", "tensorboard", "wandb")
    }
    if config is not None:
        for role in config.method.roles:
            key, folder = config.role_source(role)
            found |= {key: Path(folder)} if folder else {}
        found |= {"model.path": Path(config.model.path)} if config.model.path else {}
        found |= {f"data.sources[{i}]": Path(s) for i, s in enumerate(config.data.sources) if s != "shapes"}
    return found


def limits(config: Config) -> Iterator[str]:
    """Yield what stock diffusers does otherwise with a student, which it opens all the same."""
    if config.role_options("student").causal:
        yield "this student makes videos block by block; stock diffusers samples all frames at once, which is another model"
    if config.role_options("student").tile is not None:
        yield "this student has sparse attention; stock diffusers drops its gates and attends densely, which is another model"


def card(config: Config, step: int, notes: Sequence[str]) -> str:
    """Return the page that stands beside the weights."""
    lines = [f"# A student of {config.model.path or 'random weights'}", ""]
    lines += [f"Made by fastdmd with method `{config.method.name}`, {step} steps."]
    lines += [f"\n**Warning:** {note}. Sample it with `fastdmd sample`." for note in notes]
    return "\n".join(lines) + "\n"
