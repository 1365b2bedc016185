"""Build tiles and lists of them by sorting, not by a kernel, for the tests of the Triton kernels."""

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALIGNED, ALL_RAGGED = (8, 4, 8), (5, 6, 7)


def tiles_of(grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """(row_start, n_valid) of cubes of 4 x 4 x 4."""
    counts = torch.ones(1, dtype=torch.int32)
    for n in grid:
        sizes = torch.tensor([min(4, n - i) for i in range(0, n, 4)], dtype=torch.int32)
        counts = (counts[:, None] * sizes).flatten()
    return from_counts(counts.tolist())


def from_counts(counts: list[int]) -> tuple[Tensor, Tensor]:
    n_valid = torch.tensor(counts, dtype=torch.int32, device=DEVICE)
    return (n_valid.cumsum(0) - n_valid).to(torch.int32), n_valid


def pooled(x: Tensor, tiles) -> Tensor:
    """Means in float64, [B, N, n, K]."""
    return torch.stack([x.double()[:, r : r + n].mean(1) for r, n in rows_of(tiles)], 2)


def rows_of(tiles) -> list[tuple[int, int]]:
    return list(zip(tiles[0].tolist(), tiles[1].tolist(), strict=True))


def best(scores: Tensor, topk: int) -> Tensor:
    """Return the indices of the topk largest, ascending; equal ones from the lowest."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :topk].sort(-1).values


def pack(index: Tensor, tiles) -> Tensor:
    return ((tiles[0][index] << 7) | tiles[1][index]).to(torch.int32)


def error(x: Tensor, exact: Tensor) -> float:
    assert x.isfinite().all()
    return ((x.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def random(*shape: int, dtype=torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(DEVICE, dtype)
