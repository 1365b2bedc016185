"""Distances between two sets of videos."""

import pytest
import torch
from torch import Tensor

from fastdmd.data.distances import sliced_wasserstein


def videos(seed: int, count: int = 48) -> Tensor:
    return torch.randn(count, 3, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def smooth(x: Tensor) -> Tensor:
    """Return videos with the same mean and variance of each pixel, but with correlated neighbours."""
    for axis in (-3, -2, -1):
        x = (x + x.roll(1, axis)) / 2**0.5
    return x


def test_sliced_wasserstein_of_the_same_set_in_another_order_is_zero():
    assert sliced_wasserstein(videos(0), videos(0).flip(0)) == 0


def test_sliced_wasserstein_grows_with_a_shift():
    x = videos(0)
    distances = [sliced_wasserstein(x, x + shift) for shift in (0.1, 0.2, 0.4)]
    assert distances[1:] == pytest.approx([2 * distances[0], 4 * distances[0]], rel=1e-4)
    assert distances[0] > 0.01


def test_sliced_wasserstein_of_a_scale_is_exact():
    """Check W1(N(0, 1), N(0, c^2)) = |c - 1| sqrt(2 / pi): filtered white noise is standard normal."""
    assert sliced_wasserstein(videos(0), 1.5 * videos(0)) == pytest.approx(
        0.5 * (2 / torch.pi) ** 0.5, rel=0.03
    )


def test_sliced_wasserstein_sees_another_texture():
    assert sliced_wasserstein(videos(0), smooth(videos(1))) > 2 * sliced_wasserstein(videos(0), videos(1))


def test_sliced_wasserstein_needs_equal_sets():
    with pytest.raises(ValueError, match="differ in shape"):
        sliced_wasserstein(videos(0), videos(0)[:4])
