"""One row of the table: what is run, what it should give, and how much work it is."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import sizes
from bench.clock import Run

Tensors = list[Tensor]


@dataclass(frozen=True)
class Work:
    run: Run  # what is timed
    results: Callable[[], Tensors]
    exact: Callable[[], Tensors]
    flops: int = 0
    bytes: int = 0
    kernels: tuple[str, ...] = ()  # of triton whose launch configuration goes into the record


@dataclass(frozen=True)
class Case:
    op: str
    variant: str
    of: str  # forward, backward, both
    shape: sizes.Attention | sizes.Loss
    dtype: str
    build: Callable[[torch.device], Work]
    ours: bool = False
    captured: bool = False  # too short to be launched from the host: timed as a CUDA graph

    def __str__(self) -> str:
        return f"{self.op}-{self.of}-{self.shape.name}-{self.dtype}-{self.variant}".replace(" ", "_")


def random(*size: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)


def values(run: Callable[..., Tensor], inputs: Tensors, dout: Tensor) -> Tensors:
    """Return [out, gradients ..]."""
    out = run(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


def upcast(x: Tensor) -> Tensor:
    return x.detach().float().requires_grad_(x.requires_grad)


def check(work: Work) -> float:
    """Return the largest relative error of what is about to be timed.

    Raises AssertionError when it is not the same function. The limit asks no more than that: 2 roundings of
    the coarsest dtype, where a wrong index is off by 0.1. That errors are at most twice those of PyTorch's
    own composition is for tests/kernels/test_gpu.py.
    """
    worst = 0.0
    for i, (x, true) in enumerate(zip(work.results(), work.exact(), strict=True)):
        error = ((x.float() - true.float()).norm() / true.float().norm().clamp_min(1e-30)).item()
        limit = max(2 * torch.finfo(x.dtype).eps, 2e-5)
        assert error <= limit, f"result {i} of {list(x.shape)} is off by {error:.1e}, more than {limit:.1e}"
        worst = max(worst, error)
    return worst
