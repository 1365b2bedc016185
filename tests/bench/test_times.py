"""Times of bench.regress: a slower op fails, noise does not."""

import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[2]))

from bench import ratios, regress


@pytest.fixture
def found(tmp_path, monkeypatch):
    """Give one op ratios in the place of measured ones; what is stored is in a folder of the test's own."""
    monkeypatch.setattr(regress, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ratios, "PAIRS", {"op": ratios.rotation})
    values: list[list[float]] = []
    monkeypatch.setattr(ratios, "measure", lambda device, names: {name: values.pop(0) for name in names})
    values += [[1.9, 2.0, 2.1]] * 6
    assert regress.main(["--times", "--store"]) == 0
    assert not values
    return values


def test_an_op_that_is_slower_three_times_fails(found, capsys):
    found += [[2.2, 2.2, 2.3], [2.2, 2.2, 9.0], [2.1, 2.12, 2.3]]
    assert regress.main(["--times"]) == 1
    assert "op     2.000  2.120  SLOWER +6.0%" in capsys.readouterr().out
    assert not found


def test_the_best_of_three_tries_counts(found, capsys):
    found += [[2.2, 2.2, 2.3], [2.0, 2.09, 2.2]]
    assert regress.main(["--times"]) == 0
    assert "op     2.000  2.090  +4.5%" in capsys.readouterr().out
    assert not found


def test_a_machine_without_baseline_and_another_torch(found, monkeypatch, capsys):
    found += [[2.0], [2.0]]
    monkeypatch.setattr(torch, "__version__", "3.0.0+cpu")
    assert regress.main(["--times"]) == 0
    assert "not comparable" in capsys.readouterr().out
    monkeypatch.setattr(regress.record, "device_name", lambda device: "Abacus (R) 1")
    assert regress.main(["--times"]) == 1
    assert "no baseline of this machine; store one: python -m bench.regress --store --times" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("slower", [1.0, 1.1])
def test_ten_percent_more_is_seen_through_noise_and_none_is_not(tmp_path, monkeypatch, slower):
    """By a clock of the test's own: a machine that slows down and recovers, calls that vary by a fifth."""
    monkeypatch.setattr(regress, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    draw, clock, cost = random.Random(0), [0.0], [1.0]
    monkeypatch.setattr(ratios, "time", SimpleNamespace(process_time=lambda: clock[0]))

    def call(seconds: float) -> None:
        load = 1.5 + math.sin(clock[0] / 50)
        clock[0] += seconds * load * draw.uniform(0.8, 1.2)

    monkeypatch.setattr(
        ratios, "PAIRS", {"op": lambda sizes, draw: ratios.Pair(lambda: call(2 * cost[0]), lambda: call(1.0))}
    )
    assert regress.main(["--times", "--store"]) == 0
    cost[0] = slower
    assert [regress.main(["--times"]) for _ in range(20)] == [int(slower > 1)] * 20


def test_each_op_has_a_reference_beside_it(monkeypatch):
    monkeypatch.setattr(ratios, "ROUNDS", 2)
    found = ratios.measure(torch.device("cpu"), list(ratios.PAIRS))
    assert found.keys() == {"dmd_loss", "rotate", "block"}
    assert all(len(values) == 2 and min(values) > 0 for values in found.values())
