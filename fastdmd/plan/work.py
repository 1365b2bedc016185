"""The work of ops: FLOPs of products and of attention, and the bytes that all others move."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

import fastdmd.plan.ops  # noqa: F401  # registers the ops below
import fastdmd_kernels  # noqa: F401  # and this the kernels' own

BACKWARD = 2.5  # products of attention's backward: five to the forward's two


@dataclass
class Work:
    """FLOPs (multiply-adds x 2) by what computes them, and bytes of ops that compute little."""

    matmul: float = 0  # convolutions too
    float8: float = 0  # products of eight bits
    attention: float = 0
    attention_backward: float = 0
    sparse: float = 0  # of video sparse attention, the pairs that it keeps
    sparse_backward: float = 0
    traffic: float = 0  # bytes read and written

    def __add__(self, other: Self) -> "Work":
        return Work(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def add(self, other: "Work") -> None:
        """Add in place, for every op: `+` takes ten times as long."""
        self.matmul += other.matmul
        self.float8 += other.float8
        self.attention += other.attention
        self.attention_backward += other.attention_backward
        self.sparse += other.sparse
        self.sparse_backward += other.sparse_backward
        self.traffic += other.traffic

    def __mul__(self, factor: float) -> "Work":
        return Work(**{f.name: getattr(self, f.name) * factor for f in fields(self)})

    def __sub__(self, other: Self) -> "Work":
        return self + other * -1

    @property
    def flops(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self) if f.name != "traffic")


def _dense(q: Tensor, k: Tensor) -> float:
    """Return the FLOPs of attention's forward, q [B, N, Lq, K], k [B, N, Lk, K]."""
    return 4.0 * q.numel() * k.shape[2]


def _sparse(q: Tensor, lists: Tensor, k: Tensor, tiles: Tensor) -> float:
    """Return the FLOPs of sparse attention's forward.

    q [B, Lq, N, K], lists [B, N, nq, topk], k [B, Lk, N, K]; tiles: a number for each of k's.
    """
    return 4.0 * q.numel() * lists.shape[3] * k.shape[1] / tiles.shape[0]


COUNTED: dict[Any, Callable[[Sequence[Any]], Work]] = {
    torch.ops.aten._scaled_mm: lambda a: Work(float8=2.0 * a[0].numel() * a[1].shape[1]),
    torch.ops.fastdmd.attention: lambda a: Work(attention=_dense(a[0], a[1])),
    torch.ops.fastdmd.attention_backward: lambda a: Work(attention_backward=BACKWARD * _dense(a[1], a[2])),
    torch.ops.fastdmd.vsa_fine: lambda a: Work(sparse=_sparse(a[0], a[3], a[1], a[7])),
    torch.ops.fastdmd.vsa_fine_backward: lambda a: Work(
        sparse_backward=BACKWARD * _sparse(a[1], a[6], a[2], a[10])
    ),
    torch.ops.fastdmd.vsa_select: lambda a: Work(matmul=2.0 * a[0].numel() * a[1].shape[2]),
}


# forward ops that compute without grad mode: in a backward they are recomputed
AGAIN = {
    torch.ops.fastdmd.attention,
    torch.ops.fastdmd.rms_norm,
    torch.ops.fastdmd.vsa_fine,
    torch.ops.fastdmd.vsa_select,
}


def work_of(func: Any, args: Any, kwargs: Any, out: Any, inputs: list[Tensor], outputs: list[Tensor]) -> Work:
    """Return the work of an op, from its overload, arguments and tensors."""
    packet = func.overloadpacket
    if packet in COUNTED:
        return COUNTED[packet](args)
    if packet in flop_registry:
        return Work(matmul=float(flop_registry[packet](*args, **kwargs, out_val=out)))
    if func.is_view:
        return Work()
    return Work(traffic=float(sum(map(moved, inputs)) + sum(map(moved, outputs))))


def moved(x: Tensor) -> int:
    """Return the bytes of a tensor that an op touches: of one that is expanded, each once."""
    sides = [n for n, stride in zip(x.shape, x.stride(), strict=True) if stride]
    return math.prod(sides) * x.element_size()
