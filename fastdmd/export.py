"""A student as a diffusers folder and as a file of adapters."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastdmd import config as configs
from fastdmd.config import Config
from fastdmd.files import is_in, written_beside
from fastdmd.models import component
from fastdmd.models.lora import export_lora, merged
from fastdmd.models.lowbit import is_code
from fastdmd.resume import config_of, not_finite, restored, shortened

RUN = "run.output_dir"
PARTS = ("checkpoints", "samples", "tensorboard", "wandb")  # of a run's folder
MARK = "Exported by fastdmd"


def exported_scheduler(config: Config) -> Any:
    """Return diffusers' scheduler for the student's steps; ValueError when none has them."""
    method = config.make_method()
    times = method.times.tolist() if method.renoises and method.times is not None else None
    return config.family.make_scheduler(times, config.make_schedule(), exported_from(config))


def exported_from(config: Config) -> Path | None:
    """Return the folder whose frozen parts an export copies."""
    return Path(config.model.path) if config.model.path else None


def export_student(
    path: Path, out: str | Path, force: bool = False, overrides: Sequence[str] = ()
) -> list[str]:
    """Write the student of a run's newest checkpoint as a diffusers folder, and return what to know of it.

    It has its validation weights. Adapters are merged into it, and stand beside it as
    pytorch_lora_weights.safetensors where they are all there is. `force` replaces an earlier export.
    """
    config = config_of(path, overrides)
    target = check_out(str(out), config, force)  # before anything is loaded
    run = restored(config, only=("student",))
    student = run.nets["student"]
    net = student.net
    averaged = run.ema if config.validation.weights == "ema" else None
    learned = averaged.shadow if averaged else run.optimizers["student"].masters
    weights = learned
    adapters = config.role_lora("student")
    if adapters:
        # in bf16 W + B A would lose what is under W / 256 of B A
        for name, p in net.named_parameters():
            p.data = p.data if is_code(name) else p.data.float()
        for name, value in learned.items():
            student.trainable[name].data.copy_(value)
        weights = merged(net, "student")
    if bad := not_finite(
        {"student": weights}
    ):  # a frozen weight under adapters, say: what learns was checked
        raise ValueError(
            f"{path}: {shortened(bad)} not finite; nothing exported, see the folder of the student"
        )
    notes = list(limits(config))
    with written_beside(target) as part:
        config.family.export(part, net.config, weights, exported_scheduler(config), exported_from(config))
        if adapters and not adapters.modules:
            file = part / "pytorch_lora_weights.safetensors"
            export_lora(file, learned, adapters.rank, adapters.alpha, config.family.lora_prefix)
        page = card(config, run.step, opening(part, target.name), notes)
        (part / "README.md").write_text(page, encoding="utf-8")
    return notes


def check_out(out: str, config: Config, force: bool) -> Path:
    """Return the folder of an export, links resolved.

    Raise ValueError where it would write over what the run reads or is.
    `force` replaces an earlier export, and nothing else.
    """
    target = named_folder(out)
    for key, path in reads(config):
        if is_in(path, target) or (is_in(target, path) and key != RUN):
            raise ValueError(
                f"--out {out!r} would write over {key} = '{path}', which the run reads; name another"
            )
    if not target.is_dir() or not any(target.iterdir()):
        return target
    page = target / "README.md"
    if not page.is_file() or MARK not in page.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(f"--out {out!r} is not empty, and no export of fastdmd; name another")
    if not force:
        raise ValueError(f"--out {out!r} is an export already; name another, or replace it with --force")
    return target


def check_samples(out: str, config: Config) -> Path:
    """Return the folder for samples, links resolved.

    Raise ValueError where they would mix with what the run reads or is.
    """
    target = named_folder(out)
    for key, path in reads(config):
        if is_in(target, path) and key not in (RUN, f"{RUN}/samples"):
            raise ValueError(f"--out {out!r} lies in {key} = '{path}', which the run reads; name another")
    return target


def named_folder(out: str) -> Path:
    """Return the folder that `--out` names, with `~` and links resolved."""
    if not out.strip():
        raise ValueError("--out is empty; name a folder to write")
    target = Path(out).expanduser().resolve()
    for path in (target, *target.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"--out {out!r}: {path} is a file; name a folder")
    return target


def reads(config: Config) -> Iterator[tuple[str, Path]]:
    """Yield the files and folders that a run reads and is, with the key that names each.

    What links in them lead to is among them.
    """
    folder = Path(config.run.output_dir)
    yield from ((f"{RUN}/{part}", folder / part) for part in PARTS)
    for key, name in configs.paths_of(config):
        path = Path(name).resolve()
        yield key, path
        yield from ((key, link.resolve()) for link in path.rglob("*") if link.is_symlink())


def limits(config: Config) -> Iterator[str]:
    """Yield how stock diffusers would sample a student otherwise than it was trained."""
    options = config.role_options("student")
    if options.causal:
        yield "the student makes videos block by block, and stock diffusers samples all frames at once"
    if options.tile is not None:
        yield "the student has sparse attention, and stock diffusers drops its gates and attends to all"


def opening(folder: Path, name: str) -> str:
    """Return the line that opens an export in diffusers: parts that it lacks have to be None there."""
    index = component.read_json(folder / "model_index.json")
    absent = [f", {part}=None" for part, kind in index.items() if kind == [None, None]]
    return f"{index['_class_name']}.from_pretrained({name!r}{''.join(absent)})"


def card(config: Config, step: int, line: str, notes: Sequence[str]) -> str:
    """Return the page that stands beside the weights."""
    source = config.student.path or config.model.path or "random weights"
    warnings = [
        f"> **Stock diffusers does not sample this right**: {note}. Use `fastdmd sample`.\n" for note in notes
    ]
    return "\n".join(
        [
            *("---", "library_name: diffusers", "---", ""),
            f"{MARK}: a student of `{source}`, method `{config.method.name}`, {step} steps.\n",
            *warnings,
            *(
                "```python",
                f"from diffusers import {line.partition('.')[0]}",
                "",
                f"pipe = {line}",
                "```",
                "",
            ),
        ]
    )
