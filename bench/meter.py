"""Where the time of a step goes, part by part, and what it launches.

A part lasts until the next one begins, so parts add up to the whole: draws, each call of a network, the
mathematics between calls, the backward, clipping and update.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.clock import Moment
from fastdmd.run import Run

FORWARD, BACKWARD, OPTIMIZER, GRAPH = "forward", "backward", "optimizer", "forward and backward"
MOVES = ("Memcpy", "Memset")  # of a GPU's events, what is no kernel
OWN = ("CPU", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")
# ops that compute nothing: they make memory, look at it in another way, or read a number of it
IDLE = {
    *("empty", "empty_like", "empty_strided", "new_empty", "as_strided", "view", "_unsafe_view", "alias"),
    *("transpose", "t", "permute", "unsqueeze", "squeeze", "expand", "slice", "select", "split", "unbind"),
    *(
        "split_with_sizes",
        "detach",
        "detach_",
        "unfold",
        "_reshape_alias",
        "_local_scalar_dense",
        "resize_",
        "scalar_tensor",
    ),
}


@dataclass
class Clock:
    """The moments at which parts begin: events in a GPU's queue, the time of the process on a CPU."""

    device: torch.device
    marks: list[tuple[str, Any, float]] = field(default_factory=list)

    def begin(self, part: str) -> None:
        moment = Moment() if self.device.type == "cuda" else time.process_time()
        self.marks.append((part, moment, time.perf_counter()))

    def read(self) -> tuple[Counter[str], float]:
        """Return the seconds of each part, and those of the wall clock in all, and begin anew."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.begin("")
        found: Counter[str] = Counter()
        for (part, start, _), (_, end, _) in zip(self.marks, self.marks[1:], strict=False):
            found[part] += end - start
        wall = self.marks[-1][2] - self.marks[0][2]
        self.marks.clear()
        return found, wall


class Marked:
    """A method that says when its phases draw, compute and are done."""

    def __init__(self, method: Any, clock: Clock) -> None:
        self.method, self.clock, self.phase = method, clock, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def begin(self, what: str) -> None:
        self.clock.begin(f"{self.phase}: {what}")

    def draw(self, phase: str, *arguments: Any) -> Any:
        self.phase = phase
        self.begin("draws")
        return self.method.draw(phase, *arguments)

    def loss(self, *arguments: Any) -> Any:
        self.begin(FORWARD)
        found = self.method.loss(*arguments)
        self.begin(BACKWARD)
        return found

    def before(self, what: str, call: Callable[..., Any], after: str | None = None) -> Callable[..., Any]:
        """Return a call that begins a part, and another one after it."""

        def marked(*arguments: Any) -> Any:
            self.begin(what)
            found = call(*arguments)
            if after is not None:
                self.begin(after)
            return found

        return marked


def attach(run: Run, clock: Clock) -> None:
    """Have a run's steps tell the clock what they do.

    In mode "step" a phase is one graph, in which no clock can be read.
    """
    marked: Any = Marked(run.method, clock)
    run.method = marked
    for optimizer in run.optimizers.values():
        optimizer.clip = marked.before(OPTIMIZER, optimizer.clip)
    if run.capture.mode == "step":
        run.capture.backward = marked.before(GRAPH, run.capture.backward)
        return
    for role, denoiser in run.nets.items():
        denoiser._call = marked.before(f"{FORWARD}, {role}", denoiser._call, FORWARD)


def launches(run: Callable[[], object], device: torch.device) -> dict[str, tuple[int, float]]:
    """Return how often each kernel runs on the device, and its seconds.

    On a CPU: each op that PyTorch's dispatcher hands to it and that computes. Of compiled code there those
    that inductor leaves to PyTorch alone.
    """
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as trace:
        run()
        if gpu:
            torch.cuda.synchronize(device)
    events: Any = trace.events()
    if gpu:
        kernels = [event for event in events if event.device_type == DeviceType.CUDA]
        kernels = [event for event in kernels if not event.name.startswith(MOVES)]
    else:
        kernels = [op for event in events if event.cpu_parent is None for op in ops_in(event)]
    counts: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    for event in kernels:
        counts[event.name] += 1
        seconds[event.name] += (event.device_time_total if gpu else event.cpu_time_total) / 1e6
    return {name: (count, seconds[name]) for name, count in counts.items()}


def ops_in(event: Any) -> Iterator[Any]:
    """Yield the ops of an event of the CPU that compute, and none that these call."""
    space, _, name = event.name.partition("::")
    if space not in ("aten", "fastdmd") or event.name in composites():
        for child in event.cpu_children:
            yield from ops_in(child)
    elif name not in IDLE:
        yield event


@cache
def composites() -> frozenset[str]:
    """Return the ops that are made of others above autograd: they have nothing of their own for a CPU."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if not name.endswith("out")]
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    own = {name.partition(".")[0] for name in names for key in OWN if has(name, key)}
    made = {name.partition(".")[0] for name in names if has(name, "CompositeImplicitAutograd")}
    return frozenset(made - own)
