"""A choice by trial: of the implementations of one op, the fastest of those that are right on this device."""

import statistics
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, TypeVar

import torch
from torch import Tensor

Implementation = TypeVar("Implementation")

# what libraries raise where they cannot run: not installed, no such GPU, dtype or head dim, no memory
REFUSALS = (ImportError, OSError, RuntimeError, ValueError, TypeError, AssertionError)
NEAR = 1.05  # times this near are noise: the first in the order of preference wins, on every rank the same


@dataclass(frozen=True)
class Choice:
    name: str
    # forward and backward of the trial's inputs, of those that are right
    seconds: Mapping[str, float] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)  # name -> why not

    def __str__(self) -> str:
        if not self.seconds:
            return f"{self.name} (pinned)"
        times = [
            f"{name} {1e3 * s:.2f} ms" for name, s in sorted(self.seconds.items(), key=lambda item: item[1])
        ]
        return "; ".join([self.name, *times, *(f"no {name}: {why}" for name, why in self.refused.items())])


class Choices:
    """What an op runs for each (GPU, ..) that was met: by trial, or as it was told."""

    def __init__(self, op: str, names: Collection[str], default: str, probe: Callable[..., Choice]) -> None:
        """Take what `op` is called in errors, what runs on CPU and MPS, and the trial of a (GPU, ..)."""
        self.op, self.names, self.default, self.probe = op, names, default, probe
        # plain attributes, which torch.compile guards on: a choice made later is seen by compiled code
        self.made: dict[tuple[Any, ...], Choice] = {}
        self.forced: str | None = None

    def check(self, name: str) -> None:
        if name not in self.names:
            raise ValueError(f"no {self.op} by {name!r}: {', '.join(self.names)}")

    def prepare(self, device: torch.device, *key: Any, name: str | None = None) -> str:
        """Choose now, by trial or `name`, and return what is chosen; a choice stays until another `name`."""
        if name is not None:
            self.check(name)
        if device.type != "cuda":
            return self.forced or self.default
        where = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
        if name is not None:
            self.made[where, *key] = Choice(name)
        elif (where, *key) not in self.made:
            self.made[where, *key] = self.probe(where, *key)
        return self.made[where, *key].name

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Run the op with one implementation in all of the process, and restore what was before."""
        self.check(name)
        before, self.forced = self.forced, name
        try:
            yield
        finally:
            self.forced = before


def choose(
    op: str,
    device: torch.device,
    candidates: Mapping[str, Implementation],
    check: Callable[[Implementation], None],
    seconds_of: Callable[[Implementation], float],
) -> Choice:
    """Choose the first of the candidates, in order of preference, that is right and, but for noise, fastest.

    `check` raises one of REFUSALS for what is wrong. Raises RuntimeError, with all reasons, if none is right.
    """
    seconds: dict[str, float] = {}
    refused: dict[str, str] = {}
    # the first call may come from under no_grad, inference_mode or autocast
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for name, run in candidates.items():
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                try:
                    check(run)
                    seconds[name] = seconds_of(run)
                except REFUSALS as e:
                    reasons = [str(e) or type(e).__name__, *(str(warning.message) for warning in said)]
                    refused[name] = "; ".join(reason.splitlines()[0] for reason in reasons)
    if not seconds:
        raise RuntimeError(f"no {op} on {device}: {refused}")
    fastest = min(seconds.values())
    return Choice(next(name for name, s in seconds.items() if s <= NEAR * fastest), seconds, refused)


def values(run: Callable[..., Tensor], inputs: Sequence[Tensor], dout: Tensor) -> list[Tensor]:
    """Return the output and the gradients of the inputs, each of which requires one."""
    out = run(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


def hold(
    names: Sequence[str], exact: Sequence[Tensor], plain: Sequence[Tensor], ours: Sequence[Tensor]
) -> None:
    """Raise RuntimeError for errors of more than 4 times the rounding of the plain composition."""
    for name, true, theirs, x in zip(names, exact, plain, ours, strict=True):
        error, limit = _error(x, true), 4 * _error(theirs, true) + 1e-12
        if not error <= limit:
            raise RuntimeError(
                f"wrong {name}: relative error {error:.1e}, of the plain composition {limit / 4:.1e}"
            )


def _error(x: Tensor, exact: Tensor) -> float:
    return ((x.double() - exact).norm() / exact.norm()).item()


def median_seconds(
    call: Callable[[], object], device: torch.device, calls: int = 10, rounds: int = 5
) -> float:
    """Return the median seconds of a call; several are queued at once, so that the host is not measured."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    times = []
    for _ in range(1 + rounds):  # the first warms up
        start = now()
        for _ in range(calls):
            call()
        times.append((now() - start) / calls)
    return statistics.median(times[1:])


def listed(candidates: Sequence[str], packages: Mapping[str, str]) -> str:
    """List candidates with the version of the package that each needs, torch's own without."""
    return ", ".join(
        f"{name} ({installed(packages[name])})" if name in packages else name for name in candidates
    )


def installed(package: str) -> str:
    """Return a package's version, or "not installed"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
