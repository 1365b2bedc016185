"""What ahead-of-time compilation needs to know of one variant of a kernel."""

from collections.abc import Mapping
from dataclasses import dataclass

from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

# as triton's signatures name them
DTYPES = ("fp32", "fp16", "bf16")
HEAD_DIMS = (64, 128)


@dataclass(frozen=True)
class Spec:
    """Describe one (kernel, dtype, head dim) for one target.

    Pointers and integers that are not in `unaligned` are divisible by 16.
    """

    op: str
    kernel: JITFunction
    dtype: str  # of DTYPES
    head_dim: int
    signature: Mapping[str, str]  # argument -> type, "constexpr" for those below
    constexprs: Mapping[str, object]
    options: Mapping[str, object]  # num_warps, num_stages, enable_fp_fusion, ..: of triton.compile
    tensor_cores: bool  # the kernel must use them
    async_copies: bool  # its inner loop must use cp.async or TMA
    unaligned: tuple[str, ...] = ()


def gpu_target(name: str) -> GPUTarget:
    """Return the target named "sm_90", "gfx942" and the like; raise ValueError for other names."""
    if name.startswith("sm_") and name[3:].isdigit():
        return GPUTarget("cuda", int(name[3:]), 32)
    if name.startswith("gfx"):
        return GPUTarget("hip", name, 64)
    raise ValueError(f"target '{name}' is not a GPU's; use one like sm_90 or gfx942")
