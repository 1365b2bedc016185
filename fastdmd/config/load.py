"""Read, check and write the configuration of a run."""

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from fastdmd.config import strict, toml
from fastdmd.config.schema import OPTIONAL_TABLES, Config, Problems
from fastdmd.data import shapes
from fastdmd.data.encoded import read_folders
from fastdmd.data.table import Config as DataConfig
from fastdmd.methods.flow import Flow
from fastdmd.methods.method import TRAINABLE
from fastdmd.models.sdxl import folder as sdxl_folder
from fastdmd.rollout import Config as RolloutConfig

PATHS = (  # the keys that name files or folders, and what they may have beside them
    *("run.output_dir", "model.path", "student.path", "teacher.path", "critic.path"),
    *("data.sources", "checkpoint.resume"),
)
WORDS = ("", "shapes", "latest")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read and check a whole configuration; ConfigError with all that is wrong. No weight is touched.

    `~` is the user's home. The paths of what is returned are absolute, so that it opens from anywhere.
    """
    source = toml.read(Path(path), overrides)
    for table, name in (key.split(".") for key in PATHS):
        values = source.data.get(table)
        if isinstance(values, dict) and name in values:
            values[name] = _each(os.path.expanduser, values[name])
    config, tables = _convert(source)
    for check, needs in CHECKS.items():
        for key, message in check(config) if needs <= set(tables) else ():
            source.error(tuple(key.split(".")), message)
    source.raise_errors()
    return _absolute(config)


def read_saved(path: Path) -> Config:
    """Read a run's configuration without checking it: what it names may have moved, and devices differ."""
    return _absolute(_convert(toml.read(path))[0])


def _convert(source: toml.Source) -> tuple[Config, Collection[str]]:
    """Return the configuration, with None for each wrong table, and the names of the right ones."""
    tables = strict.convert(Config, source.data, (), source)
    if "method" in tables:
        used = tables["method"].uses
        tables |= {table: OPTIONAL_TABLES[table]() for table in used if tables.get(table, "wrong") is None}
    return Config(**{f.name: None for f in fields(Config)} | tables), tables.keys()  # type: ignore[arg-type]


def _absolute(config: Config) -> Config:
    changed: dict[str, Any] = {}
    for table, name in (key.split(".") for key in PATHS):
        values = changed.get(table) or getattr(config, table)
        if values is not None:
            changed[table] = replace(values, **{name: _each(_from_here, getattr(values, name))})
    return replace(config, **changed)


def paths_of(config: Config) -> Iterator[tuple[str, str]]:
    """Yield every path in a configuration with the key that names it."""
    for key in PATHS:
        table, name = key.split(".")
        settings = getattr(config, table)
        value = None if settings is None else getattr(settings, name)
        values = value if isinstance(value, tuple) else (value,)
        yield from ((key, each) for each in values if isinstance(each, str) and each not in WORDS)


def _from_here(path: str) -> str:
    return str(Path(path).absolute())  # links and `..` stay as they are


def _each(change: Callable[[str], str], value: Any) -> Any:
    """Change a path, or each of a list of paths; what is neither stays as it is."""
    if isinstance(value, list | tuple):
        return type(value)(_each(change, each) for each in value)
    return change(value) if isinstance(value, str) and value not in WORDS else value


def dump(config: Config) -> str:
    """Return the resolved configuration as TOML that `load` reads back to the same Config."""
    return strict.dump(config)


# What no table can see alone. A check may meet values out of their range, as all errors come at once.


def _check_unused(config: Config) -> Problems:
    method = config.method
    for table in ("teacher", "critic", "rollout"):
        if getattr(config, table) is not None and table not in (*method.uses, *method.roles):
            yield table, f"method '{method.name}' does not use it; remove the table"
    if "ema" in method.roles.values() and config.ema is None:
        yield "ema", f"method '{method.name}' follows the student's average; add the table [ema] with a decay"


def _check_optim(config: Config) -> Problems:
    name = config.method.name
    trained = [role for role in TRAINABLE if role in config.method.roles]
    for role in trained:
        if role not in config.optim:
            yield f"optim.{role}", f"method '{name}' trains the {role}; add the table [optim.{role}] with lr"
    for role in config.optim:
        if role not in trained:
            yield (
                f"optim.{role}",
                f"method '{name}' trains the {' and the '.join(trained)} only; remove the table",
            )


def _check_weights(config: Config) -> Problems:
    roles, component = config.method.roles, config.family.component
    if config.model.scratch:
        key, _ = config.model.scratch
        if "teacher" in roles:
            yield key, f"method '{config.method.name}' starts from a teacher; give model.path instead"
        if config.student.path:
            yield "student.path", f"the student has random weights by {key}; keep one of the two"
        return
    what = f"a diffusers folder (the one above {component}/)"
    sources = [(role, *config.role_source(role)) for role, how in roles.items() if how != "heads"]
    sources.append(("run", "model.path", config.model.path))  # its other parts are read in any case
    for role, key, path in sources:
        if path is None:
            yield key, f"missing; the {role} needs weights: name {what}"
        elif not (Path(path) / component / "config.json").is_file():
            yield key, f"{path!r} has no {component}/config.json; name {what}"
        else:
            try:
                config.family.read_config(Path(path))
            except ValueError as e:
                yield key, str(e)


def _check_family(config: Config) -> Problems:
    """Check the tables of one family against the family."""
    if config.model.family == "wan2.1":
        if config.schedule is None:
            yield (
                "schedule",
                "missing; a flow model needs it: add the table [schedule] with flow_shift, e.g. 5.0",
            )
        if config.data.frames is None:
            yield "data.frames", "missing; Wan makes videos: write frames = 81"
        if config.method.guidance_embedding:
            yield "method.guidance_embedding", "Wan has no guidance embedding; remove the key"
        return
    if config.rollout and config.rollout.grad_frames is not None:
        yield "rollout.grad_frames", "SDXL makes images, of one frame; remove the key"
    if config.schedule is not None:
        yield "schedule", "SDXL's noise is in its folder's scheduler/; remove the table"
    if config.data.frames is not None:
        yield "data.frames", "SDXL makes images; remove the key"
    for role, kind in vars(config.model.attention).items():
        if kind == "vsa":
            yield f"model.attention.{role}", "video sparse attention is Wan's; remove the key"
    if config.method.name == "dcm":
        yield "method.name", "'dcm' is for flow models such as Wan; use dmd, sid or lcm"
    if isinstance(config.method, Flow.Config) and config.method.frames_per_block is not None:
        yield "method.frames_per_block", "SDXL makes images, of one frame; remove the key"
    if config.rollout and config.rollout.mode == "causal":
        yield "rollout.mode", "'causal' makes videos block by block, and SDXL images; use 'bidirectional'"


def _check_noise(config: Config) -> Problems:
    """SDXL's folders against each other: all networks of a run are told the same noise."""
    if config.model.family != "sdxl":
        return
    noises: dict[str, sdxl_folder.Noise] = {}
    sources = {"model.path": config.model.path, **dict(map(config.role_source, config.method.roles))}
    for key, path in sources.items():
        folder = Path(path or "")
        if (
            path
            and (folder / config.family.component).is_dir()
            and (key == "model.path" or (folder / "scheduler").is_dir())
        ):
            try:
                noises[key] = sdxl_folder.read_noise(folder)
            except ValueError as e:
                yield key, str(e)
    ours = noises.get("model.path")
    for key, noise in noises.items():
        if ours and noise != ours:
            yield (
                key,
                f"its scheduler/ has {noise}, and that of model.path {ours}; "
                "name an SDXL with the same noise",
            )


def _check_lora(config: Config) -> Problems:
    if config.student.train == "lora" and config.lora is None:
        yield (
            "lora",
            "missing; student.train = 'lora' needs it: add the table [lora] with rank, alpha and targets",
        )
    if config.lora is not None and config.student.train != "lora":
        yield "lora", "no role uses it; set student.train = 'lora' too, or remove the table"


def _check_data(config: Config) -> Problems:
    """Check what the data gives against what the method and the networks take."""
    data, path, builtin = config.data, config.model.path, config.data.kind == "shapes"
    if builtin and path and (Path(path) / "text_encoder").is_dir():
        remedy = "name files with a prompt a line, or encoded folders"
        yield "data.sources", f"'shapes' has no text for the text_encoder/ of {path!r}; {remedy}"
        return
    needs_latents = config.method.needs_latents or (config.rollout and config.rollout.mode == "data")
    if data.kind == "prompts" and needs_latents and all(Path(source).is_file() for source in data.sources):
        remedy = "name encoded folders, or use dmd with rollout.mode = 'bidirectional' and gan_weight = 0"
        yield "data.sources", f"prompt files have no latents; {remedy}"
        return
    if not builtin and config.model.scratch:
        key, _ = config.model.scratch
        yield (
            key,
            "random weights have no text encoder and VAE, which this data needs; give model.path instead",
        )
        return
    parts = () if builtin or not path else config.family.frozen
    if absent := [part for part in parts if not (Path(path or "") / part).is_dir()]:
        yield (
            "model.path",
            f"{path!r} has no {', '.join(absent)}, which prompts need; name a whole diffusers folder",
        )
    (C, *latent), what = data.latent_shape(), "'shapes'" if builtin else "the VAE"
    needed = {"in_channels": (C, what), "out_channels": (C, what)}
    if (widths := _text_widths(config)) and tuple(widths) != config.family.told:
        has, told = (
            " and ".join(name.removesuffix("_dim") for name in names)
            for names in (widths, config.family.told)
        )
        yield (
            "data.sources",
            f"has {has} of prompts, and {config.model.family} is told {told}; encode it for this model",
        )
    else:
        needed |= {name: (width, what if builtin else "the data") for name, width in widths.items()}
    for key, net in _architectures(config):
        for name, (value, what) in needed.items():
            if (given := getattr(net, name)) != value:
                where = f"{key}.{name}" if config.model.scratch else key
                yield (
                    where,
                    f"{name} is {given}, and {what} needs {value}; use a network with {name} = {value}",
                )
        if len(latent) == len(net.grain):  # told by _check_family
            for name, n, grain in zip(config.family.latent_axes, latent, net.grain, strict=True):
                if grain > 0 and n % grain:
                    yield (
                        f"data.{name}",
                        f"{n} latents along one side are no multiple of patch {grain}; use more or fewer",
                    )


def _text_widths(config: Config) -> dict[str, int]:
    """Of prompts that the data has embedded already, by the keys of a network."""
    if config.data.kind == "shapes":
        return dict.fromkeys(config.family.told, shapes.TEXT_DIM)
    if config.data.kind == "encoded":
        with contextlib.suppress(ValueError):  # told by [data]
            folder, *_ = read_folders(config.data.sources, config.data.latent_shape())
            return {f"{key}_dim": shape[-1] for key, shape in folder.shapes.items() if key != "x0"}
    return {}


def _architectures(config: Config) -> Iterator[tuple[str, Any]]:
    """By the key that each comes from."""
    if config.model.scratch:
        yield config.model.scratch
        return
    for key, path in dict(map(config.role_source, config.method.roles)).items():
        with contextlib.suppress(ValueError, OSError):  # told by _check_weights
            yield key, config.family.read_config(Path(path or ""))


def _check_attention(config: Config) -> Problems:
    roles = config.method.roles
    sparse = [role for role, kind in vars(config.model.attention).items() if kind == "vsa"]
    for role in sparse:
        if role not in roles:
            yield f"model.attention.{role}", f"method '{config.method.name}' has no {role}; remove the key"
        elif config.vsa is None:
            yield (
                f"model.attention.{role}",
                "'vsa' needs the table [vsa] with a sparsity, e.g. vsa.sparsity = 0.8",
            )
        elif config.role_options(role).causal:
            yield f"model.attention.{role}", "a causal rollout has no sparse attention; set it to 'dense'"
    if config.vsa is not None and not sparse:
        yield "vsa", "no role uses it; set model.attention.student = 'vsa' too, or remove the table"


def _check_frames(config: Config) -> Problems:
    rollout, frames = config.rollout or RolloutConfig(), config.data.latent_frames()
    first = int(rollout.independent_first_frame)
    yield from _uneven_blocks(config.data, "rollout.frames_per_block", rollout.frames_per_block, first)
    if (kept := rollout.grad_frames) and frames > 0 and kept > frames:
        yield "rollout.grad_frames", f"{kept} is over the {frames} latent frames; use at most {frames}"


def _check_flow_blocks(config: Config) -> Problems:
    if not isinstance(config.method, Flow.Config) or config.method.frames_per_block is None:
        return
    yield from _uneven_blocks(config.data, "method.frames_per_block", config.method.frames_per_block, 0)
    if config.validation.teacher_guidance not in (None, 1):
        yield "validation.teacher_guidance", "a causal flow model is sampled without guidance; remove the key"


def _uneven_blocks(data: DataConfig, key: str, block: int | None, first: int) -> Problems:
    """Latent frames that are not `first` and a multiple of the block."""
    frames = data.latent_frames()
    if block and block > 0 and frames > 0 and (frames - first) % block:
        below = frames - (frames - first) % block
        near = [data.frames_for(n) for n in (below, below + block) if n > 0]
        yield (
            "data.frames",
            f"{data.frames} gives {frames} latent frames, not {'1 + ' * first}a multiple of {key} = {block}; "
            f"nearest: {' or '.join(map(str, near))}",
        )


def _check_prompts(config: Config) -> Problems:
    known = shapes.captions(config.data.latent_frames())
    for prompt in config.validation.prompts if config.data.kind == "shapes" else ():
        if prompt not in known:
            close = strict.closest(prompt, known) or known[0]
            yield "validation.prompts", f"{prompt!r} is not a caption of 'shapes'; e.g. {close!r}"


CHECKS: dict[Callable[[Config], Problems], set[str]] = {  # by the tables that each reads
    _check_family: {"method", "model", "schedule", "data", "rollout"},
    _check_noise: {"method", "model", "student", "teacher", "critic"},
    _check_lora: {"student", "lora"},
    _check_unused: {"method", "teacher", "critic", "rollout", "ema"},
    _check_optim: {"method", "optim"},
    _check_weights: {"method", "model", "student", "teacher", "critic"},
    _check_data: {"method", "model", "student", "teacher", "critic", "rollout", "data"},
    _check_attention: {"method", "model", "vsa", "rollout"},
    _check_frames: {"data", "rollout"},
    _check_flow_blocks: {"method", "data", "validation"},
    _check_prompts: {"data", "validation"},
}
