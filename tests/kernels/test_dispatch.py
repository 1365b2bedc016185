"""Which backend runs the ops: by device, forced in tests, and never silently another."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdmd_kernels import dispatch

KERNELS = Path(__file__).parents[2] / "kernels"
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def undecided():
    """Decisions are cached: make them anew, and forget those of the test."""
    dispatch._decided.clear()
    yield
    dispatch._decided.clear()


def test_backends_by_device(undecided):
    pytest.importorskip("triton")
    assert [dispatch.backend(torch.device(d)) for d in ("cpu", "mps", "cuda")] == ["torch", "torch", "triton"]
    with pytest.raises(ValueError, match="no backend for device 'xla'"):
        dispatch.backend(torch.device("xla"))


def test_the_interpreter_alone_changes_nothing(undecided, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.backend(CPU) == "torch"


def test_use_forces_and_restores(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with dispatch.use("triton"):
        assert dispatch.backend(CPU) == "triton"
        with dispatch.use("torch"):
            assert dispatch.backend(CPU) == dispatch.backend(CUDA) == "torch"
        assert dispatch.backend(CPU) == "triton"
        with pytest.raises(KeyError), dispatch.use("torch"):
            raise KeyError
        assert dispatch.backend(CPU) == "triton"
    assert dispatch.backend(CPU) == "torch"


def test_use_refuses_what_could_not_run(monkeypatch):
    with pytest.raises(ValueError, match="no backend 'cuda': triton, torch"), dispatch.use("cuda"):  # pyright: ignore
        pass
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), dispatch.use("triton"):
        pass
    assert dispatch.backend(CPU) == "torch"


def test_a_gpu_without_triton_is_an_error_in_one_line(undecided, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match="needs triton, which cannot be imported") as e:
        dispatch.backend(CUDA)
    assert "\n" not in str(e.value)


def test_the_file_of_an_op_is_that_of_its_backend(monkeypatch):
    assert dispatch.module("vsa", CPU).__name__ == "fastdmd_kernels.vsa.torch"


def test_describe_says_why(undecided, monkeypatch):
    pytest.importorskip("triton")
    assert dispatch.describe(CPU) == dict.fromkeys(dispatch.OPS, "torch (cpu)")
    assert set(dispatch.describe(CUDA).values()) == {f"triton ({'ROCm' if torch.version.hip else 'CUDA'})"}
    with dispatch.use("torch"):
        assert set(dispatch.describe(CUDA).values()) == {"torch (forced)"}


def test_triton_is_imported_by_who_needs_it_only():
    """Importing the kernels and running an op on a CPU do not: TRITON_INTERPRET is read at that moment."""
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from fastdmd_kernels import Tiles, video_sparse_attention
x = torch.randn(1, 64, 1, 16)
video_sparse_attention(x, x, x, x, Tiles((4, 4, 4)), 1)
assert "triton" not in sys.modules
"""
    subprocess.run([sys.executable, "-I", "-c", code, str(KERNELS)], check=True)


def test_the_answer_is_a_constant_of_a_graph(undecided):
    """Asked for the first time while tracing, too: dynamo must not walk into the import of triton."""
    pytest.importorskip("triton")

    def double_on_triton(x: torch.Tensor) -> torch.Tensor:
        return 2 * x if dispatch.backend(CUDA) == "triton" else x

    compiled = torch.compile(double_on_triton, fullgraph=True, backend="eager")
    assert compiled(torch.ones(2)).tolist() == [2.0, 2.0]
