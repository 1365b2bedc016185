"""Every byte that is alive in a step, by what it is for, and the work that the step does, op by op.

Tensors of the meta device count as they would on a GPU; tensors with values count too where asked, to hold a
plan against a real step.
"""

import gc
import importlib
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdmd.plan.known import KNOWN, Known, call_key, how_again
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

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: PyTorch wraps the dispatch of other modes, at a fifth of its time."""
        return False

    def begin(self, name: str) -> None:
        """Begin a phase, or go on with it."""
        self.phase = self.phases.setdefault(name, Phase())
        self.note()

    def note(self) -> None:
        """Take the bytes of this moment as the phase's peak, where there are more."""
        if self.total > self.phase.peak:
            self.phase.peak, self.phase.by = self.total, Counter(self.by)

    def include(self, inside: Phase, total: int, by: Counter[str]) -> None:
        """Take in what was traced apart, of bytes above those of a moment: `total`, `by` kind."""
        if total + inside.peak > self.phase.peak:
            self.phase.peak = total + inside.peak
            self.phase.by = Counter(by)
            self.phase.by.update(inside.by)
        self.phase.work.add(inside.work)

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
        if key in self.held:
            return
        size = -(-storage.nbytes() // ROUND) * ROUND
        if not size:
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
        with torch._C.DisableTorchFunction():  # `Fused` sees no shape that is read here
            out, work = self.call(func, args, kwargs or {})
            outputs = self.tensors((out,))
            if outputs:
                kind = self.made()
                for tensor in outputs:
                    self.add(tensor, kind)
                self.phase.work.add(work)
                if in_backward() and (torch.is_grad_enabled() or func.overloadpacket in AGAIN):
                    self.phase.recomputed.add(work)
        return out

    def call(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Work]:
        """Return what an op returns, and its work; the meta device is asked once for the same shapes."""
        key = call_key(func, args, kwargs) if self.device_type == "meta" else None
        found = KNOWN.get(key)
        if found is not None:
            return found.again(args) if found.again else func(*args, **kwargs), found.work
        out = func(*args, **kwargs)
        outputs = self.tensors((out,))
        work = work_of(func, args, kwargs, out, self.tensors(args), outputs) if outputs else Work()
        if key is not None:
            KNOWN[key] = Known(work, how_again(func, args, kwargs, out))
        return out, work

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


@contextmanager
def uncollected() -> Iterator[None]:
    """Collect no garbage: it takes a fifth of a trace, and would decide by chance when a tensor goes.

    torch._dynamo is imported before: checkpoints do it, and a first import keeps the frames around it, with
    their tensors.
    """
    importlib.import_module("torch._dynamo")
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def in_backward() -> bool:
    """Return whether autograd runs a node, perhaps a recomputation in it."""
    return torch._C._current_autograd_node() is not None
