"""The benchmark of a cycle: its parts, FLOPs and launches against other instruments than its own."""

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from tiny import make_config, write_toml
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastdmd import capture
from fastdmd.flops import step_flops
from fastdmd.models.families import FAMILIES
from fastdmd.models.family import Options
from fastdmd.run import Run, build_synthetic
from fastdmd_kernels import attention

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY))

from bench import step as bench  # noqa: E402
from bench.meter import IDLE, Clock, attach, launches  # noqa: E402
from bench.side import pair  # noqa: E402

CPU = torch.device("cpu")
SAME = {"add_": "add", "uniform_": "rand", "normal_": "randn"}
SIZE = ("data.resolution=[16, 16]", "data.frames=4")


class Ops(TorchDispatchMode):
    """Count what autograd's dispatcher is asked for, op by op."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def synthetic(here: Path, method: str = "dmd", *overrides: str) -> Run:
    here.mkdir(exist_ok=True)
    return build_synthetic(make_config(here, method, *SIZE, *overrides))


def folded(counts: Mapping[str, int]) -> Counter[str]:
    """Return counts by the names that both have: under a dispatcher's mode autograd adds out of place."""
    found: Counter[str] = Counter()
    for name, count in counts.items():
        if name not in IDLE and not name.startswith("_record_function"):  # the optimizer's own label
            found[SAME.get(name, name)] += count
    return found


def test_launches_are_those_that_a_hand_counts():
    x, w = torch.randn(8, 4), torch.randn(8, 4)
    found = launches(lambda: (x @ w.t()).relu().add_(1).sum(), CPU)
    assert {name: count for name, (count, _) in found.items()} == {
        "aten::mm": 1,
        "aten::relu": 1,
        "aten::add_": 1,
        "aten::sum": 1,
    }
    assert all(seconds > 0 for _, seconds in found.values())


def test_launches_of_a_cycle_are_those_that_the_dispatcher_sees(tmp_path):
    run = synthetic(tmp_path)
    bench.take(run, range(2))
    with Ops() as ops:
        bench.take(run, range(2))
    found = {
        name.partition("::")[2]: count
        for name, (count, _) in launches(lambda: bench.take(run, range(2)), CPU).items()
    }
    assert folded(found) == folded(ops.counts)
    assert found["mm"] > 0


@pytest.mark.parametrize("method", ["dmd", "dmd_lora", "lcm", "causal_sid"])
def test_parts_add_up_to_the_cycle(tmp_path, method):
    """By a clock around the whole; each phase has its own."""
    run = synthetic(tmp_path, method)
    bench.take(run, range(2))
    clock = Clock(CPU)
    attach(run, clock)
    before = time.process_time()
    bench.take(run, range(4), clock)
    parts, wall = clock.read()
    whole = time.process_time() - before
    assert 0.9 * whole <= sum(parts.values()) <= whole
    assert wall > 0
    assert all(seconds >= 0 for seconds in parts.values())
    phases = {phase for step in range(4) for phase in run.method.phases(step)}
    assert {part.partition(":")[0] for part in parts} == {"data", *phases}
    for phase in phases:
        assert {f"{phase}: {what}" for what in ("draws", "forward", "backward", "optimizer")} <= parts.keys()


def test_samples_a_second_are_those_of_the_cycle(tmp_path):
    run = synthetic(tmp_path, "dmd", "run.grad_accum=3")
    found = bench.timed(run, 2)
    assert (found["steps"], found["batch"]) == (2, 6)
    assert found["samples_s"] * found["cycle_s"] == pytest.approx(12)
    assert sum(found["parts"].values()) == pytest.approx(found["cycle_s"])
    backward = sum(s for part, s in found["parts"].items() if part.endswith("backward"))
    called = sum(s for part, s in found["parts"].items() if ": forward, " in part)
    assert sum(found["role_s"].values()) == pytest.approx(backward + called)
    assert found["mfu"] is None  # of a CPU no peak is known
    assert len(found["largest"]) == bench.LARGEST
    assert found["planned_gb"] > 0


@pytest.mark.parametrize(("method", "most"), [("dmd", 1.0), ("lcm", 1.0), ("causal_sid", 1.3)])
def test_flops_of_roles_are_those_that_torch_counts(tmp_path, method, most):
    """Forwards exactly, as attention is products here; a backward leaves out what nothing asks for.

    Through frozen networks, as SiD's is, attention's backward is twice its forward, and our counter has once.
    """
    run = synthetic(tmp_path, method)
    parts = bench.part_flops(run, range(4))
    own = 0
    for step in range(4):
        bench.at(run, step)
        own += step_flops(run)
    assert sum(parts.values()) == own
    assert sum(bench.by_role(parts, run.method.trains).values()) == own

    counted: Counter[str] = Counter()
    whole = FlopCounterMode(display=False)
    for role, denoiser in run.nets.items():

        def call(*arguments, role=role, inner=denoiser._call):
            before = whole.get_total_flops()
            found = inner(*arguments)
            counted[role] += whole.get_total_flops() - before
            return found

        denoiser._call = call
    with attention.use("math"), whole:
        bench.take(run, range(4))
    for role in run.nets:
        forwards = sum(value for part, value in parts.items() if part.endswith(f": forward, {role}"))
        assert forwards == counted[role] > 0, role
    backward = sum(value for part, value in parts.items() if part.endswith(": backward"))
    assert 0.75 * backward <= whole.get_total_flops() - sum(counted.values()) <= most * backward


def test_both_sides_are_one_function(tmp_path):
    config = make_config(tmp_path, "dmd_lora", *SIZE)
    ours, theirs = pair(config, CPU)
    torch.testing.assert_close(ours.call(), theirs.call(), rtol=1e-4, atol=1e-5)
    for side in (ours, theirs):
        side.call().square().mean().backward()
    grads = [dict(side.net.named_parameters())["blocks.0.attn1.to_q.weight"].grad for side in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-6)


def test_a_line_of_results_says_what_was_measured(tmp_path, capsys):
    path = write_toml(tmp_path, "dmd")
    for file in (tmp_path / "wan").rglob("*.safetensors"):
        file.unlink()
    there = sorted(tmp_path.rglob("*"))
    results = tmp_path / "results"
    words = [str(path), *SIZE, "--cycles", "1", "--diffusers", "--results", str(results)]
    bench.main(words)
    assert set(tmp_path.rglob("*")) == {*there, results, results / "step.jsonl"}
    line = json.loads((results / "step.jsonl").read_text())
    assert (line["op"], line["config"], line["overrides"]) == ("step", "dmd", list(SIZE))
    assert line["flops"].keys() == {"student", "teacher", "critic"} == line["role_s"].keys()
    assert all(math.isfinite(x) and x > 0 for both in line["diffusers"].values() for x in both)
    assert line["device"]
    assert line["command"].startswith("python -m bench.step")
    said = capsys.readouterr().out
    for words in (
        "commit",
        "samples/s",
        "useful work by role",
        "peak memory",
        "launches a cycle",
        "diffusers",
    ):
        assert words in said


def test_another_family_has_no_other_side(tmp_path):
    with pytest.raises(ValueError, match=r"--diffusers: model.family is 'sdxl'; use it with 'wan2\.1'"):
        pair(make_config(tmp_path, "sdxl_lcm"), CPU)


@pytest.mark.slow
def test_a_phase_of_one_graph_is_one_part(tmp_path, monkeypatch):
    monkeypatch.setattr(capture, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    found = bench.timed(synthetic(tmp_path, "flow", "compile.mode='step'"), 1)
    torch._dynamo.reset()
    torch._dynamo.config.trace_autograd_ops = False
    assert set(found["parts"]) == {
        "data",
        *(f"student: {what}" for what in ("draws", "forward and backward", "optimizer")),
    }
    assert found["role_s"]["student"] == found["parts"]["student: forward and backward"]
    assert found["flops"]["student"] > 0


@pytest.mark.full_size
@pytest.mark.parametrize(("name", "parameters"), [("wan1_3b", 1.42e9), ("wan14b", 14.29e9)])
def test_the_folders_of_the_benchmark_have_the_published_sizes(name, parameters):
    family = FAMILIES["wan2.1"]
    with torch.device("meta"):
        net = family.make(family.read_config(REPOSITORY / "bench" / "models" / name), Options())
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(parameters, rel=0.005)


def test_by_turns_takes_a_cycle_of_each_in_every_pair(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "PAIRS", 3)
    runs = [
        synthetic(tmp_path / name, "dmd", *keys) for name, keys in (("a", ()), ("b", ("run.grad_accum=8",)))
    ]
    pairs = bench.by_turns(*runs)
    assert len(pairs) == 3
    assert all(other > one > 0 for one, other in pairs)  # eight micro-batches against one
