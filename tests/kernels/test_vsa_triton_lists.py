"""Test the Triton kernels that pool tiles, choose them and invert the choice, against sorting in float64.

Without a GPU they run in triton's interpreter (tests/conftest.py), which proves arithmetic and indexing.
"""

import math

import pytest
import torch
from vsa_tiles import ALIGNED, ALL_RAGGED, DEVICE, best, error, from_counts, pack, pooled, random, tiles_of

from fastdmd_kernels.vsa import triton as vsa

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("grid", [ALIGNED, ALL_RAGGED])
def test_pool(grid):
    tiles = tiles_of(grid)
    x = random(2, math.prod(grid), 3, 2, 16)[:, :, 1]
    assert error(vsa.pool(x, *tiles), pooled(x, tiles)) < 3e-7
    assert (vsa.pool(x[:, :0], *from_counts([0, 0])) == 0).all()


@pytest.mark.parametrize(("nq", "nk"), [(5, 1), (18, 33), (3, 100)])
def test_select(nq, nk):
    q_c, k_c = random(2, 2, nq, 16), random(2, 2, nk, 16, seed=1)
    tiles = from_counts([1 + i % 64 for i in range(nk)])
    scores = q_c.double() @ k_c.double().mT
    for topk in sorted({1, min(7, nk), nk}):
        assert torch.equal(vsa.select(q_c, k_c, *tiles, topk), pack(best(scores, topk), tiles))


def test_select_ties_go_to_the_lowest_tile():
    tiles = from_counts([64] * 40)
    zero = torch.zeros(1, 1, 3, 16, device=DEVICE)
    keys = random(1, 1, 40, 16)  # scores 0 and -0
    lowest = torch.arange(6, device=DEVICE).expand(1, 1, 3, 6)
    assert torch.equal(vsa.select(zero, keys, *tiles, 6), pack(lowest, tiles))
    ones = torch.ones(1, 1, 3, 16, device=DEVICE)
    levels = torch.tensor([-1.0, 2.0, -3.0, 2.0, 5.0], device=DEVICE).repeat(8)
    levels = levels[:, None].expand(1, 1, 40, 16)
    for topk in (5, 8, 11, 25, 39):
        exact = best(ones @ levels.mT, topk)
        assert torch.equal(vsa.select(ones, levels, *tiles, topk), pack(exact, tiles))


@pytest.mark.parametrize(("nq", "nk", "topk"), [(1, 1, 1), (3, 9, 4), (70, 5, 2), (40, 150, 140)])
def test_invert(nq, nk, topk):
    """More than 32 query tiles, and lists longer than a block."""
    tiles = from_counts([1 + i % 64 for i in range(nk)])
    index = best(random(2, 2, nq, nk), topk)
    offsets, entries = (x.cpu() for x in vsa.invert(pack(index, tiles), tiles[0], nq))
    for b in range(2):
        for h in range(2):
            for tile in range(nk):
                first, end = offsets[b, h, tile : tile + 2].tolist()
                chose = (index[b, h] == tile).any(-1).nonzero().flatten()
                assert entries[b, h, first:end].tolist() == chose.tolist()
    assert (offsets[..., -1] == nq * topk).all()
