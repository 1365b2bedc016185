"""AdamW with moments of 8 bits a number (2110.02861), by torchao; in parts that are plain tensors.

A moment is codes, one scale a block of them, and the table of what codes mean. Where blocks do not fit, or a
tensor is small, it stays float32. torchao is imported when such an optimizer is made, and no sooner.
"""

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

BLOCK = 256  # numbers that share a scale
LEAST = 4096  # numbers of a tensor whose moments are in codes
LEVELS = 256  # values of a code
PARTS = ("codes", "scale", "qmap")


def is_installed() -> bool:
    return find_spec("torchao") is not None


def make(
    masters: Iterable[Tensor], lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Return torchao's optimizer; its learning rate is a tensor, to be filled and not replaced."""
    from torchao.optim import AdamW8bit  # pyright: ignore[reportMissingImports]

    return AdamW8bit(masters, lr, betas, eps, weight_decay, block_size=BLOCK)


def is_coded(master: Tensor) -> bool:
    """Return whether a master's moments are in codes."""
    return master.numel() >= LEAST and master.numel() % BLOCK == 0


def part_forms(master: Tensor) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return the shape and dtype of each part of a moment; of one in float32 the only part has no name."""
    if not is_coded(master):
        return {"": (master.shape, master.dtype)}
    return {
        "codes": (master.shape, torch.uint8),
        "scale": (torch.Size([master.numel() // BLOCK]), torch.float32),
        "qmap": (torch.Size([LEVELS]), torch.float32),
    }


def parts_of(moment: Tensor) -> dict[str, Tensor]:
    """Return the parts of a moment by name."""
    if not is_traceable_wrapper_subclass(moment):
        return {"": moment}
    return {part: getattr(moment, part) for part in PARTS}


def joined(parts: Mapping[str, Tensor], signed: bool) -> Any:
    """Return the moment of some parts. The first moment has a sign, the second has none."""
    if "" in parts:
        return parts[""]
    from torchao.optim.subclass_8bit import OptimState8bit  # pyright: ignore[reportMissingImports]

    kind: Any = OptimState8bit
    return kind(*(parts[part] for part in PARTS), signed, dtype=torch.float32)
