"""Test that a discriminator's maps are in raster order: a place in a map is that place of the latent."""

import pytest
import torch
from torch import Tensor

from fastdmd.denoiser import Cond, Denoiser
from fastdmd.models.wan.layers import WanConfig
from fastdmd.models.wan.net import Wan
from fastdmd.schedule import FlowSchedule

ARCHITECTURE = WanConfig(
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=2,
    ffn_dim=16,
    in_channels=3,
    out_channels=3,
    text_dim=8,
    freq_dim=16,
    patch_size=(1, 2, 1),
)
GRID = (3, 4, 5)  # no two axes alike
LAYERS = (0, 1)


def local_wan(tile: tuple[int, int, int] | None) -> Wan:
    """Return a network without attention: what it makes of a token is a function of that token's patch."""
    torch.manual_seed(0)
    net = Wan(ARCHITECTURE, tile)
    for block in net.blocks:
        for attention in (block.attn1, block.attn2):
            torch.nn.init.zeros_(attention.to_out[0].weight)
        torch.nn.init.ones_(block.scale_shift_table)
    return net


@torch.no_grad()
def maps_of(net: Wan, x_t: Tensor) -> list[Tensor]:
    """Return the maps [B, D, T, H, W] after each of LAYERS, at one time and one text."""
    B = len(x_t)
    text = torch.ones(B, 4, ARCHITECTURE.text_dim)
    t = torch.full((B,), 0.5, dtype=torch.float64)
    return Denoiser(net, FlowSchedule(3.0)).features(x_t, t, Cond(text), LAYERS)[1]


@pytest.mark.parametrize("tile", [None, (2, 2, 2), (2, 3, 4), (4, 4, 4)])
def test_a_changed_patch_changes_its_own_place_of_every_map(tile):
    net = local_wan(tile)
    (T, H, W), (pt, ph, pw) = GRID, ARCHITECTURE.patch_size
    x_t = torch.randn(1, 3, T * pt, H * ph, W * pw, generator=torch.Generator().manual_seed(0))
    places = [(t, h, w) for t in range(T) for h in range(H) for w in range(W)]
    changed = x_t.repeat(len(places), 1, 1, 1, 1)
    for i, (t, h, w) in enumerate(places):
        changed[i, :, t * pt : (t + 1) * pt, h * ph : (h + 1) * ph, w * pw : (w + 1) * pw] += 1.0
    before, after = maps_of(net, x_t), maps_of(net, changed)
    assert len(before) == len(after) == len(LAYERS)
    for old, new in zip(before, after, strict=True):
        assert old.shape == (1, ARCHITECTURE.width, *GRID)
        size = (new - old).abs().amax(1)  # [places, T, H, W]
        want = torch.eye(len(places)).view(len(places), *GRID)
        assert torch.equal((size > 1e-3).float(), want)
        assert float(size[want == 0].max()) < 1e-5
