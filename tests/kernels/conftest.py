import importlib.util
import math

import pytest
import torch

from fastdmd_kernels import dispatch


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    """Run the whole op on each backend; without a GPU triton's is its interpreter."""
    if request.param == "triton" and not importlib.util.find_spec("triton"):
        pytest.skip("no triton")
    with dispatch.use(request.param):
        yield request.param


@pytest.fixture
def poison(monkeypatch):
    """Fill new memory with NaN: what a kernel leaves unwritten is seen."""
    empty = torch.empty

    def poisoned(*size, **options):
        x = empty(*size, **options)
        return x.fill_(math.nan if x.is_floating_point() else -1)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda x: poisoned(x.shape, dtype=x.dtype, device=x.device))
