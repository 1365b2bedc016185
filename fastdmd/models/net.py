"""What every network of a role is: one `forward`, and what the trainer has to know of it beside.

B batch, C channel, L tokens, N heads, K head dim.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from fastdmd.batch import Cond
from fastdmd.models.attention import Attention
from fastdmd.models.lowbit import is_code
from fastdmd.models.offload import Offload
from fastdmd.models.stream import Stream

Checkpointing = Literal["none", "selective", "full"]


class Architecture(Protocol):
    """The keys of a network's config.json that define it."""

    @property
    def in_channels(self) -> int: ...

    @property
    def out_channels(self) -> int: ...

    @property
    def text_dim(self) -> int:
        """Return the width of `Cond.text`."""
        ...

    @property
    def grain(self) -> tuple[int, ...]:
        """Return what latents along their axes have to be multiples of."""
        ...

    def shallow(self, depth: int) -> Self:
        """Return the architecture with at most `depth` of the blocks that are alike."""
        ...

    def problems(self) -> Iterator[tuple[str, str]]: ...


@dataclass(frozen=True)
class Call:
    """How a network is called, beside its inputs."""

    layers: tuple[int, ...] = ()  # blocks whose hidden states are wanted
    attention: Attention | None = None  # of self-attention, from `Net.attention`; None: dense
    blocks: tuple[int, ...] = ()  # frames of each block of a causal network in one pass; (): one block of all
    cache: Any = None  # a video from `start_video` of a causal network: the frames follow those that it holds
    write: bool = False  # the frames' own keys and values stay in the cache
    role: str | None = None  # whose adapters and copies of modules are taken; None: nobody's


PLAIN = Call()


class Out(NamedTuple):
    """What a network returns."""

    F: Tensor  # [B, C, ..]
    maps: list[Tensor]  # hidden states [B, D, ..] after each of `Call.layers`, at least float32


class Net(nn.Module, ABC):
    """A role's network. `forward` is the only way in, as FSDP2 hooks no other."""

    config: Any  # its Architecture
    float32: tuple[str, ...] = ()  # parts of names of parameters that stay float32 whatever the compute dtype
    checkpointing: Checkpointing = "none"  # what of the blocks is computed anew in the backward
    offload: Offload | None = None  # of the blocks' inputs, to host memory
    stream: Stream | None = None  # of the blocks' frozen weights, from host memory
    blocks: Sequence[nn.Module] | nn.ModuleList  # in the order of the walk
    widths: tuple[int, ...]  # channels after each block

    def __init__(self) -> None:
        super().__init__()
        self.acting: list[str] = []  # the role of the call that runs, where modules inside cannot be given it

    @property
    def units(self) -> list[nn.Module]:
        """Return the parts that are compiled one by one."""
        return list(self.blocks)

    @abstractmethod
    def forward(self, x_t: Tensor, model_t: Tensor, cond: Cond, call: Call = PLAIN) -> Out:
        """Return F of x_t [B, C, ..] at times model_t [B], or [B, n] for the n of `call.blocks`."""

    @abstractmethod
    def flops(self, shape: Iterable[int], text_tokens: int, call: Call = PLAIN) -> int:
        """Return multiply-adds x 2 of one forward of a latent [B, C, ..].

        They are those of products, convolutions and attention.
        """

    def attention_flops(self, shape: Iterable[int], text_tokens: int, call: Call = PLAIN) -> int:
        """Return the part of `flops` in which no side is a weight, so that a backward has two for each."""
        return 0

    @abstractmethod
    def start_from_scratch(self) -> Self:
        """Set random weights to train from."""

    def topk(self, shape: Iterable[int], sparsity: float) -> int | None:
        """Return how many key tiles sparse attention keeps at a sparsity; None where attention is dense."""
        return None

    def attention(self, shape: Iterable[int], topk: int | None) -> Attention | None:
        """Return how self-attention works on a latent [B, C, ..]; None where it is dense."""
        return None

    def start_video(self, shape: Iterable[int]) -> Any:
        """Return an empty cache for videos [B, C, T, H, W], of a causal network."""
        raise ValueError(f"{type(self).__name__} makes no video block by block")

    def prepare(
        self, shape: Sequence[int], device: torch.device, dtype: torch.dtype, dense: bool = False
    ) -> None:
        """Make what calls on latents [B, C, ..] of that shape share.

        That is tables, and the choice of the dense attention. dense: some calls of a network with sparse
        attention attend to all.
        """

    def recompute_blocks(self, how: Checkpointing) -> None:
        """Say what of the blocks is computed anew in the backward."""
        self.checkpointing = how

    def chunk_feed_forward(self, chunks: int) -> None:
        """Say in how many chunks of tokens a feed-forward is computed."""
        assert chunks == 1  # the configuration was checked

    def keeps_float32(self, name: str) -> bool:
        """Return whether a parameter stays float32 whatever the compute dtype."""
        return any(part in name for part in self.float32)


def cast(net: Net, dtype: torch.dtype) -> dict[str, Tensor]:
    """Round parameters to the compute dtype in place, and return the float32 originals of those, by name.

    The originals are an optimizer's masters.
    """
    masters: dict[str, Tensor] = {}
    for name, parameter in net.named_parameters():
        if dtype != torch.float32 and not net.keeps_float32(name) and not is_code(name):
            masters[name] = parameter.detach().float()
            parameter.data = parameter.data.to(dtype)
    return masters
