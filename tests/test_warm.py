"""`fastdmd warm`: after it, the kernels of a run are all in triton's cache."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fastdmd import config as configs
from fastdmd.warm import sparsities

pytest.importorskip("triton")
REPOSITORY = Path(__file__).parent.parent
CONFIG = REPOSITORY / "configs" / "tiny_dmd.toml"
SPARSE = (
    "precision.compute='bf16'",
    "model.attention={student='vsa', teacher='vsa', critic='vsa'}",
    "vsa={sparsity=0.5, tile=[2, 2, 2]}",
)


def warm(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: under TRITON_INTERPRET, which the tests set, nothing is ever compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", "from fastdmd.cli import main; main()", "warm", str(CONFIG), *arguments]
    return subprocess.run(
        command,
        cwd=REPOSITORY,
        env=environment | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )


def counts(done: subprocess.CompletedProcess[str]) -> tuple[str, int, int]:
    """(target, compiled, found in the cache)."""
    assert done.returncode == 0, done.stderr
    words = done.stdout.replace(":", "").split()
    return words[0], int(words[2]), int(words[4])


def test_a_second_process_compiles_nothing(tmp_path):
    target, compiled, cached = counts(warm(tmp_path, "--target", "sm_90", *SPARSE))
    assert target == "sm_90"
    assert compiled >= 9  # pool, select, forward, dq, the inversion and dkdv; the loss's three
    assert cached == 0
    names = {path.stem for path in tmp_path.rglob("*.cubin")}
    assert {"_vsa_fwd", "_vsa_bwd_dq", "_vsa_bwd_dkdv", "_dmd_reduce", "_dmd_write"} <= names

    assert counts(warm(tmp_path, "--target", "sm_90", *SPARSE)) == ("sm_90", 0, compiled)
    # what the cache holds is of that target and dtype, and no more
    assert counts(warm(tmp_path, "--target", "sm_90", *SPARSE[1:]))[1] > 0
    assert counts(warm(tmp_path, "--target", "sm_100", *SPARSE))[1] > 0


def test_dense_runs_need_the_loss_only(tmp_path):
    counts(warm(tmp_path, "--target", "gfx942", SPARSE[0]))
    assert {path.stem.split("_")[1] for path in tmp_path.rglob("*.hsaco")} == {"dmd"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "error: no GPU on this machine; name one with --target, e.g. --target sm_90\n"),
        (("--target", "h100"), "error: target 'h100' is not a GPU's; use one like sm_90 or gfx942\n"),
        (("--target", "sm_70"), "error: no kernels for sm_70; there are for sm_80 and newer\n"),
    ],
)
def test_what_cannot_be_compiled_for_is_one_clear_line(tmp_path, arguments, message):
    done = warm(tmp_path, *arguments, *SPARSE)
    assert (done.returncode, done.stderr) == (2, message)


def test_every_sparsity_of_the_warm_up_is_compiled():
    config = configs.load(
        CONFIG, [*SPARSE, "vsa.warmup_every=100", "vsa.warmup_step=0.2", "run.max_steps=350"]
    )
    assert {round(s, 6) for s in sparsities(config)} == {0.0, 0.2, 0.4, 0.5}
    assert config.vsa
    assert sparsities(replace(config, vsa=replace(config.vsa, warmup_every=0))) == {0.5}
    assert sparsities(replace(config, vsa=None)) == {0.0}
