"""The configuration of a run: one complete TOML, a frozen dataclass for each table, each where it is used."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union

from fastdmd.capture import Config as CompileConfig
from fastdmd.checkpoint import Config as CheckpointConfig
from fastdmd.data import shapes
from fastdmd.data.table import Config as DataConfig
from fastdmd.device import present
from fastdmd.evaluation.validate import Config as ValidationConfig
from fastdmd.latents import LatentSpec
from fastdmd.log import Config as LogConfig
from fastdmd.memory import Config as MemoryConfig
from fastdmd.methods import METHODS, Method
from fastdmd.methods.method import TRAINABLE
from fastdmd.methods.score_distillation import CriticConfig
from fastdmd.models.attention import VSAConfig
from fastdmd.models.families import FAMILIES
from fastdmd.models.family import AnyFamily, Options, Problems
from fastdmd.models.lora import LoraConfig
from fastdmd.optim import Config as OptimConfig
from fastdmd.optim import EMAConfig
from fastdmd.precision import Config as PrecisionConfig
from fastdmd.rollout import Config as RolloutConfig
from fastdmd.schedule import Config as ScheduleConfig
from fastdmd.schedule import Schedule

if TYPE_CHECKING:
    from fastdmd.models.family import ModelConfig

    MethodConfig = Any
    OptimTables = Mapping[str, OptimConfig]
else:
    # [model] and [method] are tables of what they name, [optim.ROLE] that of a role that some method trains
    ModelConfig = Union[tuple(family.Config for family in FAMILIES.values())]  # noqa: UP007
    MethodConfig = Union[tuple(method.Config for method in METHODS.values())]  # noqa: UP007
    OptimTables = dict[Literal[TRAINABLE], OptimConfig]


OPTIONAL_TABLES = {"critic": CriticConfig, "rollout": RolloutConfig}


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
        if any(
            p.exists() and not p.is_dir() for p in (Path(self.output_dir), *Path(self.output_dir).parents)
        ):
            yield "output_dir", f"{self.output_dir!r} is a file, or below one; name a folder"
        if self.device != "auto" and self.device not in present():
            yield "device", f"{self.device!r} is not on this machine; use {' or '.join(['auto', *present()])}"


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    train: Literal["full", "lora"] = "full"
    path: str | None = None  # weights to start from; absent: model.path


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    path: str


@dataclass(frozen=True, kw_only=True)
class Config:
    run: RunConfig
    model: ModelConfig
    method: MethodConfig
    data: DataConfig
    schedule: ScheduleConfig | None = None  # of flow models; the noise of others is in their folders
    optim: OptimTables = field(default_factory=dict[str, OptimConfig])
    student: StudentConfig = field(default_factory=StudentConfig)
    lora: LoraConfig | None = None
    teacher: TeacherConfig | None = None
    vsa: VSAConfig | None = None
    critic: CriticConfig | None = None  # here and below: filled in when the method uses it
    rollout: RolloutConfig | None = None
    ema: EMAConfig | None = None
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    logging: LogConfig = field(default_factory=LogConfig)

    def make_method(self) -> Method:
        """Return the objective, with the tables that it uses."""
        tables = {table: getattr(self, table) for table in self.method.uses}
        return METHODS[self.method.name](self.method, self.make_schedule(), **tables)

    @property
    def family(self) -> AnyFamily:
        return FAMILIES[self.model.family]

    def make_schedule(self) -> Schedule:
        flow_shift = None if self.schedule is None else self.schedule.flow_shift
        return self.family.make_schedule(flow_shift, Path(self.model.path) if self.model.path else None)

    @property
    def latents(self) -> LatentSpec:
        """Return how latents follow from [data]: by the family's VAE, or as the built-in world has them."""
        own = self.family.latents
        return shapes.latents(own.temporal is not None) if self.data.kind == "shapes" else own

    def latent_shape(self) -> tuple[int, ...]:
        """Return (C, T, H, W), or (C, H, W) for images."""
        return self.latents.shape(self.data.frames, self.data.resolution)

    def latent_frames(self) -> int:
        """Return the number of latent frames (1 for images)."""
        return self.latents.frames(self.data.frames)

    def text_tokens(self) -> int:
        """Return the tokens of an encoded prompt."""
        return shapes.TEXT_TOKENS if self.data.kind == "shapes" else self.family.text_tokens

    def role_source(self, role: str) -> tuple[str, str | None]:
        """Return the key that a role's weights come from, and the diffusers folder that it names.

        The student's average starts as the student, and a detail expert goes on from the semantic one.
        """
        if role in ("student", "target", "semantic") and self.student.path:
            return "student.path", self.student.path
        if role == "teacher" and self.teacher:
            return "teacher.path", self.teacher.path
        if role == "critic" and self.critic and self.critic.path:
            return "critic.path", self.critic.path
        return "model.path", self.model.path

    def role_options(self, role: str) -> Options:
        """Return what a role's network has beside its weights."""
        like = (
            "student" if role in ("target", "semantic") else role
        )  # its average, and the student of another run
        sparse = self.vsa is not None and vars(self.model.attention).get(like) == "vsa"
        rolls = self.rollout is not None and self.rollout.mode == "causal"
        rolls = rolls or self.method.frames_per_block is not None
        return Options(
            tile=self.vsa.tile if self.vsa and sparse else None,
            causal=rolls and like == "student",
            guidance_embedding=like == "student" and self.method.guidance_embedding,
        )

    def role_lora(self, role: str) -> LoraConfig | None:
        """Return the adapters that a role trains in place of its own weights."""
        if role in ("student", "target") and self.student.train == "lora":
            return self.lora
        if role == "critic" and self.critic and self.critic.train == "lora" and self.lora:
            return replace(self.lora, path=None)
        return None

    def role_path(self, role: str) -> str | None:
        return self.role_source(role)[1]
