"""Which backend runs an op: "triton" on CUDA and ROCm, "torch" on CPU and MPS.

That is decided once per process and device. There is no fallback: a GPU whose triton cannot be imported is an
error here, not a slow run.
"""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Literal, get_args

import torch

Backend = Literal["triton", "torch"]

OPS = ("video_sparse_attention", "dmd_loss", "sid_loss")

# a plain global, not a ContextVar: autograd runs the backward of a GPU op in its own thread
_forced: Backend | None = None


def _import_triton() -> None:
    try:
        importlib.import_module("triton")
    except ImportError as e:
        raise RuntimeError(f"a {_gpu()} device needs triton, which cannot be imported: {e}") from e


def _gpu() -> str:
    return "ROCm" if torch.version.hip else "CUDA"


_decided: dict[str, tuple[Backend, str]] = {}


def _decide(device_type: str) -> tuple[Backend, str]:
    """Return (backend, why) for a device type."""
    if device_type not in _decided:
        if device_type == "cuda":
            _import_triton()
            _decided[device_type] = "triton", _gpu()
        elif device_type in ("cpu", "mps", "meta"):
            _decided[device_type] = "torch", device_type
        else:
            raise ValueError(
                f"no backend for device {device_type!r}: cuda (CUDA, ROCm), cpu and mps have one"
            )
    return _decided[device_type]


# As torch.compiler.assume_constant_result does, which would import dynamo and triton. A graph takes the
# answer as a constant: tracing the import would break it, and dynamo does not see functools.cache.
_decide.__dict__["_dynamo_marked_constant"] = True


def backend(device: torch.device) -> Backend:
    """Return the backend of all ops on this device.

    Raises ValueError for an unknown kind of device, RuntimeError for a GPU without triton.
    """
    return _forced or _decide(device.type)[0]


@contextmanager
def use(name: Backend, launches: bool = True) -> Iterator[None]:
    """Run all ops of the process on one backend, for tests and comparisons, and restore what was before.

    "triton" without a GPU runs CPU tensors through triton's interpreter, which needs TRITON_INTERPRET=1 set
    before triton is first imported. Where nothing is launched (`warm` compiles only) it needs neither. Raises
    ValueError for an unknown name, RuntimeError when triton could not run.
    """
    global _forced
    if name not in get_args(Backend):
        raise ValueError(f"no backend {name!r}: {', '.join(get_args(Backend))}")
    if name == "triton":
        _import_triton()
        if launches and not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError("triton runs on the CPU only through its interpreter: set TRITON_INTERPRET=1")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def module(op: str, device: torch.device) -> ModuleType:
    """Import and return what implements an op on this device: `<op>/triton.py` or `<op>/torch.py`."""
    return importlib.import_module(f"fastdmd_kernels.{op}.{backend(device)}")


def describe(device: torch.device) -> dict[str, str]:
    """Tell `doctor` which backend each op has, as op -> "backend (why)"; raises what `backend` raises."""
    line = f"{backend(device)} ({'forced' if _forced else _decide(device.type)[1]})"
    return dict.fromkeys(OPS, line)
