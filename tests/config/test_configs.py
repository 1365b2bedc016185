"""Every configuration of the repository: it loads, its networks are the published ones, and a step of it runs.

On the meta device and in a folder with what the configurations name, but for weights.
"""

import json
import tomllib
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel, WanTransformer3DModel
from tiny import write_encoded

from fastdmd import config as configs
from fastdmd.config import Config
from fastdmd.methods.method import TRAINABLE
from fastdmd.models.family import FAMILIES, GUIDANCE_EMBEDDING
from fastdmd.models.sdxl.folder import Noise
from fastdmd.models.sdxl.net import SDXLConfig
from fastdmd.models.wan.layers import WanConfig
from fastdmd.warm import nets_on_meta, step_on_meta

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").glob("*.toml"))
WANS = {
    "Wan2.1-T2V-1.3B-Diffusers": WanConfig(
        num_attention_heads=12, attention_head_dim=128, num_layers=30, ffn_dim=8960, freq_dim=256, text_dim=4096
    ),
    "Wan2.1-T2V-14B-Diffusers": WanConfig(
        num_attention_heads=40, attention_head_dim=128, num_layers=40, ffn_dim=13824, freq_dim=256, text_dim=4096
    ),
}
SDXL = "stable-diffusion-xl-base-1.0"
PARAMETERS = {"Wan2.1-T2V-1.3B-Diffusers": 1.42e9, "Wan2.1-T2V-14B-Diffusers": 14.29e9, SDXL: 2.567e9}


def overrides(path: Path) -> list[str]:
    """Of the second run that a file's comment tells of, `#   key=value` each."""
    return [line.removeprefix("#   ") for line in path.read_text().splitlines() if line.startswith("#   ")]


RUNS = [pytest.param(path, [], id=path.stem) for path in FILES]
RUNS += [pytest.param(path, overrides(path), id=f"{path.stem}, again") for path in FILES if overrides(path)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with all that the configurations name: published architectures, empty frozen parts, one sample each."""
    path = tmp_path_factory.mktemp("place")
    (path / "assets").symlink_to(ROOT / "assets")
    for name, wan in WANS.items():
        make_folder(path / "models" / name, "wan2.1", {"_class_name": "WanTransformer3DModel", **vars(wan)})
    unet = {"_class_name": "UNet2DConditionModel", **SDXLConfig().keys()}
    make_folder(path / "models" / SDXL, "sdxl", unet)
    scheduler = path / "models" / SDXL / "scheduler" / "scheduler_config.json"
    scheduler.parent.mkdir()
    scheduler.write_text(json.dumps({"_class_name": "EulerDiscreteScheduler", **vars(Noise())}))
    text = torch.zeros(1, 512, 4096, dtype=torch.bfloat16)
    x0 = torch.zeros(1, 16, 21, 60, 104, dtype=torch.bfloat16)
    write_encoded(path / "data" / "wan_480p", {"x0": x0, "text": text}, text)
    image = {"x0": torch.zeros(1, 4, 128, 128), "text": torch.zeros(1, 77, 2048), "pooled": torch.zeros(1, 1280)}
    write_encoded(path / "data" / "sdxl_1024", image, None)
    (path / "data" / "prompts.txt").write_text("a cat\na dog\n")
    for file in FILES:  # what one run wants another to have exported
        if source := tomllib.loads(file.read_text())["model"].get("path"):
            student = path / "runs" / file.stem / "student"
            student.parent.mkdir(parents=True)
            student.symlink_to(path / source)
    return path


def make_folder(path: Path, family: str, config: dict) -> None:
    for part in (FAMILIES[family].component, *FAMILIES[family].frozen):
        (path / part).mkdir(parents=True)
    (path / FAMILIES[family].component / "config.json").write_text(json.dumps(config))


@pytest.fixture(autouse=True)
def there(place, monkeypatch):
    monkeypatch.chdir(place)


@cache
def published(path: Path) -> int:
    """The parameters of diffusers' own network of a folder."""
    stock = UNet2DConditionModel if (path / "unet").is_dir() else WanTransformer3DModel
    [config] = [*path.glob("unet/config.json"), *path.glob("transformer/config.json")]
    with torch.device("meta"):
        return count(stock.from_config(json.loads(config.read_text())))


def count(net: torch.nn.Module) -> int:
    return sum(p.numel() for name, p in net.named_parameters() if ".lora_" not in name)


def added(config: Config, role: str, net) -> int:
    """What a role's network has beside the published parameters and adapters."""
    options, found = config.role_options(role), 0
    if options.tile:  # a gate for each block
        found += net.config.num_layers * (net.config.width + 1) * net.config.width
    if options.guidance_embedding:
        found += GUIDANCE_EMBEDDING * net.config.block_out_channels[0]
    return found


@pytest.mark.parametrize(("path", "extra"), RUNS)
def test_it_loads(path, extra, tmp_path):
    config = configs.load(path, extra)
    (tmp_path / "resolved.toml").write_text(configs.dump(config), encoding="utf-8")
    assert configs.load(tmp_path / "resolved.toml") == config


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_architectures_have_the_published_numbers(name):
    assert published(Path("models") / name) == pytest.approx(PARAMETERS[name], rel=1e-3)


@pytest.mark.parametrize(("path", "extra"), RUNS)
def test_its_networks_are_the_published_ones(path, extra):
    config = configs.load(path, extra)
    nets = nets_on_meta(config, config.make_method())
    assert set(nets) == set(config.method.roles)
    for role, denoiser in nets.items():
        if config.method.roles[role] == "heads":
            continue
        source, net = config.role_path(role), denoiser.net
        if source:
            assert count(net) == published(Path(source)) + added(config, role, net), role
        assert net.checkpointing == (config.memory.checkpointing == "full")
        assert {p.dtype for p in net.parameters()} <= {config.precision.dtype, torch.float32}


@pytest.mark.parametrize(("path", "extra"), RUNS)
def test_a_step_trains_what_it_should(path, extra):
    """Forward and backward of every phase; DCM's heads are every second block, so two blocks have one."""
    config = configs.load(path, extra)
    depth = 2 if config.method.name == "dcm" else None
    nets = step_on_meta(config, config.vsa.sparsity if config.vsa else 0.0, depth)
    for role, denoiser in nets.items():
        names = {name for name, _ in denoiser.net.named_parameters()} if role in TRAINABLE else set()
        if role == "student" and config.lora:
            whole = tuple(f"{module}." for module in config.lora.modules)
            names = {name for name in names if ".lora_" in name or name.startswith(whole)}
        assert {name for name, p in denoiser.net.named_parameters() if p.grad is not None} == names, role
        assert names or role not in TRAINABLE


@pytest.mark.parametrize(("path", "extra"), RUNS)
def test_its_student_can_be_exported(path, extra):
    """diffusers has a scheduler whose steps are the student's."""
    config = configs.load(path, extra)
    method = config.make_method()
    times = method.times.tolist() if method.times is not None and method.renoises else None
    scheduler = config.family.make_scheduler(times, config.make_schedule(), None)
    if times:
        scheduler.set_timesteps(len(times))
        index = scheduler.timesteps + (config.model.family == "sdxl")
        assert index.tolist() == pytest.approx([1000 * t for t in times], abs=1e-3)


def test_adapters_of_lcm_lora_are_as_many_as_the_published():
    """394 MB in float16."""
    config = configs.load(ROOT / "configs" / "sdxl_lcm_lora.toml")
    nets = nets_on_meta(config, config.make_method())
    assert 2 * sum(p.numel() for p in nets["student"].trainable.values()) == pytest.approx(394e6, rel=5e-3)
