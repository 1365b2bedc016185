"""The configuration of a run: one complete TOML, a frozen dataclass for each table, each where it is used."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union

from fastdmd import shapes, strict, toml
from fastdmd.checkpoint import Config as CheckpointConfig
from fastdmd.data import Config as DataConfig
from fastdmd.log import Config as LogConfig
from fastdmd.methods import METHODS, Method
from fastdmd.methods.method import TRAINABLE
from fastdmd.methods.score_distillation import CriticConfig
from fastdmd.models import folder
from fastdmd.models.wan import VSAConfig, WanConfig
from fastdmd.optim import Config as OptimConfig
from fastdmd.optim import EMAConfig
from fastdmd.precision import Config as PrecisionConfig
from fastdmd.precision import present
from fastdmd.rollout import Config as RolloutConfig
from fastdmd.schedule import FlowSchedule, Schedule
from fastdmd.toml import ConfigError
from fastdmd.validate import Config as ValidationConfig
from fastdmd_kernels.tiles import Grid

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
    family: Literal["wan2.1"]
    path: str | None = None  # a diffusers folder with transformer/
    architecture: WanConfig | None = None  # in place of a path: random weights, method flow
    attention: AttentionConfig = field(default_factory=AttentionConfig)

    def problems(self) -> Problems:
        for name, value in vars(self.architecture).items() if self.architecture else ():
            least = min(value) if isinstance(value, tuple) else value
            if least <= 0 and value is not False:
                yield f"architecture.{name}", f"{strict.show(value)} is not positive; use 1 or more"
            elif name in ("attention_head_dim", "freq_dim") and least % 2:
                yield f"architecture.{name}", f"{least} is odd; use {least + 1}, as channels turn in pairs"


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
    schedule: ScheduleConfig
    method: MethodConfig
    data: DataConfig
    optim: OptimTables = field(default_factory=dict)
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

    def make_schedule(self) -> Schedule:
        return FlowSchedule(self.schedule.flow_shift)

    def role_source(self, role: str) -> tuple[str, str | None]:
        """The key that a role's weights come from, and the diffusers folder that it names."""
        if role == "teacher" and self.teacher:
            return "teacher.path", self.teacher.path
        if role == "critic" and self.critic and self.critic.path:
            return "critic.path", self.critic.path
        return "model.path", self.model.path

    def role_tile(self, role: str) -> Grid | None:
        """The tile of a role's sparse attention; None when it is dense."""
        like = "student" if role in ("target", "semantic") else role  # its average, and the student of another run
        return self.vsa.tile if self.vsa and vars(self.model.attention).get(like) == "vsa" else None

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
    roles = config.method.roles
    if config.model.architecture:
        if config.model.path:
            yield "model.architecture", "model.path has an architecture already; keep one of the two"
        elif "teacher" in roles:
            yield "model.architecture", f"method '{config.method.name}' starts from a teacher; give model.path instead"
        return
    what = "a diffusers folder (the one above transformer/)"
    for role in roles:
        key, path = config.role_source(role)
        if path is None:
            yield key, f"missing; the {role} needs weights: name {what}"
        elif not (Path(path) / "transformer" / "config.json").is_file():
            yield key, f"{path!r} has no transformer/config.json; name {what}"
        else:
            try:
                folder.read_config(Path(path))
            except ValueError as e:
                yield key, str(e)


def _check_data(config: Config) -> Problems:
    """What the data gives against what the method and the networks take."""
    data, path = config.data, config.model.path
    if data.builtin and path and (Path(path) / "text_encoder").is_dir():
        yield "data.sources", f"'shapes' has no text for the text_encoder/ of {path!r}; name files with a prompt a line"
        return
    if not data.builtin and (config.method.needs_latents or (config.rollout and config.rollout.mode == "data")):
        remedy = "use 'shapes', or dmd with rollout.mode = 'bidirectional' and gan_weight = 0"
        yield "data.sources", f"prompt files have no latents; {remedy}"
        return
    parts = () if data.builtin or not path else ("text_encoder", "tokenizer", "vae")
    if absent := [part for part in parts if not (Path(path or "") / part).is_dir()]:
        yield "model.path", f"{path!r} has no {', '.join(absent)}, which prompts need; name a whole diffusers folder"
    (C, *latent), what = data.latent_shape(), "'shapes'" if data.builtin else "the VAE"
    needed = {"in_channels": C, "out_channels": C} | ({"text_dim": shapes.TEXT_DIM} if data.builtin else {})
    for key, net in _architectures(config):
        for name, value in needed.items():
            if (given := getattr(net, name)) != value:
                where = f"{key}.{name}" if key == "model.architecture" else key
                yield where, f"{name} is {given}, and {what} needs {value}; use a network with {name} = {value}"
        for name, n, patch in zip(("frames", "resolution", "resolution"), latent, net.patch_size, strict=True):
            if patch > 0 and n % patch:
                yield f"data.{name}", f"{n} latents along one side are no multiple of patch {patch}; use more or fewer"


def _architectures(config: Config) -> Iterator[tuple[str, WanConfig]]:
    """By the key that each comes from."""
    if config.model.architecture:
        yield "model.architecture", config.model.architecture
        return
    for key, path in dict(map(config.role_source, config.method.roles)).items():
        with contextlib.suppress(ValueError, OSError):  # told by _check_weights
            yield key, folder.read_config(Path(path or ""))


def _check_attention(config: Config) -> Problems:
    roles = config.method.roles
    sparse = [role for role, kind in vars(config.model.attention).items() if kind == "vsa"]
    for role in sparse:
        if role not in roles:
            yield f"model.attention.{role}", f"method '{config.method.name}' has no {role}; remove the key"
        elif config.vsa is None:
            yield f"model.attention.{role}", "'vsa' needs the table [vsa] with a sparsity, e.g. vsa.sparsity = 0.8"
    if config.vsa is not None and not sparse:
        yield "vsa", "no role uses it; set model.attention.student = 'vsa' too, or remove the table"


def _check_frames(config: Config) -> Problems:
    rollout, data, frames = config.rollout or RolloutConfig(), config.data, config.data.latent_frames()
    block, kept = rollout.frames_per_block, rollout.grad_frames
    if block and block > 0 and frames % block:
        near = [data.frames_for(n) for n in (frames // block * block, (frames // block + 1) * block) if n > 0]
        yield (
            "data.frames",
            f"{data.frames} gives {frames} latent frames, not a multiple of rollout.frames_per_block = {block}; "
            f"nearest: {' or '.join(map(str, near))}",
        )
    if kept and frames > 0 and kept > frames:
        yield "rollout.grad_frames", f"{kept} is over the {frames} latent frames; use at most {frames}"


def _check_prompts(config: Config) -> Problems:
    for prompt in config.validation.prompts if config.data.builtin else ():
        if prompt not in shapes.CAPTIONS:
            close = strict.closest(prompt, shapes.CAPTIONS) or shapes.CAPTIONS[0]
            yield "validation.prompts", f"{prompt!r} is not a caption of 'shapes'; e.g. {close!r}"


CHECKS: dict[Callable[[Config], Problems], set[str]] = {  # by the tables that each reads
    _check_unused: {"method", "teacher", "critic", "rollout", "ema"},
    _check_optim: {"method", "optim"},
    _check_weights: {"method", "model", "teacher", "critic"},
    _check_data: {"method", "model", "teacher", "critic", "rollout", "data"},
    _check_attention: {"method", "model", "vsa"},
    _check_frames: {"data", "rollout"},
    _check_prompts: {"data", "validation"},
}
