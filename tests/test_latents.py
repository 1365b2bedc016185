"""Test the sizes of latents: those of diffusers' own VAEs, and of the built-in world."""

import re

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan

from fastdmd.data import shapes
from fastdmd.models.families import FAMILIES

WAN, SDXL = (FAMILIES[name].latents for name in ("wan2.1", "sdxl"))


@pytest.mark.parametrize("frames", [1, 5, 17])
def test_wan_s_are_those_of_its_vae(frames):
    """With fewer channels inside, diffusers' VAE packs a video as the published one does."""
    with torch.device("meta"):
        vae = AutoencoderKLWan(base_dim=4, z_dim=16)
        latent = vae.encode(torch.empty(1, 3, frames, 32, 48)).latent_dist.mode()
    assert WAN.shape(frames, (32, 48)) == latent.shape[1:]
    assert WAN.frames(frames) == latent.shape[2]
    assert WAN.pixel_frames(latent.shape[2]) == frames


def test_sdxl_s_are_those_of_its_vae():
    with torch.device("meta"):
        down = {"down_block_types": ("DownEncoderBlock2D",) * 4, "block_out_channels": (4, 4, 4, 4)}
        vae = AutoencoderKL(latent_channels=4, norm_num_groups=2, **down)
        latent = vae.encode(torch.empty(1, 3, 64, 48)).latent_dist.mode()
    assert SDXL.shape(None, (64, 48)) == latent.shape[1:]
    assert SDXL.frames(None) == 1


def test_the_published_sizes_are_allowed():
    assert WAN.shape(81, (480, 832)) == (16, 21, 60, 104)
    assert SDXL.shape(None, (1024, 768)) == (4, 128, 96)
    assert not list(WAN.problems(WAN.usual_frames, WAN.usual_resolution))
    assert not list(SDXL.problems(SDXL.usual_frames, SDXL.usual_resolution))
    for video in (True, False):
        spec = shapes.latents(video)
        assert not list(spec.problems(spec.usual_frames, spec.usual_resolution))
        assert spec.shape(spec.usual_frames, (12, 14)) == ((3, 4, 12, 14) if video else (3, 12, 14))


@pytest.mark.parametrize(
    ("spec", "frames", "resolution", "key", "message"),
    [
        (WAN, 82, (480, 832), "frames", r"82 is not 1 \+ 4 n, .*; nearest: 81 or 85"),
        (WAN, 0, (480, 832), "frames", "0 is not positive"),
        (WAN, None, (480, 832), "frames", "missing; .* write frames = 81"),
        (SDXL, 1, (1024, 1024), "frames", "makes images; remove the key"),
        (
            WAN,
            81,
            (480, 830),
            "resolution",
            r"\[480, 830\] .* multiples of 16 from 16 on; e\.g\. \[480, 832\]",
        ),
        (SDXL, None, (0, 1024), "resolution", r"e\.g\. \[1024, 1024\]"),
    ],
)
def test_sizes_that_cannot_be_are_named(spec, frames, resolution, key, message):
    [(found, text)] = spec.problems(frames, resolution)
    assert found == key
    assert re.search(message, text)
