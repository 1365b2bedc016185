"""One block of a network's walk: what its backward needs is kept, computed anew, or fetched from the host."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastdmd.models.net import Net
from fastdmd.models.recompute import recompute


def run_block(net: Net, index: int, block: nn.Module, x: Tensor, *arguments: Any) -> Tensor:
    """Return what block `index` makes of x."""
    run = block if net.stream is None else partial(net.stream.run, index, block)
    if not torch.is_grad_enabled():
        return run(x, *arguments)
    with nullcontext() if net.offload is None else net.offload.keeping(index, x):
        if net.checkpointing == "full":
            return recompute(run, x, *arguments)
        return run(x, *arguments)
