"""What a run tells: metrics.jsonl over kills and resumes, the mirrors, the progress line."""

import io
import json
import math
import os
import socket
import struct
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from fastdmd import log
from fastdmd.log import Config, Progress, RunLog, read_metrics

ROWS = [{"step": step, "train/loss_student": 0.1 * step} for step in (1, 2, 3)]


def write(folder, first: int, last: int, *backends: str, kill: bool = False) -> list[log.Mirror]:
    """Write the log of a run that resumes from `first` and goes to `last`; step 2 has no "valid/swd"."""
    run = RunLog(Config(backends=backends), folder, first)
    if first == 0:
        run.write(0, {"valid/oracle": 0.0})
    for row in ROWS[first:last]:
        run.write(row["step"], {"train/loss_student": row["train/loss_student"]})
        if row["step"] == 2:
            run.write(2, {"valid/oracle": 0.5, "valid/swd": None})
    run.sync()
    if not kill:
        run.__exit__(None)
    return run.mirrors


def steps(folder) -> list[int]:
    return [row["step"] for row in read_metrics(folder / "metrics.jsonl")]


def test_a_resumed_run_writes_its_rows_once(tmp_path):
    write(tmp_path, 0, 3)
    whole = (tmp_path / "metrics.jsonl").read_text()
    assert steps(tmp_path) == [0, 1, 2, 2, 3]
    assert json.loads(whole.splitlines()[3]) == {"step": 2, "valid/oracle": 0.5, "valid/swd": None}
    write(tmp_path, 2, 2)
    assert steps(tmp_path) == [0, 1, 2, 2]
    write(tmp_path, 1, 3)
    assert (tmp_path / "metrics.jsonl").read_text() == whole
    write(tmp_path, 0, 0)
    assert steps(tmp_path) == [0]  # of the new one: a run at 0 starts anew


@pytest.mark.parametrize("torn", ["{", '{"step": 3, "train/loss_student": 0.30000', '{"step": 3, "a": 1.0}'])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    write(tmp_path, 0, 2)
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write(torn)
    assert steps(tmp_path) == [0, 1, 2, 2]
    write(tmp_path, 2, 3)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 2, 3]
    assert read_metrics(tmp_path / "metrics.jsonl", 1) == [{"step": 0, "valid/oracle": 0.0}, ROWS[0]]
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_numbers_are_read_back_exactly(tmp_path):
    values = {"a": 0.1 + 0.2, "b": 1e-45, "c": 1.7976931348623157e308, "d": 2.0}
    with RunLog(Config(), tmp_path, 0) as run:
        run.write(1, values)
    write(tmp_path, 1, 1)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, **values}]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_null(tmp_path, monkeypatch, bad):
    """In rows, in rows of an older version that a resume writes again, and absent from the mirrors."""
    monkeypatch.setitem(sys.modules, "wandb", wandb := FakeWandb())
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "valid/swd": bad}) + "\n")
    with RunLog(Config(backends=("wandb",)), tmp_path, 1) as run:
        run.write(2, {"a": 0.5, "valid/swd": bad})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == ['{"step": 1, "valid/swd": null}', '{"step": 2, "a": 0.5, "valid/swd": null}']
    assert wandb.runs == {"run0": [(1, {}), (2, {"a": 0.5})]}


def test_sync_flushes_the_rows_to_the_disk(tmp_path, monkeypatch):
    with RunLog(Config(), tmp_path, 0) as run:
        run.write(1, {"a": 1.0})
        flushed = []
        monkeypatch.setattr(log.os, "fsync", lambda fd: flushed.append(os.fstat(fd).st_ino))
        run.sync()
    assert flushed == [(tmp_path / "metrics.jsonl").stat().st_ino]


class FakeWandb(types.ModuleType):
    """A server that keeps what it got of each run, and drops the steps that it has, as wandb does."""

    def __init__(self, keep: bool = True) -> None:
        super().__init__("wandb")
        self.keep, self.runs, self.calls = keep, {}, []

    def init(self, *, id, resume, **settings) -> types.SimpleNamespace:
        name = id or f"run{len(self.calls)}"
        self.calls.append({"id": id, "resume": resume, **settings})
        rows = self.runs.setdefault(name, []) if self.keep else []
        run = types.SimpleNamespace(id=name, step=1 + rows[-1][0] if rows else 0, codes=[], rows=rows)

        def take(values: dict[str, float], step: int) -> None:
            if step >= run.step:
                run.step = step
                rows.append((step, values))

        run.log, run.finish = take, lambda exit_code: run.codes.append(exit_code)
        return run


EXPECTED = [
    (0, {"valid/oracle": 0.0}),
    (1, {"train/loss_student": 0.1}),
    (2, {"train/loss_student": 0.2}),
    (2, {"valid/oracle": 0.5}),
    (3, {"train/loss_student": 0.1 * 3}),
]


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", wandb := FakeWandb())
    write(tmp_path, 0, 2, "wandb", kill=True)
    server = wandb.runs["run0"]
    del server[2:]  # what the kill kept from the server
    write(tmp_path, 2, 3, "wandb")
    assert wandb.runs == {"run0": server}
    assert server == EXPECTED
    for call, known in zip(wandb.calls, (None, "run0"), strict=True):
        assert call == {
            "id": known,
            "resume": "allow",
            "project": "fastdmd",
            "name": tmp_path.name,
            "dir": str(tmp_path),
        }


def test_wandb_is_not_told_twice(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", wandb := FakeWandb())
    write(tmp_path, 0, 3, "wandb", kill=True)
    write(tmp_path, 1, 3, "wandb")
    assert wandb.runs == {"run0": EXPECTED}


def test_wandb_offline_has_the_whole_run_in_its_newest_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(keep=False))
    write(tmp_path, 0, 2, "wandb", kill=True)
    (mirror,) = write(tmp_path, 2, 3, "wandb")
    assert mirror.run.id == "run0"
    assert mirror.run.rows == EXPECTED


def test_a_run_that_starts_anew_is_another_for_wandb(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", wandb := FakeWandb())
    write(tmp_path, 0, 3, "wandb")
    write(tmp_path, 0, 1, "wandb")
    assert wandb.runs == {"run0": EXPECTED, "run1": EXPECTED[:2]}


@pytest.mark.parametrize("failed", [False, True])
def test_wandb_hears_of_a_failure(tmp_path, monkeypatch, failed):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
    run = RunLog(Config(backends=("wandb",), project="p", run_name="n"), tmp_path, 0)
    try:
        with run:
            if failed:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert run.mirrors[0].run.codes == [int(failed)]


class Net(NamedTuple):
    """A proxy that nobody answers behind: a process that reaches for the network connects to it."""

    server: socket.socket

    def was_touched(self) -> bool:
        self.server.setblocking(False)
        try:
            self.server.accept()[0].close()
        except BlockingIOError:
            return False
        return True


@pytest.fixture
def network(monkeypatch) -> Iterator[Net]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        yield Net(server)


def offline_rows(folder: Path) -> tuple[str, list[tuple[int, dict[str, float]]], int]:
    """Return the id, the rows and the exit code in wandb's file of an offline run.

    It is LevelDB's log format: 7 bytes, then records of a checksum, a length, a kind (1: whole), a message.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    [path] = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, at = path.read_bytes(), 7
    name, rows, code = "", [], -1
    while at + 7 <= len(data):
        _, size, kind = struct.unpack_from("<IHB", data, at)
        if at + 7 + size > len(data):
            break  # it is being written
        assert kind == 1
        record = Record.FromString(data[at + 7 : at + 7 + size])
        at += 7 + size
        if record.HasField("history"):
            items = record.history.item
            values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
            rows.append((values["_step"], {k: v for k, v in values.items() if not k.startswith("_")}))
        elif record.HasField("run"):
            name = record.run.run_id
        elif record.HasField("exit"):
            code = record.exit.exit_code
    return name, rows, code


def whole_offline_rows(folder: Path) -> tuple[str, list[tuple[int, dict[str, float]]], int]:
    """Return what `offline_rows` does once the exit code is there: a process of wandb's own writes."""
    end = time.monotonic() + 30
    while offline_rows(folder)[2] < 0 and time.monotonic() < end:
        time.sleep(0.02)
    return offline_rows(folder)


def test_wandb_for_real(tmp_path, monkeypatch, network):
    """Offline, where a resumed run's folder has all its rows: syncing replaces a run."""
    pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "SILENT": "true", "ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    write(tmp_path, 0, 2, "wandb")
    first, rows, code = whole_offline_rows(tmp_path)
    together = [
        (0, {"valid/oracle": 0.0}),
        (1, {"train/loss_student": 0.1}),
        (2, {"train/loss_student": 0.2, "valid/oracle": 0.5}),
        (3, {"train/loss_student": 0.1 * 3}),
    ]
    assert (rows, code) == (together[:3], 0)
    (tmp_path / "wandb").rename(tmp_path / "before")  # folders are named by the second
    write(tmp_path, 2, 3, "wandb")
    assert whole_offline_rows(tmp_path) == (first, together, 0)
    assert not network.was_touched()


def test_tensorboard_takes_back_the_steps_that_are_made_again(tmp_path, monkeypatch):
    made = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            self.start, self.scalars, self.done = (folder, purge_step), [], []
            made.append(self)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.scalars.append((step, {name: value}))

        def flush(self) -> None:
            self.done.append("flush")

        def close(self) -> None:
            self.done.append("close")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    write(tmp_path, 0, 3, "tensorboard", kill=True)
    write(tmp_path, 2, 3, "tensorboard")
    folder = str(tmp_path / "tensorboard")
    assert [writer.start for writer in made] == [(folder, 0), (folder, 3)]
    assert made[0].scalars == EXPECTED
    assert made[1].scalars == EXPECTED[4:]
    assert [writer.done for writer in made] == [["flush"], ["flush", "close"]]


def test_tensorboard_for_real(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, 0, 3, "tensorboard", kill=True)
    write(tmp_path, 2, 3, "tensorboard")
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in board.Scalars("train/loss_student")]
    assert losses == [(row["step"], pytest.approx(row["train/loss_student"])) for row in ROWS]
    assert [(event.step, event.value) for event in board.Scalars("valid/oracle")] == [(0, 0.0), (2, 0.5)]
    assert set(board.Tags()["scalars"]) == {"train/loss_student", "valid/oracle"}


@pytest.mark.parametrize(("name", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_mirror_that_is_not_installed(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"'{name}' is not installed; pip install 'fastdmd\[{name}\]'"):
        RunLog(Config(backends=(name,)), tmp_path, 0)


class Terminal(io.StringIO):
    def __init__(self, live: bool) -> None:
        super().__init__()
        self.live = live

    def isatty(self) -> bool:
        return self.live


def watch(monkeypatch, live: bool, seconds: list[float], total: int, done: int = 0) -> Terminal:
    """Show a progress line at each of `seconds`, one step further each time."""
    monkeypatch.setattr(sys, "stderr", out := Terminal(live))
    times = iter([0.0, *seconds])
    monkeypatch.setattr(log.time, "monotonic", lambda: next(times))
    with Progress("step", total, done) as progress:
        for i in range(len(seconds)):
            progress.show(done + i + 1, "loss 1")
    return out


def test_progress_on_a_terminal_is_one_line(monkeypatch):
    out = watch(monkeypatch, True, [30, 60, 60.1, 90], total=1004, done=1000).getvalue()
    start = "\r\x1b[2Kstep "
    assert out.split(start)[1:] == [
        "1001/1004  30.00 s each  ETA 1:30  loss 1",
        "1002/1004  30.00 s each  ETA 1:00  loss 1",  # the next comes too soon
        "1004/1004  22.50 s each  took 1:30  loss 1\n",
    ]


def test_progress_in_a_file_is_a_line_every_ten_seconds(monkeypatch):
    out = watch(monkeypatch, False, [5, 10, 15, 3600], total=4).getvalue()
    assert out.splitlines() == [
        "step 2/4  5.00 s each  ETA 0:10  loss 1",
        "step 4/4  900.00 s each  took 1:00:00  loss 1",
    ]


@pytest.mark.parametrize("live", [True, False])
def test_progress_that_stops_early_ends_its_line(monkeypatch, live):
    out = watch(monkeypatch, live, [30], total=3).getvalue()
    assert out.endswith("step 1/3  30.00 s each  ETA 1:00  loss 1\n")
    assert out.count("\n") == 1
