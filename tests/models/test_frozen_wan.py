"""Wan's text encoder: as the pipeline has it, and with one byte a weight."""

import pytest
import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from test_export import frozen_networks

from fastdmd.models.families import FAMILIES
from fastdmd.models.lowbit import LowBitLinear
from fastdmd.models.wan.frozen import clean

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("wan")
    for name in ("tokenizer", "text_encoder"):
        frozen_networks()[name].save_pretrained(path / name)
    return str(path)


ODD = (
    "",
    "   a  fox\tin \u3000 snow  ",
    "a fox &amp; a hound",
    "a fox &amp;amp; a hound",
    "&lt;b&gt;bold&lt;/b&gt;",
    "l\u2019h\u00f4tel",
    "l\u2019h\u00f4tel".encode().decode("cp1252"),
    "\u201ccurly\u201d quotes",
    "\ufb01lm in \uff21\uff22\uff23",
    "e\u0301tude",
    "a\u00a0b",
    "one\u2028two",
    "\ufeffmarked",
    "\u8272\u8c03\u8273\u4e3d\uff0c\u8fc7\u66dd",
    "\u200bzero\u200bwidth",
    "100&#37; red",
    "x\u0085y",
    "&nbsp;edges&nbsp;",
    "\x1b[31mred\x1b[0m",
    "a " * 600,
)


@pytest.mark.parametrize("prompt", ODD)
def test_a_prompt_is_what_the_pipeline_makes_of_it(prompt):
    assert clean(prompt) == prompt_clean(prompt)


def test_embeddings_are_the_pipeline_s(folder):
    encoder = FAMILIES["wan2.1"].encoder(folder, CPU, torch.float32)
    parts = dict.fromkeys(("vae", "transformer", "transformer_2", "scheduler"))
    pipeline = WanPipeline(tokenizer=encoder.tokenizer, text_encoder=encoder.model, **parts)
    wanted, _ = pipeline.encode_prompt(
        list(ODD), do_classifier_free_guidance=False, max_sequence_length=512, device=CPU
    )
    torch.testing.assert_close(encoder(ODD).text, wanted, rtol=0, atol=1e-6)


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
