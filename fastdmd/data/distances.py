"""Distances between two sets of videos, by their small space-time patches.

B batch, C channel, T frames, H W space, P projections.
"""

import torch
import torch.nn.functional as nnf
from torch import Tensor

PATCH = (2, 3, 3)  # frames, pixels, pixels: the finest detail, where few-step samplers fail first


def _filters(channels: int, frames: int, count: int) -> Tensor:
    """Fixed random unit filters, float32 [P, C, 2, 3, 3], the same on every machine; of one frame for images."""
    patch = (min(frames, PATCH[0]), *PATCH[1:])
    filters = torch.randn(count, channels, *patch, generator=torch.Generator().manual_seed(0))
    return filters / filters.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1)


def _features(x: Tensor, count: int) -> Tensor:
    """Responses of the filters, float32 [B, P, L], frames and pixels flattened."""
    return nnf.conv3d(x.float(), _filters(x.shape[1], x.shape[2], count)).flatten(2)


def sliced_wasserstein(x: Tensor, y: Tensor, projections: int = 64) -> float:
    """Mean over projections of the 1-Wasserstein distance between patch projections of x and y [B, C, T, H, W].

    Both need equally many videos: one-dimensional optimal transport then pairs sorted values.
    """
    if x.shape != y.shape:
        raise ValueError(f"sets differ in shape: {list(x.shape)} and {list(y.shape)}")
    fx, fy = (_features(v, projections).transpose(0, 1).flatten(1).sort(dim=1).values for v in (x, y))
    return float((fx - fy).abs().mean())


def mmd(x: Tensor, y: Tensor, features: int = 64) -> float:
    """Unbiased squared maximum mean discrepancy of per-video features, with the energy-distance kernel -|u - v|.

    Features: mean and standard deviation of each filter's response over a video. Zero in expectation for equal laws.
    """
    u, v = (torch.cat([f.mean(2), f.std(2)], dim=1) for f in (_features(x, features), _features(y, features)))
    n, m = len(u), len(v)
    within = torch.cdist(u, u).sum() / (n * (n - 1)) + torch.cdist(v, v).sum() / (m * (m - 1))
    return float(2 * torch.cdist(u, v).mean() - within)
