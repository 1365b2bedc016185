"""Frozen weights of one byte: values, gradients, bytes, and runs on them."""

import json
from dataclasses import replace

import pytest
import torch
from tiny import ARCHITECTURE, kept_bytes, make_config, write_wan
from torch import nn

from fastdmd import config as configs
from fastdmd import train
from fastdmd.export import export_student
from fastdmd.models.lowbit import LowBitLinear, code_dtype, restored
from fastdmd.models.products import coded_rows
from fastdmd.models.wan import folder
from fastdmd.plan import live
from fastdmd.plan.step import trace
from fastdmd.rng import Rng
from fastdmd.run import Run, build

CPU = torch.device("cpu")
KINDS = pytest.mark.parametrize("kind", ["int8", "float8"])
FULL = "memory.checkpointing='full'"


def made(kind, dtype=torch.float32, bias=True) -> tuple[LowBitLinear, nn.Linear]:
    """Return a layer of one byte a weight, and the plain one of the weight that it computes with."""
    torch.manual_seed(0)
    plain = nn.Linear(48, 32, bias=bias).to(dtype)
    low = LowBitLinear(plain, code_dtype(kind, CPU))
    low.load(plain.weight, CPU)
    with torch.no_grad():
        plain.weight.copy_(low.dense())
    return low, plain


@KINDS
def test_codes_are_within_half_a_step_of_the_weight(kind):
    torch.manual_seed(0)
    weight = torch.randn(64, 128) * torch.logspace(-3, 1, 64)[:, None]
    codes, scale = coded_rows(weight, code_dtype(kind, CPU))
    assert codes.element_size() == 1
    back = restored(codes, scale, torch.float32)
    step = scale if kind == "int8" else weight.abs() / 8 + scale * 2**-9  # three bits of mantissa
    assert ((back - weight).abs() <= 0.5001 * step).all()
    largest = weight.abs().amax(1)
    torch.testing.assert_close(back.abs().amax(1), largest)
    error = (back - weight).norm() / weight.norm()
    assert error < {"int8": 0.01, "float8": 0.03}[kind]


@KINDS
def test_a_row_of_zeros_stays_zero(kind):
    assert not restored(*coded_rows(torch.zeros(2, 4), code_dtype(kind, CPU)), torch.float32).any()


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_weight_it_stands_for(kind, dtype):
    low, plain = made(kind, dtype)
    x = torch.randn(2, 5, 48).to(dtype)
    found, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, exact = low(found), plain(wanted)
    torch.testing.assert_close(out, exact)
    grad = torch.randn(out.shape).to(dtype)
    out.backward(grad)
    exact.backward(grad)
    torch.testing.assert_close(found.grad, wanted.grad)
    assert found.grad.abs().max() > 0
    assert not low.packed.requires_grad


@KINDS
def test_a_graph_keeps_the_bytes_and_no_copy(kind):
    """At most the layer's input and 1.1 times its bytes."""
    low, _ = made(kind, torch.bfloat16, bias=False)
    x = torch.randn(3, 48, dtype=torch.bfloat16, requires_grad=True)
    assert kept_bytes(lambda: low(x * 1.0).sum()) <= x.nbytes + 1.1 * 48 * 32 + 4 * 32


def deep(here, *overrides: str, layers: int = 3, method: str = "dmd_lora"):
    make_config(here, method)
    write_wan(here / "wan", replace(ARCHITECTURE, num_layers=layers))
    return configs.load(here / f"{method}.toml", overrides)


def bits(x: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor: codes in views of bfloat16 may be NaN there."""
    return x.detach().contiguous().view(torch.uint8)


def raw(run: Run, role: str):
    batch = run.world.batch(Rng(0, 0, "data", range(2), "cpu"))
    x_t = torch.randn(2, *run.world.latent_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return run.nets[role].features(x_t, torch.tensor([900.0, 300.0]), batch.cond, ())[0]


@KINDS
@pytest.mark.parametrize(
    "keys", [(), (FULL, "memory.stream_base=true"), ("precision.compute='bf16'",)], ids=str
)
def test_roles_on_a_base_of_one_byte_learn(tmp_path, kind, keys):
    run = build(deep(tmp_path / "low", f"precision.frozen='{kind}'", *keys))
    net = run.nets["student"].net
    low = [layer for layer in net.modules() if isinstance(layer, LowBitLinear)]
    assert len(low) == 3 * 10  # q, k, v, out of both attentions, and the feed-forward
    assert torch.equal(raw(run, "student"), raw(run, "teacher"))
    plain = build(deep(tmp_path / "plain", *(key for key in keys if "compute" in key)))
    error = (raw(run, "teacher") - raw(plain, "teacher")).norm() / raw(plain, "teacher").norm()
    assert 0 < error < 0.05
    before = {name: p.clone() for name, p in net.named_parameters()}
    for _ in range(2):
        assert json.dumps(train.take_step(run))
    moved = {n for n, p in net.named_parameters() if not torch.equal(bits(p), bits(before[n]))}
    assert {"student", "critic"} == {
        role for role in ("student", "critic") for n in moved if f".{role}." in n
    }
    assert all(".lora_" in name for name in moved)


@KINDS
@pytest.mark.parametrize("method", ["lcm_lora", "sdxl_lcm_lora"])
def test_gradients_pass_through_a_base_of_one_byte(tmp_path, kind, method):
    """As many adapters learn as on the plain one; a frozen teacher of SiD passes them on, too."""
    counts = {}
    for frozen in ("compute", kind):
        run = build(make_config(tmp_path / frozen, method, f"precision.frozen='{frozen}'"))
        train.take_step(run)
        moments = run.optimizers["student"].moments()
        counts[frozen] = {name for name, x in moments.items() if "exp_avg." in name and x.abs().max() > 0}
    assert counts[kind] == counts["compute"] != set()


def test_sid_s_teacher_of_one_byte_passes_gradient(tmp_path):
    run = build(make_config(tmp_path, "dmd", "method.name='sid'", "precision.frozen='int8'"))
    x = torch.randn(2, *run.world.latent_shape, requires_grad=True)
    batch = run.world.batch(Rng(0, 0, "data", range(2), "cpu"))
    run.nets["teacher"].features(x, torch.tensor([900.0, 300.0]), batch.cond, ())[0].square().sum().backward()
    assert x.grad.abs().max() > 0
    assert [layer for layer in run.nets["teacher"].net.modules() if isinstance(layer, LowBitLinear)]
    assert not [layer for layer in run.nets["critic"].net.modules() if isinstance(layer, LowBitLinear)]


@KINDS
def test_an_export_has_the_weights_that_were_computed_with(tmp_path, kind):
    keys = (f"precision.frozen='{kind}'", "run.max_steps=2", "optim.student.lr=0.1")
    run = train.train(deep(tmp_path, *keys, "validation.weights='student'"))
    export_student(run.folder, tmp_path / "out")
    net = folder.load(tmp_path / "out")
    batch = run.world.batch(Rng(0, 0, "data", range(2), "cpu"))
    x_t = torch.randn(2, *run.world.latent_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = net(x_t, torch.tensor([900.0, 300.0]), batch.cond).F
    torch.testing.assert_close(found, raw(run, "student"), rtol=1e-4, atol=1e-4)


@KINDS
def test_a_plan_has_one_byte_a_weight(tmp_path, kind, monkeypatch):
    """Of the linear layers of blocks: each block more takes its bytes, and 4 for each output."""
    monkeypatch.setattr(live, "ROUND", 1)
    size = {}
    for layers in (2, 3):
        config = deep(tmp_path / str(layers), f"precision.frozen='{kind}'", layers=layers)
        size[layers] = trace(config, None).fixed["weights, student + teacher + critic"]
    D, hidden = 24, 32
    linear = 8 * D * D + 2 * D * hidden
    biases = scales = 4 * (9 * D + hidden)
    norms_and_table = 4 * (4 * D + 2 * D + 6 * D)
    assert size[3] - size[2] == linear + biases + scales + norms_and_table


def test_it_is_refused_where_nothing_is_frozen(tmp_path):
    with pytest.raises(
        ValueError, match=r"precision.frozen: every network is trained whole; set student.train"
    ):
        make_config(tmp_path, "flow", "precision.frozen='int8'")
