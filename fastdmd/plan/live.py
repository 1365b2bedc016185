"""Every byte that is alive in a step, by what it is for, and the work that the step does, op by op.

Tensors of the meta device count as they would on a GPU; tensors with values count too where asked, to hold a
plan against a real step.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdmd.plan.work import AGAIN, Work, work_of

ROUND = 512  # bytes: what CUDA's caching allocator rounds a tensor up to
GRAPH, WORKING = "kept graph", "working set"


@dataclass
class Phase:
    """The memory peak of a phase, in all and by kind, and its work."""

    peak: int = 0
    by: Counter[str] = field(default_factory=Counter[str])
    work: Work = field(default_factory=Work)
    recomputed: Work = field(default_factory=Work)  # in it, for the backward


@dataclass
class Held:
    """A storage: its bytes and what it is for."""

    size: int
    kind: str
    gone: Any = None  # keeps the weak reference


class Live(TorchDispatchMode):
    """Count each storage from the op that made it until its last reference goes."""

    def __init__(self, device_type: str = "meta") -> None:
        super().__init__()
        self.device_type = device_type
        self.held: dict[int, Held] = {}
        self.by: Counter[str] = Counter()
        self.total = 0
        self.phases: dict[str, Phase] = {}
        self.phase = Phase()
        self.kind: str | None = None  # what is made is for, where that is said
        self.keeps = False  # whether the call in progress keeps a graph

    def begin(self, name: str) -> None:
        """Begin a phase, or go on with it."""
        self.phase = self.phases.setdefault(name, Phase())
        self.note()

    def note(self) -> None:
        """Take the bytes of this moment as the phase's peak, where there are more."""
        if self.total > self.phase.peak:
            self.phase.peak, self.phase.by = self.total, Counter(self.by)

    def before(self, grad_enabled: bool) -> None:
        """Note whether a call keeps a graph, from outside of it."""
        self.keeps = grad_enabled

    @contextmanager
    def made_as(self, kind: str) -> Iterator[None]:
        """Take all that is made inside for one kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def hold(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Say what tensors are for."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key not in self.held:
                self.add(tensor, kind)
            held = self.held.get(key)
            if held is not None:
                self.by[held.kind] -= held.size
                self.by[kind] += held.size
                held.kind = kind
        self.note()

    def add(self, tensor: Tensor, kind: str) -> None:
        """Count a tensor's storage, if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = -(-storage.nbytes() // ROUND) * ROUND
        if key in self.held or not size:
            return
        held = Held(size, kind)

        def gone(_: Any) -> None:
            if self.held.get(key) is held:
                del self.held[key]
                self.by[held.kind] -= held.size
                self.total -= held.size

        held.gone = weakref.ref(storage, gone)
        self.held[key] = held
        self.by[kind] += size
        self.total += size
        self.note()

    def made(self) -> str:
        """Return what an op's output is for, where nothing said it."""
        if self.kind is not None:
            return self.kind
        return GRAPH if self.keeps and not in_backward() else WORKING

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        outputs = self.tensors((out,))
        if outputs:
            kind = self.made()
            for tensor in outputs:
                self.add(tensor, kind)
            inputs = self.tensors(args)
            work = work_of(func, args, kwargs or {}, out, inputs, outputs)
            self.phase.work += work
            if in_backward() and (torch.is_grad_enabled() or func.overloadpacket in AGAIN):
                self.phase.recomputed += work
        return out

    def counts(self, x: object) -> bool:
        return isinstance(x, Tensor) and x.device.type == self.device_type

    def tensors(self, values: Iterable[object]) -> list[Tensor]:
        """Return the tensors that count among an op's arguments, or in its output."""
        found: list[Tensor] = []
        for value in values:
            if isinstance(value, Tensor):
                if value.device.type == self.device_type:
                    found.append(value)
            elif isinstance(value, list | tuple):
                found += self.tensors(value)
        return found


def in_backward() -> bool:
    """Return whether autograd runs a node, perhaps a recomputation in it."""
    return torch._C._current_autograd_node() is not None
