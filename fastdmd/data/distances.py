"""Distances between two sets of videos, by their small space-time patches.

B batch, C channel, T frames, H W space, P projections.
"""

import torch
import torch.nn.functional as nnf
from torch import Tensor

PATCH = (2, 3, 3)  # frames, pixels, pixels: the finest detail, where few-step samplers fail first


def _filters(channels: int, frames: int, count: int) -> Tensor:
    """Return fixed random unit filters, float32 [P, C, 2, 3, 3], the same on every machine.

    Images have filters of one frame, [P, C, 1, 3, 3].
    """
    patch = (min(frames, PATCH[0]), *PATCH[1:])
    filters = torch.randn(count, channels, *patch, generator=torch.Generator().manual_seed(0))
    return filters / filters.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1)


def _features(x: Tensor, count: int) -> Tensor:
    """Return the responses of the filters, float32 [B, P, L], frames and pixels flattened."""
    return nnf.conv3d(x.float(), _filters(x.shape[1], x.shape[2], count)).flatten(2)


def sliced_wasserstein(x: Tensor, y: Tensor, projections: int = 64) -> float:
    """Return the sliced 1-Wasserstein distance between the patches of x and y [B, C, T, H, W].

    It is the mean over projections of the distance between projected patches. Both sets need equally many
    videos: one-dimensional optimal transport then pairs sorted values.
    """
    if x.shape != y.shape:
        raise ValueError(f"sets differ in shape: {list(x.shape)} and {list(y.shape)}")
    fx, fy = (_features(v, projections).transpose(0, 1).flatten(1).sort(dim=1).values for v in (x, y))
    return float((fx - fy).abs().mean())
