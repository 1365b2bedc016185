"""Print the resident bytes that steps of a run take above those of its process, for `test_resident.py`.

Arguments: a small configuration, whose steps load code and libraries first, the large one, and overrides.
"""

import gc
import sys
from pathlib import Path

import torch
from torch import Tensor

from fastdmd import config as configs
from fastdmd import train
from fastdmd.config import Config
from fastdmd.plan import ops
from fastdmd.plan.ops import Fused
from fastdmd.rng import Rng
from fastdmd.run import Run, build


def status(key: str) -> int:
    """Return a number of bytes of this process."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.partition(f"{key}:")[2].split()[0])


def two_steps(config: Config) -> Run:
    """Return a run after a second step, when AdamW has its moments."""
    run = build(config)
    with Fused(lambda grad_enabled: None):
        train.take_step(run)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        train.take_step(run)
    return run


def main(small: str, large: str, *overrides: str) -> None:
    torch.set_num_threads(1)
    Tensor.backward = ops.backward
    Rng.shared_integer = lambda self, high: high - 1  # as the plan draws
    two_steps(configs.load(small, overrides))
    gc.collect()
    before = status("VmRSS")
    run = two_steps(configs.load(large, overrides))
    assert run.step == 2
    print(status("VmHWM") - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
