"""Diffusers folders in and out, bit for bit, and the scheduler that takes a student's steps."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchLCMScheduler, UniPCMultistepScheduler, WanTransformer3DModel

from fastdmd.models.wan import folder
from fastdmd.models.wan.layers import WanConfig
from fastdmd.models.wan.net import Wan
from fastdmd.schedule import FlowSchedule

TEACHER = Path(__file__).parents[2] / "assets" / "tiny_wan"
TINY = WanConfig(
    num_attention_heads=2, attention_head_dim=12, num_layers=2, ffn_dim=40, in_channels=3, out_channels=3,
    text_dim=8,
    freq_dim=32, patch_size=(1, 1, 2), cross_attn_norm=False, eps=1e-5,
)  # fmt: skip


@pytest.fixture
def theirs():
    torch.manual_seed(0)
    return WanTransformer3DModel(**asdict(TINY))


@pytest.fixture
def saved(theirs, tmp_path):
    """Make a folder that diffusers wrote."""
    theirs.save_pretrained(tmp_path / "transformer")
    return tmp_path


def edit_config(path, **values):
    file = path / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def same(a, b):
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a
    )


@pytest.mark.parametrize("max_shard_size", ["10GB", "20KB"])
def test_loads_what_diffusers_saved(theirs, tmp_path, max_shard_size):
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size=max_shard_size)
    shards = len(list(tmp_path.glob("transformer/*.safetensors")))
    assert shards > 2 if max_shard_size == "20KB" else shards == 1
    net = folder.load(tmp_path)
    assert net.config == TINY
    assert same(net.state_dict(), theirs.state_dict())


def test_loads_as_float32(theirs, tmp_path):
    theirs.bfloat16().save_pretrained(tmp_path / "transformer")
    assert same(folder.load(tmp_path).state_dict(), theirs.float().state_dict())


def test_diffusers_opens_what_we_saved(tmp_path):
    net = Wan(TINY)
    folder.save(tmp_path, net.config, dict(net.named_parameters()))
    theirs, info = WanTransformer3DModel.from_pretrained(tmp_path / "transformer", output_loading_info=True)
    assert not any(info.values()), info
    assert {key: theirs.config[key] for key in asdict(TINY)} == {**asdict(TINY), "patch_size": [1, 1, 2]}
    assert same(theirs.state_dict(), net.state_dict())
    assert folder.load(tmp_path).config == TINY


def test_saving_again_replaces_shards(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size="20KB")
    net = Wan(TINY)
    folder.save(tmp_path, net.config, net.state_dict())
    assert same(folder.load(tmp_path).state_dict(), net.state_dict())
    assert len(list(tmp_path.glob("transformer/*.safetensors*"))) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"_class_name": "UNet2DConditionModel"},
            "is a UNet2DConditionModel.*name a diffusers folder of Wan 2.1",
        ),
        ({"image_dim": 1280, "added_kv_proj_dim": 5120}, "image_dim = 1280.*name a text-to-video Wan 2.1"),
        ({"in_channels": 36}, "in_channels = 36.*name a text-to-video Wan 2.1"),
        ({"ffn_dim": 41}, r"proj.weight is \[40, 24\], not \[41, 24\].*and 3 more.*save the folder again"),
        ({"num_layers": 1}, "blocks.1.* is unknown.*save the folder again"),
        ({"num_layers": 3}, "blocks.2.* is missing.*save the folder again"),
    ],
)
def test_refuses_another_model(saved, values, message):
    edit_config(saved, **values)
    with pytest.raises(ValueError, match=message) as e:
        folder.load(saved)
    assert str(saved) in str(e.value)
    assert "\n" not in str(e.value)


def test_refuses_the_pair_of_wan_2_2(saved):
    (saved / "transformer_2").mkdir()
    with pytest.raises(
        ValueError, match=f"^{re.escape(str(saved))}: .*transformer_2.*name a text-to-video Wan 2.1$"
    ):
        folder.load(saved)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda file: file.rename(file.with_suffix(".bin")),
            "neither .*safetensors nor .*index.json.*save it",
        ),
        (lambda file: file.write_bytes(file.read_bytes()[:-100]), "cannot be read.*again"),
    ],
)
def test_refuses_damaged_weights(saved, damage, message):
    damage(saved / "transformer" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=message) as e:
        folder.load(saved)
    assert str(saved) in str(e.value)
    assert "\n" not in str(e.value)


def test_refuses_a_missing_shard(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "transformer", max_shard_size="20KB")
    lost = min(tmp_path.glob("transformer/*.safetensors"))
    lost.unlink()
    with pytest.raises(ValueError, match=f"^{re.escape(str(lost))} cannot be read.*again$"):
        folder.load(tmp_path)


@pytest.mark.parametrize(
    ("timesteps", "shift", "terminal"),
    [
        ([1000], 1.0, None),
        ([1000, 522], 1.0, 0.522),
        ([1000, 757, 522], 0.96705, 0.522),
        ([1000, 400, 200], None, 0.2),
        ([1000, 750, 500, 250], 1.0, 0.25),
        ([1000, 937.5, 833.333, 625], 2.50945, 0.625),
    ],
)
def test_scheduler_takes_the_students_steps(timesteps, shift, terminal, tmp_path):
    config = folder.lcm_scheduler_config([t / 1000 for t in timesteps])
    assert config["shift_terminal"] == terminal
    if shift is not None:
        assert config["shift"] == pytest.approx(shift, abs=1e-5)
    FlowMatchLCMScheduler.from_config(config).save_pretrained(tmp_path)
    scheduler = FlowMatchLCMScheduler.from_pretrained(tmp_path)
    scheduler.set_timesteps(len(timesteps))
    assert scheduler.timesteps.tolist() == pytest.approx(timesteps, abs=1e-3)
    assert (1000 * scheduler.sigmas).tolist() == pytest.approx([*timesteps, 0], abs=1e-3)


@pytest.mark.parametrize(
    "timesteps", [[1000, 900, 500, 250], [1000, 937.5, 833, 625], [1000, 800, 790, 780, 100]]
)
def test_scheduler_refuses_other_lists(timesteps):
    with pytest.raises(
        ValueError, match=r"^method.denoising_timesteps = \[1000.*three steps always are"
    ) as e:
        folder.lcm_scheduler_config([t / 1000 for t in timesteps])
    assert "\n" not in str(e.value)


def test_many_step_export_solves_on_our_grid(tmp_path):
    """One shift: 50 steps of the stock solver are where ours are. Two shifts would be 0.05 off."""
    net = Wan(TINY)
    many = folder.make_scheduler(None, FlowSchedule(3.0), None)
    folder.export(tmp_path, net.config, net.state_dict(), many, None)
    scheduler = UniPCMultistepScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    scheduler.set_timesteps(50)
    assert (scheduler.sigmas - FlowSchedule(3.0).solver_grid(50)).abs().max() < 5e-3
    assert (
        json.loads((tmp_path / "model_index.json").read_text())["scheduler"][1] == "UniPCMultistepScheduler"
    )


def test_the_shipped_teacher_opens_in_diffusers():
    ours, path = folder.load(TEACHER), TEACHER / "transformer"
    theirs = WanTransformer3DModel.from_pretrained(path).state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.state_dict().items())
