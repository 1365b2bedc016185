"""Every configuration of the repository loads, has the published networks, and runs a step.

On the meta device and in a folder with what the configurations name, but for weights.
"""

import json
import re
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, WanTransformer3DModel
from tiny import write_encoded

from fastdmd import config as configs
from fastdmd.config import Config
from fastdmd.methods.method import TRAINABLE
from fastdmd.models.families import FAMILIES
from fastdmd.models.sdxl.family import GUIDANCE_EMBEDDING
from fastdmd.models.sdxl.folder import Noise
from fastdmd.models.sdxl.net import SDXLConfig
from fastdmd.models.wan.layers import WanConfig
from fastdmd.roles import roles_of
from fastdmd.warm import nets_on_meta, step_on_meta

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").glob("*.toml"))
WANS = {
    "Wan2.1-T2V-1.3B-Diffusers": WanConfig(
        num_attention_heads=12,
        attention_head_dim=128,
        num_layers=30,
        ffn_dim=8960,
        freq_dim=256,
        text_dim=4096,
    ),
    "Wan2.1-T2V-14B-Diffusers": WanConfig(
        num_attention_heads=40,
        attention_head_dim=128,
        num_layers=40,
        ffn_dim=13824,
        freq_dim=256,
        text_dim=4096,
    ),
}
CAUSAL = "Wan2.1-T2V-1.3B-causal"  # what self-forcing starts from
SDXL = "stable-diffusion-xl-base-1.0"
# updates of (student, critic) over a whole run, as published, or ours where the file says so
LENGTHS = {
    "sdxl_dmd": (3800, 19000),  # DMD2's 19,000 iterations
    "sdxl_lcm": (1000, 0),
    "sdxl_lcm_lora": (1000, 0),
    "wan14b_dcm": (1000, 0),
    "wan14b_dmd": (800, 4000),  # FastVideo's 4,000 steps
    "wan14b_dmd_24gb": (800, 4000),
    "wan14b_dmd_full": (800, 4000),
    "wan14b_sid": (120, 600),  # Self-Forcing's 600 iterations, here and below
    "wan1_3b_dcm": (1000, 0),
    "wan1_3b_dmd": (800, 4000),
    "wan1_3b_dmd_full": (800, 4000),
    "wan1_3b_lcm": (4000, 0),
    "wan1_3b_selfforcing_dmd": (120, 600),
    "wan1_3b_selfforcing_sid": (120, 600),
    "wan1_3b_sid": (120, 600),
    "tiny_dcm_detail": (500, 0),
    "tiny_dcm_semantic": (1400, 0),
    "tiny_dmd": (490, 980),
    "tiny_dmd_gan": (420, 840),
    "tiny_dmd_lora": (600, 1200),
    "tiny_dmd_vsa": (490, 980),
    "tiny_flow": (16000, 0),
    "tiny_flow_causal": (2000, 0),
    "tiny_flow_vsa": (2500, 0),
    "tiny_lcm": (1600, 0),
    "tiny_sdxl_flow": (8000, 0),
    "tiny_sdxl_lcm": (1200, 0),
    "tiny_sdxl_lcm_lora": (800, 0),
    "tiny_selfforcing_dmd": (400, 800),
    "tiny_selfforcing_sid": (900, 1800),
    "tiny_sid": (900, 1800),
}
SAMPLES = {  # of a step
    **dict.fromkeys(("wan1_3b_dmd", "wan1_3b_dmd_full", "wan1_3b_sid", "wan14b_sid"), 64),
    **dict.fromkeys(("wan1_3b_selfforcing_dmd", "wan1_3b_selfforcing_sid"), 64),
    # 64 GPUs, four on a sample
    **dict.fromkeys(("wan14b_dmd", "wan14b_dmd_24gb", "wan14b_dmd_full"), 16),
    **dict.fromkeys(("wan1_3b_dcm", "wan14b_dcm"), 1),
    "wan1_3b_lcm": 16,
    "sdxl_dmd": 128,
    **dict.fromkeys(("sdxl_lcm", "sdxl_lcm_lora"), 12),
}
NEEDS_NO_SOURCE = ("output_dir", "family", "name", "expert")
SIBLINGS = [
    ("wan1_3b_dmd_full", "wan14b_dmd_full"),
    ("wan1_3b_dmd_full", "wan1_3b_dmd"),
    ("wan14b_dmd_full", "wan14b_dmd"),
    ("wan14b_dmd", "wan14b_dmd_24gb"),
    ("wan14b_dmd", "wan14b_sid"),
    ("wan1_3b_sid", "wan14b_sid"),
    ("wan1_3b_dcm", "wan14b_dcm"),
    ("wan1_3b_dmd_full", "wan1_3b_sid"),
    ("wan1_3b_dmd_full", "wan1_3b_selfforcing_dmd"),
    ("wan1_3b_sid", "wan1_3b_selfforcing_sid"),
    ("wan1_3b_selfforcing_dmd", "wan1_3b_selfforcing_sid"),
    ("wan1_3b_dcm", "wan1_3b_lcm"),
    ("sdxl_lcm", "sdxl_lcm_lora"),
    ("tiny_dmd", "tiny_dmd_gan"),
    ("tiny_dmd", "tiny_dmd_lora"),
    ("tiny_dmd", "tiny_dmd_vsa"),
    ("tiny_dmd", "tiny_sid"),
    ("tiny_dmd", "tiny_selfforcing_dmd"),
    ("tiny_sid", "tiny_selfforcing_sid"),
    ("tiny_selfforcing_dmd", "tiny_selfforcing_sid"),
    ("tiny_dcm_semantic", "tiny_dcm_detail"),
    ("tiny_sdxl_lcm", "tiny_sdxl_lcm_lora"),
    ("tiny_flow", "tiny_sdxl_flow"),
    ("tiny_flow_causal", "tiny_flow_vsa"),
]
DIFFERENCES = Path(__file__).parent / "golden" / "config_differences.txt"
PARAMETERS = {"Wan2.1-T2V-1.3B-Diffusers": 1.42e9, "Wan2.1-T2V-14B-Diffusers": 14.29e9, SDXL: 2.567e9}


def overrides(path: Path) -> list[str]:
    """Of the second run that a file's comment tells of, `#   key=value` each."""
    return [line.removeprefix("#   ") for line in path.read_text().splitlines() if line.startswith("#   ")]


RUNS = [pytest.param(path, [], id=path.stem) for path in FILES]
RUNS += [pytest.param(path, overrides(path), id=f"{path.stem}, again") for path in FILES if overrides(path)]
# what `make check` leaves out: networks of the published sizes, which take most of a minute together
SIZES = [
    run
    if str(run.id).startswith("tiny")
    else pytest.param(*run.values, id=run.id, marks=pytest.mark.full_size)
    for run in RUNS
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Make a folder with all that the configurations name.

    It has published architectures, empty frozen parts and one sample of each kind.
    """
    path = tmp_path_factory.mktemp("place")
    (path / "assets").symlink_to(ROOT / "assets")
    for name, wan in {**WANS, CAUSAL: WANS["Wan2.1-T2V-1.3B-Diffusers"]}.items():
        make_folder(path / "models" / name, "wan2.1", {"_class_name": "WanTransformer3DModel", **vars(wan)})
    unet = {"_class_name": "UNet2DConditionModel", **SDXLConfig().keys()}
    make_folder(path / "models" / SDXL, "sdxl", unet)
    scheduler = path / "models" / SDXL / "scheduler" / "scheduler_config.json"
    scheduler.parent.mkdir()
    scheduler.write_text(json.dumps({"_class_name": "EulerDiscreteScheduler", **vars(Noise())}))
    text = torch.zeros(1, 512, 4096, dtype=torch.bfloat16)
    x0 = torch.zeros(1, 16, 21, 60, 104, dtype=torch.bfloat16)
    write_encoded(path / "data" / "wan_480p", {"x0": x0, "text": text}, text)
    image = {
        "x0": torch.zeros(1, 4, 128, 128),
        "text": torch.zeros(1, 77, 2048),
        "pooled": torch.zeros(1, 1280),
    }
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
    """Return the parameters of diffusers' own network of a folder."""
    stock = UNet2DConditionModel if (path / "unet").is_dir() else WanTransformer3DModel
    [config] = [*path.glob("unet/config.json"), *path.glob("transformer/config.json")]
    with torch.device("meta"):
        return count(stock.from_config(json.loads(config.read_text())))


def count(net: torch.nn.Module) -> int:
    """Return the parameters of a network that are no role's own adapters or copies."""
    own = (".lora_", ".own.")
    return sum(p.numel() for name, p in net.named_parameters() if not any(mark in name for mark in own))


def added(config: Config, role: str, net) -> int:
    """Return what a role's network has beside the published parameters and adapters."""
    options, found = config.role_options(role), 0
    if options.tile and not config.role_lora(role):  # a gate for each block; of adapters it has no weights
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


@pytest.mark.parametrize(("path", "extra"), SIZES)
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
        assert net.checkpointing == config.memory.checkpointing
        assert {p.dtype for p in net.parameters()} <= {config.precision.dtype, torch.float32}


@pytest.mark.parametrize(("path", "extra"), SIZES)
def test_a_step_trains_what_it_should(path, extra):
    """Forward and backward of every phase; DCM's heads are every second block, so two blocks have one."""
    config = configs.load(path, extra)
    depth = 2 if config.method.name == "dcm" else None
    nets = step_on_meta(config, config.vsa.sparsity if config.vsa else 0.0, depth)
    roles, wanted = roles_of(config), defaultdict[str, set[str]](set)
    for role, denoiser in nets.items():
        names = {name for name, _ in denoiser.net.named_parameters()} if role in TRAINABLE else set()
        if roles[role].lora:
            names = {n for n in names if re.search(rf"\.(own|lora_A|lora_B)\.{role}\.", n)}
        wanted[roles[role].network] |= names
        assert names or role not in TRAINABLE
    for role, names in wanted.items():
        learned = {name for name, p in nets[role].net.named_parameters() if p.grad is not None}
        assert learned == names, role


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


@pytest.mark.full_size
def test_adapters_of_lcm_lora_are_as_many_as_the_published():
    """394 MB in float16."""
    config = configs.load(ROOT / "configs" / "sdxl_lcm_lora.toml")
    nets = nets_on_meta(config, config.make_method())
    assert 2 * sum(p.numel() for p in nets["student"].trainable.values()) == pytest.approx(394e6, rel=5e-3)


def updates(config: Config) -> Counter[str]:
    """Count the updates of each role over a whole run."""
    method, counts = config.make_method(), Counter()
    for step in range(config.run.max_steps):
        counts.update(role for phase in method.phases(step) for role in method.trains(phase))
    return counts


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_run_has_the_published_length(path):
    counts = updates(configs.load(path))
    assert (counts["student"], counts["critic"]) == LENGTHS[path.stem]


@pytest.mark.parametrize("name", SAMPLES)
def test_what_waits_for_a_step_waits_the_published_time(name):
    """`start_step` and `warmup_steps` count steps, of which DMD and SiD train the student in one of five."""
    config = configs.load(ROOT / "configs" / f"{name}.toml")
    start = config.ema.start_step if config.ema else 0
    assert start == (200 if config.method.name in ("dmd", "sid") and config.ema else 0)
    warmups = {role: optim.warmup_steps for role, optim in config.optim.items()}
    assert set(warmups.values()) == {500 if name == "sdxl_dmd" else 0}
    assert config.run.max_steps > max(start, *warmups.values())


@pytest.mark.parametrize("name", SAMPLES)
def test_a_step_has_the_published_samples(name):
    run = configs.load(ROOT / "configs" / f"{name}.toml").run
    assert run.batch_size * run.grad_accum == SAMPLES[name]


@pytest.mark.parametrize("name", ["selfforcing_dmd", "selfforcing_sid"])
@pytest.mark.parametrize("size", ["tiny", "wan1_3b"])
def test_a_critic_of_self_forcing_starts_from_the_bidirectional_base(size, name):
    config = configs.load(ROOT / "configs" / f"{size}_{name}.toml")
    assert config.role_source("student")[0] == "student.path"
    assert "causal" in config.student.path
    assert config.role_source("critic")[0] == "model.path"
    assert "causal" not in config.model.path
    causal = [role for role in ("student", "teacher", "critic") if config.role_options(role).causal]
    assert causal == ["student"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_student_is_its_own_target(path):
    assert not list(configs.load(path).make_method().warnings())


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.stem.startswith("wan")], ids=lambda path: path.stem
)
def test_every_recipe_of_wan_compiles_its_blocks(path):
    assert configs.load(path).compile.mode == "blocks"


def without_source(text: str) -> Iterator[str]:
    """Yield the lines of a recipe whose value has no comment beside it, nor beside the head of its table."""
    sourced, inside = False, False
    for line in text.splitlines():
        if line.startswith("["):
            sourced = "#" in line
        elif inside or not line or line.startswith("#"):
            inside = inside and line != "]"
        elif not sourced and "#" not in line and line.split(" = ")[0] not in NEEDS_NO_SOURCE:
            yield line
        else:
            inside = line.split("#")[0].rstrip().endswith("= [")


@pytest.mark.parametrize(
    "path", [path for path in FILES if not path.name.startswith("tiny")], ids=lambda path: path.stem
)
def test_each_value_of_a_recipe_has_its_source_beside_it(path):
    assert list(without_source(path.read_text(encoding="utf-8"))) == []


def test_a_value_without_a_source_is_seen():
    text = "# a recipe\n[a]\nx = 1  # A\ny = 2\n[b]  # ours\nz = 3\n[c]\nw = [  # C\n  1,\n]\nv = 4\n"
    assert list(without_source(text)) == ["y = 2", "v = 4"]


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested tables by their full keys."""
    found = {}
    for key, value in table.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def differences() -> str:
    """Return the keys in which siblings differ, with both values."""
    text = []
    for left, right in SIBLINGS:
        files = (ROOT / "configs" / f"{name}.toml" for name in (left, right))
        a, b = (flat(tomllib.loads(file.read_text(encoding="utf-8"))) for file in files)
        text.append(f"{left} | {right}")
        for key in sorted(a.keys() | b.keys()):
            if a.get(key) != b.get(key):
                text.append(f"  {key}: {a.get(key, 'absent')} | {b.get(key, 'absent')}")
        text.append("")
    return "\n".join(text)


def test_siblings_differ_as_they_are_known_to():
    """To write the file anew: `PYTHONPATH=tests python tests/config/test_configs.py`; read its diff."""
    assert differences() == DIFFERENCES.read_text(encoding="utf-8")


def test_every_configuration_has_a_sibling():
    alone = {"sdxl_dmd", "tiny_lcm"}
    assert {name for pair in SIBLINGS for name in pair} | alone == {path.stem for path in FILES}


if __name__ == "__main__":
    DIFFERENCES.write_text(differences(), encoding="utf-8")
