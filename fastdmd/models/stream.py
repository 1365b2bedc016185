"""Frozen weights of a network's blocks in host memory, two blocks of them on the device.

A block's weights come one block ahead of their use, in both directions of the walk: forward, and in the
backward, where a recomputed block has them again. Block i always lies in slot i % 2: a saved tensor that
points there finds its own values. What trains (adapters, copies of modules) stays on the device.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from fastdmd.models.lora import is_own

ALIGN = 256  # bytes
SLOTS = 2


class Stream:
    """The weights of blocks that are alike."""

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        """Move what is frozen in the blocks to the host; on the meta device nothing is anywhere else."""
        self.device = device
        self.copier = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.parameters = [frozen(block) for block in blocks]
        self.places, size = layout(self.parameters[0])
        if any(layout(each) != (self.places, size) for each in self.parameters):
            raise ValueError("memory.stream_base: the network's blocks are not alike; remove the key")
        self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        self.at: list[int | None] = [None] * SLOTS  # the block in each slot
        self.loads = 0
        self.most = 0  # blocks that were on the device at once
        self.host: list[Tensor] = []
        for index, parameters in enumerate(self.parameters):
            if device.type == "meta":
                self.point(index, self.slots[index % SLOTS])
                continue
            host = torch.empty(size, dtype=torch.uint8, pin_memory=self.copier is not None)
            for (first, last), p in zip(self.places, parameters, strict=True):
                host[first:last].view(p.dtype).view(p.shape).copy_(p.data)
            self.host.append(host)
            self.point(index, host)

    def run(self, index: int, block: nn.Module, x: Tensor, *arguments: Any) -> Tensor:
        """Return what a block makes of x, its weights on the device."""
        if self.host:
            self.enter(index)
        return block(x, *arguments)

    def enter(self, index: int) -> None:
        """Have a block's weights on the device, and those of the next block on their way."""
        self.load(index)
        if self.copier is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.copier)
        in_backward = torch._C._current_autograd_node() is not None  # pyright: ignore
        ahead = (index + (-1 if in_backward else 1)) % len(self.host)
        if ahead % SLOTS != index % SLOTS:
            self.load(ahead)

    def load(self, index: int) -> None:
        """Begin to bring a block's weights to its slot, in the place of those that lie there."""
        slot = index % SLOTS
        before = self.at[slot]
        if before == index:
            return
        if before is not None:
            self.point(before, self.host[before])
        if self.copier is None:
            self.slots[slot].copy_(self.host[index])
        else:
            self.copier.wait_stream(torch.cuda.current_stream(self.device))  # the slot's last use
            with torch.cuda.stream(self.copier):
                self.slots[slot].copy_(self.host[index], non_blocking=True)
        self.at[slot] = index
        self.point(index, self.slots[slot])
        self.loads += 1
        self.most = max(self.most, sum(block is not None for block in self.at))

    def point(self, index: int, buffer: Tensor) -> None:
        """Let a block's parameters be views of a buffer. Autograd saves the parameters themselves."""
        for (first, last), p in zip(self.places, self.parameters[index], strict=True):
            p.data = buffer[first:last].view(p.dtype).view(p.shape)


def streamed_names(net: Any) -> set[str]:
    """Return the names of a network's parameters that a Stream of its blocks moves."""
    moved = {id(p) for block in net.blocks for p in frozen(block)}
    return {name for name, p in net.named_parameters() if id(p) in moved}


def frozen(block: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a block that no role trains."""
    return [p for name, p in block.named_parameters() if not is_own(name)]


def layout(parameters: Sequence[nn.Parameter]) -> tuple[list[tuple[int, int]], int]:
    """Return where each parameter lies in a buffer, (first, last) byte, and the buffer's bytes."""
    places: list[tuple[int, int]] = []
    at = 0
    for p in parameters:
        size = prod(p.shape) * p.element_size()
        places.append((at, at + size))
        at += -(-size // ALIGN) * ALIGN
    return places, at
