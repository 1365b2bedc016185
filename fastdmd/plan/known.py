"""What ops of the meta device return and take, kept by what they were called with.

PyTorch computes shapes there in Python: that is most of a trace's time, and few calls of a step are new.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastdmd.plan.work import Work

Again = Callable[[Sequence[Any]], Any]


class Known(NamedTuple):
    """An op's work, and how to make its outputs from its arguments; None: it has to be called."""

    work: Work
    again: Again | None


class Made(NamedTuple):
    """A tensor that is all of a new storage."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def again(self) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device="meta")


KNOWN: dict[Any, Known] = {}  # by `call_key`: shapes and numbers only


def call_key(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return what decides on an op's outputs and work; an op stays, so its address names it."""
    key = id(func), *map(described, args)
    return (*key, *((name, described(value)) for name, value in kwargs.items())) if kwargs else key


def described(value: Any) -> Any:
    """Return what of an argument decides on shapes."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, list | tuple):
        return tuple(map(described, value))
    return type(value), value  # 1, 1.0 and True are equal, and give outputs of other types


def how_again(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Again | None:
    """Return how to do without an op that writes to its first argument or makes storages; None for others."""
    if args and out is args[0]:
        return None if torch.Tag.inplace_view in func.tags else itemgetter(0)
    several = isinstance(out, tuple)
    made = made_of(out if several else (out,), tree_leaves((args, kwargs)))
    return None if made is None else partial(remade, made, several)


def made_of(outputs: Sequence[Any], inputs: Sequence[Any]) -> list[Made | None] | None:
    """Return outputs of the meta device as they can be made again.

    None where one is no tensor, or where they share storages, have more than they show, or had them before.
    """
    tensors = [x for x in outputs if x is not None]
    if not all(isinstance(x, Tensor) and x.is_meta for x in tensors):
        return None
    made = [x if x is None else Made(tuple(x.shape), x.stride(), x.dtype) for x in outputs]
    old = {storage_of(x) for x in inputs if isinstance(x, Tensor)}
    fresh = {storage_of(x) for x in tensors} - old
    sizes = [x.untyped_storage().nbytes() for x in tensors]
    whole = [each.again().untyped_storage().nbytes() for each in made if each]
    return made if len(fresh) == len(tensors) and sizes == whole else None


def storage_of(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def remade(made: Sequence[Made | None], several: bool, _: Sequence[Any]) -> Any:
    """Return what a call would."""
    outputs = [each and each.again() for each in made]
    return tuple(outputs) if several else outputs[0]
