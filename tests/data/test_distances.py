"""Distances between two sets of videos."""

import pytest
import torch
from torch import Tensor

from fastdmd.data.distances import mmd, sliced_wasserstein


def videos(seed: int, count: int = 48) -> Tensor:
    return torch.randn(count, 3, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def smooth(x: Tensor) -> Tensor:
    """Of the same mean and variance a pixel, but neighbours alike."""
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
    """Projections on unit filters of white noise are standard normal: W1(N(0, 1), N(0, c^2)) = |c - 1| sqrt(2 / pi)."""
    assert sliced_wasserstein(videos(0), 1.5 * videos(0)) == pytest.approx(
        0.5 * (2 / torch.pi) ** 0.5, rel=0.03
    )


def test_sliced_wasserstein_sees_another_texture():
    assert sliced_wasserstein(videos(0), smooth(videos(1))) > 2 * sliced_wasserstein(videos(0), videos(1))


def test_sliced_wasserstein_needs_equal_sets():
    with pytest.raises(ValueError, match="differ in shape"):
        sliced_wasserstein(videos(0), videos(0)[:4])


def test_mmd_is_unbiased():
    """Over repetitions its mean for one law is zero within its own error, with sets of different size too."""
    values = torch.tensor([mmd(videos(2 * i, 8), videos(2 * i + 1, 12)) for i in range(60)])
    assert values.min() < 0 < values.max()
    assert values.mean().abs() < 3 * values.std() / 60**0.5
    # the mean over all pairs, a sample with itself too, would be off by mean|u - u'| (1 / 8 + 1 / 12) = 0.28
    assert 3 * values.std() / 60**0.5 < 0.02


def test_mmd_of_another_law():
    x = videos(0)
    null = max(abs(mmd(x, videos(seed))) for seed in range(1, 6))
    assert mmd(x, smooth(videos(1))) > 10 * null
    assert mmd(x, 1.3 * videos(1)) > 10 * null
