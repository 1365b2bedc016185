"""Test what a plan says: work by another counter, time by hand, its lines, and its refusals."""

import json
from dataclasses import replace

import pytest
import torch
from tiny import ARCHITECTURE, LORA, TEXTS, make_config, write_toml
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from fastdmd import config as configs
from fastdmd.batch import Cond
from fastdmd.cli import app
from fastdmd.config import Config
from fastdmd.hardware import BF16_PEAK
from fastdmd.models.wan.net import Wan
from fastdmd.plan import report
from fastdmd.plan.estimate import COMPILED, Plan, make_plan
from fastdmd.plan.gpus import GPU, GPUS
from fastdmd.plan.live import Live
from fastdmd.plan.ops import Fused, backward
from fastdmd.plan.step import cycle
from fastdmd.plan.work import Work
from fastdmd.warm import nets_on_meta

ONE = GPU(
    target="sm_90",
    memory=10**9,
    peak_matmul=2e6,
    peak_bandwidth=7e6,
    matmul=1e6,
    float8=1.5e6,
    attention=2e6,
    attention_backward=3e6,
    sparse=4e6,
    sparse_backward=5e6,
    bandwidth=6e6,
)


def measured(checkpointing: bool) -> tuple[Work, Work, dict[str, int]]:
    """Return the work of a Wan's forward and backward, what of it was recomputed, and torch's own count."""
    torch.manual_seed(0)
    net = Wan(replace(ARCHITECTURE, num_layers=2))
    net.recompute_blocks("full" if checkpointing else "none")
    x, t, cond = torch.randn(2, 3, 4, 8, 8), torch.full((2,), 500.0), Cond(torch.randn(2, 8, 32))
    live = Live("cpu")
    with FlopCounterMode(display=False) as counter:
        net(x, t, cond).F.square().mean().backward()
    counts = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    with Fused(live.before), live:
        live.begin("all")
        backward(net(x, t, cond).F.square().mean())
    return live.phase.work, live.phase.recomputed, counts


def test_products_are_what_torch_counts():
    """Count attention by hand: torch does not know its CPU kernel."""
    work, recomputed, counts = measured(checkpointing=False)
    assert work.matmul == sum(n for op, n in counts.items() if "attention" not in op)
    tokens, text, width, blocks = 4 * 4 * 4, 8, 24, 2
    assert work.attention == 4 * 2 * width * tokens * (tokens + text) * blocks
    assert work.attention_backward == 2.5 * work.attention
    assert recomputed == Work()


def test_what_a_checkpoint_recomputes_is_a_forward_of_the_blocks():
    plain, _, _ = measured(checkpointing=False)
    work, recomputed, counts = measured(checkpointing=True)
    assert work.attention == 2 * plain.attention
    assert recomputed.attention == plain.attention
    assert work.matmul == sum(n for op, n in counts.items() if "attention" not in op)
    assert recomputed.matmul == work.matmul - plain.matmul > 0
    assert recomputed.traffic > 0


def test_time_is_work_over_rates():
    work = Work(1e6, 10.5e6, 4e6, 9e6, 16e6, 25e6, 36e6)
    assert work.flops == 65.5e6
    assert ONE.seconds(work) == {
        "products": 1.0 + 7.0,
        "dense attention": 2.0 + 3.0,
        "sparse attention": 4.0 + 5.0,
        "elementwise traffic": 6.0,
    }
    assert set(GPUS) == {"h100", "h200", "b200", "a100", "mi300x", "rtx5090", "rtx4090"}
    assert all(gpu.sparse < gpu.attention < gpu.matmul < gpu.peak_matmul for gpu in GPUS.values())
    assert {name for name, gpu in GPUS.items() if gpu.float8 == gpu.matmul} == {"a100"}  # it has no float8
    assert all(1 <= gpu.float8 / gpu.matmul <= 2 for gpu in GPUS.values())
    assert all(0.7 < gpu.bandwidth / gpu.peak_bandwidth < 0.95 for gpu in GPUS.values())
    known = {key: GPUS[key.lower()].peak_matmul for key in BF16_PEAK if key.lower() in GPUS}
    assert known == {key: BF16_PEAK[key] for key in known}
    assert len(known) >= 4


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        ((2, 1), [("student", "critic"), ("critic",)]),
        ((4, 2), [("student", "critic", "critic"), ("critic", "critic")]),
        ((3, 3), [("student", "critic", "critic", "critic")]),
    ],
)
def test_a_cycle_is_the_shortest_that_repeats(tmp_path, keys, steps):
    updates, shared = keys
    config = make_config(
        tmp_path, "dmd", f"critic.updates_per_generator={updates}", f"critic.updates_per_rollout={shared}"
    )
    assert cycle(config.make_method()) == steps


def test_the_lines_say_what_fits_and_what_learns(tmp_path):
    config = make_config(tmp_path, "dmd", "critic.updates_per_generator=4", "run.max_steps=8")
    plan = make_plan(config)
    memory, time, counts = report.lines(config, plan, "card", ONE)
    assert plan.need == round(1.05 * plan.peak) + 1_500_000_000 > ONE.memory
    assert memory.endswith("and card has 1.0: does NOT fit")
    assert "per cycle of 4 steps" in time
    assert counts.startswith("updates: 2 of the student, 8 of the critic; a checkpoint has ")
    assert report.hours(config, plan, ONE) == pytest.approx(2 * plan.seconds(ONE) / 3600)
    trained = 3 * 2 * plan.parameters["student"] + plan.parameters["student"]
    assert plan.checkpoint == 4 * trained  # masters and moments of both, and the average
    assert report.balance(config, plan) == pytest.approx(4 * 2e-3 / 1e-3)
    [warning] = report.warnings(config, plan)
    assert "the critic learns 8 times as fast as the student" in warning
    calm = make_config(tmp_path, "dmd", "critic.updates_per_generator=4", "optim.critic.lr=2e-4")
    assert not list(report.warnings(calm, make_plan(calm)))


def test_uniform_exits_cost_the_mean_of_both_ends(tmp_path):
    first, last, uniform = (
        make_plan(make_config(tmp_path, "dmd", *keys)).work
        for keys in (
            ["method.denoising_timesteps=[1000]"],
            ["rollout.exit='last'"],
            ["rollout.exit='uniform'"],
        )
    )
    assert uniform.flops == pytest.approx((first.flops + last.flops) / 2)
    assert first.flops < uniform.flops < last.flops


def test_two_micro_batches_are_twice_the_work(tmp_path):
    one, two = (make_plan(make_config(tmp_path, "dmd", f"run.grad_accum={n}")) for n in (1, 2))
    assert two.work.flops == pytest.approx(2 * one.work.flops)
    assert one.peak < two.peak < 1.2 * one.peak


def test_validations_are_the_samplers_forwards(tmp_path):
    """Of 5 samples at steps 0, 3, 6 and the end, three steps each; the teacher at the end, under guidance."""
    keys = ["run.max_steps=7", "validation={every=3, samples=5, batch_size=2, teacher_steps=10}"]
    config = make_config(tmp_path, "dmd", *keys)
    plan = make_plan(config)
    net, few = nets_on_meta(config, config.make_method())["student"].net, len(config.make_method().times)
    forward = net.flops((1, *config.latent_shape()), config.text_tokens())
    assert plan.validation.flops == pytest.approx(5 * forward * (4 * few + 2 * (10 + few)), rel=1e-3)
    assert report.validation_hours(plan, ONE) == sum(ONE.seconds(plan.validation).values()) / 3600
    assert f"and {report.validation_hours(plan, ONE):.3g} of validation; " in page_time(config, plan)
    alone = make_plan(make_config(tmp_path, "dmd", *keys, "validation.teacher_reference=false"))
    assert alone.validation.flops == pytest.approx(5 * forward * 4 * few, rel=1e-3)


@pytest.mark.parametrize("linear", ["compute", "float8"])
def test_compiled_blocks_move_fewer_bytes(tmp_path, linear):
    """In networks, not in optimizers; products are the same, and so is memory."""
    keys = (f"precision.linear='{linear}'", "optim.student.name='adamw8bit'")
    eager, compiled = (
        make_plan(make_config(tmp_path, "dmd", *keys, f"compile.mode='{mode}'")) for mode in ("off", "blocks")
    )
    share = COMPILED[linear]
    for name, phase in eager.phases.items():
        work = phase.work
        if not name.endswith("optimizer"):
            work = replace(work, traffic=share * work.traffic)
            assert work.traffic < 0.3 * phase.work.traffic
        assert compiled.phases[name].work == work
        assert compiled.phases[name].peak == phase.peak
    assert compiled.validation == replace(
        eager.validation, traffic=pytest.approx(share * eager.validation.traffic)
    )
    assert compiled.work.flops == eager.work.flops
    assert compiled.seconds(ONE) < eager.seconds(ONE)


def test_a_validation_may_be_the_peak(tmp_path):
    """It keeps no graph, but has samples of its own number; micro-batches of a step are not there."""
    plans = {}
    for size, accum in ((1, 1), (64, 1), (64, 3)):
        keys = [f"validation={{samples=64, batch_size={size}}}", f"run.grad_accum={accum}"]
        plans[size, accum] = make_plan(make_config(tmp_path, "dmd", *keys))
    few, many, accumulated = plans.values()
    assert not few.peak_phase.startswith("validation")
    assert few.peak == max(phase.peak for phase in few.phases.values())
    assert many.peak_phase == "validation: teacher"  # under guidance
    assert many.peak == many.phases["validation: teacher"].peak == accumulated.peak
    assert many.work == few.work
    assert sum(many.by.values()) == many.peak
    assert " GB in validation: teacher; " in next(
        report.lines(make_config(tmp_path, "dmd"), many, "card", ONE)
    )


def page_time(config: Config, plan: Plan) -> str:
    _, time, _ = report.lines(config, plan, "card", ONE)
    return time


def test_adapters_are_apart_and_learn_alone(tmp_path):
    config = make_config(tmp_path, "lcm_lora")
    plan = make_plan(config)
    assert LORA.strip().startswith("[student]")
    assert plan.trained["student"] < plan.parameters["student"] / 4
    assert plan.by["adapters, student"] > 0
    base = "weights, student + teacher"  # once for both
    assert plan.by[base] > plan.by["adapters, student"]
    assert [kind for kind in plan.by if kind.startswith("weights")] == [base]


def test_the_command_needs_a_config_json_alone(tmp_path):
    """Neither weights nor data nor what encodes it are looked for, and all else is checked as ever."""
    path = write_toml(tmp_path, "dmd")
    (tmp_path / "wan" / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    elsewhere = [f'data.sources=["{tmp_path}/prompts.txt"]', "data.frames=5", "data.resolution=[32, 32]"]
    wan = tmp_path / "wan" / "transformer" / "config.json"
    keys = json.loads(wan.read_text()) | {"in_channels": 16, "out_channels": 16}
    wan.write_text(json.dumps(keys))
    done = CliRunner().invoke(app, ["plan", str(path), *elsewhere, "--json", "--gpu", "rtx4090"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert {"peak_gb", "fits", "seconds_per_cycle", "gpu_hours", "validation_hours", "by"} <= set(found)
    assert found["fits"]
    assert sum(found["by"].values()) == pytest.approx(found["peak_gb"])
    assert max(found["phases"].values()) == pytest.approx(found["peak_gb"])
    shown = CliRunner().invoke(app, ["plan", str(path), *elsewhere])
    assert "and h100 has 85.5: fits" in shown.stdout
    assert f"\nrun.batch_size up to {found['largest_batch']} fits" not in shown.stdout  # of another card
    assert "\nrun.batch_size up to " in shown.stdout
    assert 0 < found["largest_batch_gain"] < 1
    assert "kept graph" in shown.stdout
    for arguments, message in (
        (["--gpu", "h300"], "--gpu 'h300' is not one of a100, b200"),
        (["optim.critic.lr=-1"], "optim.critic.lr: -1.0 is not positive"),
    ):
        refused = CliRunner().invoke(app, ["plan", str(path), *elsewhere, *arguments])
        assert refused.exit_code == 2
        assert message in refused.stderr
    with pytest.raises(configs.ConfigError, match=r"data\.sources: no file"):
        configs.load(path, elsewhere)


@pytest.mark.parametrize("how", TEXTS)
def test_every_method_can_be_planned(tmp_path, how):
    plan = make_plan(make_config(tmp_path, how))
    assert sum(plan.by.values()) == plan.peak
    assert plan.work.flops > 0
    assert plan.peak == max(phase.peak for phase in plan.phases.values())


def test_a_phase_s_updates_are_of_all_roles_that_it_trains(tmp_path):
    gan = ("method.gan_weight=0.1", "method.gan_layers=[0]", "optim.disc.lr=1e-3")
    config = make_config(tmp_path, "dmd", "critic.updates_per_generator=3", *gan)
    assert report.updates(config, make_plan(config)) == {"student": 2, "critic": 6, "disc": 6}
