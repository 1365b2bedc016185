"""The configuration of a run: one complete TOML, a frozen dataclass for each table, each where it is used."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union

from fastdmd import shapes, strict, toml
from fastdmd.checkpoint import Config as CheckpointConfig
from fastdmd.data import Config as DataConfig
from fastdmd.encoded import read_folders
from fastdmd.log import Config as LogConfig
from fastdmd.methods import METHODS, Method
from fastdmd.methods.flow import Flow
from fastdmd.methods.method import TRAINABLE
from fastdmd.methods.score_distillation import CriticConfig
from fastdmd.models import sdxl_folder
from fastdmd.models.family import FAMILIES, Family, Options
from fastdmd.models.lora import LoraConfig
from fastdmd.models.sdxl import SDXLConfig
from fastdmd.models.wan import VSAConfig, WanConfig
from fastdmd.optim import Config as OptimConfig
from fastdmd.optim import EMAConfig
from fastdmd.precision import Config as PrecisionConfig
from fastdmd.precision import present
from fastdmd.rollout import Config as RolloutConfig
from fastdmd.schedule import FlowSchedule, Schedule
from fastdmd.toml import ConfigError
from fastdmd.validate import Config as ValidationConfig

__all__ = ["Config", "ConfigError", "dump", "load"]

if TYPE_CHECKING:
    MethodConfig = Any
    OptimTables = Mapping[str, OptimConfig]
else:
    # [method] is the table of the method that it names, and [optim.ROLE] that of a role that some method trains
    MethodConfig = Union[tuple(method.Config for method in METHODS.values())]  # noqa: UP007
    OptimTables = dict[Literal[TRAINABLE], OptimConfig]

OPTIONAL_TABLES = {"critic": CriticConfig, "rollout": RolloutConfig}
Problems = Iterator[tuple[str, str]]  # (key, what is wrong with it and what to do)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    output_dir: str
    max_steps: int
    batch_size: int  # of a micro-batch
    seed: int = 0
    grad_accum: int = 1
    device: str = "auto"  # CUDA or ROCm, then MPS, then CPU; or a torch device

    def problems(self) -> Problems:
        for key in ("max_steps", "batch_size", "grad_accum"):
            if getattr(self, key) < 1:
                yield key, f"{getattr(self, key)} is not positive; use 1 or more"
        if not 0 <= self.seed < 2**63:
            yield "seed", f"{self.seed} leaves [0, 2^63); e.g. 0"
        if any(p.exists() and not p.is_dir() for p in (Path(self.output_dir), *Path(self.output_dir).parents)):
            yield "output_dir", f"{self.output_dir!r} is a file, or below one; name a folder"
        if self.device != "auto" and self.device not in present():
            yield "device", f"{self.device!r} is not on this machine; use {' or '.join(['auto', *present()])}"


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Self-attention of each role."""

    student: Literal["dense", "vsa"] = "dense"
    teacher: Literal["dense", "vsa"] = "dense"
    critic: Literal["dense", "vsa"] = "dense"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    family: Literal["wan2.1", "sdxl"]
    path: str | None = None  # a diffusers folder with transformer/, SDXL's with unet/
    architecture: WanConfig | None = None  # in place of a path: random weights, method flow
    unet: SDXLConfig | None = None  # the same for SDXL
    attention: AttentionConfig = field(default_factory=AttentionConfig)

    @property
    def scratch(self) -> tuple[str, Any] | None:
        """The key and the architecture of random weights, if any."""
        key = "architecture" if self.family == "wan2.1" else "unet"
        return None if getattr(self, key) is None else (f"model.{key}", getattr(self, key))

    def problems(self) -> Problems:
        other, meant = ("unet", "architecture") if self.family == "wan2.1" else ("architecture", "unet")
        if getattr(self, other) is not None:
            yield other, f"family '{self.family}' does not use it; write model.{meant}, or change the family"
        if self.path and getattr(self, meant) is not None:
            yield meant, "model.path has an architecture already; keep one of the two"


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    train: Literal["full", "lora"] = "full"


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    path: str


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    flow_shift: float

    def problems(self) -> Problems:
        if self.flow_shift <= 0:
            yield "flow_shift", f"{self.flow_shift} is not positive; Wan 2.1 uses 3 or 5, and 1 is off"


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    checkpointing: Literal["none", "full"] = "none"


@dataclass(frozen=True, kw_only=True)
class Config:
    run: RunConfig
    model: ModelConfig
    method: MethodConfig
    data: DataConfig
    schedule: ScheduleConfig | None = None  # of flow models; SDXL's noise is in its folder
    optim: OptimTables = field(default_factory=dict)
    student: StudentConfig = field(default_factory=StudentConfig)
    lora: LoraConfig | None = None
    teacher: TeacherConfig | None = None
    vsa: VSAConfig | None = None
    critic: CriticConfig | None = None  # here and below: filled in when the method uses it
    rollout: RolloutConfig | None = None
    ema: EMAConfig | None = None
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    logging: LogConfig = field(default_factory=LogConfig)

    def make_method(self) -> Method:
        """The objective, with the tables that it uses."""
        tables = {table: getattr(self, table) for table in self.method.uses}
        return METHODS[self.method.name](self.method, self.make_schedule(), **tables)

    @property
    def family(self) -> Family:
        return FAMILIES[self.model.family]

    def make_schedule(self) -> Schedule:
        if self.schedule is not None:
            return FlowSchedule(self.schedule.flow_shift)
        return sdxl_folder.make_schedule(Path(self.model.path) if self.model.path else None)

    def role_source(self, role: str) -> tuple[str, str | None]:
        """The key that a role's weights come from, and the diffusers folder that it names."""
        if role == "teacher" and self.teacher:
            return "teacher.path", self.teacher.path
        if role == "critic" and self.critic and self.critic.path:
            return "critic.path", self.critic.path
        return "model.path", self.model.path

    def role_options(self, role: str) -> Options:
        """What a role's network has beside its weights."""
        like = "student" if role in ("target", "semantic") else role  # its average, and the student of another run
        sparse = self.vsa is not None and vars(self.model.attention).get(like) == "vsa"
        rolls = self.rollout is not None and self.rollout.mode == "causal"
        rolls = rolls or (isinstance(self.method, Flow.Config) and self.method.frames_per_block is not None)
        return Options(
            tile=self.vsa.tile if self.vsa and sparse else None,
            causal=rolls and like == "student",
            guidance_embedding=like == "student" and self.method.guidance_embedding,
        )

    def role_lora(self, role: str) -> LoraConfig | None:
        """The adapters that a role trains in place of its own weights."""
        return self.lora if role in ("student", "target") and self.student.train == "lora" else None

    def role_path(self, role: str) -> str | None:
        return self.role_source(role)[1]


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read and check a whole configuration; ConfigError with all that is wrong. No weight is touched."""
    source = toml.read(Path(path), overrides)
    tables = strict.convert(Config, source.data, (), source)
    if "method" in tables:
        used = tables["method"].uses
        tables |= {table: OPTIONAL_TABLES[table]() for table in used if tables.get(table, "wrong") is None}
    config = Config(**{f.name: None for f in fields(Config)} | tables)  # type: ignore[arg-type]
    for check, needs in CHECKS.items():
        for key, message in check(config) if needs <= tables.keys() else ():
            source.error(tuple(key.split(".")), message)
    source.raise_errors()
    return config


def dump(config: Config) -> str:
    """The resolved configuration as TOML that `load` reads back to the same Config."""
    return strict.dump(config)


# What no table can see alone. A check may meet values that are out of their range, as every error is told at once.


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
            yield f"optim.{role}", f"method '{name}' trains the {' and the '.join(trained)} only; remove the table"


def _check_weights(config: Config) -> Problems:
    roles, component = config.method.roles, config.family.component
    if config.model.scratch:
        if "teacher" in roles:
            key, _ = config.model.scratch
            yield key, f"method '{config.method.name}' starts from a teacher; give model.path instead"
        return
    what = f"a diffusers folder (the one above {component}/)"
    for role, how in roles.items():
        key, path = config.role_source(role)
        if how == "heads":
            continue
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
    """The tables of one family against the family."""
    if config.model.family == "wan2.1":
        if config.schedule is None:
            yield "schedule", "missing; a flow model needs it: add the table [schedule] with flow_shift, e.g. 5.0"
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
    for key, path in dict(map(config.role_source, config.method.roles)).items():
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
            yield key, f"its scheduler/ has {noise}, and that of model.path {ours}; name an SDXL with the same noise"


def _check_lora(config: Config) -> Problems:
    if config.student.train == "lora" and config.lora is None:
        yield "lora", "missing; student.train = 'lora' needs it: add the table [lora] with rank, alpha and targets"
    if config.lora is not None and config.student.train != "lora":
        yield "lora", "no role uses it; set student.train = 'lora' too, or remove the table"


def _check_data(config: Config) -> Problems:
    """What the data gives against what the method and the networks take."""
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
        yield key, "random weights have no text encoder and VAE, which this data needs; give model.path instead"
        return
    parts = () if builtin or not path else config.family.frozen
    if absent := [part for part in parts if not (Path(path or "") / part).is_dir()]:
        yield "model.path", f"{path!r} has no {', '.join(absent)}, which prompts need; name a whole diffusers folder"
    (C, *latent), what = data.latent_shape(), "'shapes'" if builtin else "the VAE"
    needed = {"in_channels": (C, what), "out_channels": (C, what)}
    if (widths := _text_widths(config)) and tuple(widths) != config.family.told:
        has, told = (
            " and ".join(name.removesuffix("_dim") for name in names) for names in (widths, config.family.told)
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
                yield where, f"{name} is {given}, and {what} needs {value}; use a network with {name} = {value}"
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
            yield f"model.attention.{role}", "'vsa' needs the table [vsa] with a sparsity, e.g. vsa.sparsity = 0.8"
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
    _check_noise: {"method", "model", "teacher", "critic"},
    _check_lora: {"student", "lora"},
    _check_unused: {"method", "teacher", "critic", "rollout", "ema"},
    _check_optim: {"method", "optim"},
    _check_weights: {"method", "model", "teacher", "critic"},
    _check_data: {"method", "model", "teacher", "critic", "rollout", "data"},
    _check_attention: {"method", "model", "vsa", "rollout"},
    _check_frames: {"data", "rollout"},
    _check_flow_blocks: {"method", "data", "validation"},
    _check_prompts: {"data", "validation"},
}
