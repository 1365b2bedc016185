"""The configuration of a run: one complete TOML, one frozen dataclass a table, each defined in the module that uses it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union

from fastdmd import strict
from fastdmd.checkpoint import Config as CheckpointConfig
from fastdmd.data import Config as DataConfig
from fastdmd.log import Config as LogConfig
from fastdmd.methods import METHODS
from fastdmd.methods.score_distillation import CriticConfig
from fastdmd.models.wan import WanConfig
from fastdmd.optim import Config as OptimConfig
from fastdmd.optim import EMAConfig
from fastdmd.precision import Config as PrecisionConfig
from fastdmd.rollout import Config as RolloutConfig
from fastdmd.strict import ConfigError
from fastdmd.validate import Config as ValidationConfig

__all__ = ["Config", "ConfigError", "dump", "load"]

# [method] is the table of the method that it names
MethodConfig = Any if TYPE_CHECKING else Union[tuple(method.Config for method in METHODS.values())]  # noqa: UP007


OPTIONAL_TABLES = {"critic": CriticConfig, "rollout": RolloutConfig}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    output_dir: str
    max_steps: int
    batch_size: int  # of a micro-batch
    seed: int = 0
    grad_accum: int = 1
    device: str = "auto"  # CUDA or ROCm, then MPS, then CPU; or a torch device

    def problems(self) -> Iterator[tuple[str, str]]:
        for key in ("max_steps", "batch_size", "grad_accum"):
            if getattr(self, key) < 1:
                yield key, f"{getattr(self, key)} is not positive; use 1 or more"
        if self.device.split(":")[0] not in ("auto", "cuda", "mps", "cpu"):
            yield "device", f"'{self.device}' is not one of auto, cuda, mps, cpu; ROCm is cuda to torch"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    family: Literal["wan2.1"]
    path: str | None = None  # a diffusers folder with transformer/
    architecture: WanConfig | None = None  # in place of a path: random weights, method flow


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    path: str


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    flow_shift: float

    def problems(self) -> Iterator[tuple[str, str]]:
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
    optim: dict[str, OptimConfig]
    data: DataConfig
    teacher: TeacherConfig | None = None
    critic: CriticConfig | None = None  # here and below: filled in when the method uses it
    rollout: RolloutConfig | None = None
    ema: EMAConfig | None = None
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    logging: LogConfig = field(default_factory=LogConfig)

    def role_path(self, role: str) -> str | None:
        """The diffusers folder a role's weights come from."""
        if role == "teacher" and self.teacher:
            return self.teacher.path
        if role == "critic" and self.critic and self.critic.path:
            return self.critic.path
        return self.model.path


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read and check a whole configuration; ConfigError with all that is wrong. No weight is touched."""
    source = strict.read(Path(path), overrides)
    config = strict.build(Config, source.data, (), source)
    if config is not None and not source.errors:
        absent = [table for table in METHODS[config.method.name].uses if getattr(config, table) is None]
        config = replace(config, **{table: OPTIONAL_TABLES[table]() for table in absent})
        for key, message in _cross_checks(config, source.data):
            source.error(tuple(key.split(".")), message)
    source.raise_errors()
    assert config is not None
    return config


def dump(config: Config) -> str:
    """The resolved configuration as TOML that `load` reads back to the same Config."""
    return strict.dump(config)


def _cross_checks(config: Config, given: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What no table can see alone."""
    name, method = config.method.name, METHODS[config.method.name]
    for table in ("critic", "rollout", "teacher"):
        if table in given and table not in (*method.uses, *method.roles):
            yield table, f"method '{name}' does not use it; remove the table"
    trained = [role for role, how in method.roles.items() if how == "train"]
    for role in trained:
        if role not in config.optim:
            yield f"optim.{role}", f"method '{name}' trains the {role}; add the table [optim.{role}] with lr"
    for role in config.optim:
        if role not in trained:
            yield f"optim.{role}", f"method '{name}' trains {', '.join(trained)} only; remove the table"
    yield from _check_weights(config)
    yield from _check_data(config)


def _check_weights(config: Config) -> Iterator[tuple[str, str]]:
    method = METHODS[config.method.name]
    if config.model.architecture:
        if config.model.path:
            yield "model.architecture", "model.path has an architecture already; keep one of the two"
        if "teacher" in method.roles:
            yield "model.architecture", f"method '{config.method.name}' starts from a teacher; give model.path instead"
        return
    for role in method.roles:
        key = "teacher.path" if role == "teacher" and config.teacher else "model.path"
        key = "critic.path" if role == "critic" and config.critic and config.critic.path else key
        path = config.role_path(role)
        if path is None:
            yield (
                "model.path",
                f"missing; the {role} needs weights: name a diffusers folder (the one above transformer/)",
            )
            return
        if not (Path(path) / "transformer" / "config.json").is_file():
            yield key, f"'{path}' has no transformer/config.json; name a diffusers folder (the one above transformer/)"
            return


def _check_data(config: Config) -> Iterator[tuple[str, str]]:
    rollout, frames = config.rollout or RolloutConfig(), config.data.latent_frames()
    if config.data.builtin and config.model.path and (Path(config.model.path) / "text_encoder").exists():
        yield (
            "data.sources",
            "'shapes' has its own tiny text embedding; name prompt files for a model with a text_encoder/",
        )
    if not config.data.builtin:
        if config.method.name == "flow" or rollout.mode == "data":
            yield (
                "data.sources",
                "prompt files have no latents; use 'shapes', or rollout.mode = 'bidirectional' with dmd",
            )
        for part in ("text_encoder", "tokenizer", "vae"):
            if config.model.path and not (Path(config.model.path) / part).is_dir():
                yield (
                    "model.path",
                    f"'{config.model.path}' has no {part}/, which prompts need; name a whole diffusers folder",
                )
    block = rollout.frames_per_block
    if block and block > 0 and frames % block:
        low = config.data.frames_for(frames // block * block)
        high = config.data.frames_for((frames // block + 1) * block)
        yield (
            "data.frames",
            (
                f"{config.data.frames} gives {frames} latent frames, not a multiple of rollout.frames_per_block = {block}; "
                f"nearest: {low} or {high}"
            ),
        )
    if rollout.grad_frames and rollout.grad_frames > frames:
        yield "rollout.grad_frames", f"{rollout.grad_frames} is over the {frames} latent frames; use at most {frames}"
