"""Test that recipes fit the cards that they are planned for."""

import json
from pathlib import Path

import pytest
from test_configs import WANS

from fastdmd import config as configs
from fastdmd.plan.estimate import make_plan
from fastdmd.plan.gpus import GPUS

ROOT = Path(__file__).parents[2]
CARDS = {  # the card that a recipe is planned for, and the most GB of its peak
    "wan14b_dmd": ("h100", 66),
    "wan14b_dmd_24gb": ("rtx4090", 22),
    "wan1_3b_dmd": ("rtx4090", 16),
    "wan14b_sid": ("h100", 66),
}


@pytest.mark.slow
@pytest.mark.full_size
@pytest.mark.parametrize("name", CARDS)
def test_a_recipe_fits_the_card_that_it_is_planned_for(tmp_path, monkeypatch, name):
    card, most = CARDS[name]
    path = ROOT / "configs" / f"{name}.toml"
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# Planned for one card of " + ("80 GB" if card == "h100" else "24 GB"))
    for wan, architecture in WANS.items():  # a config.json is all that a plan takes
        folder = tmp_path / "models" / wan / "transformer"
        folder.mkdir(parents=True)
        keys = {"_class_name": "WanTransformer3DModel", **vars(architecture)}
        (folder / "config.json").write_text(json.dumps(keys), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    config = configs.load(path, elsewhere=True)
    plan = make_plan(config)
    assert plan.fits(GPUS[card])
    assert plan.peak <= most * 1e9
    L, D = 21 * 30 * 52, WANS[Path(config.model.path).name].width
    blocks = WANS[Path(config.model.path).name].num_layers
    if config.memory.checkpointing == "full" and config.memory.offload == "none":
        assert plan.by["kept graph"] <= 1.02 * blocks * L * D * 2  # each block's input in bfloat16
