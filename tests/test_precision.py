"""What number types become on a device, and what a device refuses."""

import pytest
import torch
from tiny import make_config

from fastdmd import train
from fastdmd.precision import Config, became, capability, has_float8, has_mxfp8, target_of
from fastdmd.run import build, build_synthetic

YES = None
NO_NUMBERS, NO_PRODUCTS = "has no such numbers; use 'int8'", "has no such products; use 'compute'"
# of a target: frozen int8, frozen float8, linear float8, linear mxfp8
ROWS = {
    "sm_80": (YES, NO_NUMBERS, NO_PRODUCTS, NO_PRODUCTS),
    "sm_90": (YES, YES, YES, "has no such products; use 'float8'"),
    "sm_100": (YES, YES, YES, YES),
    "sm_120": (YES, YES, YES, YES),
    "gfx942": (YES, YES, YES, "has no such products; use 'float8'"),
    "gfx950": (YES, YES, YES, "has no such products; use 'float8'"),
    "mps": (YES, NO_NUMBERS, NO_PRODUCTS, NO_PRODUCTS),
    "cpu": (YES, YES, YES, "has no such products; use 'float8'"),
}
OPTIONS = (
    ("frozen", "int8", "a byte for each weight of linear layers that no role trains, and products in bf16"),
    ("frozen", "float8", "a byte for each weight of linear layers that no role trains, and products in bf16"),
    ("linear", "float8", "products of linear layers of blocks in e4m3, a scale for each row"),
    ("linear", "mxfp8", "products of linear layers of blocks in e4m3, a scale for each 32 numbers"),
)


@pytest.mark.parametrize("target", ROWS)
@pytest.mark.parametrize("column", range(4))
def test_each_option_says_what_it_became_or_names_the_nearest(target, column):
    key, value, became_this = OPTIONS[column]
    refusal = ROWS[target][column]
    config = Config(**{key: value})
    if refusal is YES:
        (line,) = became(config, target)
        assert line.startswith(f"precision.{key} = '{value}': {became_this}")
    else:
        with pytest.raises(ValueError, match=rf"^precision\.{key} = '{value}': {target} {refusal}$"):
            became(config, target)


@pytest.mark.parametrize("target", ROWS)
def test_what_every_target_can_do(target):
    assert became(Config(), target) == []
    (line,) = became(Config(master="bf16-sr"), target)
    assert line == "precision.master = 'bf16-sr': no float32 masters; updates round the weights at random"
    (line,) = became(Config(text_encoder="int8"), target)
    assert line.startswith("precision.text_encoder = 'int8': a byte for each weight of its linear layers")


def test_it_says_where_products_are_computed():
    assert "(tensor cores of sm_90); weight gradients in bf16" in became(Config(linear="float8"), "sm_90")[0]
    assert "(emulated, which saves nothing)" in became(Config(linear="float8"), "cpu")[0]
    lines = became(Config(frozen="float8", linear="float8"), "sm_100")
    assert lines[0].endswith("that no role trains, and products in float8")
    assert len(lines) == 2


def test_all_that_a_target_refuses_is_said_at_once():
    with pytest.raises(ValueError, match=r"frozen = 'float8': .*\n.*text_encoder = 'float8': .*\n.*linear"):
        became(Config(frozen="float8", linear="float8", text_encoder="float8"), "mps")


def test_a_gpu_multiplies_into_bf16():
    message = "precision.linear = 'float8': sm_90 has results in bf16 only; use compute = 'bf16'"
    with pytest.raises(ValueError, match=message):
        became(Config(linear="float8", compute="fp32"), "sm_90")
    assert became(Config(linear="float8", compute="fp32"), "cpu")


def test_targets_by_their_capability():
    assert (capability("sm_89"), capability("gfx942"), capability("cpu")) == (89, 0, 0)
    assert [t for t in ("sm_75", "sm_86", "sm_89", "sm_103", "sm_121", "gfx90a") if has_float8(t)] == [
        "sm_89",
        "sm_103",
        "sm_121",
    ]
    assert [t for t in ("sm_89", "sm_103", "sm_121") if has_mxfp8(t)] == ["sm_103", "sm_121"]
    assert (target_of(torch.device("cpu")), target_of(torch.device("mps"))) == ("cpu", "mps")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("frozen='int8'", "linear='float8'"), r"precision.frozen: 'int8' weights would be rounded again to"),
        (("frozen='float8'", "linear='mxfp8'"), r"precision.frozen: 'float8' weights would be rounded again"),
        (
            ("master='bf16-sr'",),
            r"precision.master: 'bf16-sr' weights that compute in float32 train no better",
        ),
        (("text_encoder='int8'",), r"precision.text_encoder: the captions of 'shapes' are embedded without"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, keys, message):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, "dmd_lora", *(f"precision.{key}" for key in keys))


def test_moments_of_8_bits_want_float32_masters(tmp_path):
    keys = ("precision.compute='bf16'", "precision.master='bf16-sr'", "optim.critic.name='adamw8bit'")
    with pytest.raises(
        ValueError, match=r"optim.critic.name: 'adamw8bit' is for float32 masters; use 'adamw'"
    ):
        make_config(tmp_path, "dmd", *keys)


def test_a_run_says_what_its_numbers_became(tmp_path, capsys):
    keys = ("precision.frozen='int8'", "run.max_steps=1", "validation.teacher_reference=false")
    train.train(make_config(tmp_path, "dmd_lora", *keys))
    assert "precision.frozen = 'int8': a byte for each weight" in capsys.readouterr().err


def test_a_run_on_a_device_that_cannot_is_refused_before_it_builds(tmp_path):
    config = make_config(tmp_path, "dmd_lora", "precision.linear='mxfp8'")
    with pytest.raises(
        ValueError, match=r"precision\.linear = 'mxfp8': cpu has no such products; use 'float8'"
    ):
        train.train(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_samples_are_not_made_on_a_device_that_cannot_compute_them(tmp_path):
    """A run of another machine: one line, where a product would fail inside."""
    config = make_config(tmp_path, "dmd_lora", "precision.linear='mxfp8'")
    for start in (build, build_synthetic):
        with pytest.raises(ValueError, match=r"precision\.linear = 'mxfp8': cpu has no such products"):
            start(config)
