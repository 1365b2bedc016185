"""SDXL folders in and out, bit for bit; noise tables and schedulers that give what diffusers gives."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    LCMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from test_sdxl import GUIDED, TINY, inputs, randomized, stock

from fastdmd.batch import Cond
from fastdmd.data.table import Config
from fastdmd.data.world import ShapesWorld
from fastdmd.denoiser import Denoiser
from fastdmd.models.sdxl import folder as sdxl_folder
from fastdmd.models.sdxl.family import SDXLFamily
from fastdmd.models.sdxl.folder import Noise
from fastdmd.models.sdxl.net import SDXL
from fastdmd.rng import Rng
from fastdmd.sampler import guided, ode
from fastdmd.schedule import VPSchedule

TEACHER = Path(__file__).parents[2] / "assets" / "tiny_sdxl"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def saved(tmp_path):
    """Make a folder that diffusers wrote."""
    randomized(stock(TINY)).save_pretrained(tmp_path / "unet")
    DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(
        tmp_path / "scheduler"
    )
    return tmp_path


def edit_json(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def same(a, b):
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a
    )


def opened(folder) -> StableDiffusionXLPipeline:
    """Return the pipeline of a folder that has no text encoders."""
    absent = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae"))
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---------------------------------------------------------------------------------- the UNet


@pytest.mark.parametrize("max_shard_size", ["10GB", "20KB"])
def test_loads_what_diffusers_saved(tmp_path, max_shard_size):
    theirs = randomized(stock(GUIDED))
    theirs.save_pretrained(tmp_path / "unet", max_shard_size=max_shard_size)
    net = sdxl_folder.load(tmp_path)
    assert net.config == GUIDED
    assert same(net.unet.state_dict(), theirs.state_dict())


def test_loads_as_float32(saved):
    theirs = stock(TINY).bfloat16()
    theirs.save_pretrained(saved / "unet")
    assert same(sdxl_folder.load(saved).unet.state_dict(), theirs.float().state_dict())


def test_loads_a_copy(saved):
    net, file = sdxl_folder.load(saved), next(saved.glob("unet/*.safetensors"))
    kept = {name: value.clone() for name, value in net.state_dict().items()}
    with file.open("r+b") as f:  # in place: a mapped tensor would follow
        f.seek(file.stat().st_size // 2)
        f.write(bytes(file.stat().st_size // 4))
    assert same(net.state_dict(), kept)


def test_one_number_for_all_levels(saved):
    """diffusers' other way to write a list."""
    theirs = UNet2DConditionModel.from_config({**stock(TINY).config, "attention_head_dim": 2})
    theirs.save_pretrained(saved / "unet")
    net = sdxl_folder.load(saved)
    assert net.config == replace(TINY, attention_head_dim=(2, 2))
    x_t, model_t, cond = inputs(TINY)
    added = {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
    reference = theirs(x_t, model_t, cond.text, added_cond_kwargs=added).sample
    assert torch.equal(net(x_t, model_t, cond).F, reference)


def test_diffusers_opens_what_we_saved(tmp_path):
    net = randomized(SDXL(GUIDED))
    sdxl_folder.save(tmp_path, net.config, dict(net.named_parameters()))
    theirs, info = UNet2DConditionModel.from_pretrained(tmp_path / "unet", output_loading_info=True)
    assert not any(info.values()), info
    assert same(theirs.state_dict(), net.unet.state_dict())
    assert theirs.config.up_block_types == ["CrossAttnUpBlock2D", "UpBlock2D"]
    assert sdxl_folder.read_config(tmp_path) == GUIDED


def test_a_student_with_a_guidance_embedding_starts_as_its_teacher(saved):
    teacher, student = sdxl_folder.load(saved), sdxl_folder.load(saved, time_cond_proj_dim=256)
    assert student.config == replace(TINY, time_cond_proj_dim=256)
    x_t, model_t, cond = inputs(TINY)
    embedded = replace(cond, guidance=torch.tensor([1.0, 3.0, 9.0]))
    assert torch.equal(student(x_t, model_t, embedded).F, teacher(x_t, model_t, cond).F)


def test_a_guidance_embedding_is_kept(tmp_path):
    net = randomized(SDXL(GUIDED))
    sdxl_folder.save(tmp_path, GUIDED, net.state_dict())
    for asked in (None, 14):
        assert same(sdxl_folder.load(tmp_path, time_cond_proj_dim=asked).state_dict(), net.state_dict())
    with pytest.raises(ValueError, match="guidance embedding of width 14, not 256; use 14"):
        sdxl_folder.load(tmp_path, time_cond_proj_dim=256)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"_class_name": "WanTransformer3DModel"},
            "is a WanTransformer3DModel.*name a diffusers folder of SDXL",
        ),
        ({"addition_embed_type": None}, "addition_embed_type = None, and SDXL 'text_time'"),
        ({"encoder_hid_dim": 4096}, "encoder_hid_dim = 4096.*name an SDXL"),
        ({"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]}, "no mirror of its down_block_types"),
        ({"norm_num_groups": 3}, "norm_num_groups: 3 does not divide"),
        ({"cross_attention_dim": 13}, r"is \[16, 12\], not \[16, 13\].*and \d+ more.*save the folder again"),
        ({"layers_per_block": 2}, "is missing.*save the folder again"),
    ],
)
def test_refuses_another_model(saved, values, message):
    edit_json(saved / "unet" / "config.json", **values)
    with pytest.raises(ValueError, match=message) as e:
        sdxl_folder.load(saved)
    assert str(saved) in str(e.value)
    assert "\n" not in str(e.value)


def test_refuses_an_old_config_that_leaves_out_what_sdxl_has(saved):
    """Stable Diffusion 1's has neither key."""
    file = saved / "unet" / "config.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in raw.items() if k != "addition_embed_type"}))
    with pytest.raises(ValueError, match="addition_embed_type = None"):
        sdxl_folder.read_config(saved)
    file.write_text(json.dumps({k: v for k, v in raw.items() if k != "cross_attention_dim"}))
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))} has no cross_attention_dim"):
        sdxl_folder.read_config(saved)


# --------------------------------------------------------------------------------- the noise


@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "linear"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_noise_table_is_that_of_diffusers(tmp_path, beta_schedule, prediction):
    theirs = DDIMScheduler(
        beta_start=0.001, beta_end=0.013, beta_schedule=beta_schedule, prediction_type=prediction,
        num_train_timesteps=500,
    )  # fmt: skip
    theirs.save_pretrained(tmp_path / "scheduler")
    schedule = sdxl_folder.read_noise(tmp_path).schedule()
    assert schedule.alphas_cumprod.dtype == torch.float64
    torch.testing.assert_close(schedule.alphas_cumprod, theirs.alphas_cumprod.double(), rtol=1e-4, atol=0)
    assert schedule.prediction == {"epsilon": "eps", "v_prediction": "v"}[prediction]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"beta_schedule": "squaredcos_cap_v2"},
            "beta_schedule = 'squaredcos_cap_v2' is not one of scaled_linear",
        ),
        ({"prediction_type": "sample"}, "prediction_type = 'sample' is not one of epsilon"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
    ],
)
def test_refuses_another_noise(saved, values, message):
    edit_json(saved / "scheduler" / "scheduler_config.json", **values)
    with pytest.raises(ValueError, match=message) as e:
        sdxl_folder.read_noise(saved)
    assert "\n" not in str(e.value)


def test_sdxl_s_own_noise():
    """Of the published scheduler_config.json; at the end 0.5 % of the variance is still signal."""
    table = Noise().schedule().alphas_cumprod
    assert len(table) == 1000
    assert float(table[0]) == pytest.approx(1 - 0.00085)
    assert float(table[-1]) == pytest.approx(0.0047, abs=1e-4)


# ------------------------------------------------------------------------------- the folder


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("steps", "w"), [(4, 1.0), (5, 3.0), (50, 1.0)])
def test_an_exported_teacher_in_a_stock_pipeline_is_our_solver(tmp_path, prediction, steps, w):
    net, noise = SDXL(TINY), Noise(prediction_type=prediction)
    sdxl_folder.export(tmp_path, TINY, net.state_dict(), sdxl_folder.ddim_scheduler(noise), None)
    pipe, B = opened(tmp_path), 2
    assert same(pipe.unet.state_dict(), net.unet.state_dict())
    assert isinstance(pipe.scheduler, DDIMScheduler)
    x, _, cond = inputs(TINY, B)
    assert cond.pooled is not None
    size = torch.tensor([[8.0, 6, 0, 0, 8, 6]]).repeat(B, 1)
    sized = Cond(cond.text, cond.pooled, size)
    nothing = Cond(torch.zeros_like(cond.text), torch.zeros_like(cond.pooled), size)
    theirs = pipe(
        prompt_embeds=cond.text, pooled_prompt_embeds=cond.pooled, negative_prompt_embeds=nothing.text,
        negative_pooled_prompt_embeds=nothing.pooled, original_size=(8, 6), target_size=(8, 6), height=8,
        width=8,
        latents=x, guidance_scale=w, num_inference_steps=steps, output_type="latent",
    ).images  # fmt: skip
    schedule = noise.schedule()
    with torch.no_grad():
        ours = ode(
            guided(Denoiser(net, schedule), nothing, w), schedule, x, schedule.solver_grid(steps), sized
        )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_the_grid_is_that_of_lcm():
    schedule = Noise().schedule()
    grid = schedule.solver_grid(50)
    assert (grid.dtype, len(grid)) == (torch.float64, 51)
    assert schedule.model_t(grid).tolist() == [*(20 * n - 1 for n in range(50, 0, -1)), 0]
    assert schedule.model_t(schedule.solver_grid(4)).tolist() == [999, 749, 499, 249, 0]
    assert schedule.alpha(grid)[-1] == schedule.alphas_cumprod[0].sqrt()  # not 1
    short = VPSchedule([0.9, 0.5, 0.1, 0.01], "eps")
    assert short.model_t(short.solver_grid(2)).tolist() == [3, 1, 0]


def lcm(timesteps: list[float]) -> LCMScheduler:
    return sdxl_folder.lcm_scheduler(Noise(), [t / 1000 for t in timesteps], Noise().schedule())


@pytest.mark.parametrize(
    ("timesteps", "solver_steps"),
    [
        ([1000], 50),
        ([1000, 760, 500, 260], 50),
        ([1000, 750, 500, 250], 4),
        ([1000, 800, 600, 400, 200], 50),
        ([1000, 760, 520, 280], 25),
        ([1000 - 10 * n for n in range(100)], 100),
    ],
)
def test_scheduler_takes_the_students_steps(timesteps, solver_steps, tmp_path):
    lcm(timesteps).save_pretrained(tmp_path)
    scheduler = LCMScheduler.from_pretrained(tmp_path)
    scheduler.set_timesteps(len(timesteps))
    assert scheduler.timesteps.tolist() == [t - 1 for t in timesteps]
    assert scheduler.config.original_inference_steps == solver_steps
    assert scheduler.config.timestep_scaling == 10.0
    assert {key: scheduler.config[key] for key in asdict(Noise())} == asdict(Noise())


def test_scheduler_rounds_as_the_network_is_conditioned():
    """750.5 is index 750, and not 749: the half goes to the even one."""
    assert VPSchedule([0.5] * 1000, "eps").model_t(torch.tensor([0.7505])).item() == 750
    with pytest.raises(ValueError, match=r"750\.5"):
        lcm([1000, 750.5, 500, 250])


@pytest.mark.parametrize(
    "timesteps",
    [
        [1000, 900, 500],
        [1000, 900, 500, 250],
        [1000, 900, 600, 320, 200, 100],
        [1000 - 16 * n for n in range(60)],
    ],
    ids=len,
)
def test_scheduler_refuses_other_lists_and_names_one_that_it_takes(timesteps):
    with pytest.raises(ValueError, match=r"^method.denoising_timesteps = \[1000.*e\.g\. \[1000") as e:
        lcm(timesteps)
    assert "\n" not in str(e.value)
    lcm(json.loads(str(e.value).partition("e.g. ")[2]))


def test_export_copies_what_the_source_has(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=3).save_pretrained(
        source / "vae"
    )
    (source / "model_index.json").write_text(json.dumps({"vae": ["diffusers", "AutoencoderTiny"]}))
    sdxl_folder.export(out, TINY, SDXL(TINY).state_dict(), lcm([1000, 500]), source)
    index = json.loads((out / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline"
    assert index["scheduler"] == ["diffusers", "LCMScheduler"]
    assert index["vae"] == ["diffusers", "AutoencoderTiny"]  # as the source says
    assert index["text_encoder_2"] == [None, None]  # it has none
    assert index["force_zeros_for_empty_prompt"] is True
    assert sorted(path.name for path in out.iterdir()) == ["model_index.json", "scheduler", "unet", "vae"]
    assert AutoencoderKL.from_pretrained(out / "vae").config.latent_channels == 3


# --------------------------------------------------------------------------- the shipped one


def test_the_shipped_teacher_opens_in_diffusers():
    pipe, net = opened(TEACHER), sdxl_folder.load(TEACHER)
    assert same(pipe.unet.state_dict(), net.unet.state_dict())
    assert sdxl_folder.read_noise(TEACHER) == Noise()
    assert sum(file.stat().st_size for file in TEACHER.rglob("*.safetensors")) < 3e6


def test_the_shipped_teacher_needs_its_many_steps():
    config = Config(sources=("shapes",), resolution=(12, 12))
    world = ShapesWorld(config, SDXLFamily(), (3, 12, 12), torch.device("cpu"))
    schedule, prompts = sdxl_folder.read_noise(TEACHER).schedule(), [*world.prompts] * 4
    teacher, cond = Denoiser(sdxl_folder.load(TEACHER), schedule), world.cond(prompts)
    noise = Rng(7, 0, "sample", range(len(prompts)), "cpu").normal(world.latent_shape)
    with torch.no_grad():
        samples = {n: ode(teacher, schedule, noise, schedule.solver_grid(n), cond) for n in (50, 4)}
    scores = {n: world.scores(x0, prompts, 0)["oracle"] for n, x0 in samples.items()}
    assert scores[50] >= 0.85
    assert scores[4] == 0
