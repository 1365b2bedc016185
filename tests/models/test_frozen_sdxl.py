"""SDXL's text encoders and VAE, tiny and random, against the stock pipeline; and a run on its prompts."""

import string
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from test_sdxl import TINY, randomized
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from fastdmd import config as configs
from fastdmd.models.families import FAMILIES
from fastdmd.models.sdxl import frozen as frozen_sdxl
from fastdmd.models.sdxl.folder import Noise
from fastdmd.rng import Rng
from fastdmd.train import train

CPU = torch.device("cpu")
# two encoders of 8 and 12, a projection to 6
ARCHITECTURE = replace(
    TINY,
    in_channels=4,
    out_channels=4,
    cross_attention_dim=20,
    projection_class_embeddings_input_dim=6 + 6 * 4,
)
PROMPTS = ["a red fox", "some blue sea and much more than that", "", "fox"]
RUN = """
[run]
output_dir = "{here}/run"
max_steps = 2
batch_size = 2
device = "cpu"

[model]
family = "sdxl"
path = "{here}/sdxl"

[method]
name = "dmd"
denoising_timesteps = [1000, 500]
guidance = 3.0

[critic]
updates_per_generator = 1

[optim.student]
lr = 1e-3

[optim.critic]
lr = 1e-3

[precision]
compute = "fp32"

[data]
sources = ["{here}/prompts.txt"]
resolution = [32, 48]

[validation]
samples = 2
batch_size = 2
show = 1
teacher_steps = 2
"""


def tokenizer(pad: str) -> CLIPTokenizer:
    tokens = ["<|startoftext|>", "<|endoftext|>", "!", *string.ascii_lowercase]
    tokens += [f"{letter}</w>" for letter in string.ascii_lowercase]
    return CLIPTokenizer({token: i for i, token in enumerate(tokens)}, [], pad_token=pad, model_max_length=77)


def text_config(width: int) -> CLIPTextConfig:
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    sizes = {"intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "projection_dim": 6}
    return CLIPTextConfig(vocab_size=64, hidden_size=width, max_position_embeddings=77, **sizes, **ids)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory) -> StableDiffusionXLPipeline:
    """Make a whole folder that diffusers wrote, at pipe.name_or_path."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4), down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=2,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, scaling_factor=0.13025,
        force_upcast=True,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("pipe") / "sdxl"
    noise = {key: getattr(Noise(), key) for key in ("beta_start", "beta_end", "beta_schedule")}
    StableDiffusionXLPipeline(
        vae=randomized(vae).eval(),
        text_encoder=randomized(CLIPTextModel(text_config(8))).eval(),
        text_encoder_2=randomized(CLIPTextModelWithProjection(text_config(12))).eval(),
        tokenizer=tokenizer("<|endoftext|>"),
        tokenizer_2=tokenizer("!"),
        unet=randomized(UNet2DConditionModel(**ARCHITECTURE.keys())),
        scheduler=DDIMScheduler(**noise),
    ).save_pretrained(path)
    pipe = StableDiffusionXLPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(pipe) -> str:
    return str(pipe.name_or_path)


def test_text_is_that_of_the_stock_pipeline(pipe, folder):
    """Where a prompt is empty, that of its guidance's other side."""
    encode = FAMILIES["sdxl"].encoder(folder, CPU, torch.float32)
    text, uncond, pooled, uncond_pooled = pipe.encode_prompt(PROMPTS, device=CPU)
    assert not uncond.any()
    empty = torch.tensor([prompt == "" for prompt in PROMPTS])
    cond = encode(PROMPTS)
    assert cond.text.shape == (4, 77, 8 + 12)
    torch.testing.assert_close(
        cond.text, torch.where(empty[:, None, None], uncond, text), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        cond.pooled, torch.where(empty[:, None], uncond_pooled, pooled), rtol=1e-5, atol=1e-5
    )
    assert cond.time_ids is None  # the world's
    assert torch.pdist(cond.pooled).min() > 1e-2
    # a batch of its own gives the same
    each = [encode([prompt]) for prompt in PROMPTS]
    torch.testing.assert_close(torch.cat([one.text for one in each]), cond.text, rtol=1e-5, atol=1e-5)
    chunks = encode(PROMPTS, batch_size=3)
    torch.testing.assert_close(chunks.pooled, cond.pooled, rtol=1e-5, atol=1e-5)


def test_encoders_have_the_dtype_that_is_asked_for(folder):
    cond = frozen_sdxl.TextEncoder(folder, CPU, torch.bfloat16)(["a red fox", ""])
    assert (cond.text.dtype, cond.pooled.dtype) == (torch.bfloat16, torch.bfloat16)
    assert cond.text[0].any()
    assert not cond.text[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_are_those_of_the_stock_pipeline(pipe, folder, dtype):
    """In float32 whatever is asked for, as the folder has force_upcast."""
    torch.manual_seed(1)
    latents = 0.1 * torch.randn(3, 4, 4, 6)
    with torch.no_grad():
        image = pipe.vae.decode(latents / 0.13025).sample
    theirs = pipe.image_processor.postprocess(image, output_type="np")
    assert 0.05 < theirs.std() < 0.45  # not all clipped
    ours = FAMILIES["sdxl"].decode(folder, latents, CPU, dtype)
    assert (ours.shape, ours.dtype) == ((3, 1, 32, 48, 3), torch.uint8)
    assert (ours[:, 0] / 255 - torch.from_numpy(theirs)).abs().max() <= 0.51 / 255


def test_a_run_on_prompts_and_its_pictures(pipe, folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red fox\nsome blue sea\n")
    (tmp_path / "sdxl").symlink_to(folder)
    (tmp_path / "run.toml").write_text(RUN.format(here=tmp_path))
    run = train(configs.load(tmp_path / "run.toml"))
    assert (tmp_path / "run" / "samples" / "student" / "00.webp").is_file()
    batch = run.world.batch(Rng(0, 0, "data", range(6), "cpu"))
    assert batch.x0 is None
    assert batch.latent_shape == (4, 4, 6)
    text, _, pooled, _ = pipe.encode_prompt(["a red fox", "some blue sea"], device=CPU)
    for i in range(6):
        [row] = [n for n in range(2) if torch.allclose(batch.cond.text[i], text[n], atol=1e-4)]
        torch.testing.assert_close(batch.cond.pooled[i], pooled[row], rtol=1e-4, atol=1e-4)
    assert not batch.uncond.text.any()
    assert not batch.uncond.pooled.any()
    for cond in (batch.cond, batch.uncond, run.world.cond(["a fox"] * 6)):
        assert cond.time_ids.tolist() == [[32, 48, 0, 0, 32, 48]] * 6


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn])
def test_encoders_of_one_byte_a_weight_are_near(folder, codes):
    """Every linear layer of both, which are most of their bytes."""
    plain = FAMILIES["sdxl"].encoder(folder, CPU, torch.bfloat16)
    low = FAMILIES["sdxl"].encoder(folder, CPU, torch.bfloat16, codes)
    wanted, found = plain(PROMPTS), low(PROMPTS)
    assert (found.text.dtype, found.pooled.dtype) == (torch.bfloat16, torch.bfloat16)
    for one, other in ((found.text, wanted.text), (found.pooled, wanted.pooled)):
        assert 0 < (one - other).float().norm() / other.float().norm() < 0.1
    for _, model in low.parts:
        kinds = {type(layer).__name__ for layer in model.modules()}
        assert "Linear" not in kinds
        assert "LowBitLinear" in kinds
