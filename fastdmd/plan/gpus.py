"""What GPUs have and sustain.

Published: memory as the driver reports it, and the vendors' data sheets (dense bfloat16 products with float32
sums, bandwidth). Derived, and none of it measured by this project yet, so a plan says "by derived rates":
products from GEMM benchmarks at sustained clocks, those of eight bits at 1.55 times that, with scales and
casts; dense attention from FlashAttention-3 on an H100 (head dimension 128, 16,000 to 40,000 tokens: 620-648
TFLOP/s forward, 561-651 backward, less a tenth to a fifth for heads and edges), scaled to other cards by
their products; sparse attention from instruction counts of our compiled kernels and FastVideo's published
374-526 on an H100; copies at 0.75 to 0.92 of the data sheet.
"""

from dataclasses import dataclass

from fastdmd.plan.work import Work
from fastdmd.precision import has_float8

MIB = 1 << 20


@dataclass(frozen=True)
class GPU:
    """Rates in FLOP/s, bytes and bytes/s."""

    target: str  # what code for it is made for
    memory: int
    peak_matmul: float  # of the data sheet
    peak_bandwidth: float  # of the data sheet
    matmul: float
    float8: float  # products of eight bits; of a GPU without them, as others
    attention: float
    attention_backward: float
    sparse: float
    sparse_backward: float
    bandwidth: float  # of copies

    def seconds(self, work: Work) -> dict[str, float]:
        """Return the time of each kind of work, one after the other."""
        return {
            "products": work.matmul / self.matmul + work.float8 / self.float8,
            "dense attention": work.attention / self.attention
            + work.attention_backward / self.attention_backward,
            "sparse attention": work.sparse / self.sparse + work.sparse_backward / self.sparse_backward,
            "elementwise traffic": work.traffic / self.bandwidth,
        }


FLOAT8 = 1.55  # times the rate of bfloat16


def _gpu(
    target: str,
    mib: int,
    peaks: tuple[float, float],
    matmul: float,
    dense: tuple[float, float],
    sparse: tuple[float, float],
    copy: float,
) -> GPU:
    """Return a row of the table, from MiB, TFLOP/s and TB/s."""
    return GPU(
        target=target,
        memory=mib * MIB,
        peak_matmul=1e12 * peaks[0],
        peak_bandwidth=1e12 * peaks[1],
        matmul=1e12 * matmul,
        float8=1e12 * matmul * (FLOAT8 if has_float8(target) else 1),
        attention=1e12 * dense[0],
        attention_backward=1e12 * dense[1],
        sparse=1e12 * sparse[0],
        sparse_backward=1e12 * sparse[1],
        bandwidth=1e12 * copy,
    )


GPUS = {
    #        published: MiB, GEMM and memory | derived: GEMM, attention and sparse (forward, backward), copy
    "h100": _gpu("sm_90", 81_559, (989, 3.35), 740, (580, 480), (360, 330), 2.9),
    "h200": _gpu("sm_90", 143_771, (989, 4.8), 740, (580, 480), (360, 330), 4.3),
    "b200": _gpu("sm_100", 183_359, (2250, 8.0), 1600, (1250, 1000), (550, 450), 7.0),
    "a100": _gpu("sm_80", 81_920, (312, 2.04), 250, (190, 160), (120, 100), 1.7),
    "mi300x": _gpu("gfx942", 196_592, (1307, 5.3), 620, (450, 250), (250, 180), 4.0),
    "rtx5090": _gpu("sm_120", 32_607, (209.5, 1.79), 190, (180, 150), (110, 90), 1.6),
    "rtx4090": _gpu("sm_89", 24_564, (165.2, 1.01), 150, (145, 115), (85, 70), 0.92),
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
