"""AdamW with moments of 8 bits: near AdamW, saved in parts and resumed bit for bit, planned to the byte.

torchao compiles a step for each shape of a parameter, for seconds each; here its steps are not compiled.
"""

import math
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train import assert_same, stop_after, weights
from tiny import ARCHITECTURE, make_config, manifest, rows, write_wan
from torch import Tensor, nn

from fastdmd import adamw8bit, train
from fastdmd import config as configs
from fastdmd.config import Config
from fastdmd.optim import Config as OptimConfig
from fastdmd.optim import Optimizer
from fastdmd.plan import live
from fastdmd.plan.estimate import make_plan
from fastdmd.plan.step import trace
from fastdmd.resume import save
from fastdmd.run import build
from fastdmd.train import Diverged, Interrupted

EIGHT = ("optim.student.name='adamw8bit'", "optim.critic.name='adamw8bit'")
CODED, ODD, SMALL = (64, 128), (65, 64), (63,)  # one in codes, one whose blocks do not fit, one that is small


@pytest.fixture
def eager() -> Iterator[None]:
    pytest.importorskip("torchao")
    with torch.compiler.set_stance("force_eager"):
        yield


def made(
    name: Literal["adamw", "adamw8bit"] = "adamw8bit", rounded: bool = False
) -> tuple[nn.ParameterDict, Optimizer]:
    """Return parameters of three shapes, perhaps in bfloat16, and an optimizer of them."""
    g = torch.Generator().manual_seed(0)
    shapes = {"coded": CODED, "odd": ODD, "small": SMALL}
    net = nn.ParameterDict({key: torch.randn(shape, generator=g) for key, shape in shapes.items()})
    masters: dict[str, Tensor] = {}
    if rounded:
        masters = {key: p.detach().clone() for key, p in net.named_parameters()}
        net.bfloat16()
    config = OptimConfig(lr=0.02, name=name, warmup_steps=2, grad_clip_norm=1e9)
    return net, Optimizer(dict(net.named_parameters()), config, 100, masters)


def steps(net: nn.ParameterDict, optimizer: Optimizer, first: int, last: int) -> list[float]:
    """Return the losses of steps that draw parameters to 3, on noise of each step's own."""
    losses = []
    for step in range(first, last):
        g = torch.Generator().manual_seed(step)
        loss = torch.stack(
            [(p.float() - 3 + torch.randn(p.shape, generator=g)).square().mean() for p in net.parameters()]
        ).sum()
        loss.backward()
        optimizer.clip()
        optimizer.step(step)
        losses.append(loss.item())
    return losses


def test_moments_are_saved_in_plain_parts_as_foretold(eager):
    net, optimizer = made()
    steps(net, optimizer, 0, 1)
    moments = optimizer.moments()
    assert {type(value) for value in moments.values()} == {Tensor}
    found = {name: (value.shape, value.dtype) for name, value in moments.items()}
    assert found == optimizer.moment_forms(moments)
    assert {name for name in moments if name.endswith(".coded")} == {
        "step.coded",
        *(f"{kind}_{part}.coded" for kind in ("exp_avg", "exp_avg_sq") for part in adamw8bit.PARTS),
    }
    assert moments["exp_avg_codes.coded"].dtype == torch.uint8
    assert moments["exp_avg.odd"].dtype == moments["exp_avg_sq.small"].dtype == torch.float32
    sizes = [value.nbytes for name, value in moments.items() if not name.startswith("step.")]
    assert optimizer.moment_bytes() == sum(sizes)


def test_losses_are_near_those_of_adamw(eager):
    """They fall by two thirds, and the weights tell which tensors have moments in codes."""
    (net, eight), (other, plain) = made(), made("adamw")
    found, wanted = (torch.tensor(steps(*each, 0, 100)) for each in ((net, eight), (other, plain)))
    assert wanted[-1] < wanted[0] / 3
    torch.testing.assert_close(found, wanted, rtol=0.01, atol=0.0)
    far = {key: ((net[key] - other[key]).norm() / other[key].norm()).item() for key in net}
    assert 1e-3 < far["coded"] < 3e-2
    assert max(far["odd"], far["small"]) < 1e-5


@pytest.mark.parametrize("rounded", [False, True])
def test_resume_is_bit_identical(tmp_path, eager, rounded):
    net, optimizer = made(rounded=rounded)
    steps(net, optimizer, 0, 3)
    for file, values in (("masters", optimizer.masters), ("moments", optimizer.moments())):
        save_file({name: value.detach() for name, value in values.items()}, tmp_path / file)
    steps(net, optimizer, 3, 7)
    other, resumed = made(rounded=rounded)
    resumed.load(load_file(tmp_path / "masters"), load_file(tmp_path / "moments"))
    state = resumed.adamw.state[resumed.masters["coded"]]
    assert (state["exp_avg"].signed, state["exp_avg_sq"].signed) == (True, False)
    steps(other, resumed, 3, 7)
    assert all(torch.equal(net[key], other[key]) for key in net)
    there = resumed.moments()
    assert optimizer.moments().keys() == there.keys()
    assert all(torch.equal(value, there[name]) for name, value in optimizer.moments().items())


def wide(here: Path, *overrides: str) -> Config:
    """Return DMD on a Wan whose projections are large enough for codes."""
    make_config(here, "dmd")
    shape = {"num_attention_heads": 4, "attention_head_dim": 16, "ffn_dim": 128}
    write_wan(here / "wan", replace(ARCHITECTURE, **shape))
    return configs.load(here / "dmd.toml", overrides)


def test_a_stopped_run_resumes_bit_for_bit(tmp_path, monkeypatch, eager):
    whole = train.train(wide(tmp_path / "whole", *EIGHT))
    config = wide(tmp_path / "stopped", *EIGHT)
    with monkeypatch.context() as patch:
        stop_after(patch, 3, signal.SIGTERM)
        with pytest.raises(Interrupted, match="stopped at step 3 of 6"):
            train.train(config)
    resumed = train.train(config)
    assert any("_codes." in name for name in resumed.optimizers["critic"].moments())
    assert_same(weights(whole), weights(resumed))
    assert manifest(resumed.folder)["files"] == manifest(whole.folder)["files"]
    assert rows(resumed.folder) == rows(whole.folder)


def test_a_scale_that_is_not_finite_is_not_saved(tmp_path, eager):
    run = build(wide(tmp_path, *EIGHT))
    train.take_step(run)
    optimizer = run.optimizers["student"]
    name, master = next((n, m) for n, m in optimizer.masters.items() if adamw8bit.is_coded(m))
    optimizer.adamw.state[master]["exp_avg"].scale[0] = math.nan
    with pytest.raises(Diverged, match=f"optim_student.exp_avg_scale.{name} is not finite; nothing saved"):
        save(run)


def test_a_plan_has_the_bytes_of_a_run(tmp_path, monkeypatch, eager):
    monkeypatch.setattr(live, "ROUND", 1)
    config = wide(tmp_path, *EIGHT)
    run, found = build(config), trace(config, None)
    train.take_step(run)
    for role, optimizer in run.optimizers.items():
        sizes = [value.nbytes for name, value in optimizer.moments().items() if not name.startswith("step.")]
        assert found.fixed[f"moments, {role}"] == found.moments[role] == sum(sizes)


def block_torchao(monkeypatch) -> None:
    """Let an import of torchao be an ImportError."""
    for name in ("torchao", "torchao.optim", "torchao.optim.subclass_8bit"):
        monkeypatch.setitem(sys.modules, name, None)


def test_a_plan_needs_no_torchao_and_has_fewer_bytes(tmp_path, monkeypatch):
    """Many moments of a Wan as small as this stay float32: 2.7 times fewer bytes, at full size 3.9."""
    block_torchao(monkeypatch)
    config = wide(tmp_path)
    tables = {role: replace(table, name="adamw8bit") for role, table in config.optim.items()}
    plain, eight = make_plan(config), make_plan(replace(config, optim=tables))
    roles = ("student", "critic")
    before, after = (sum(p.by[f"moments, {role}"] for role in roles) for p in (plain, eight))
    assert before > 2.5 * after
    assert plain.peak - eight.peak == before - after
    assert plain.checkpoint - eight.checkpoint == pytest.approx(before - after, rel=0.1)
    assert eight.work.traffic < plain.work.traffic


def test_torchao_is_imported_for_this_optimizer_alone(tmp_path, monkeypatch):
    block_torchao(monkeypatch)
    train.take_step(build(make_config(tmp_path, "flow")))
    with pytest.raises(ImportError):
        made()


def test_without_torchao_it_is_refused_but_for_a_run_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(adamw8bit, "is_installed", lambda: False)
    config = wide(tmp_path)
    with pytest.raises(configs.ConfigError) as refusal:
        configs.load(tmp_path / "dmd.toml", EIGHT)
    said = {line.partition("optim.")[2] for line in str(refusal.value).splitlines()}
    remedy = "'adamw8bit' needs torchao; pip install 'fastdmd[quant]'"
    assert {f"{role}.name: {remedy}" for role in ("student", "critic")} <= said
    elsewhere = configs.load(tmp_path / "dmd.toml", EIGHT, elsewhere=True)
    assert elsewhere.optim["critic"].name == "adamw8bit"
    assert config.optim["critic"].name == "adamw"
