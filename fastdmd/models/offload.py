"""Inputs of blocks in host memory until the backward wants them, with copies beside the computation.

A recomputed block keeps its input alone. At 14B and 32,760 tokens that is 335 MB a block, 13 GB in all.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Held:
    """One block's input on the host."""

    def __init__(self, x: Tensor, before: "Held | None", copier: Any) -> None:
        self.before = before  # of the block before, which the backward wants next
        self.copier = copier
        self.shape, self.dtype, self.device = x.shape, x.dtype, x.device
        self.ready: Tensor | None = None  # on the device again
        self.host: Tensor | None = None  # on the meta device there is none
        if copier is not None:
            self.host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            copier.wait_stream(torch.cuda.current_stream(x.device))
            with torch.cuda.stream(copier):
                self.host.copy_(x, non_blocking=True)
            x.record_stream(copier)
        elif not x.is_meta:
            self.host = x.clone()

    def fetch(self) -> None:
        """Begin to bring it back."""
        if self.ready is not None:
            return
        self.ready = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        if self.copier is not None:
            self.copier.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.copier):
                self.ready.copy_(self.host, non_blocking=True)  # type: ignore[arg-type]
            self.ready.record_stream(self.copier)
        elif self.host is not None:
            self.ready.copy_(self.host)

    def take(self) -> Tensor:
        """Return it on the device, and begin with the one before."""
        self.fetch()
        if self.copier is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.copier)
        if self.before is not None:
            self.before.fetch()
        x, self.ready = self.ready, None
        assert x is not None
        self.host = self.before = None  # a backward wants it once, and the walk's last holds all before it
        return x


class Offload:
    """The inputs of the blocks of one network on the host."""

    def __init__(self, device: torch.device) -> None:
        self.copier = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.last: Held | None = None
        self.held = 0  # inputs that went to the host so far

    def keeping(self, index: int, x: Tensor) -> saved_tensors_hooks:
        """Return the context of block `index`, in which x is kept on the host."""
        if index == 0:
            self.last = None
        storage = x.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]

        def pack(kept: Tensor) -> Tensor | Held:
            if kept.untyped_storage()._cdata != storage:  # pyright: ignore[reportPrivateUsage]
                return kept  # what blocks share: text, times, tables
            self.last = Held(kept.detach(), self.last, self.copier)
            self.held += 1
            return self.last

        def unpack(kept: Tensor | Held) -> Tensor:
            return kept.take() if isinstance(kept, Held) else kept

        return saved_tensors_hooks(pack, unpack)
