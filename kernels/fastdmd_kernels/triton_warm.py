"""Compile without launching: triton's disk cache is filled as a run would fill it, with no GPU at hand."""

# pyright: reportIncompatibleMethodOverride=false
# (triton's base class says that its methods return nothing)

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastdmd_kernels import dispatch
from fastdmd_kernels.aot_spec import gpu_target


def this_gpu() -> str:
    """Return the target of the GPU of this machine; raise ValueError without one."""
    if not torch.cuda.is_available():
        raise ValueError("no GPU on this machine; name one with --target, e.g. --target sm_90")
    target: Any = driver.active.get_current_target()  # its base class says None
    arch = target.arch
    return f"sm_{arch}" if isinstance(arch, int) else arch


class _Aim(DriverBase):
    """Stand in for a driver: it knows for which GPU to compile, and of no device."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_device_interface(self) -> Any:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def get_empty_cache_for_benchmark(self) -> Any:
        raise NotImplementedError

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    @staticmethod
    def is_active() -> bool:
        return True


class _Implementations(TorchDispatchMode):
    """Run what an op of ours does on a GPU, on the meta device.

    There it would be its fake, which launches nothing.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace != "fastdmd":
            return func(*args, **kwargs)
        for key in ("CUDA", "CompositeExplicitAutograd"):
            if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key):
                return func._op_dk(getattr(torch._C.DispatchKey, key), *args, **kwargs)
        raise AssertionError(f"{func} has no implementation")


@contextmanager
def compiling(target: str) -> Iterator[list[bool]]:
    """Compile the kernels of ops that are called on meta tensors inside for `target`, and launch nothing.

    Yields a list that grows by one entry per kernel variant: whether the disk cache had it already.
    """
    cached: list[bool] = []
    run = JITFunction.run
    listener = knobs.compilation.listener
    active = driver._active

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    driver.set_active(_Aim(gpu_target(target)))
    JITFunction.run = compile_only
    knobs.compilation.listener = lambda **event: cached.append(event["cache_hit"])
    try:
        with dispatch.use("triton", launches=False), _Implementations():
            yield cached
    finally:
        JITFunction.run, knobs.compilation.listener = run, listener
        driver._active = active  # not reset_active: without a GPU there is no default
