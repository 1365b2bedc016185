"""Test a plan's memory against the allocator's record of a real step, and its extrapolation bit for bit."""

import gc
import json
import math
from bisect import bisect
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURE, UNET, make_config, write_wan
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastdmd import config as configs
from fastdmd import train
from fastdmd.config import Config
from fastdmd.evaluation.evaluate import sample
from fastdmd.evaluation.validate import prompts_for
from fastdmd.models.sdxl import folder as sdxl_folder
from fastdmd.models.sdxl.net import SDXL
from fastdmd.optim import EMAConfig
from fastdmd.plan import live, ops
from fastdmd.plan.estimate import depths_of, traces
from fastdmd.plan.ops import Fused
from fastdmd.plan.step import trace
from fastdmd.rng import Rng
from fastdmd.run import build

SIZE = ("data.resolution=[24, 24]", "data.frames=6")
VSA = ("vsa={sparsity=0.5, tile=[2, 2, 2]}", "model.attention.student='vsa'", "model.attention.critic='vsa'")
OURS = ("fastdmd::", "aten::_scaled_mm")  # what a CPU computes by ways round that a GPU has no need of
BOTH = "critic.updates_per_generator=1"  # else the second step, which is compared, is the critic's alone
FORMS: dict[str, tuple[str, ...]] = {
    "dmd": ("dmd",),
    "dmd_full": ("dmd", BOTH, "memory.checkpointing='full'"),
    "dmd_sparse": ("dmd", BOTH, *VSA),
    "dmd_two": ("dmd", "run.grad_accum=2"),
    "dmd_lora": ("dmd_lora",),
    "dmd_lora_full": ("dmd_lora", "memory.checkpointing='full'"),
    "dmd_lora_sparse": ("dmd_lora", *VSA),
    "dmd_selective": ("dmd", BOTH, "memory.checkpointing='selective'"),
    "dmd_float8": ("dmd", BOTH, "precision.linear='float8'"),
    "dmd_lora_selective": ("dmd_lora", "memory.checkpointing='selective'"),
    "dmd_lora_int8": ("dmd_lora", "precision.frozen='int8'"),
    "dmd_lora_float8": ("dmd_lora", "precision.frozen='float8'", "precision.linear='float8'"),
    "lcm": ("lcm",),
    "lcm_lora": ("lcm_lora",),
    "lcm_lora_full": ("lcm_lora", "memory.checkpointing='full'"),
    "causal_flow": ("causal_flow",),
    "causal_sid": ("causal_sid", BOTH),
}


def config_of(here: Path, form: str, heads: int = 4, layers: int = 3) -> Config:
    """Return a configuration on a Wan of 24 channels a head, at sizes where activations outweigh the rest."""
    name, *overrides = FORMS[form]
    make_config(here, name)
    shape = {"num_attention_heads": heads, "attention_head_dim": 24, "ffn_dim": 64 * heads}
    write_wan(here / "wan", replace(ARCHITECTURE, num_layers=layers, **shape))
    return configs.load(here / f"{name}.toml", [*overrides, *SIZE])


def allocated(run: Callable[[], object]) -> int:
    """Return the most bytes that the CPU's allocator had given out in a call, above those before it.

    What some ops take inside on a CPU, which a GPU's kernels do not, is left out: their ends count.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    assert record.profiler is not None
    events = record.profiler.kineto_results.events()
    ours = sorted((e.start_ns(), e.end_ns()) for e in events if e.name().startswith(OURS))
    total = most = 0
    for event in events:
        if event.name() != "[memory]":
            continue
        last = bisect(ours, (event.start_ns(), math.inf)) - 1
        inside = last >= 0 and event.start_ns() <= ours[last][1]
        if not inside:
            most = max(most, total, total + event.nbytes())
        total += event.nbytes()
    return most


WIDE = ("dmd", "dmd_full", "dmd_sparse", "dmd_lora", "dmd_lora_selective", "dmd_lora_int8")


@pytest.mark.parametrize(
    ("form", "heads"),
    [
        *((form, 4) for form in FORMS),
        *(
            pytest.param(form, 8, marks=[pytest.mark.slow, *([] if form in WIDE else [pytest.mark.campaign])])
            for form in FORMS
        ),
    ],
)
def test_the_peak_is_the_allocator_s_within_a_percent(tmp_path, form, heads, monkeypatch):
    """Compare the second step, when AdamW has its moments; a CPU does not round sizes up."""
    monkeypatch.setattr(live, "ROUND", 1)
    monkeypatch.setattr(Rng, "shared_integer", lambda self, high: high - 1)  # as the plan draws
    config = config_of(tmp_path, form, heads)
    plan, run = trace(config, None), build(config)
    monkeypatch.setattr(Tensor, "backward", ops.backward)
    with Fused(lambda grad_enabled: None):
        train.take_step(run)
        measured = allocated(lambda: train.take_step(run))
    taken = " + ".join(run.method.phases(1))
    peak = max(phase.peak for name, phase in plan.phases.items() if name.startswith(f"{taken}:"))
    inputs = plan.fixed["inputs"]  # which a step makes, and for all its micro-batches
    before = sum(plan.fixed.values()) - inputs
    assert measured == pytest.approx(peak - before + (config.run.grad_accum - 1) * inputs, rel=0.01)


@pytest.mark.parametrize("weights", ["ema", "student"])
@pytest.mark.parametrize("form", ["dmd", "dmd_lora", "dmd_lora_float8", "causal_sid"])
def test_a_validation_s_peak_is_the_allocator_s_within_a_percent(tmp_path, form, weights, monkeypatch):
    """More samples at once than a step has; where the average samples, what learns lies aside."""
    monkeypatch.setattr(live, "ROUND", 1)
    config = config_of(tmp_path, form)
    settings = replace(config.validation, weights=weights, samples=6, batch_size=6)
    config = replace(config, validation=settings, ema=EMAConfig(decay=0.9))
    plan, run = trace(config, None), build(config)
    with Fused(lambda grad_enabled: None):
        train.take_step(run)
        measured = allocated(lambda: sample(run, "student", prompts_for(settings, run.world), 0))
    before = sum(plan.fixed.values()) - plan.fixed["inputs"]
    assert measured == pytest.approx(plan.samplers["student"].peak - before, rel=0.01)


def same(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Compare mappings, in which a key without bytes may be absent."""
    return all(first.get(key, 0) == second.get(key, 0) for key in {**first, **second})


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dmd_full", "dmd_sparse", "dmd_lora_sparse"])
def test_a_few_blocks_give_the_bytes_of_all(tmp_path, form, monkeypatch):
    assert_exact(config_of(tmp_path, form, layers=6), monkeypatch)


@pytest.mark.slow
def test_networks_of_several_depths_grow_apart(tmp_path, monkeypatch):
    config_of(tmp_path, "dmd", layers=6)
    write_wan(tmp_path / "teacher", replace(ARCHITECTURE, num_layers=9))
    config = configs.load(tmp_path / "dmd.toml", [*SIZE, f"teacher.path='{tmp_path}/teacher'"])
    assert_exact(config, monkeypatch)


@pytest.mark.slow
def test_an_sdxl_of_many_blocks(tmp_path, monkeypatch):
    config = make_config(tmp_path, "sdxl_dmd")
    deep = replace(UNET, transformer_layers_per_block=(1, 6))
    with torch.random.fork_rng(devices=[]):
        weights = SDXL(deep).state_dict()
    sdxl_folder.save(tmp_path / "sdxl", deep, weights)
    assert_exact(config, monkeypatch)


def assert_exact(config: Config, monkeypatch) -> None:
    whole = trace(config, None)
    depths = []
    monkeypatch.setattr(
        "fastdmd.plan.estimate.trace", lambda *given, **keys: depths.append(given[1]) or trace(*given, **keys)
    )
    few = traces(config, depths_of(config))
    assert all(depth is not None and max(depth.values()) <= 4 for depth in depths)
    for name, phase in whole.phases.items():
        assert few.phases[name].peak == phase.peak, name
        assert same(few.phases[name].by, phase.by), name
        assert vars(few.phases[name].work) == pytest.approx(vars(phase.work)), name
        assert vars(few.phases[name].recomputed) == pytest.approx(vars(phase.recomputed)), name
    assert few.first_exit.keys() == whole.first_exit.keys()
    for name, work in whole.first_exit.items():
        assert vars(few.first_exit[name]) == pytest.approx(vars(work)), name
    assert few.samplers.keys() == whole.samplers.keys()
    for name, phase in whole.samplers.items():
        assert few.samplers[name].peak == phase.peak, name
        assert vars(few.samplers[name].work) == pytest.approx(vars(phase.work)), name
    assert same(few.fixed, whole.fixed)
    assert same(few.parameters, whole.parameters)
    assert same(few.trained, whole.trained)


def on_meta() -> int:
    """Count the tensors of the meta device that are alive."""
    gc.collect()
    return sum(issubclass(type(x), Tensor) and x.is_meta for x in gc.get_objects())


def test_no_tensor_of_a_plan_stays(tmp_path):
    """A real step after a plan would meet what a cache kept."""
    config = config_of(tmp_path, "dmd_sparse")
    before = on_meta()
    trace(config, None)
    assert on_meta() == before
    assert json.dumps(train.take_step(build(config)))
