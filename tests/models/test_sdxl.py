"""SDXL as a role's network computes what stock diffusers does under our conditions."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from tiny import UNET
from torch import Tensor, nn

from fastdmd.batch import Cond
from fastdmd.models.net import Call, cast
from fastdmd.models.sdxl.net import SDXL, SDXLConfig, guidance_embedding

TINY = replace(
    UNET,
    transformer_layers_per_block=(1, 2),
    cross_attention_dim=12,
    projection_class_embeddings_input_dim=10 + 6 * 4,
)
GUIDED = replace(TINY, time_cond_proj_dim=14)  # with a guidance embedding


def stock(config: SDXLConfig) -> UNet2DConditionModel:
    """Return the same architecture as diffusers writes it."""
    return UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2), attention_head_dim=(1, 2), norm_num_groups=4,
        cross_attention_dim=12,
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=34, time_cond_proj_dim=config.time_cond_proj_dim,
    )  # fmt: skip


def randomized(net: nn.Module) -> Any:
    """Every parameter random, so that no norm is 1, no bias and no embedding 0."""
    for p in net.parameters():
        if p.ndim == 1:
            nn.init.normal_(p, mean=0.5, std=0.3)
        else:
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return net


def inputs(config: SDXLConfig, B: int = 3) -> tuple[Tensor, Tensor, Cond]:
    text, pooled = torch.randn(B, 5, config.cross_attention_dim), torch.randn(B, config.pooled_dim)
    time_ids = torch.tensor([[8.0, 6, 1, 2, 3, 4]]).repeat(B, 1) + torch.arange(B)[:, None]
    w = None if config.time_cond_proj_dim is None else torch.tensor([1.0, 3.5, 8.0])[:B]
    return torch.randn(B, 3, 8, 8), torch.tensor([999.0, 259.0, 19.0])[:B], Cond(text, pooled, time_ids, w)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("config", [TINY, GUIDED], ids=["plain", "guided"])
def test_equals_the_stock_call(config):
    ours, theirs = randomized(SDXL(config)), stock(config)
    theirs.load_state_dict(ours.unet.state_dict())
    x_t, model_t, cond = inputs(config)
    F = ours(x_t, model_t, cond).F
    embedding = None if cond.guidance is None else guidance_embedding(cond.guidance, 14)
    added = {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
    reference = theirs(
        x_t, model_t.long(), cond.text, timestep_cond=embedding, added_cond_kwargs=added, return_dict=False
    )[0]
    torch.testing.assert_close(F, reference, rtol=0, atol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_features_are_what_the_next_block_is_given(checkpointing):
    """Return F and the gradient through the maps of all five blocks, whether recomputed or not."""
    ours, theirs = randomized(SDXL(TINY)).train(), stock(TINY)
    theirs.load_state_dict(ours.unet.state_dict())
    ours.recompute_blocks("full" if checkpointing else "none")
    x_t, model_t, cond = inputs(TINY)
    given: list[Tensor] = []

    def look(block: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        given.append(named["hidden_states"] if "hidden_states" in named else args[0])

    for block in (theirs.down_blocks[1], theirs.mid_block, *theirs.up_blocks, theirs.conv_norm_out):
        block.register_forward_pre_hook(look, with_kwargs=True)
    added = {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
    x_ref = x_t.clone().requires_grad_()
    reference = theirs(x_ref, model_t.long(), cond.text, added_cond_kwargs=added, return_dict=False)[0]
    x_t.requires_grad_()
    F, maps = ours(x_t, model_t, cond, Call(layers=(0, 1, 2, 3, 4)))
    torch.testing.assert_close(F, reference, rtol=0, atol=0)
    assert tuple(x.shape[1] for x in maps) == ours.widths == (8, 16, 16, 16, 8)
    for found, wanted in zip(maps, given, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    weights = [torch.randn_like(x) for x in maps]
    [found], [wanted] = (
        torch.autograd.grad(sum((w * m).sum() for w, m in zip(weights, each, strict=True)), x)
        for each, x in ((maps, x_t), (given, x_ref))
    )
    torch.testing.assert_close(found, wanted)
    assert len(ours(x_t, model_t, cond, Call(layers=(2,)))[1]) == 1
    assert ours(x_t, model_t, cond)[1] == []
    assert not ours.maps  # no hidden state outlives its call


def test_the_defaults_are_sdxl():
    """The architecture that Stability published, 2,567,463,684 parameters."""
    with torch.device("meta"):
        net = SDXL(SDXLConfig())
    assert sum(p.numel() for p in net.parameters()) == 2_567_463_684
    assert net.config.pooled_dim == 1280
    assert list(SDXLConfig().problems()) == []


def test_what_is_fixed_is_all_that_diffusers_has():
    """No key of the architecture is left to diffusers' defaults, which may change."""
    unet = stock(TINY)
    left = {key for key in unet.config if not key.startswith("_")} - TINY.keys().keys()
    # what text_time, the default attention and a float32 softmax do not read
    assert left <= {"addition_embed_type_num_heads", "class_embeddings_concat", "upcast_attention"}


@pytest.mark.parametrize("dim", [256, 14, 15])
def test_guidance_is_embedded_as_the_stock_pipeline_does(dim):
    """Its guidance_scale is our w; what it embeds is one less."""
    w = torch.tensor([1.0, 1.5, 4.0, 15.0])
    theirs = StableDiffusionXLPipeline.get_guidance_scale_embedding(None, w - 1, embedding_dim=dim)  # type: ignore[arg-type]
    torch.testing.assert_close(
        guidance_embedding(w, dim), theirs, rtol=0, atol=2e-3
    )  # float32 angles up to 14,000
    assert torch.equal(
        guidance_embedding(w, dim)[0, : dim // 2], torch.zeros(dim // 2)
    )  # sines of 0 at w = 1


def test_a_stock_pipeline_tells_the_same_at_guidance_scale_w():
    """One LCM step of the pipeline: what its UNet was called with and gave, and what we give for that w."""
    net, w, calls = randomized(SDXL(GUIDED)), 3.5, []
    pipe = StableDiffusionXLPipeline(
        vae=None, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=net.unet,
        scheduler=LCMScheduler(),
    )  # type: ignore[arg-type]  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    net.unet.register_forward_hook(
        lambda _, args, kwargs, out: calls.append((args, kwargs, out)), with_kwargs=True
    )
    x_t, _, cond = inputs(GUIDED, B=1)
    pipe(
        prompt_embeds=cond.text, pooled_prompt_embeds=cond.pooled, latents=x_t, guidance_scale=w,
        num_inference_steps=1, height=8, width=8, output_type="latent",
    )  # fmt: skip
    [((sample, t), kwargs, (out, *_))] = calls
    ours = Cond(cond.text, cond.pooled, kwargs["added_cond_kwargs"]["time_ids"], torch.tensor([w]))
    with torch.no_grad():
        assert (out - net(sample, t[None], ours).F).abs().max() < 1e-4
        other = replace(ours, guidance=torch.tensor([w + 1]))
        assert (out - net(sample, t[None], other).F).abs().max() > 1e-2


def test_a_guidance_embedding_starts_at_zero():
    net = SDXL(GUIDED)
    x_t, model_t, cond = inputs(GUIDED)
    F = net(x_t, model_t, cond).F
    assert torch.equal(F, net(x_t, model_t, replace(cond, guidance=cond.guidance + 2)).F)
    F.square().mean().backward()
    assert net.unet.time_embedding.cond_proj.weight.grad.abs().max() > 0  # and moves


@pytest.mark.parametrize(
    ("config", "w"), [(GUIDED, None), (TINY, torch.ones(3))], ids=["missing", "superfluous"]
)
def test_guidance_without_its_embedding_is_refused(config, w):
    x_t, model_t, cond = inputs(config)
    with pytest.raises(
        ValueError, match=r"time_cond_proj_dim.*Cond.guidance|Cond.guidance.*time_cond_proj_dim"
    ):
        SDXL(config)(x_t, model_t, replace(cond, guidance=w))


def test_a_video_world_s_cond_is_refused():
    x_t, model_t, cond = inputs(TINY)
    with pytest.raises(ValueError, match=r"Cond\.pooled and Cond\.time_ids"):
        SDXL(TINY)(x_t, model_t, Cond(cond.text))


@pytest.mark.parametrize(
    ("values", "key", "message"),
    [
        ({"attention_head_dim": (1,)}, "attention_head_dim", "1 values for 2 levels"),
        (
            {"down_block_types": ("DownBlock2D", "AttnDownBlock2D")},
            "down_block_types",
            "'AttnDownBlock2D' is not",
        ),
        ({"norm_num_groups": 3}, "norm_num_groups", "does not divide"),
        ({"attention_head_dim": (1, 3)}, "attention_head_dim", "3 heads do not divide 16"),
        (
            {"projection_class_embeddings_input_dim": 24},
            "projection_class_embeddings_input_dim",
            "leaves nothing",
        ),
        ({"norm_num_groups": 0}, "norm_num_groups", "0 is not positive; SDXL uses 32"),
        ({"block_out_channels": (8, 0)}, "block_out_channels", "is not positive"),
    ],
)
def test_architectures_that_are_none(values, key, message):
    [(found, text)] = replace(TINY, **values).problems()
    assert found == key
    assert message in text


def test_cast_rounds_all_and_keeps_masters():
    net = randomized(SDXL(GUIDED))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    batch = inputs(GUIDED)
    exact = net(*batch).F
    masters = cast(net, torch.bfloat16)
    assert masters.keys() == before.keys()
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name].bfloat16())
        assert masters[name].dtype == torch.float32
        assert torch.equal(masters[name], before[name])
    theirs = stock(GUIDED).bfloat16()
    theirs.load_state_dict(net.unet.state_dict())
    x_t, model_t, cond = batch
    added = {"text_embeds": cond.pooled.bfloat16(), "time_ids": cond.time_ids}
    embedding = guidance_embedding(cond.guidance, 14).bfloat16()
    reference = theirs(
        x_t.bfloat16(), model_t, cond.text.bfloat16(), timestep_cond=embedding, added_cond_kwargs=added
    )
    F = net(*batch).F
    assert torch.equal(F, reference.sample)
    assert 0 < (F.float() - exact).norm() / exact.norm() < 0.1


def test_cast_to_float32_keeps_all():
    net = SDXL(TINY)
    assert cast(net, torch.float32) == {}
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_checkpointing_changes_nothing():
    net, batch, calls = randomized(SDXL(TINY)), inputs(TINY), []
    net.unet.mid_block.resnets[1].register_forward_pre_hook(lambda *_: calls.append(1))
    names, parameters = zip(*net.named_parameters(), strict=True)
    expected = torch.autograd.grad(net(*batch).F.square().sum(), parameters)
    assert (net.checkpointing, len(calls)) == ("none", 1)
    net.recompute_blocks("full")
    again = torch.autograd.grad(net(*batch).F.square().sum(), parameters)
    assert (net.checkpointing, len(calls)) == ("full", 3)  # the block ran again in the backward
    for name, a, b in zip(names, expected, again, strict=True):
        torch.testing.assert_close(a, b, msg=name)
    net.checkpointing = "none"
    net(*batch)
    assert len(calls) == 4


def test_from_scratch_is_drawn_from_the_seed_and_starts_at_zero():
    nets = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        nets.append(SDXL(TINY).start_from_scratch())
    first, again, other = (dict(net.named_parameters()) for net in nets)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["unet.conv_in.weight"], other["unet.conv_in.weight"])
    assert torch.equal(nets[0](*inputs(TINY)).F, torch.zeros(3, 3, 8, 8))
    assert not any(first[f"unet.mid_block.resnets.{i}.conv2.weight"].any() for i in (0, 1))


@pytest.mark.parametrize("config", [TINY, GUIDED], ids=["plain", "guided"])
def test_flops_equal_a_count_by_hooks(config):
    """Every linear and convolution by its output, every attention by its lengths."""
    net, total, scores = SDXL(config), 0, 0

    def matrix(module, _, out):
        nonlocal total
        total += 2 * out.numel() * module.weight[0].numel()

    def attention(module, args, kwargs, out):
        nonlocal scores
        x, context = args[0], kwargs.get("encoder_hidden_states")
        keys = x if context is None else context
        scores += 4 * x.shape[0] * x.shape[1] * keys.shape[1] * module.inner_dim

    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(matrix)
        elif type(module).__name__ == "Attention":
            module.register_forward_hook(attention, with_kwargs=True)
    x_t, model_t, cond = inputs(config)
    with torch.no_grad():
        net(x_t, model_t, cond)
    assert net.flops(x_t.shape, cond.text.shape[1]) == total + scores
    assert net.attention_flops(x_t.shape, cond.text.shape[1]) == scores > 0
