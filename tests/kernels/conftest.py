import importlib.util

import pytest

from fastdmd_kernels import dispatch


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    """Run the whole op on each backend; without a GPU triton's is its interpreter."""
    if request.param == "triton" and not importlib.util.find_spec("triton"):
        pytest.skip("no triton")
    with dispatch.use(request.param):
        yield request.param
