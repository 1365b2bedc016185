"""Adapters in our networks, and their file in stock diffusers."""

import re
import tomllib
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, WanTransformer3DModel
from safetensors.torch import load_file
from test_sdxl import TINY, inputs, randomized, stock
from torch import nn

from fastdmd.batch import Cond
from fastdmd.denoiser import Denoiser
from fastdmd.models.lora import (
    WAN_TARGETS,
    add_lora,
    export_lora,
    lora_parameters,
    start_lora,
)
from fastdmd.models.net import cast
from fastdmd.models.sdxl.net import SDXL
from fastdmd.models.wan.layers import WanConfig
from fastdmd.models.wan.net import Wan
from fastdmd.schedule import FlowSchedule

WAN = WanConfig(
    num_attention_heads=2, attention_head_dim=12, num_layers=2, ffn_dim=40, in_channels=3, out_channels=3,
    text_dim=24,
    freq_dim=32,
)  # fmt: skip
RANK, ALPHA = 4, 6.0
RECIPE = Path(__file__).parents[2] / "configs" / "sdxl_lcm_lora.toml"
SDXL_TARGETS = tuple(tomllib.loads(RECIPE.read_text(encoding="utf-8"))["lora"]["targets"])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def sdxl():
    return randomized(SDXL(TINY)), inputs(TINY)


def wan():
    x_t = torch.randn(3, 3, 2, 4, 6)
    return randomized(Wan(WAN)), (x_t, torch.tensor([1000.0, 500.0, 20.0]), Cond(torch.randn(3, 7, 24)))


NETS = pytest.mark.parametrize(
    ("make", "targets"), [(sdxl, SDXL_TARGETS), (wan, WAN_TARGETS)], ids=["sdxl", "wan"]
)


def adapted(make, targets, seed=0):
    """Return a network with adapters that do something, and its inputs."""
    net, batch = make()
    add_lora(net, RANK, ALPHA, targets)
    start_lora(net, seed, torch.device("cpu"), torch.float32)
    for name, p in lora_parameters(net).items():
        if ".lora_B." in name:
            nn.init.normal_(p, std=0.1)
    return net, batch


def matched(net, targets):
    """Layers that a pattern of the targets finds."""
    ends = re.compile(rf"(^|.*\.)({'|'.join(map(re.escape, targets))})$")
    return {n for n, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and ends.match(n)}


@NETS
def test_adapters_start_at_nothing_in_every_target(make, targets):
    net, batch = make()
    before, layers = net(*batch).F, matched(net, targets)
    add_lora(net, RANK, ALPHA, targets)
    start_lora(net, 0, torch.device("cpu"), torch.float32)
    assert torch.equal(net(*batch).F, before)
    adapters = lora_parameters(net)
    assert adapters.keys() == {f"{n}.lora_{side}.default.weight" for n in layers for side in "AB"}
    assert not [n for n, p in net.named_parameters() if p.requires_grad]  # until a Denoiser says who learns
    Denoiser(net, FlowSchedule(3.0), adapters).learn(True)
    assert {n for n, p in net.named_parameters() if p.requires_grad} == adapters.keys()
    net(*batch).F.square().sum().backward()
    for name, p in adapters.items():  # A's gradient is through B, which is zero
        assert (p.grad.abs().max() > 0) == (".lora_B." in name), name


def test_the_targets_of_sdxl_are_those_of_lcm_lora():
    """Every convolution and linear layer but the ends and the embeddings."""
    net = SDXL(TINY)
    everything = {n for n, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    left = {name.removeprefix("unet.") for name in everything - matched(net, SDXL_TARGETS)}
    assert {name.split(".")[0] for name in left} == {"conv_in", "conv_out", "time_embedding", "add_embedding"}
    kinds = {type(m) for n, m in net.named_modules() if n in matched(net, SDXL_TARGETS)}
    assert kinds == {nn.Linear, nn.Conv2d}


@NETS
def test_adapters_are_alpha_over_rank_of_b_a(make, targets):
    """Merged by hand into a network without adapters."""
    net, batch = adapted(make, targets)
    plain, _ = make()
    merged = {}
    for name, value in net.state_dict().items():
        if ".lora_" in name:
            continue
        a, b = (
            net.state_dict().get(name.replace("base_layer.weight", f"lora_{s}.default.weight")) for s in "AB"
        )
        if "base_layer.weight" in name and a is not None:
            product = torch.einsum("or...,ri...->oi...", b, a)  # B of a convolution is 1 x 1
            value = value + ALPHA / RANK * product
        merged[name.replace("base_layer.", "")] = value
    plain.load_state_dict(merged)
    torch.testing.assert_close(net(*batch).F, plain(*batch).F, rtol=1e-4, atol=1e-4)


def test_adapters_are_drawn_from_their_seed():
    first, again, other = (lora_parameters(adapted(sdxl, SDXL_TARGETS, seed)[0]) for seed in (1, 1, 2))
    a = next(name for name in first if ".lora_A." in name)
    assert torch.equal(first[a], again[a])
    assert not torch.equal(first[a], other[a])


def test_a_target_that_is_no_layer_is_refused():
    net, _ = wan()
    with pytest.raises(ValueError, match=r"^lora.targets: no layer is called to_qq, norm_q; ") as e:
        add_lora(net, RANK, ALPHA, ("to_k", "to_qq", "norm_q"))
    assert "\n" not in str(e.value)
    assert lora_parameters(net) == {}


def test_a_file_of_sdxl_in_a_stock_pipeline(tmp_path):
    """alpha is not the rank: the file has to hold the product."""
    net, (x_t, model_t, cond) = adapted(sdxl, SDXL_TARGETS)
    export_lora(tmp_path / "out" / "lora.safetensors", lora_parameters(net), RANK, ALPHA)
    theirs = stock(TINY)
    base = {n.removeprefix("unet.").replace("base_layer.", ""): v for n, v in net.state_dict().items()}
    theirs.load_state_dict({name: value for name, value in base.items() if ".lora_" not in name})
    absent = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"))
    pipe = StableDiffusionXLPipeline(unet=theirs, **absent)  # type: ignore[arg-type]
    pipe.load_lora_weights(tmp_path / "out", weight_name="lora.safetensors")
    added = {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
    loaded = {name for name, _ in theirs.named_parameters() if ".lora_" in name}
    assert len(loaded) == len(lora_parameters(net))
    torch.testing.assert_close(
        theirs(x_t, model_t, cond.text, added_cond_kwargs=added).sample,
        net(x_t, model_t, cond).F,
        rtol=0,
        atol=1e-4,
    )


def test_a_file_of_wan_in_a_stock_transformer(tmp_path):
    net, (x_t, model_t, cond) = adapted(wan, WAN_TARGETS)
    export_lora(tmp_path / "lora.safetensors", lora_parameters(net), RANK, ALPHA, prefix="transformer.")
    theirs = WanTransformer3DModel(**vars(WAN))
    base = {
        name.replace("base_layer.", ""): v for name, v in net.state_dict().items() if ".lora_" not in name
    }
    theirs.load_state_dict(base)
    theirs.load_lora_adapter(load_file(tmp_path / "lora.safetensors"), prefix="transformer")
    torch.testing.assert_close(
        theirs(x_t, model_t, cond.text).sample, net(x_t, model_t, cond).F, rtol=1e-4, atol=1e-4
    )


def test_adapters_are_cast_with_their_network():
    net, batch = adapted(sdxl, SDXL_TARGETS)
    exact = net(*batch).F
    masters = cast(net, torch.bfloat16)
    assert lora_parameters(net).keys() <= masters.keys()
    assert (net(*batch).F.float() - exact).norm() / exact.norm() < 0.1
