"""What the trainer asks of a family of networks, in one form; models/families.py has them by name."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from fastdmd.batch import Cond
from fastdmd.latents import LatentSpec, Resolution
from fastdmd.models.component import Weights
from fastdmd.models.net import Architecture, Net
from fastdmd.schedule import Schedule
from fastdmd_kernels.tiles import Grid

Encoder = Callable[[Sequence[str]], Cond]  # on the host
Problems = Iterator[tuple[str, str]]  # (key, what is wrong with it and what to do)
SelfAttention = Literal["dense", "vsa"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a role asks of its network beside the weights."""

    tile: Grid | None = None  # of sparse attention
    causal: bool = False  # a video block by block
    guidance_embedding: bool = False


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Self-attention of each role."""

    student: SelfAttention = "dense"
    teacher: SelfAttention = "dense"
    critic: SelfAttention = "dense"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The table [model]; a family's own says what `family` and `architecture` are."""

    family: str
    path: str | None = None  # a diffusers folder
    architecture: Architecture | None = None  # in place of a path: random weights
    attention: AttentionConfig = field(default_factory=AttentionConfig)

    def problems(self) -> Problems:
        if self.path and self.architecture is not None:
            yield "architecture", "model.path has an architecture already; keep one of the two"


A = TypeVar("A", bound=Architecture)
N = TypeVar("N", bound=Net)
S = TypeVar("S", bound=Schedule)


class Scheduler(Protocol):
    """A scheduler of diffusers, which has no types."""

    def save_pretrained(self, save_directory: Path) -> object: ...


class Family(ABC, Generic[A, N, S]):
    """A family: its folder of models/ in one form, and what it can and cannot do."""

    Config: ClassVar[type[ModelConfig]]  # the table [model]
    component: ClassVar[str]  # the network's folder in a diffusers folder
    frozen: ClassVar[tuple[str, ...]]  # the folders that prompts need beside it
    latents: ClassVar[LatentSpec]
    # of an architecture, the widths of prompts' embeddings: text_dim of Cond.text, pooled_dim of Cond.pooled
    conditioning: ClassVar[tuple[str, ...]]
    text_tokens: ClassVar[int]  # of an encoded prompt
    is_flow: ClassVar[bool]  # whether it predicts velocities, at times that [schedule] shifts
    lora_prefix: ClassVar[str]  # of names in a file of adapters
    gate: ClassVar[str | None] = None  # end of the names of sparse attention's gates: a folder may lack them

    @abstractmethod
    def read_config(self, folder: Path) -> A:
        """Return the architecture of a diffusers folder.

        Raise ValueError for another network than the family's.
        """

    @abstractmethod
    def make(self, architecture: A, options: Options) -> N:
        """Return a network with random weights, on torch's current device."""

    @abstractmethod
    def open_weights(self, folder: Path, net: N) -> Weights:
        """Return the weights of a diffusers folder, by the names of a network."""

    @abstractmethod
    def make_schedule(self, flow_shift: float | None, folder: Path | None) -> S:
        """Return the noise schedule, of [schedule] or of a diffusers folder."""

    @abstractmethod
    def encoder(
        self, path: str, device: torch.device, dtype: torch.dtype, codes: torch.dtype | None = None
    ) -> Encoder:
        """Return the encoder of prompts of a diffusers folder.

        codes: the type of its linear layers' weights, where those are one byte each.
        """

    @abstractmethod
    def decode(self, path: str, x0: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return latents as uint8 [B, T, H, W, 3] on the host."""

    @abstractmethod
    def make_scheduler(self, times: Sequence[float] | None, schedule: S, source: Path | None) -> Scheduler:
        """Return diffusers' scheduler of a student that re-noises at `times`; of many steps without times.

        Raise ValueError where there is none. source: the folder of the frozen parts.
        """

    @abstractmethod
    def export(
        self,
        out: Path,
        architecture: A,
        weights: Mapping[str, Tensor],
        scheduler: Scheduler,
        source: Path | None,
    ) -> None:
        """Write a diffusers folder, with the frozen parts of `source` if it has them."""

    def sized(self, cond: Cond, resolution: Resolution) -> Cond:
        """Return a condition with the sizes that the network is conditioned on, if any."""
        return cond

    def refuses(self, options: Options) -> Problems:
        """Yield the options that it has no network for, with the reason and the remedy."""
        yield from ()

    def is_small(self, name: str) -> bool:
        """Return whether a linear layer of a block is too small, or too dear, for one byte a weight."""
        return self.gate is not None and name.endswith(self.gate)

    def refuses_memory(self, memory: Any) -> Problems:
        """Yield the keys of [memory] that its networks have no form for, with the remedy."""
        yield from ()

    def folder_problems(self, folders: Mapping[str, Path]) -> Problems:
        """Yield what is wrong with the folders of a run beside each other.

        folders: by their keys, "model.path" first; each has the network's component.
        """
        yield from ()


AnyFamily = Family[Any, Any, Any]
