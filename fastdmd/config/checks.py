"""What no table of a configuration can see alone: each check reads several.

A check may meet values out of their range, as all errors come at once.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastdmd import adamw8bit
from fastdmd.config import strict
from fastdmd.config.schema import Config
from fastdmd.data import shapes
from fastdmd.data.encoded import read_folders
from fastdmd.methods import METHODS
from fastdmd.methods.method import TRAINABLE
from fastdmd.models.attention import VSAConfig
from fastdmd.models.family import Problems
from fastdmd.rollout import Config as RolloutConfig

SCRATCH = "model.architecture"  # the key of random weights


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
    if config.model.architecture is not None:
        if "teacher" in roles:
            yield SCRATCH, f"method '{config.method.name}' starts from a teacher; give model.path instead"
        if config.student.path:
            yield "student.path", f"the student has random weights by {SCRATCH}; keep one of the two"
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


def _check_schedule(config: Config) -> Problems:
    family, name = config.family, config.model.family
    if family.is_flow and config.schedule is None:
        yield (
            "schedule",
            "missing; a flow model needs it: add the table [schedule] with flow_shift, e.g. 5.0",
        )
    if not family.is_flow and config.schedule is not None:
        yield "schedule", f"the noise of '{name}' is in its folder's scheduler/; remove the table"
    if not family.is_flow and config.method.flow_only:
        others = " or ".join(other for other, method in METHODS.items() if not method.Config.flow_only)
        yield "method.name", f"'{config.method.name}' is for flow models, and '{name}' is none; use {others}"


def _check_options(config: Config) -> Problems:
    """Check what each role asks of its network against what the family has."""
    method, roles = config.method, config.method.roles
    sparse = [role for role, kind in vars(config.model.attention).items() if kind == "vsa"]
    blocks = "method.frames_per_block" if method.frames_per_block is not None else "rollout.mode"
    keys = {"causal": blocks, "guidance_embedding": "method.guidance_embedding"}
    refused: dict[str, str] = {}
    for role in {**roles, **dict.fromkeys(sparse)}:
        options = config.role_options(role)
        if role in sparse:
            options = replace(options, tile=(config.vsa or VSAConfig(sparsity=0)).tile)
        for option, message in config.family.refuses(options):
            refused[keys.get(option, f"model.attention.{role}")] = message
    yield from refused.items()
    for role in sparse:
        key = f"model.attention.{role}"
        if role not in roles:
            yield key, f"method '{method.name}' has no {role}; remove the key"
        elif config.vsa is None and key not in refused:
            yield key, "'vsa' needs the table [vsa] with a sparsity, e.g. vsa.sparsity = 0.8"
    if config.vsa is not None and not sparse:
        yield "vsa", "no role uses it; set model.attention.student = 'vsa' too, or remove the table"


def problems_of_memory(config: Config) -> Problems:
    """Yield what of [memory] the networks of a run have no form for."""
    for key, message in config.family.refuses_memory(config.memory):
        yield f"memory.{key}", message
    trains = [role for role in TRAINABLE if role in config.method.roles and not config.role_lora(role)]
    frozen = [role for role, how in config.method.roles.items() if how == "frozen"]
    if config.memory.stream_base and not frozen and trains:
        yield (
            "memory.stream_base",
            "every network is trained whole; set student.train = 'lora', or remove the key",
        )


def problems_of_precision(config: Config) -> Problems:
    """Yield what of [precision] has no effect."""
    roles = config.method.roles.items()
    shared = [role for role, how in roles if how == "frozen" or config.role_lora(role)]
    if config.precision.frozen != "compute" and not shared:
        yield (
            "precision.frozen",
            "every network is trained whole; set student.train = 'lora', or remove the key",
        )
    if config.precision.text_encoder != "compute" and config.data.kind == "shapes":
        yield (
            "precision.text_encoder",
            "the captions of 'shapes' are embedded without a text encoder; remove the key",
        )
    coded = [role for role, table in config.optim.items() if table and table.name == "adamw8bit"]
    if config.precision.master == "bf16-sr" and coded:
        yield (
            f"optim.{coded[0]}.name",
            "'adamw8bit' is for float32 masters; use 'adamw', or remove precision.master",
        )


def problems_of_compile(config: Config) -> Problems:
    """Yield what of other tables 'step' has no graph for."""
    memory, rollout = config.memory, config.rollout or RolloutConfig()
    if config.compile.mode != "step":
        return
    for key, off in (("offload", "none"), ("stream_base", False)):
        if getattr(memory, key) != off:
            yield (
                "compile.mode",
                f"'step' is one graph, which moves nothing to the host; use 'blocks', or no {key}",
            )
    if memory.checkpointing != "none":  # torch takes attention for random, as it could drop out
        yield "compile.mode", "'step' computes nothing anew; use 'blocks', or memory.checkpointing = 'none'"
    if rollout.mode == "causal" and not rollout.shared_exit_step:
        yield (
            "compile.mode",
            "'step' has a graph for each choice of exits; use 'blocks', or rollout.shared_exit_step",
        )


def _check_folders(config: Config) -> Problems:
    """Check the folders of a run beside each other."""
    sources = {"model.path": config.model.path, **dict(map(config.role_source, config.method.roles))}
    folders = {key: Path(path) for key, path in sources.items() if path}
    there = {key: folder for key, folder in folders.items() if (folder / config.family.component).is_dir()}
    yield from config.family.folder_problems(there)


def _check_lora(config: Config) -> Problems:
    takes = [role for role in ("student", "critic") if (own := getattr(config, role)) and own.train == "lora"]
    if takes and config.lora is None:
        yield (
            "lora",
            f"missing; {takes[0]}.train = 'lora' needs it: add the table [lora] with rank, alpha and targets",
        )
    if config.lora is not None and not takes:
        yield "lora", "no role uses it; set student.train = 'lora' too, or remove the table"
    if config.lora is not None and config.lora.path:
        if "student" not in takes:
            yield "lora.path", "the student has no adapters; set student.train = 'lora', or remove the key"
        elif not Path(config.lora.path).is_file():
            yield "lora.path", f"{config.lora.path!r} is no file; name a .safetensors file of adapters"


def _check_data(config: Config) -> Problems:
    """Check what the data gives against what the method and the networks take."""
    data = config.data
    path = config.model.path
    builtin = config.data.kind == "shapes"
    if builtin and path and (Path(path) / "text_encoder").is_dir():
        remedy = "name files with one prompt per line, or encoded folders"
        yield "data.sources", f"'shapes' has no text for the text_encoder/ of {path!r}; {remedy}"
        return
    cause: str | None = config.method.needs_latents
    if cause is None and config.rollout and config.rollout.mode == "data":
        cause = "rollout.mode = 'data'"
    if data.kind == "prompts" and cause and all(Path(source).is_file() for source in data.sources):
        yield "data.sources", f"prompt files have no latents, which {cause} needs; name encoded folders"
        return
    if not builtin and config.model.architecture is not None:
        yield (
            SCRATCH,
            "random weights have no text encoder and VAE, which this data needs; give model.path instead",
        )
        return
    C, *latent = config.latent_shape()
    what = "'shapes'" if builtin else "the VAE"
    needed = {"in_channels": (C, what), "out_channels": (C, what)}
    widths, conditioning = _text_widths(config), config.family.conditioning
    if widths and tuple(widths) != conditioning:
        has, wanted = (
            " and ".join(name.removesuffix("_dim") for name in names) for names in (widths, conditioning)
        )
        yield (
            "data.sources",
            f"has {has} of prompts, and {config.model.family} is conditioned on {wanted}; "
            "encode it for this model",
        )
    else:
        needed |= {name: (width, what if builtin else "the data") for name, width in widths.items()}
    for key, net in _architectures(config):
        for name, (value, what) in needed.items():
            if (given := getattr(net, name)) != value:
                where = f"{key}.{name}" if key == SCRATCH else key
                yield (
                    where,
                    f"{name} is {given}, and {what} needs {value}; use a network with {name} = {value}",
                )
        for name, n, grain in zip(config.latents.keys, latent, net.grain, strict=True):
            if grain > 0 and n % grain:
                yield (
                    f"data.{name}",
                    f"{n} latents along one side are no multiple of patch {grain}; use more or fewer",
                )


def _check_parts(config: Config) -> Problems:
    """Check that the parts are there which encode prompts and decode latents."""
    path = config.model.path
    parts = () if config.data.kind == "shapes" or not path else config.family.frozen
    if absent := [part for part in parts if not (Path(path or "") / part).is_dir()]:
        yield (
            "model.path",
            f"{path!r} has no {', '.join(absent)}, which prompts need; name a whole diffusers folder",
        )


def _text_widths(config: Config) -> dict[str, int]:
    """Return the widths of prompts that the data has embedded already, by the keys of a network."""
    if config.data.kind == "shapes":
        return dict.fromkeys(config.family.conditioning, shapes.TEXT_DIM)
    if config.data.kind == "encoded":
        with contextlib.suppress(ValueError):  # _check_sizes yields it
            folder, *_ = read_folders(config.data.sources, config.latent_shape())
            return {f"{key}_dim": shape[-1] for key, shape in folder.shapes.items() if key != "x0"}
    return {}


def _architectures(config: Config) -> Iterator[tuple[str, Any]]:
    """Yield the architectures of a run by the keys that they come from."""
    if config.model.architecture is not None:
        yield SCRATCH, config.model.architecture
        return
    for key, path in dict(map(config.role_source, config.method.roles)).items():
        with contextlib.suppress(ValueError, OSError):  # _check_weights yields it
            yield key, config.family.read_config(Path(path or ""))


def _check_sizes(config: Config) -> Problems:
    for key, message in config.data.size_problems(config.latents):
        yield f"data.{key}", message


def _check_frames(config: Config) -> Problems:
    """Check frames of the rollout against those of a video."""
    rollout, frames = config.rollout or RolloutConfig(), config.latent_frames()
    first = int(rollout.independent_first_frame)
    yield from _uneven_blocks(config, "rollout.frames_per_block", rollout.frames_per_block, first)
    if rollout.grad_frames is None:
        return
    if config.latents.temporal is None:
        yield "rollout.grad_frames", "the model makes images, of one frame; remove the key"
    elif 0 < frames < rollout.grad_frames:
        yield (
            "rollout.grad_frames",
            f"{rollout.grad_frames} is over the {frames} latent frames; use at most {frames}",
        )


def _check_blocks(config: Config) -> Problems:
    """Check the blocks of a causal model of many steps."""
    block = config.method.frames_per_block
    yield from _uneven_blocks(config, "method.frames_per_block", block, 0)
    if block is not None and config.validation.teacher_guidance not in (None, 1):
        yield (
            "validation.teacher_guidance",
            "a causal model of many steps is sampled without guidance; remove the key",
        )


def _uneven_blocks(config: Config, key: str, block: int | None, first: int) -> Problems:
    """Yield latent frames that are not `first` and a multiple of the block."""
    frames = config.latent_frames()
    if block and block > 0 and frames > 0 and (frames - first) % block:
        below = frames - (frames - first) % block
        near = [config.latents.pixel_frames(n) for n in (below, below + block) if n > 0]
        yield (
            "data.frames",
            f"{config.data.frames} gives {frames} latent frames, not "
            f"{'1 + ' * first}a multiple of {key} = {block}; nearest: {' or '.join(map(str, near))}",
        )


def _check_packages(config: Config) -> Problems:
    for role, table in config.optim.items():  # a wrong table is None
        if table and table.name == "adamw8bit" and not adamw8bit.is_installed():
            yield f"optim.{role}.name", "'adamw8bit' needs torchao; pip install 'fastdmd[quant]'"


def _check_prompts(config: Config) -> Problems:
    known = shapes.captions(config.latent_frames())
    for prompt in config.validation.prompts if config.data.kind == "shapes" else ():
        if prompt not in known:
            close = strict.closest(prompt, known) or known[0]
            yield "validation.prompts", f"{prompt!r} is not a caption of 'shapes'; e.g. {close!r}"


CHECKS: dict[Callable[[Config], Problems], set[str]] = {  # by the tables that each reads
    _check_schedule: {"method", "model", "schedule"},
    _check_options: {"method", "model", "vsa", "rollout"},
    problems_of_memory: {"method", "model", "student", "critic", "lora", "memory"},
    problems_of_precision: {"method", "student", "critic", "lora", "optim", "data", "precision"},
    problems_of_compile: {"memory", "rollout", "compile"},
    _check_folders: {"method", "model", "student", "teacher", "critic"},
    _check_lora: {"student", "critic", "lora"},
    _check_unused: {"method", "teacher", "critic", "rollout", "ema"},
    _check_optim: {"method", "optim"},
    _check_weights: {"method", "model", "student", "teacher", "critic"},
    _check_sizes: {"model", "data"},
    _check_data: {"method", "model", "student", "teacher", "critic", "rollout", "data"},
    _check_parts: {"model", "data"},
    _check_packages: {"optim"},
    _check_frames: {"model", "data", "rollout"},
    _check_blocks: {"method", "model", "data", "validation"},
    _check_prompts: {"model", "data", "validation"},
}
OF_THIS_MACHINE = {_check_parts, _check_packages}
