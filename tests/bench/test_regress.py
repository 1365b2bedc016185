"""bench.regress passes what is as it was, and names what a planted fault makes more of."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import make_config

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[2]))

from bench import counts, regress
from bench.counts import Part
from fastdmd.methods.dmd import DMD
from fastdmd.models.wan.layers import Block


@pytest.fixture
def regressed(tmp_path, monkeypatch, capsys):
    """Store a baseline of one part, then run again with what is planted; return the status and the output."""
    monkeypatch.setattr(regress, "BASELINE", tmp_path / "regress.json")

    def run(part: str, plant=None) -> tuple[int, str]:
        monkeypatch.setattr(counts, "PARTS", {part: counts.PARTS[part]})
        assert regress.main(["--store"]) == 0
        assert regress.main([]) == 0
        assert "as in the baseline" in capsys.readouterr().out
        plant()
        return regress.main([]), capsys.readouterr().out

    return run


def wrap(monkeypatch, owner, name, around):
    """Put `around(original, *arguments)` in the place of a method."""
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *arguments, **keys: around(original, *arguments, **keys))


def test_a_host_read_in_a_loss_fails(regressed, monkeypatch):
    monkeypatch.setattr(counts, "CYCLES", ("tiny_dmd",))

    def reads(loss, *arguments):
        found, metrics = loss(*arguments)
        found.detach().item()
        return found, metrics

    status, out = regressed("cycle", lambda: wrap(monkeypatch, DMD, "loss", reads))
    assert status == 1
    [row] = [line for line in out.splitlines() if "tiny_dmd" in line]
    # one of each loss of the cycle: a student's and two critics'
    assert row.split() == ["cycle,", "tiny_dmd:", "host", "reads", "0", "3", "WORSE"]


def test_a_constant_and_a_second_call_fail(regressed, monkeypatch):
    monkeypatch.setattr(counts, "CYCLES", ("tiny_lcm",))

    def twice(loss, self, *arguments):
        loss(self, *arguments)
        found, metrics = loss(self, *arguments)
        return found + counts.torch.tensor([1.0]).to("meta").sum(), metrics

    from fastdmd.methods.lcm import LCM

    status, out = regressed("cycle", lambda: wrap(monkeypatch, LCM, "loss", twice))
    rows = [line.split(": ")[1].split() for line in out.splitlines() if "tiny_lcm" in line]
    assert status == 1
    assert ["constants", "0", "1", "WORSE"] in rows
    assert ["calls,", "teacher", "1", "2", "WORSE", "by", "100.00%"] in rows


def test_an_extra_launch_in_a_block_fails(regressed, monkeypatch):
    def with_sum(tokens_after, self, *arguments):
        out = tokens_after(self, *arguments)
        return out + out.sum(1, keepdim=True)

    status, out = regressed("eager block", lambda: wrap(monkeypatch, Block, "tokens_after", with_sum))
    [row] = [line for line in out.splitlines() if "dense, forward: launches, elementwise" in line]
    *_, before, now, worse, _, _ = row.split()
    assert status == 1
    assert worse == "WORSE"
    assert int(now) - int(before) == 2
    assert "eager block, sparse, backward: bytes, elementwise" in out


@pytest.mark.slow
def test_a_larger_planned_peak_fails(regressed, monkeypatch):
    monkeypatch.setattr(counts, "PEAKS", ("wan1_3b_dmd",))

    def keeps_more(tokens_after, self, x, *arguments):
        return tokens_after(self, x, *arguments) * x.float().exp().to(x.dtype)

    status, out = regressed("planned peak", lambda: wrap(monkeypatch, Block, "tokens_after", keeps_more))
    [row] = [line for line in out.splitlines() if "wan1_3b_dmd" in line]
    assert status == 1
    assert "WORSE by" in row


@pytest.mark.slow
def test_a_graph_more_fails(regressed, monkeypatch):
    """One block has another number in its code than the others, and shares no graph with them."""

    def numbered(init, self, *arguments, **keys):
        init(self, *arguments, **keys)
        self.eps *= 1.01 if len(made) == 1 else 1.0
        made.append(self)

    made: list[Block] = []
    status, out = regressed("graphs", lambda: wrap(monkeypatch, Block, "__init__", numbered))
    [row] = [line for line in out.splitlines() if "tiny_dmd: graphs" in line]
    assert status == 1
    assert "WORSE" in row


# -------------------------------------------------------------------------------------------------- the table


def planted(monkeypatch, tmp_path, before: Part, now: Part) -> int:
    monkeypatch.setattr(regress, "BASELINE", tmp_path / "regress.json")
    monkeypatch.setattr(counts, "PARTS", {"kernels": before})
    assert regress.main(["--store"]) == 0
    monkeypatch.setattr(counts, "PARTS", {"kernels": now})
    return regress.main([])


def test_fewer_asks_for_a_new_baseline(tmp_path, monkeypatch, capsys):
    assert planted(monkeypatch, tmp_path, Part(lambda: {"spills": 8}), Part(lambda: {"spills": 6})) == 1
    assert "better by 25.00%; store: python -m bench.regress --store" in capsys.readouterr().out


def test_a_count_that_came_or_went_fails(tmp_path, monkeypatch, capsys):
    status = planted(monkeypatch, tmp_path, Part(lambda: {"a": 8, "b": 0}), Part(lambda: {"a": 8, "c": 0}))
    out = capsys.readouterr().out
    assert status == 1
    assert "kernels, b         0     -  gone; store:" in out
    assert "kernels, c         -     0  new; store:" in out


def test_another_version_is_said_and_no_failure(tmp_path, monkeypatch, capsys):
    before = Part(lambda: {"registers": 8}, "torch")
    now = Part(lambda: {"registers": 9}, "triton", digits=3)
    assert planted(monkeypatch, tmp_path, before, now) == 0
    [row] = [line for line in capsys.readouterr().out.splitlines() if "not comparable" in line]
    assert row.split()[1:4:2] == ["torch", "triton"]
    assert planted(monkeypatch, tmp_path, before, replace(before, count=now.count)) == 1


def test_a_part_without_baseline_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(regress, "BASELINE", tmp_path / "none.json")
    monkeypatch.setattr(counts, "PARTS", {"kernels": Part(lambda: {"spills": 0})})
    assert regress.main([]) == 1
    assert "no baseline; store one" in capsys.readouterr().out


def test_the_stored_baseline_is_read_by_pytest_benchmark(tmp_path):
    path = regress.BASELINE
    entries = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
    assert {each["name"] for each in entries} == set(counts.PARTS)
    command = [sys.executable, "-m", "pytest_benchmark", "compare", str(path)]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert all(f"{name} " in shown.stdout for name in counts.PARTS)


def test_calls_of_a_cycle_are_those_of_the_method(tmp_path):
    """Of DMD whose critic learns in both steps of a cycle, and the student in the first."""
    config = make_config(tmp_path, "dmd", "rollout.exit='last'")
    found = counts.of_cycle(config)
    assert config.run.batch_size == 2
    assert found["calls, student"] == 3 * 2  # steps of a rollout, and rollouts
    assert found["calls, critic"] == 1 + 2  # its score, and its own losses
    assert found["calls, teacher"] == 1
    assert found["samples, teacher"] == 2 * config.run.batch_size  # both sides of guidance
    assert found["host reads"] == found["constants"] == 0
