"""Folders of encoded latents: samples of a batch, their conditions, and folders that are refused."""

import contextlib
import json
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import save_file
from test_export import frozen_networks, tiny_wan
from tiny import DMD, write_encoded
from torch import Tensor

from fastdmd import config as configs
from fastdmd.batch import Cond
from fastdmd.data.encoded import read_folders, read_sample
from fastdmd.data.table import Config, kind_of
from fastdmd.data.world import EncodedWorld, Model, make_world
from fastdmd.models import component
from fastdmd.models.family import AnyFamily
from fastdmd.models.sdxl.family import SDXLFamily
from fastdmd.models.wan import folder as wan_folder
from fastdmd.models.wan.family import WanFamily
from fastdmd.rng import Rng
from fastdmd.run import build
from fastdmd.train import take_step

CPU, WAN = torch.device("cpu"), WanFamily.latents
VIDEO, IMAGE = (16, 2, 4, 6), (4, 4, 6)


class Lengths(WanFamily):
    """Wan with an encoder of prompts' lengths in place of a folder's, and a VAE that returns its inputs."""

    def encoder(self, path, device, dtype, codes=None):
        return lambda prompts: Cond(torch.tensor([len(p) for p in prompts]).view(-1, 1, 1))

    def decode(self, path, x0, device, dtype) -> Any:
        return path, len(x0)


def numbered(
    count: int, start: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """x0 and text of sample i are full of i."""
    i = torch.arange(start, start + count, dtype=dtype)
    x0 = i.view(-1, *[1] * len(shape)).expand(-1, *shape)
    return {"x0": x0, "text": i.view(-1, 1, 1).expand(-1, 3, 5)}


@pytest.fixture
def videos(tmp_path):
    """Seven samples in two folders, two a shard: 0, 1 | 2, 3 | 4 and 5, 6."""
    uncond = torch.full((1, 3, 5), -1.0)
    write_encoded(tmp_path / "a", numbered(5, 0, VIDEO), uncond)
    write_encoded(tmp_path / "b", numbered(2, 5, VIDEO), uncond)
    return (str(tmp_path / "a"), str(tmp_path / "b"))


class Images(SDXLFamily):
    """SDXL with no text encoder."""

    def encoder(self, path, device, dtype, codes=None):
        return lambda prompts: Cond(torch.zeros(len(prompts), 1, 1))


def world(sources: tuple[str, ...], family: AnyFamily | None = None, **keys) -> EncodedWorld:
    """Return the world of folders for videos of 5 frames, or for images."""
    family = family or Lengths()
    frames = None if family.latents.temporal is None else 5
    config = Config(sources=sources, frames=frames, resolution=(32, 48), **keys)
    assert list(config.problems()) == list(config.size_problems(family.latents)) == []
    shape = family.latents.shape(frames, (32, 48))
    made = make_world(config, Model(family, "wan", CPU, torch.float32), shape)
    assert isinstance(made, EncodedWorld)
    return made


def test_every_sample_is_drawn_alike_with_what_belongs_to_it(videos):
    batch = world(videos).batch(Rng(0, 0, "data", range(700), "cpu"))
    assert batch.x0 is not None
    assert batch.x0.shape == (700, *VIDEO)
    assert batch.cond.text.shape == (700, 3, 5)
    index = batch.x0[:, 0, 0, 0, 0]
    assert torch.equal(batch.x0, index.view(-1, 1, 1, 1, 1).expand_as(batch.x0))
    assert torch.equal(batch.cond.text, index.view(-1, 1, 1).expand_as(batch.cond.text))
    counts = index.long().bincount(minlength=7)
    assert len(counts) == 7
    assert counts.min() > 60  # 100 +- 9
    assert counts.max() < 140
    assert torch.equal(batch.uncond.text, torch.full((700, 3, 5), -1.0))
    assert batch.cond.pooled is None
    assert batch.cond.time_ids is None
    assert batch.latent_shape == VIDEO


def test_a_batch_is_a_function_of_seed_step_and_sample(videos):
    def drawn(seed: int, step: int, samples: list[int]) -> list[float]:
        x0 = world(videos, caption_dropout=0.3).batch(Rng(seed, step, "data", samples, "cpu")).x0
        assert x0 is not None
        return x0[:, 0, 0, 0, 0].tolist()

    whole = drawn(0, 4, list(range(40)))
    assert drawn(0, 4, list(range(25, 40))) == whole[25:]
    assert drawn(0, 5, list(range(40))) != whole
    assert drawn(1, 4, list(range(40))) != whole


def test_a_dropped_caption_is_the_empty_prompt_and_keeps_its_latents(videos):
    rng = (0, 0, "data", range(200), "cpu")
    kept, batch = (world(videos, caption_dropout=p).batch(Rng(*rng)) for p in (0.0, 0.3))
    dropped = (batch.cond.text == -1).flatten(1).all(1)
    assert 40 < dropped.sum() < 80
    assert torch.equal(batch.x0, kept.x0)
    assert torch.equal(batch.cond.text[~dropped], kept.cond.text[~dropped])


def test_images_have_pooled_text_and_sizes_and_zeros_on_the_other_side(tmp_path):
    tensors = numbered(3, 1, IMAGE) | {"pooled": torch.arange(1.0, 4)[:, None].expand(-1, 4)}
    write_encoded(tmp_path / "a", tensors, None)
    made = world((str(tmp_path / "a"),), Images(), caption_dropout=0.5)
    batch = made.batch(Rng(0, 0, "data", range(64), "cpu"))
    text, pooled, size = batch.cond.text[:, 0, 0], batch.cond.pooled, batch.cond.time_ids
    assert pooled is not None
    assert size is not None
    assert torch.equal(pooled, text[:, None].expand(-1, 4))
    assert set(text.tolist()) == {0, 1, 2, 3}
    assert size.tolist() == [[32, 48, 0, 0, 32, 48]] * 64
    assert not batch.uncond.text.any()
    assert batch.uncond.pooled is not None
    assert (batch.uncond.pooled.shape, batch.uncond.pooled.any().item()) == ((64, 4), False)
    assert batch.uncond.time_ids is not None
    assert torch.equal(batch.uncond.time_ids, size)


def test_latents_of_half_the_bits_are_widened(tmp_path):
    write_encoded(
        tmp_path / "a", numbered(2, 0, VIDEO, torch.bfloat16), torch.zeros(1, 3, 5, dtype=torch.bfloat16)
    )
    batch = world((str(tmp_path / "a"),)).batch(Rng(0, 0, "data", range(4), "cpu"))
    assert batch.x0 is not None
    assert (batch.x0.dtype, batch.cond.text.dtype) == (torch.float32, torch.bfloat16)


def test_what_is_shown_goes_through_the_models_own_parts(videos):
    made = world(videos)
    assert made.prompts == ["a cat", "a dog"] * 2
    assert made.cond(["four", "sixsix"]).text.flatten().tolist() == [4, 6]
    assert made.pixels(torch.zeros(3, *VIDEO)) == ("wan", 3)
    assert made.scores(torch.zeros(1, *VIDEO), ["a cat"], 0) == {"oracle": None, "swd": None}


def test_one_row_is_read(videos, monkeypatch):
    class Slices(contextlib.AbstractContextManager):
        """A safetensors file that gives slices and no whole tensor."""

        def __init__(self, *arguments):
            self.file = safe_open(*arguments)

        def __exit__(self, *_):
            pass

        def get_slice(self, key):
            return self.file.get_slice(key)

    shard = read_folders(videos, VIDEO)[0].shards[1][0]
    monkeypatch.setattr(component, "safe_open", Slices)
    row = read_sample(shard, 1, ["x0", "text"])
    assert {key: (tuple(x.shape), x.unique().tolist()) for key, x in row.items()} == {
        "x0": ((1, *VIDEO), [3]),
        "text": ((1, 3, 5), [3]),
    }


def manifest(path, **values):
    file = path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


FAULTS = {  # what is done to a folder, and what is reported
    "no list of files": (
        lambda path: manifest(path, files={}),
        r"a/manifest.json has no files; encode the folder",
    ),
    "no prompts": (
        lambda path: manifest(path, prompts=[]),
        r"a/manifest.json has no prompts; encode the folder",
    ),
    "not JSON": (lambda path: (path / "manifest.json").write_text("{"), r"a/manifest.json is not JSON"),
    "a shard is absent": (
        lambda path: (path / "00002.safetensors").unlink(),
        r"a has no 00002.safetensors; encode",
    ),
    "a shard was cut": (
        lambda path: (path / "00001.safetensors").write_bytes(b"\1\0"),
        r"a/00001.safetensors cannot be read \(.+\); encode the folder again",
    ),
    "a shard has no latents": (
        lambda path: save_file({"text": torch.zeros(2, 3, 5)}, path / "00001.safetensors"),
        r"a/00001.safetensors: x0 is missing, and has to be \[2, 16, 2, 4, 6\]",
    ),
    "the first shard has no text": (
        lambda path: save_file({"x0": torch.zeros(2, *VIDEO)}, path / "00000.safetensors"),
        r"a/00000.safetensors: text is missing, and has to be \[n, S, D\]",
    ),
    "a shard has other text": (
        lambda path: save_file(
            {"x0": torch.zeros(2, *VIDEO), "text": torch.zeros(2, 3, 6)}, path / "00001.safetensors"
        ),
        r"a/00001.safetensors: text is \[2, 3, 6\], and has to be \[2, 3, 5\]",
    ),
    "a shard has fewer samples": (
        lambda path: manifest(path, files={"00000.safetensors": 3}),
        r"a/00000.safetensors: x0 is \[2, 16, 2, 4, 6\], and has to be \[3, 16, 2, 4, 6\]",
    ),
    "the empty prompt is absent": (
        lambda path: (path / "uncond.safetensors").unlink(),
        r"a has no uncond.safetensors; encode",
    ),
    "the empty prompt is another's": (
        lambda path: save_file({"text": torch.zeros(1, 2, 5)}, path / "uncond.safetensors"),
        r"a/uncond.safetensors: text is \[1, 2, 5\], and has to be \[1, 3, 5\]",
    ),
    "it is no folder of latents": (
        lambda path: (path / "manifest.json").unlink(),
        r"'.*/a' has no manifest.json; name",
    ),
}


@pytest.mark.parametrize(("fault", "message"), FAULTS.values(), ids=FAULTS)
def test_a_folder_that_is_not_as_it_says_is_refused(videos, fault, message):
    config = Config(sources=videos, frames=5, resolution=(32, 48))
    path = read_folders(videos, VIDEO)[0].folder
    assert list(config.problems()) == list(config.size_problems(WAN)) == []
    fault(path)
    with pytest.raises(ValueError, match=message):
        read_folders(videos, VIDEO)
    [(key, message)] = config.size_problems(WAN)
    assert key == "sources"
    assert "\n" not in message


def test_a_method_that_needs_latents_trains_on_them(tmp_path):
    """LCM on a whole tiny Wan folder: loss and gradient are those of the samples' latents."""
    frozen = frozen_networks()
    net = tiny_wan(channels=16, text_dim=24)
    wan_folder.save(tmp_path / "wan", net.config, net.state_dict())
    transformer = WanTransformer3DModel.from_pretrained(tmp_path / "wan" / "transformer")
    scheduler = FlowMatchEulerDiscreteScheduler()
    WanPipeline(transformer=transformer, scheduler=scheduler, **frozen).save_pretrained(tmp_path / "wan")
    torch.manual_seed(0)
    write_encoded(
        tmp_path / "data",
        {"x0": torch.randn(4, *VIDEO), "text": torch.randn(4, 512, 24)},
        torch.zeros(1, 512, 24),
    )
    text = (
        DMD.format(here=tmp_path).replace('["shapes"]', f'["{tmp_path}/data"]').replace("[8, 8]", "[32, 48]")
    )
    text = text.replace("frames = 3", "frames = 5").replace(
        'name = "dmd"', 'name = "lcm"\nguidance_range = [2, 5]'
    )
    text = text.partition("[critic]")[0]
    (tmp_path / "lcm.toml").write_text(text)
    run = build(configs.load(tmp_path / "lcm.toml"))
    first = take_step(run)
    assert first["train/loss_student"] > 0
    assert first["train/grad_norm_student"] > 0
    assert run.world.cond(["a cat"]).text.shape == (1, 512, 24)


def test_a_source_that_is_elsewhere_is_a_folder_unless_its_name_has_an_ending(tmp_path):
    """A plan is made where the data is not."""
    assert kind_of("shapes") == "shapes"
    assert kind_of(str(tmp_path / "wan_480p")) == "encoded"
    assert kind_of(str(tmp_path / "prompts.txt")) == "prompts"
    (tmp_path / "lines").write_text("a red fox\n")
    (tmp_path / "v1.5").mkdir()
    assert kind_of(str(tmp_path / "lines")) == "prompts"
    assert kind_of(str(tmp_path / "v1.5")) == "encoded"
