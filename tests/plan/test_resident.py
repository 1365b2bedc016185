"""Test a plan's memory against what the operating system says of a real step on the CPU."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import ARCHITECTURE, make_config, write_wan

from fastdmd import config as configs
from fastdmd.plan import live
from fastdmd.plan.step import trace

SIZE = ("data.resolution=[24, 24]", "data.frames=6", "critic.updates_per_generator=1")
# the allocator gives pages back at once, so that what is resident is what is alive
HONEST = {
    "MALLOC_MMAP_THRESHOLD_": "16384",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
}


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no /proc of Linux")
@pytest.mark.parametrize(
    "keys", [(), pytest.param(("memory.checkpointing='full'",), marks=pytest.mark.campaign)]
)
def test_the_peak_is_what_is_resident_within_five_percent(tmp_path, keys, monkeypatch):
    paths = {}
    for name, heads in (("small", 2), ("large", 16)):
        here = tmp_path / name
        here.mkdir()
        make_config(here, "dmd")
        shape = {"num_attention_heads": heads, "attention_head_dim": 24, "ffn_dim": 64 * heads}
        write_wan(here / "wan", replace(ARCHITECTURE, num_layers=3, **shape))
        paths[name] = here / "dmd.toml"
    monkeypatch.setattr(live, "ROUND", 1)
    phases = trace(configs.load(paths["large"], [*SIZE, *keys]), None).phases
    planned = max(phase.peak for phase in phases.values())
    script = Path(__file__).with_name("resident_step.py")
    command = [sys.executable, str(script), str(paths["small"]), str(paths["large"]), *SIZE, *keys]
    done = subprocess.run(command, env={**os.environ, **HONEST}, capture_output=True, text=True, check=True)
    assert planned > 300e6
    assert int(done.stdout) == pytest.approx(planned, rel=0.05)
