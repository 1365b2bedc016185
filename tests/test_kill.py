"""A run killed at any instant resumes to the same losses and weights, bit for bit.

`python -m tests.test_kill CONFIG [key.path=value ..]` shows it of any configuration: one run undisturbed and
one killed ten times at random, every start a fresh process of the command line; then all rows and all tensors
are compared.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdmd import checkpoint, train
from fastdmd import config as configs
from fastdmd.log import RunLog, read_metrics

COMMAND = "from fastdmd.cli import main; main()"
SHORT = (
    "run.batch_size=1",
    "checkpoint.keep=1",
    "validation.samples=1",
    "validation.teacher_reference=false",
    "validation.every=100",  # and before training
)

forks = multiprocessing.get_context("forkserver")  # one server imports torch, which takes seconds, and forks
forks.set_forkserver_preload(["fastdmd.train", "torch._dynamo", "pytest"])


class Fork:
    """`train` in a process of its own, with Popen's poll, kill and wait.

    It dies by itself at its `death`-th write.
    """

    def __init__(self, config: Path, *overrides: str, death: int = 0) -> None:
        self.process = forks.Process(target=train_until, args=(config, overrides, death))
        self.process.start()

    def poll(self) -> int | None:
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()

    def wait(self) -> int | None:
        self.process.join()
        return self.process.exitcode


def train_until(config: Path, overrides: tuple[str, ...], death: int) -> None:
    torch.set_num_threads(1)
    writes = count(1)

    def mortal(owner: Any, name: str, half: Callable[..., object] = lambda *_: None) -> None:
        """Let the process die at a call of owner.name, half done."""
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if next(writes) == death:
                half(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(owner, name, call)

    mortal(os, "fsync")
    mortal(os, "rename")
    mortal(os, "replace")
    mortal(checkpoint, "save_file", lambda tensors, path: path.write_bytes(b"half"))
    mortal(shutil, "rmtree", lambda path: next(path.iterdir()).unlink())
    mortal(RunLog, "write", lambda log, *_: print('{"step": ', end="", file=log.file, flush=True))
    train.train(configs.load(config, overrides))


def result(run: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return what kills must not change: rows without what the clock says, and hashes of the last tensors."""
    rows = [
        {k: v for k, v in row.items() if not k.startswith("perf/")}
        for row in read_metrics(run / "metrics.jsonl")
    ]
    manifest, _ = checkpoint.load(checkpoint.complete(run / "checkpoints")[-1])
    assert (run / "summary.json").is_file()
    return rows, manifest["files"]


def last_step(run: Path) -> int:
    return max((row["step"] for row in read_metrics(run / "metrics.jsonl")), default=0)


def kill_at_random(
    start: Callable[[], Any], run: Path, steps: int, kills: int, seed: int, wait: float
) -> list[int]:
    """Start, wait for a random step and up to `wait` seconds more, kill -9, start again; let the last end.

    `start` gives a Popen of the same command each time. Return the last step written at each kill.
    """
    draw, found = random.Random(seed), [0]
    for _ in range(kills):
        target = min(found[-1] + draw.randrange(2 * steps // kills), steps - 1)
        process = start()
        while process.poll() is None and last_step(run) < target:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, wait))
        process.kill()
        process.wait()
        found.append(last_step(run))
    assert start().wait() == 0
    return found[1:]


def demonstrate(config: str, *overrides: str, kills: int = 10, seed: int = 0, wait: float = 1.0) -> str:
    """Compare a run with one that is killed, both made anew in OUTPUT_DIR_whole and OUTPUT_DIR_killed."""
    settings = configs.load(config, overrides).run
    whole, killed = (Path(f"{settings.output_dir}_{name}") for name in ("whole", "killed"))

    def start(run: Path) -> subprocess.Popen[bytes]:
        words = ["train", config, *overrides, f"run.output_dir={json.dumps(str(run))}"]
        return subprocess.Popen([sys.executable, "-c", COMMAND, *words], stdout=subprocess.DEVNULL)

    for run in (whole, killed):
        shutil.rmtree(run, ignore_errors=True)
    assert start(whole).wait() == 0
    steps = kill_at_random(lambda: start(killed), killed, settings.max_steps, kills, seed, wait)
    (rows, files), (rows_killed, files_killed) = result(whole), result(killed)
    assert rows_killed == rows, "the rows differ"
    assert files_killed == files, "the tensors differ"
    what = f"{len(rows)} rows and the tensors of {', '.join(files)}"
    return f"killed after steps {steps}: {what} are equal bit for bit"


@pytest.mark.slow
@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.campaign)])
def test_killed_at_every_write(tmp_path, dmd_toml, stride):
    """Kill at each write (each fifth) of two steps with two checkpoints, the second of which drops the first.

    Writes are files, flushes, renames and removals.
    """

    def command(name: str) -> tuple[Path, ...]:
        return (
            dmd_toml,
            *SHORT,
            "run.max_steps=2",
            "checkpoint.every=1",
            f"run.output_dir='{tmp_path / name}'",
        )

    assert Fork(*command("whole")).wait() == 0
    expected = result(tmp_path / "whole")
    assert [row["step"] for row in expected[0]] == [0, 1, 2]
    for death in count(1, stride):
        run = tmp_path / str(death)
        if Fork(*command(run.name), death=death).wait() == 0:
            break
        for path in checkpoint.complete(run / "checkpoints"):
            checkpoint.load(path)
        assert Fork(*command(run.name)).wait() == 0
        assert result(run) == expected, death
        assert [path.name for path in (run / "checkpoints").glob("step_*")] == ["step_00000002"]
        shutil.rmtree(run)
    assert death > 40


def test_killed_ten_times_at_random(tmp_path, dmd_toml):
    command = (dmd_toml, *SHORT, "run.max_steps=40")
    assert Fork(*command, f"run.output_dir='{tmp_path / 'whole'}'").wait() == 0
    steps = kill_at_random(lambda: Fork(*command), tmp_path / "run", steps=40, kills=10, seed=0, wait=0.02)
    assert len(set(steps)) > 5
    rows, files = result(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(41))
    assert (rows, files) == result(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.campaign
def test_the_command_line_killed_at_random(dmd_toml):
    assert "40 rows and the tensors of student" in demonstrate(
        str(dmd_toml), "run.max_steps=40", kills=1, wait=0.5
    )


if __name__ == "__main__":
    print(demonstrate(*sys.argv[1:]))
