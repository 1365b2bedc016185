import importlib
import os
from pathlib import Path

import pytest
import torch
from tiny import write_toml

if not torch.cuda.is_available():
    # the kernels' tests run in triton's interpreter; read when triton is imported, which no line above does
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--campaign", action="store_true", help="also run the tests that take minutes each")
    parser.addoption(
        "--require",
        default="",
        metavar="NAMES",
        help="modules, by commas: to lack one is an error, where its tests would be skipped otherwise",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave campaigns out unless they are asked for."""
    if not config.getoption("--campaign"):
        items[:] = [item for item in items if item.get_closest_marker("campaign") is None]


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to start without what --require names."""
    for name in filter(None, config.getoption("--require").split(",")):
        try:
            importlib.import_module(name)
        except ImportError as e:
            raise pytest.UsageError(f"--require={name}: {e}; pip install 'fastdmd[dev]'") from e


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Use one thread: the tests' networks are too small for more, and workers would fight over the cores."""
    torch.set_num_threads(1)


@pytest.fixture
def traced(monkeypatch):
    """Trace compiled code with aot_eager, which is quick, and forget it after."""
    from fastdmd import capture  # it imports triton, which has to come after the lines above

    monkeypatch.setattr(capture, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.trace_autograd_ops = False


@pytest.fixture
def dmd_toml(tmp_path: Path) -> Path:
    """Write a whole configuration of milliseconds per step; its run is in tmp_path/run."""
    return write_toml(tmp_path, "dmd")


@pytest.fixture
def float64(monkeypatch):
    """Make networks and schedules compute in float64 what they compute in float32 at the least."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
