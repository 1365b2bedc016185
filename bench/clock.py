"""How time is taken, and what the machine can do.

On a GPU by events in the device's queue, on a CPU by the wall clock.
"""

import time
from collections.abc import Callable
from functools import partial

import torch

Run = Callable[[], object]

MATMUL_SIDE = {"cuda": 8192, "cpu": 1024}
COPY_BYTES = {"cuda": 2 << 30, "cpu": 256 << 20}


class Moment:
    """Read the GPU's clock for pytest-benchmark's timer.

    It is an event that is queued, and awaited when subtracted. No synchronisation stands between the reading
    and the work: the host runs ahead, and is not measured.
    """

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "Moment") -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


timer = Moment if torch.cuda.is_available() else time.perf_counter


class Flush:
    """Fill the level-2 cache with something else, and give the host a head start.

    On a CPU nothing happens.
    """

    def __init__(self, device: torch.device) -> None:
        self.buffer = None
        if device.type == "cuda":
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self.buffer = torch.empty(max(4 * cache, 512 << 20), dtype=torch.int8, device=device)

    def __call__(self) -> None:
        if self.buffer is not None:
            self.buffer.zero_()


def seconds(run: Run, rounds: int, flush: Flush | None = None) -> float:
    """Return the median of `rounds` calls after one to warm up."""
    times = []
    for _ in range(1 + rounds):
        if flush:
            flush()
        start = timer()
        run()
        times.append(timer() - start)
    return sorted(times[1:])[rounds // 2]


def captured(run: Run) -> Run:
    """Capture the same work as one CUDA graph.

    Kernels of microseconds then run without the host's gaps between them.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def peak_memory_gb(run: Run, device: torch.device) -> float | None:
    """Return what a call takes on top of its inputs, in 1e9 bytes.

    It is None on a CPU, where nobody counts.
    """
    if device.type != "cuda":
        run()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e9


def ceilings(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> dict[str, float]:
    """Measure the limits of this machine here and now, on random data: zeros run faster.

    Copies are in GB/s read and written, products in TFLOP/s.
    """
    flush = Flush(device)
    source = torch.rand(COPY_BYTES[device.type] // 4, device=device)
    copy = partial(torch.empty_like(source).copy_, source)
    rates = {"copy_gb_s": 2 * COPY_BYTES[device.type] / seconds(copy, 10, flush) / 1e9}
    n = MATMUL_SIDE[device.type]
    for dtype in dtypes:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        name = str(dtype).removeprefix("torch.")
        rates[f"matmul_{name}_tflops"] = 2 * n**3 / seconds(partial(torch.mm, a, b), 10, flush) / 1e12
    return rates
