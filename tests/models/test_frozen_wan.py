"""Wan's text encoder with one byte a weight."""

import pytest
import torch
from test_export import frozen_networks

from fastdmd.models.families import FAMILIES
from fastdmd.models.lowbit import LowBitLinear

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("wan")
    for name in ("tokenizer", "text_encoder"):
        frozen_networks()[name].save_pretrained(path / name)
    return str(path)


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn])
def test_an_encoder_of_one_byte_a_weight_is_near(folder, codes):
    """Its embedding and norms stay; T5 asks a projection for the dtype of its weight, which is no number."""
    plain = FAMILIES["wan2.1"].encoder(folder, CPU, torch.bfloat16)
    low = FAMILIES["wan2.1"].encoder(folder, CPU, torch.bfloat16, codes)
    prompts = ["a red fox", "snow", ""]
    wanted, found = plain(prompts).text, low(prompts).text
    assert found.dtype == torch.bfloat16
    assert 0 < (found - wanted).float().norm() / wanted.float().norm() < 0.1
    linear = [layer for layer in low.model.modules() if isinstance(layer, torch.nn.Linear)]
    coded = [layer for layer in low.model.modules() if isinstance(layer, LowBitLinear)]
    assert (len(linear), len(coded)) == (0, 7)  # q, k, v, o; gate, up, down
    size = sum(p.nbytes for layer in coded for p in (layer.packed, layer.scale))
    assert size == sum(layer.in_features * layer.out_features + 4 * layer.out_features for layer in coded)
