"""Test the plan at the head of a run: its lines, its file, and the refusal of what cannot fit."""

import json
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from tiny import make_config, write_toml
from typer.testing import CliRunner

from fastdmd import config as configs
from fastdmd import train
from fastdmd.cli import app
from fastdmd.config import Config
from fastdmd.plan import estimate, report
from fastdmd.plan.estimate import Plan, make_plan
from fastdmd.plan.gpus import GPU, GPUS, NAMES
from fastdmd.plan.levers import in_two_calls, largest_batch, levers, remedies
from fastdmd.plan.preflight import gpu_of, planned_gb, preflight

H100 = GPUS["h100"]
RECOMPUTED = ("data.resolution=[16, 16]", "run.batch_size=1", "memory.checkpointing='full'")
SHORT = ("run.max_steps=1", "validation.teacher_reference=false")


def card(need: int):
    """Return a GPU with just that memory."""
    return replace(H100, memory=need)


@pytest.mark.parametrize(
    ("method", "keys", "last"),
    [
        ("dmd_lora", ("precision.linear='float8'",), "precision.frozen = 'float8'"),
        ("dmd_lora", ("precision.linear='mxfp8'",), None),
        ("dmd", ("precision.compute='bf16'", "precision.master='bf16-sr'"), "precision.frozen = 'int8'"),
        ("dmd_lora", ("compile.mode='step'",), "precision.frozen = 'int8'"),
    ],
)
def test_no_lever_makes_a_configuration_that_is_refused(tmp_path, method, keys, last):
    """What is printed can be typed: each changed configuration loads."""
    found = dict(levers(make_config(tmp_path, method, *keys)))
    for config in found.values():
        (tmp_path / "again.toml").write_text(configs.dump(config))
        assert configs.load(tmp_path / "again.toml") == config
    assert last is None or last in found
    assert last is not None or not [text for text in found if text.startswith("precision")]
    assert any("adamw8bit" in text for text in found) == ("bf16-sr" not in str(keys))
    assert any("checkpointing" in text for text in found) == ("step" not in str(keys))


def test_levers_are_tried_until_the_run_fits(tmp_path):
    config = make_config(tmp_path, "dmd_lora", "run.batch_size=4", "data.resolution=[24, 24]")
    texts, changed = zip(*levers(config), strict=True)
    assert texts == (
        "run.batch_size = 1 and run.grad_accum = 4",
        "validation.batch_size = 1",
        "memory.guidance = 'two_calls'",
        "memory.checkpointing = 'selective'",
        "memory.checkpointing = 'full'",
        "memory.offload = 'block_inputs'",
        "memory.ffn_chunks = 8",
        "memory.stream_base = true",
        "precision.frozen = 'int8'",
        "optim.student.name = 'adamw8bit' and optim.critic.name = 'adamw8bit'",
    )
    plans = [make_plan(each) for each in (config, *changed)]
    saved = [before.peak - after.peak for before, after in pairwise(plans)]
    said = [f"{text} saves {n / 1e9:.1f} GB" for text, n in zip(texts, saved, strict=True) if n > 0]
    assert len(said) >= 4
    assert list(remedies(config, plans[0], card(plans[1].need))) == said[:1]
    smallest = min(plan.need for plan in plans)
    assert list(remedies(config, plans[0], card(smallest)))[-1] in said
    *every, rest = remedies(config, plans[0], card(smallest - 10**6))
    assert every == said
    assert rest.startswith("then 1.5 GB are needed still")


def test_levers_are_those_that_the_run_can_have(tmp_path):
    """A network trained whole is not streamed, and blocks of SDXL are not alike."""
    texts = [text for text, _ in levers(make_config(tmp_path / "flow", "flow", "run.batch_size=1"))]
    assert "memory.stream_base = true" not in texts
    assert "precision.frozen = 'int8'" not in texts
    assert "memory.offload = 'block_inputs'" in texts
    keys = ("run.batch_size=1", "memory.checkpointing='full'", "memory.guidance='two_calls'")
    config = make_config(tmp_path / "sdxl", "sdxl_dmd", *keys, "validation.batch_size=1")
    (first, _), (text, changed) = levers(config)
    assert first == "precision.frozen = 'int8'"  # of the teacher
    assert text == "optim.student.name = 'adamw8bit' and optim.critic.name = 'adamw8bit'"
    assert changed.memory == config.memory
    assert {role: table.name for role, table in changed.optim.items()} == {
        "student": "adamw8bit",
        "critic": "adamw8bit",
    }
    assert list(levers(changed)) == []


def test_guidance_takes_two_calls_where_one_does_not_fit(tmp_path, capsys):
    """Of a recipe whose peak it is: everything else is recomputed. Where neither fits, nothing is changed."""
    keys = (
        "memory.checkpointing='full'",
        "data.resolution=[24, 24]",
        "method.name='sid'",
        "run.batch_size=1",
    )
    config = make_config(tmp_path, "dmd_lora", *keys)
    (tmp_path / "run").mkdir()
    one, two = make_plan(config), make_plan(in_two_calls(config))
    assert two.need < one.need
    assert preflight(config, "card", card(one.need), force=False) is config
    assert preflight(config, "card", card(two.need), force=False).memory.guidance == "two_calls"
    assert "memory.guidance = 'two_calls', which saves 0." in capsys.readouterr().err
    assert planned_gb(tmp_path / "run") == two.peak / 1e9
    assert preflight(config, "card", card(two.need - 1), force=True) is config
    said = replace(config, memory=replace(config.memory, guidance="one_call"))
    with pytest.raises(ValueError, match=r"memory.guidance = 'two_calls' saves 0\.\d GB\. To try"):
        preflight(said, "card", card(two.need), force=False)


def test_the_largest_micro_batch_fits_and_one_more_does_not(tmp_path):
    """Small tensors are rounded up to 512 bytes, so that a sample takes not quite what the next one does."""
    config = make_config(tmp_path, "dmd", "data.resolution=[24, 24]")
    plan = make_plan(config)
    of_five = plan_of(config, 5)
    assert largest(config, plan, card(of_five.need + 50_000)) == 5
    assert largest(config, plan, card(of_five.need - 200_000)) == 4
    assert largest(config, plan, card(plan.need)) == config.run.batch_size
    assert largest_batch(config, plan, card(plan.need - 1)) is None


def test_another_phase_than_the_peak_s_may_limit_the_micro_batch(tmp_path):
    """With recomputed blocks the backward is the peak of one sample, and the forward that of forty."""
    config = make_config(tmp_path, "dmd", *RECOMPUTED, "validation.batch_size=1")
    plan, of_forty = make_plan(config), plan_of(config, 40)
    assert plan.peak_phase.endswith("backward")
    assert of_forty.peak_phase.endswith("forward")
    assert largest(config, plan, card(of_forty.need - 100_000)) == 39


def test_a_larger_micro_batch_gains_what_does_not_grow_with_it(tmp_path):
    config = make_config(tmp_path, "dmd", "data.resolution=[24, 24]")
    plan, of_eight = make_plan(config), plan_of(config, 8)
    room = largest_batch(config, plan, card(of_eight.need + 100_000))
    assert room is not None
    assert room.batch_size == 8
    gain = 1 - of_eight.seconds(H100) / 8 / (plan.seconds(H100) / config.run.batch_size)
    assert room.gain == pytest.approx(gain)
    line = report.room_line(config, room)
    assert line.startswith(
        f"run.batch_size up to 8 fits; at 8 a sample takes {100 * gain:.1f} % less time by"
    )
    assert "at 8 a sample takes as long by" in report.room_line(config, replace(room, gain=0.0004))
    own = replace(room, batch_size=config.run.batch_size)
    assert report.room_line(config, own) == f"run.batch_size = {own.batch_size} is the largest that fits"


def plan_of(config: Config, size: int) -> Plan:
    return make_plan(replace(config, run=replace(config.run, batch_size=size)))


def largest(config: Config, plan: Plan, gpu: GPU) -> int:
    room = largest_batch(config, plan, gpu)
    assert room is not None
    return room.batch_size


def test_a_run_that_cannot_fit_is_refused_unless_forced(tmp_path, capsys):
    config = make_config(tmp_path, "dmd", "memory.guidance='one_call'")
    (tmp_path / "run").mkdir()
    need = make_plan(config).need
    with pytest.raises(ValueError, match=r"this run needs 1\.5 GB, and card has 1\.5; .*use --force"):
        preflight(config, "card", card(need - 1), force=False)
    assert "does NOT fit" in capsys.readouterr().err
    assert planned_gb(tmp_path / "run") is None
    preflight(config, "card", card(need - 1), force=True)
    preflight(config, "card", card(need), force=False)
    shown = capsys.readouterr().err.splitlines()
    lines = [line for line in shown if not line.startswith("planning")]  # on a slow machine
    assert [line.partition(":")[0] for line in lines] == ["memory", "time", "updates"] * 2
    assert planned_gb(tmp_path / "run") == make_plan(config).peak / 1e9


def on_a_gpu(monkeypatch, memory: int, name: str) -> None:
    """Let the head of a run see a GPU; the run itself is on the CPU."""
    monkeypatch.setattr(train, "pick_device", lambda name: torch.device("cuda"))
    properties = SimpleNamespace(name=name, total_memory=memory, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def test_a_plan_over_two_seconds_shows_how_far_it_is(tmp_path, monkeypatch, capsys):
    config = make_config(tmp_path, "dmd")
    monkeypatch.setattr(estimate, "QUICK", -1.0)
    make_plan(config)
    assert "planning 1/1" in capsys.readouterr().err


def test_train_plans_on_a_gpu_and_keeps_it_beside_what_was_measured(tmp_path, monkeypatch):
    path, overrides = write_toml(tmp_path, "dmd"), list(SHORT)
    on_a_gpu(monkeypatch, 10**9, "NVIDIA H200")
    refused = CliRunner().invoke(app, ["train", str(path), *overrides])
    assert refused.exit_code == 2
    assert (
        "error: this run needs 1.5 GB, and NVIDIA H200 has 1.0; memory.checkpointing = " not in refused.stderr
    )
    assert "error: this run needs 1.5 GB, and NVIDIA H200 has 1.0; run.batch_size = 1" in refused.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()
    done = CliRunner().invoke(app, ["train", str(path), *overrides, "--force"])
    assert done.exit_code == 0, done.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["planned_peak_gb"] == json.loads((tmp_path / "run" / "plan.json").read_text())["peak_gb"]
    assert summary["peak_mem_gb"] > 0


def test_a_run_on_a_cpu_has_no_plan(tmp_path):
    run = train.train(make_config(tmp_path, "dmd", *SHORT))
    assert not (run.folder / "plan.json").exists()
    assert json.loads((run.folder / "summary.json").read_text())["planned_peak_gb"] is None


@pytest.mark.parametrize(
    ("name", "key"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA GeForce RTX 4090", "rtx4090"), ("NVIDIA L4", None)],
)
def test_a_card_has_its_rates_and_its_own_memory(monkeypatch, name, key):
    on_a_gpu(monkeypatch, 12345, name)
    shown = name if key else f"{name} (times as of an h100)"
    assert gpu_of(torch.device("cuda")) == (shown, replace(GPUS[key or "h100"], memory=12345))
    assert set(NAMES) == set(GPUS)
