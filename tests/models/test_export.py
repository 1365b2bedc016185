"""An exported student, sampled by stock diffusers, gives what our own sampler gives.

`python -m tests.test_export RUN` shows it of the student of any run on the built-in world.
"""

import string
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file
from tiny import DMD, reopen
from torch import nn
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from fastdmd import config as configs
from fastdmd.data import shapes
from fastdmd.evaluation import evaluate
from fastdmd.export import export_student
from fastdmd.models.wan import folder
from fastdmd.models.wan.layers import WanConfig
from fastdmd.models.wan.net import Wan
from fastdmd.rng import Rng
from fastdmd.run import Run
from fastdmd.train import train

SEED = 3
# learning rates that move the weights far from their EMA in two steps
TWO_STEPS = (
    "run.max_steps=2",
    "critic.updates_per_generator=1",
    "optim.student={lr=0.01}",
    "optim.critic.lr=0.01",
    "ema={decay=0.5}",
    "validation.teacher_reference=false",
)


def tiny_wan(channels: int, text_dim: int) -> Wan:
    torch.manual_seed(0)
    return Wan(
        WanConfig(
            num_attention_heads=2, attention_head_dim=12, num_layers=2, ffn_dim=32, in_channels=channels,
            out_channels=channels, text_dim=text_dim, freq_dim=16,
        )
    )  # fmt: skip


def frozen_networks() -> dict[str, Any]:
    """Make the other networks of a Wan 2.1 folder, tiny: 16 latent channels, text embeddings of 24."""
    torch.manual_seed(0)
    letters = [(letter, -3.0) for letter in string.ascii_lowercase]
    tokenizer = T5Tokenizer(
        [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters], extra_ids=0
    )
    text = UMT5Config(vocab_size=64, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    vae = AutoencoderKLWan(base_dim=4, z_dim=16, num_res_blocks=1)
    return {"tokenizer": tokenizer, "text_encoder": UMT5EncoderModel(text).eval(), "vae": vae}


@pytest.fixture
def frozen() -> dict[str, Any]:
    return frozen_networks()


def run_dmd(tmp_path, *overrides: str) -> Run:
    """Two steps of DMD from the folder `wan`, reopened."""
    file = tmp_path / "dmd.toml"
    file.write_text(DMD.format(here=tmp_path))
    train(configs.load(file, [*TWO_STEPS, *overrides]))
    return reopen(tmp_path / "run")


def sample_ours(run: Run, prompts: list[str], out) -> torch.Tensor:
    return load_file(evaluate.write_samples(run, "student", prompts, out, SEED) / "latents.safetensors")["x0"]


def sample_theirs(pipe: WanPipeline, shape, n: int, monkeypatch, **call):
    """Three steps of the pipeline, with our noise in place of its own at the start and in the scheduler."""
    rng = Rng(SEED, 0, "sample", range(n), "cpu")
    noise = rng.normal(shape)
    scheduler = "diffusers.schedulers.scheduling_flow_match_lcm"
    monkeypatch.setattr(f"{scheduler}.randn_tensor", lambda shape, **_: rng.normal(shape[1:]))
    pipe.set_progress_bar_config(disable=True)
    return pipe(latents=noise, guidance_scale=1.0, num_inference_steps=3, **call).frames


@pytest.mark.parametrize("weights", ["ema", "student"])
def test_built_in_world_in_a_stock_pipeline(tmp_path, frozen, monkeypatch, weights):
    net = tiny_wan(channels=3, text_dim=shapes.TEXT_DIM)
    folder.save(tmp_path / "wan", net.config, net.state_dict())
    run = run_dmd(tmp_path, "data.frames=4", "data.resolution=[16, 16]", f"validation.weights='{weights}'")
    export_student(tmp_path / "run", tmp_path / "out")

    pipe = WanPipeline.from_pretrained(tmp_path / "out", **frozen)
    prompts = shapes.CAPTIONS[:2]
    call = {"prompt_embeds": shapes.embed(prompts), "output_type": "latent"}
    theirs = sample_theirs(pipe, (3, 4, 16, 16), 2, monkeypatch, **call)
    torch.testing.assert_close(theirs, sample_ours(run, prompts, tmp_path / "samples"), rtol=0, atol=1e-4)

    # the weights that were asked for, and the training moved them apart by far more than that
    assert run.ema is not None
    masters = run.optimizers["student"].masters
    wanted, other = (run.ema.shadow, masters) if weights == "ema" else (masters, run.ema.shadow)
    exported = pipe.transformer.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in exported.items())
    assert not any(torch.allclose(value, other[name], atol=1e-3) for name, value in exported.items())


def test_prompts_in_a_stock_pipeline(tmp_path, frozen, monkeypatch):
    """A whole folder in, a whole folder out: text encoder, tokenizer and VAE come along."""
    net = tiny_wan(channels=16, text_dim=24)
    for parameter in net.parameters():  # so that the text counts
        nn.init.normal_(parameter, std=0.3)
    folder.save(tmp_path / "wan", net.config, net.state_dict())
    transformer = WanTransformer3DModel.from_pretrained(tmp_path / "wan" / "transformer")
    source = WanPipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **frozen)
    source.save_pretrained(tmp_path / "wan")
    prompts = ["a red fox", "some  blue   sea"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    sources = f"data.sources=['{tmp_path / 'prompts.txt'}']"
    run = run_dmd(tmp_path, sources, "data.frames=5", "data.resolution=[32, 32]")
    export_student(tmp_path / "run", tmp_path / "out")

    pipe = WanPipeline.from_pretrained(tmp_path / "out")
    x0 = sample_ours(run, prompts, tmp_path / "samples")
    swapped = sample_ours(run, prompts[::-1], tmp_path / "samples")
    assert (x0 - swapped).abs().max() > 1e-2
    theirs = sample_theirs(pipe, (16, 2, 4, 4), 2, monkeypatch, prompt=prompts, output_type="latent")
    torch.testing.assert_close(theirs, x0, rtol=0, atol=1e-4)
    video = sample_theirs(pipe, (16, 2, 4, 4), 2, monkeypatch, prompt=prompts, output_type="np")
    ours = run.world.pixels(x0)
    assert ours.shape == video.shape == (2, 5, 32, 32, 3)
    assert (ours / 255 - torch.from_numpy(video)).abs().max() <= 1 / 255


def demonstrate(run: str) -> str:
    """Export a run's student, sample every caption with both samplers, and compare the latents."""
    opened, prompts = reopen(Path(run)), shapes.CAPTIONS
    with tempfile.TemporaryDirectory() as out, pytest.MonkeyPatch.context() as monkeypatch:
        export_student(Path(run), Path(out))
        pipe = WanPipeline.from_pretrained(out, **frozen_networks())
        call = {"prompt_embeds": shapes.embed(prompts), "output_type": "latent"}
        theirs = sample_theirs(pipe, opened.world.latent_shape, len(prompts), monkeypatch, **call)
        ours = sample_ours(opened, prompts, Path(out) / "samples")
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    return f"{len(prompts)} videos in 3 steps: largest difference {(theirs - ours).abs().max():.1e}"


if __name__ == "__main__":
    print(demonstrate(*sys.argv[1:]))
