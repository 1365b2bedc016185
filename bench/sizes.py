"""What is measured, and how much work it is. B batch, N heads, K head dim; a grid of tokens T, H, W."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastdmd_kernels.tiles import Grid, Tiles

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

BACKWARD = 2.5  # of the forward: five products, two of them a second time
SCORES = 4e9  # bytes of float32 scores up to which what holds all of them is run: the references


@dataclass(frozen=True)
class Attention:
    """Describe the self-attention of one layer."""

    name: str
    grid: Grid
    N: int
    K: int
    topk: int
    dtypes: tuple[torch.dtype, ...]
    flex: bool = False  # in the first dtype: compiled for tens of seconds
    B: int = 1

    @cached_property  # one instance, which holds its tensors
    def tiles(self) -> Tiles:
        return Tiles(self.grid)

    @property
    def holds_all_scores(self) -> bool:
        return 4 * self.B * self.N * self.tiles.L**2 <= SCORES

    def row(self) -> dict[str, object]:
        tiles = self.tiles
        return {
            "name": self.name,
            "grid": list(self.grid),
            "B": self.B,
            "L": tiles.L,
            "N": self.N,
            "K": self.K,
            "topk": self.topk,
            "tiles": tiles.n,
        }


@dataclass(frozen=True)
class Loss:
    """Describe a latent; `mixed` is x0_g and z in float32, network outputs in bfloat16."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "mixed")

    def row(self) -> dict[str, object]:
        return {"name": self.name, "shape": list(self.shape)}


@dataclass(frozen=True)
class Plan:
    attention: tuple[Attention, ...]
    losses: tuple[Loss, ...]
    matmul: tuple[torch.dtype, ...]  # whose ceilings are measured
    compiled: bool  # also under torch.compile
    budget: float  # seconds of timing per row
    rounds: tuple[int, int]  # at least, at most


WAN_480P, WAN_720P = (21, 30, 52), (21, 45, 80)  # 81 frames of 480 x 832 and 720 x 1280
LATENTS = {"Wan 480p": (1, 16, 21, 60, 104), "Wan 720p": (1, 16, 21, 90, 160), "SDXL 1024": (4, 4, 128, 128)}

PLANS = {
    "gpu": Plan(
        attention=(
            Attention("29k", (20, 28, 52), 12, 128, 91, (BF16, FP16), flex=True),  # 455 full tiles
            Attention("8k", (8, 32, 32), 12, 128, 16, (BF16,)),
            Attention("1.3B 480p", WAN_480P, 12, 128, 125, (BF16,)),
            Attention("1.3B 720p", WAN_720P, 12, 128, 288, (BF16,)),
            Attention("14B 480p", WAN_480P, 40, 128, 63, (BF16,)),
            Attention("14B 720p", WAN_720P, 40, 128, 144, (BF16,)),
        ),
        losses=tuple(Loss(name, shape) for name, shape in LATENTS.items()),
        matmul=(BF16, FP16),
        compiled=True,
        budget=0.3,
        rounds=(5, 100),
    ),
    "cpu": Plan(
        attention=(
            Attention("8k", (8, 32, 32), 1, 128, 16, (FP32,)),  # 87.5 % sparse
            Attention("ragged 2k", (5, 18, 26), 1, 128, 18, (FP32,)),
        ),
        losses=(Loss("SDXL 1024", LATENTS["SDXL 1024"], ("float32", "mixed")),),
        matmul=(FP32,),
        compiled=False,
        budget=1.0,
        rounds=(3, 20),
    ),
    "tiny": Plan(
        attention=(Attention("tiny", (5, 6, 7), 2, 16, 3, (FP32,), flex=True),),
        losses=(Loss("tiny", (2, 3, 4, 5), ("float32", "mixed")),),
        matmul=(FP32,),
        compiled=False,
        budget=0.0,
        rounds=(2, 2),
    ),
}


def dense_flops(shape: Attention) -> int:
    """Count the FLOPs of a forward: two products of Lq x Lk x K."""
    return 4 * shape.B * shape.N * shape.tiles.L**2 * shape.K


def sparse_flops(shape: Attention, lists: Tensor) -> int:
    """Count the FLOPs of a forward: the queries of each tile by the keys of its list.

    What pads ragged tiles is not work.
    """
    n_valid = shape.tiles.on(lists.device).n_valid.long()
    keys = (lists & 127).long().sum(-1)  # [B, N, nq]
    return 4 * shape.K * int((keys * n_valid).sum())


def loss_bytes(inputs: list[Tensor], gradients: list[Tensor]) -> int:
    """Return the floor: every input read once, every gradient written once.

    DMD has 5 + 1 passes with guidance, SiD 5 + 5. No two-pass implementation reaches it from memory: it reads
    some inputs twice (DMD moves 9, SiD 15).
    """
    return sum(math.prod(x.shape) * x.element_size() for x in (*inputs, *gradients))
