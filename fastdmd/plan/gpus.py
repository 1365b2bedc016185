"""What GPUs have and sustain: memory as the driver reports it, and rates that are derived.

Peaks are the vendors' data sheets (hardware.py has those of `perf/mfu`). Sustained rates are for bfloat16 at
the sizes of video models: products as published GEMM benchmarks on sustained clocks, dense attention from
FlashAttention-3 on H100 (D 128, 16-40k tokens: 620-648 forward, 561-651 backward, less 10-20 % for heads and
edges), sparse attention from instruction counts of the compiled kernels and FastVideo's published 374-526.
None is a measurement of this project yet: a plan says "by published rates".
"""

from dataclasses import dataclass

from fastdmd.plan.work import Work

MIB = 1 << 20


@dataclass(frozen=True)
class GPU:
    """Rates in FLOP/s, bytes and bytes/s."""

    memory: int
    matmul: float
    attention: float
    attention_backward: float
    sparse: float
    sparse_backward: float
    bandwidth: float  # of copies

    def seconds(self, work: Work) -> dict[str, float]:
        """Return the time of each kind of work, one after the other."""
        return {
            "products": work.matmul / self.matmul,
            "dense attention": work.attention / self.attention
            + work.attention_backward / self.attention_backward,
            "sparse attention": work.sparse / self.sparse + work.sparse_backward / self.sparse_backward,
            "elementwise traffic": work.traffic / self.bandwidth,
        }


def _gpu(
    mib: int, matmul: float, dense: tuple[float, float], sparse: tuple[float, float], copy: float
) -> GPU:
    """Return a row of the table, from MiB, TFLOP/s and TB/s."""
    return GPU(
        memory=mib * MIB,
        matmul=1e12 * matmul,
        attention=1e12 * dense[0],
        attention_backward=1e12 * dense[1],
        sparse=1e12 * sparse[0],
        sparse_backward=1e12 * sparse[1],
        bandwidth=1e12 * copy,
    )


GPUS = {
    #                MiB   GEMM   attention: fwd, bwd   sparse: fwd, bwd   copy
    "h100": _gpu(81_559, 740, (580, 480), (360, 330), 2.9),
    "h200": _gpu(143_771, 740, (580, 480), (360, 330), 4.3),
    "b200": _gpu(183_359, 1600, (1250, 1000), (550, 450), 7.0),
    "a100": _gpu(81_920, 250, (190, 160), (120, 100), 1.7),
    "mi300x": _gpu(196_592, 620, (450, 250), (250, 180), 4.0),
    "rtx5090": _gpu(32_607, 200, (185, 150), (110, 90), 1.6),
    "rtx4090": _gpu(24_564, 150, (145, 115), (85, 70), 0.92),
}

NAMES = {  # as the driver calls them
    "h100": "H100",
    "h200": "H200",
    "b200": "B200",
    "a100": "A100",
    "mi300x": "MI300X",
    "rtx5090": "RTX 5090",
    "rtx4090": "RTX 4090",
}


def gpu_named(name: str) -> GPU:
    """Return a GPU of the table; ValueError for another name."""
    if name not in GPUS:
        raise ValueError(f"--gpu {name!r} is not one of {', '.join(sorted(GPUS))}; use one of them")
    return GPUS[name]
