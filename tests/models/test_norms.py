"""Which norms the networks compute by the op, and that all of them are chosen before the first call."""

from collections import Counter

import pytest
import torch
from test_sdxl import TINY as SDXL_TINY
from test_sdxl import inputs as sdxl_inputs
from test_wan import LATENT, inputs
from test_wan import TINY as WAN_TINY

from fastdmd.models.sdxl.net import SDXL
from fastdmd.models.wan.net import Wan
from fastdmd_kernels import norm


@pytest.fixture
def asked(monkeypatch):
    """Count the calls of the op by (norm, dtype, sizes), whatever implements them."""
    counts: Counter = Counter()

    def name(kind, device, dtype, sizes):
        counts[kind, dtype, tuple(sizes)] += 1
        return "torch"

    monkeypatch.setattr(norm, "_name", name)
    return counts


@pytest.fixture
def prepared(monkeypatch):
    """Collect what `Net.prepare` chooses for a GPU."""
    choices: set = set()

    def prepare(kind, device, dtype, sizes):
        choices.add((kind, dtype, sizes))

    for page in ("wan", "sdxl"):
        monkeypatch.setattr(f"fastdmd.models.{page}.net.prepare_norm", prepare)
    return choices


def test_all_norms_of_a_wan(asked, prepared):
    net = Wan(WAN_TINY)
    net(*inputs(WAN_TINY, LATENT))
    D = WAN_TINY.width
    blocks = WAN_TINY.num_layers
    assert asked == {
        ("rms_norm", torch.float32, (D,)): 4 * blocks,  # q and k of two attentions
        ("layer_norm", torch.float32, (D,)): 3 * blocks + 1,
    }
    net.prepare((1, WAN_TINY.in_channels, *LATENT), torch.device("cpu"), torch.float32)
    assert prepared == set(asked)


def test_a_wan_in_16_bits_has_layer_norms_in_float32(asked, prepared):
    net = Wan(WAN_TINY)
    net.to(torch.bfloat16)
    for name, parameter in net.named_parameters():
        if net.keeps_float32(name):
            parameter.data = parameter.data.float()
    x_t, model_t, cond = inputs(WAN_TINY, LATENT)
    net(x_t, model_t, cond)
    net.prepare((1, WAN_TINY.in_channels, *LATENT), torch.device("cpu"), torch.bfloat16)
    assert {dtype for kind, dtype, _ in asked if kind == "rms_norm"} == {torch.bfloat16}
    assert prepared == set(asked)


def test_all_group_norms_of_an_sdxl_that_is_frozen(asked, prepared):
    net = SDXL(SDXL_TINY).requires_grad_(False)
    net(*sdxl_inputs(SDXL_TINY))
    norms = [module for module in net.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert sum(asked.values()) == len(norms) > 20
    net.prepare((1, 3, 8, 8), torch.device("cpu"), torch.float32)
    assert prepared == set(asked)
