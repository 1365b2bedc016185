"""Options and the session of the benchmarks: ceilings measured once, result lines written as they come."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from bench import clock, record
from bench.sizes import PLANS, Plan

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HERE = Path(__file__).parent / "results"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--plan", choices=list(PLANS), default="gpu" if DEVICE.type == "cuda" else "cpu")
    parser.addoption(
        "--results", type=Path, action="append", help=f"folders of the lines; default {HERE.name}/"
    )
    parser.addoption("--minutes", type=float, default=60.0, help="start no benchmark after so many")


@dataclass
class Session:
    device: torch.device
    plan: Plan
    folders: list[Path]
    ends: float  # by time.monotonic
    flush: clock.Flush = field(init=False)
    machine: dict[str, object] = field(init=False)
    ceilings: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self.flush = clock.Flush(self.device)
        self.machine = record.machine(self.device)
        self.ceilings = clock.ceilings(self.device, self.plan.matmul)

    def write(self, line: dict[str, object]) -> None:
        line = line | {"ceilings": self.ceilings} | self.machine
        record.append(self.folders, record.file_name(self.device), line)


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Session:
    option = request.config.getoption
    ends = time.monotonic() + 60 * option("--minutes")
    return Session(DEVICE, PLANS[option("--plan")], option("--results") or [HERE], ends)
