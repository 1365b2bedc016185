"""Count what a step asks of a GPU without one: launches, and the bytes that they read and write.

Ops are counted as PyTorch dispatches them, by shapes alone, so that they may run on the meta device. One op
counts as one launch: some take two on a GPU (a layer norm's gradient to its weight), so eager code has at
least as many as are said.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastdmd.plan.work import COUNTED, moved

Kind = Literal["products", "attention", "elementwise"]
KINDS: tuple[Kind, ...] = ("products", "attention", "elementwise")
# what launches nothing beside views: storages, and other names of one
FREE = (
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "alias",
    "_unsafe_view",
    "_reshape_alias",
    "lift_fresh",
    "is_same_size",
)


@dataclass
class Launches:
    """Launches and bytes by kind: elementwise is all but products and attention, norms and sums too."""

    count: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    bytes: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))

    def add(self, kind: Kind, size: int) -> None:
        """Count one launch."""
        self.count[kind] += 1
        self.bytes[kind] += size

    def __add__(self, other: "Launches") -> "Launches":
        return Launches(
            {kind: self.count[kind] + other.count[kind] for kind in KINDS},
            {kind: self.bytes[kind] + other.bytes[kind] for kind in KINDS},
        )

    def __sub__(self, other: "Launches") -> "Launches":
        return Launches(
            {kind: self.count[kind] - other.count[kind] for kind in KINDS},
            {kind: self.bytes[kind] - other.bytes[kind] for kind in KINDS},
        )

    @property
    def total(self) -> int:
        return sum(self.count.values())

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())

    def as_counts(self) -> dict[str, int]:
        """Return the numbers by name, as a baseline holds them."""
        counts = {f"launches, {kind}": n for kind, n in self.count.items()}
        return counts | {f"bytes, {kind}": n for kind, n in self.bytes.items()}


class Counting(TorchDispatchMode):
    """Count the launches of all ops inside."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Launches()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if not func.is_view and packet.__name__ not in FREE:
            # `out=` is among the outputs; an op in place reads its tensor and writes it
            self.found.add(kind_of(packet), sum(map(moved, [*tensors(args), *tensors(out)])))
        return out


def kind_of(packet: Any) -> Kind:
    """Return what an op is, from its packet of overloads."""
    if packet in flop_registry:
        return "products"
    return "attention" if packet in COUNTED else "elementwise"


def tensors(values: Any) -> Iterator[Tensor]:
    """Yield each tensor among an op's arguments, or in its output, once."""
    seen: set[int] = set()
    for x in tree_leaves(values):
        if isinstance(x, Tensor) and id(x) not in seen:
            seen.add(id(x))
            yield x
