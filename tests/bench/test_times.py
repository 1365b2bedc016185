"""Times of bench.regress: a slower op fails, noise does not."""

import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[2]))

from bench import ratios, regress

CPU = torch.device("cpu")


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


@pytest.mark.slow
def test_ten_percent_more_is_seen_and_none_is_not(tmp_path, monkeypatch):
    """By the process's clock: an op that goes on for a tenth of the time that it took."""
    monkeypatch.setattr(regress, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ratios, "PAIRS", {"block": ratios.block})
    assert regress.main(["--times", "--store"]) == 0
    assert regress.main(["--times"]) == 0

    def slower(sizes, draw):
        pair = ratios.block(sizes, draw)

        def run():
            start = time.process_time()
            pair.op()
            end = start + 1.1 * (time.process_time() - start)
            while time.process_time() < end:
                pass

        return ratios.Pair(run, pair.reference)

    monkeypatch.setattr(ratios, "PAIRS", {"block": slower})
    assert regress.main(["--times"]) == 1
