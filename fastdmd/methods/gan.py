"""A discriminator of small heads on the hidden states of a diffusion network, and its losses.

Heads, hinge and feature matching as in DCM (2506.03123); softplus as in DMD2 (2405.14867, section 4.3).
B batch, D width, L positions; maps [B, D, ..] over the tokens of a video or an image. Logits are high for
what is real.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from fastdmd.denoiser import Denoiser
from fastdmd.methods.method import Nets

MOST_GROUPS = 32


def layer(width: int) -> nn.Sequential:
    """Return a 1 x 1 convolution, GroupNorm and LeakyReLU."""
    groups = max(n for n in range(1, MOST_GROUPS + 1) if width % n == 0)
    return nn.Sequential(nn.Conv1d(width, width, 1), nn.GroupNorm(groups, width), nn.LeakyReLU())


class Head(nn.Module):
    """A layer, another as a residual, and a 1 x 1 convolution to one logit at every position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = layer(width)
        self.residual = layer(width)
        self.last = nn.Conv1d(width, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return projection [B, D, L] and logits [B, 1, L] of a map [B, D, ..]."""
        h = self.first(x.flatten(2))
        h = h + self.residual(h)
        return h, self.last(h)


class Heads(nn.Module):
    """A head for each map, by their widths.

    Nothing in it mixes samples: batches may be judged together or apart.
    """

    def __init__(self, widths: Iterable[int]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(map(Head, widths))

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return projections [B, D, L] and logits [B, 1, L] of maps [B, D, ..]."""
        judged = [head(x) for head, x in zip(self.heads, maps, strict=True)]
        return [h for h, _ in judged], [logits for _, logits in judged]


def layer_problems(key: str, layers: Sequence[int]) -> Iterator[tuple[str, str]]:
    """Yield (key, message) for what is wrong with a list of blocks, whatever the network."""
    ascending = sorted(set(layers))
    if ascending != list(layers):
        yield key, f"{list(layers)} does not ascend; use {ascending}"


def make_heads(denoiser: Denoiser, layers: Sequence[int], key: str) -> Heads:
    """Return heads for the maps after the blocks `layers`.

    Raise ValueError, with the key that they come from, when a block is not there.
    """
    widths = denoiser.net.widths
    if absent := [i for i in layers if not 0 <= i < len(widths)]:
        raise ValueError(
            f"{key}: no block {', '.join(map(str, absent))} in the network; use 0 to {len(widths) - 1}"
        )
    return Heads(widths[i] for i in layers)


def heads(nets: Nets) -> Heads:
    """Return the discriminator among the networks."""
    net: nn.Module = nets["disc"].net
    assert isinstance(net, Heads)
    return net


def hinge_d(fake: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Return mean relu(1 + D(fake)) + mean relu(1 - D(real)), the means over all maps alike."""
    return _mean(nnf.relu(1 + x) for x in fake) + _mean(nnf.relu(1 - x) for x in real)


def hinge_g(fake: Sequence[Tensor]) -> Tensor:
    """Return mean relu(1 - D(fake)): a fake that passes for real with a margin pulls no more."""
    return _mean(nnf.relu(1 - x) for x in fake)


def softplus_d(fake: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Return mean softplus(D(fake)) + mean softplus(-D(real)): the cross entropy of both."""
    return _mean(nnf.softplus(x) for x in fake) + _mean(nnf.softplus(-x) for x in real)


def softplus_g(fake: Sequence[Tensor]) -> Tensor:
    """Return mean softplus(-D(fake)), the generator's loss that does not saturate."""
    return _mean(nnf.softplus(-x) for x in fake)


def feature_matching(fake: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Return mse(fake, sg(real)) of projections."""
    return _mean((f - r.detach()).square() for f, r in zip(fake, real, strict=True))


def halves(maps: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Split the maps of two concatenated batches."""
    pairs = [x.chunk(2) for x in maps]
    return [first for first, _ in pairs], [second for _, second in pairs]


def _mean(maps: Iterable[Tensor]) -> Tensor:
    return torch.stack([x.mean() for x in maps]).mean()
