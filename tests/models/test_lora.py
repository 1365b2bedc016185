"""Adapters in our networks, and their file in stock diffusers."""

import re
import tomllib
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from test_sdxl import TINY, inputs, randomized, stock
from torch import nn

from fastdmd.batch import Cond
from fastdmd.denoiser import Denoiser
from fastdmd.models.lora import (
    WAN_TARGETS,
    LoraConfig,
    Zero,
    add_lora,
    export_lora,
    own_parameters,
    read_lora,
    start_lora,
)
from fastdmd.models.lora import merged as merge
from fastdmd.models.net import Call, cast
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


STUDENT, CRITIC = Call(role="student"), Call(role="critic")


def add(net, targets, role="student", seed=0, modules=()):
    config = LoraConfig(rank=RANK, alpha=ALPHA, targets=targets, modules=modules)
    add_lora(net, role, config, targets, net.acting)
    start_lora(net, role, seed, torch.device("cpu"), torch.float32)
    net.requires_grad_(False)


def open_up(net, role):
    """Give a role's adapters values that do something."""
    for name, p in own_parameters(net, role).items():
        if ".lora_B." in name:
            nn.init.normal_(p, std=0.1)


def adapted(make, targets, seed=0):
    """Return a network with a student's adapters that do something, and its inputs."""
    net, batch = make()
    add(net, targets, seed=seed)
    open_up(net, "student")
    return net, batch


def matched(net, targets):
    """Layers that a pattern of the targets finds."""
    ends = re.compile(rf"(^|.*\.)({'|'.join(map(re.escape, targets))})$")
    return {n for n, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and ends.match(n)}


@NETS
def test_adapters_start_at_nothing_in_every_target(make, targets):
    net, batch = make()
    before, layers = net(*batch).F, matched(net, targets)
    add(net, targets)
    assert torch.equal(net(*batch, STUDENT).F, before)
    adapters = own_parameters(net, "student")
    assert adapters.keys() == {f"{n}.lora_{side}.weight" for n in layers for side in "AB"}
    Denoiser(net, FlowSchedule(3.0), adapters).learn(True)
    learning = {id(p) for p in net.parameters() if p.requires_grad}
    assert learning == {id(p) for p in adapters.values()}
    net(*batch, STUDENT).F.square().sum().backward()
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
            net.state_dict().get(name.replace("base_layer.weight", f"lora_{s}.student.weight")) for s in "AB"
        )
        if "base_layer.weight" in name and a is not None:
            product = torch.einsum("or...,ri...->oi...", b, a)  # B of a convolution is 1 x 1
            value = value + ALPHA / RANK * product
        merged[name.replace("base_layer.", "")] = value
    plain.load_state_dict(merged)
    torch.testing.assert_close(net(*batch, STUDENT).F, plain(*batch).F, rtol=1e-4, atol=1e-4)
    plain.load_state_dict(merge(net, "student"))
    torch.testing.assert_close(net(*batch, STUDENT).F, plain(*batch).F, rtol=1e-4, atol=1e-4)


def test_adapters_are_drawn_from_their_seed():
    first, again, other = (
        own_parameters(adapted(sdxl, SDXL_TARGETS, seed)[0], "student") for seed in (1, 1, 2)
    )
    a = next(name for name in first if ".lora_A." in name)
    assert torch.equal(first[a], again[a])
    assert not torch.equal(first[a], other[a])


def test_a_target_that_is_no_layer_is_refused():
    net, _ = wan()
    with pytest.raises(ValueError, match=r"^lora.targets: no layer is called to_qq, norm_q; ") as e:
        add(net, ("to_k", "to_qq", "norm_q"))
    assert "\n" not in str(e.value)
    assert own_parameters(net, "student") == {}


def test_a_file_of_sdxl_in_a_stock_pipeline(tmp_path):
    """alpha is not the rank: the file has to hold the product."""
    net, (x_t, model_t, cond) = adapted(sdxl, SDXL_TARGETS)
    export_lora(tmp_path / "out" / "lora.safetensors", own_parameters(net, "student"), RANK, ALPHA)
    theirs = stock(TINY)
    base = {n.removeprefix("unet.").replace("base_layer.", ""): v for n, v in net.state_dict().items()}
    theirs.load_state_dict({name: value for name, value in base.items() if ".lora_" not in name})
    absent = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"))
    pipe = StableDiffusionXLPipeline(unet=theirs, **absent)  # type: ignore[arg-type]
    pipe.load_lora_weights(tmp_path / "out", weight_name="lora.safetensors")
    added = {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
    loaded = {name for name, _ in theirs.named_parameters() if ".lora_" in name}
    assert len(loaded) == len(own_parameters(net, "student"))
    torch.testing.assert_close(
        theirs(x_t, model_t, cond.text, added_cond_kwargs=added).sample,
        net(x_t, model_t, cond, STUDENT).F,
        rtol=0,
        atol=1e-4,
    )


def test_a_file_of_wan_in_a_stock_transformer(tmp_path):
    net, (x_t, model_t, cond) = adapted(wan, WAN_TARGETS)
    export_lora(
        tmp_path / "lora.safetensors", own_parameters(net, "student"), RANK, ALPHA, prefix="transformer."
    )
    theirs = WanTransformer3DModel(**vars(WAN))
    base = {
        name.replace("base_layer.", ""): v for name, v in net.state_dict().items() if ".lora_" not in name
    }
    theirs.load_state_dict(base)
    theirs.load_lora_adapter(load_file(tmp_path / "lora.safetensors"), prefix="transformer")
    torch.testing.assert_close(
        theirs(x_t, model_t, cond.text).sample, net(x_t, model_t, cond, STUDENT).F, rtol=1e-4, atol=1e-4
    )


def test_adapters_are_cast_with_their_network():
    net, batch = adapted(sdxl, SDXL_TARGETS)
    exact = net(*batch, STUDENT).F
    masters = cast(net, torch.bfloat16)
    assert len([name for name in masters if ".lora_" in name]) == len(own_parameters(net, "student"))
    assert (net(*batch, STUDENT).F.float() - exact).norm() / exact.norm() < 0.1


@NETS
def test_three_views_of_one_base(make, targets):
    """Bitwise equal where adapters are at zero, and each its own where they are not."""
    net, batch = make()
    alone = net(*batch).F
    for seed, role in enumerate(("student", "critic")):
        add(net, targets, role, seed)
    assert all(torch.equal(net(*batch, call).F, alone) for call in (Call(), STUDENT, CRITIC))
    open_up(net, "student")
    assert all(torch.equal(net(*batch, call).F, alone) for call in (Call(), CRITIC))
    assert not torch.allclose(net(*batch, STUDENT).F, alone)
    open_up(net, "critic")
    student, critic = (net(*batch, call).F for call in (STUDENT, CRITIC))
    assert not torch.allclose(student, critic)
    assert torch.equal(net(*batch).F, alone)
    plain, _ = make()
    for role, made in {"student": student, "critic": critic}.items():
        plain.load_state_dict(merge(net, role))
        torch.testing.assert_close(plain(*batch).F, made, rtol=1e-4, atol=1e-4)


@NETS
@pytest.mark.parametrize("learns", ["student", "critic"])
def test_two_roles_and_the_base_in_one_graph(make, targets, learns):
    """Gradients reach the role that learns only, and recomputed blocks see the role of their forward."""
    net, (x_t, model_t, cond) = make()
    for seed, role in enumerate(("student", "critic")):
        add(net, targets, role, seed)
        open_up(net, role)
    own = {role: own_parameters(net, role) for role in ("student", "critic")}
    for p in own[learns].values():
        p.requires_grad_(True)

    def gradients(checkpointing):
        net.recompute_blocks("full" if checkpointing else "none")
        net.zero_grad(set_to_none=True)
        x = x_t.clone().requires_grad_()
        made = net(x, model_t, cond, STUDENT).F
        judged = net(made, model_t, cond, CRITIC).F
        (net(judged, model_t, cond).F + made).square().mean().backward()
        grads = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
        return {**grads, "input": x.grad}

    plain, again = gradients(False), gradients(True)
    assert {id(net.get_parameter(name)) for name in plain if name != "input"} == {
        id(p) for p in own[learns].values()
    }
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert all(float(grad.abs().max()) > 0 for grad in plain.values())


def test_a_module_trained_whole_is_a_copy():
    net, batch = wan()
    alone = net(*batch).F
    add(net, WAN_TARGETS, modules=("proj_out", "condition_embedder"))
    add(net, WAN_TARGETS, "critic", modules=("proj_out",))
    own = own_parameters(net, "student")
    assert {"proj_out.weight", "condition_embedder.time_embedder.linear_1.weight"} <= own.keys()
    assert torch.equal(net(*batch, STUDENT).F, alone)
    with torch.no_grad():
        own["proj_out.bias"] += 1
        own["condition_embedder.text_embedder.linear_2.bias"] += 1
    assert not torch.allclose(net(*batch, STUDENT).F, alone + 1)  # the embedder's too
    assert all(torch.equal(net(*batch, call).F, alone) for call in (Call(), CRITIC))
    plain, _ = wan()
    plain.load_state_dict(merge(net, "student"))
    torch.testing.assert_close(plain(*batch).F, net(*batch, STUDENT).F)


def test_a_target_inside_of_a_module_is_refused():
    net, _ = wan()
    with pytest.raises(ValueError, match=r"^lora.modules: proj_out is trained whole, and a target too"):
        add(net, ("to_k", "proj_out"), modules=("proj_out",))


def test_a_module_that_is_none_is_refused():
    net, _ = wan()
    with pytest.raises(ValueError, match=r"^lora.modules: no module is called 'proj_in'"):
        add(net, ("to_k",), modules=("proj_in",))


def test_adapters_of_the_patch_embedding_count():
    """It is a convolution applied as a product."""
    net, batch = adapted(wan, ("patch_embedding",))
    plain, _ = wan()
    plain.load_state_dict(merge(net, "student"))
    torch.testing.assert_close(plain(*batch).F, net(*batch, STUDENT).F, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(net(*batch).F, net(*batch, STUDENT).F)


def test_a_layer_of_zeros_under_adapters():
    """It is what a gate of sparse attention starts as, without the weights."""
    layer = nn.Sequential(nn.Linear(6, 5))
    config = LoraConfig(rank=2, alpha=4.0, targets=("0",))
    add_lora(layer, "student", config, ("0",), [])
    layer[0].base_layer = Zero(5)
    own = own_parameters(layer, "student")
    assert own.keys() == {"0.lora_A.weight", "0.lora_B.weight"}
    nn.init.normal_(own["0.lora_B.weight"])
    weights = merge(layer, "student")
    assert weights.keys() == {"0.weight", "0.bias"}
    torch.testing.assert_close(weights["0.weight"], 2 * own["0.lora_B.weight"] @ own["0.lora_A.weight"])
    assert torch.equal(weights["0.bias"], torch.zeros(5))


@pytest.mark.parametrize("alphas", [False, True], ids=["folded", "alpha"])
def test_a_file_of_adapters_is_read_back(tmp_path, alphas):
    """What it has of alpha / rank, in its B or beside it, is not counted twice."""
    net, batch = adapted(wan, WAN_TARGETS)
    own = own_parameters(net, "student")
    path = tmp_path / "lora.safetensors"
    if alphas:
        tensors = {f"transformer.{name}": p.detach().clone() for name, p in own.items()}
        tensors |= {n.replace(".lora_A.weight", ".alpha"): torch.tensor(ALPHA) for n in tensors if "_A." in n}
        save_file(tensors, path)
    else:
        export_lora(path, own, RANK, ALPHA, prefix="transformer.")
    config = LoraConfig(rank=RANK, alpha=9.0, targets=WAN_TARGETS)
    read = read_lora(path, "transformer.", config, {name: tuple(p.shape) for name, p in own.items()})
    assert read.keys() == own.keys()
    other, _ = wan()
    add_lora(other, "student", config, WAN_TARGETS, other.acting)
    other.load_state_dict(net.state_dict())
    for name, p in own_parameters(other, "student").items():
        p.data = read[name]
    torch.testing.assert_close(other(*batch, STUDENT).F, net(*batch, STUDENT).F, rtol=1e-4, atol=1e-4)


def test_a_file_of_other_adapters_is_refused(tmp_path):
    net, _ = adapted(wan, WAN_TARGETS)
    path = tmp_path / "lora.safetensors"
    own = own_parameters(net, "student")
    export_lora(path, own, RANK, ALPHA, prefix="transformer.")
    config = LoraConfig(rank=RANK, alpha=ALPHA, targets=("to_q",))
    shapes = {name: tuple(p.shape) for name, p in own.items()}
    few = {name: shape for name, shape in shapes.items() if ".to_q." in name}
    refused = [
        (few, r"attn1\.to_k\.lora_A\.weight is unknown, .* and \d+ more; name a file of these$"),
        (shapes | {"x.lora_A.weight": (RANK, 3)}, r"transformer\.x\.lora_A\.weight is missing"),
        (shapes | {min(shapes): (RANK + 1, 24)}, rf"is \[{RANK}, 24\], not \[{RANK + 1}, 24\]"),
    ]
    for wanted, message in refused:
        with pytest.raises(ValueError, match=rf"^lora\.path: .* does not fit \[lora\]: .*{message}"):
            read_lora(path, "transformer.", config, wanted)
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"^lora\.path: .* cannot be read .*; name a file of adapters$"):
        read_lora(path, "transformer.", config, shapes)
