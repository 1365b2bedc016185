"""Test that what a trace leaves out, ops of known shapes and calls of a known kind, changes no number."""

import pytest
import torch
from tiny import make_config

from fastdmd.plan import live, step
from fastdmd.plan.estimate import make_plan
from fastdmd.plan.known import how_again, remade
from fastdmd.plan.replay import Replayed

SPARSE = (
    "vsa={sparsity=0.5, tile=[2, 2, 2]}",
    "model.attention.student='vsa'",
    "model.attention.critic='vsa'",
)


def trace_everything(monkeypatch) -> None:
    """Let each op and each call of a network be made."""
    monkeypatch.setattr(live, "call_key", lambda func, args, kwargs: None)
    monkeypatch.setattr(step, "replay", lambda live, nets: None)


@pytest.mark.parametrize(
    ("how", "overrides"),
    [
        ("dmd", ()),
        ("dmd", ("memory.checkpointing='full'", "run.grad_accum=2")),
        ("dmd", SPARSE),
        ("causal_sid", ()),
        ("dcm", ()),
        ("lcm_lora", ()),
        ("sdxl_dmd", ()),
        ("sdxl_lcm", ()),
    ],
)
def test_a_plan_is_bit_for_bit_that_of_every_op_and_call(tmp_path, how, overrides, monkeypatch):
    config = make_config(tmp_path, how, *overrides)
    plan = make_plan(config)
    trace_everything(monkeypatch)
    assert make_plan(config) == plan


@pytest.mark.parametrize("how", ["dmd", "causal_sid"])
def test_a_rollout_costs_few_calls(tmp_path, how, monkeypatch):
    traced, record = [], Replayed.record
    asked, key = [], Replayed.key
    monkeypatch.setattr(Replayed, "record", lambda *given: traced.append(0) or record(*given))
    monkeypatch.setattr(Replayed, "key", lambda *given: asked.append(0) or key(*given))
    make_plan(make_config(tmp_path, how))
    assert 0 < len(traced) < 0.7 * len(asked)


def test_only_ops_that_make_storages_or_write_to_one_are_left_out():
    aten, x = torch.ops.aten, torch.empty(4, 6, device="meta")
    again = how_again(aten.mm.default, (x, x.T), {}, x @ x.T)
    assert again is not None
    assert again(()).shape == (4, 4)
    assert again(()).untyped_storage()._cdata != again(()).untyped_storage()._cdata
    in_place = how_again(aten.mul_.Tensor, (x, x), {}, x)
    assert in_place is not None
    assert in_place((x,)) is x
    assert how_again(aten.transpose.int, (x, 0, 1), {}, x.T) is None
    assert how_again(aten._unsafe_view.default, (x, [24]), {}, x.view(24)) is None
    assert how_again(aten.transpose_.default, (x, 0, 1), {}, x) is None
    assert how_again(aten._local_scalar_dense.default, (x,), {}, 1.0) is None
    part = torch.empty(8, 6, device="meta")[:4]
    assert how_again(aten.clone.default, (x,), {}, part) is None
    assert remade([None, None], True, ()) == (None, None)
