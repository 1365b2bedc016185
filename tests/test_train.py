"""The loop: exact resume, accumulation, steps that are not finite, validation weights, reports."""

import inspect
import json
import math
import os
import signal

import mlp
import pytest
import torch
from safetensors.torch import load_file
from tiny import DETAIL, make_config, manifest, reopen, rows, write_toml, write_wan
from torch import Tensor
from typer.testing import CliRunner

from fastdmd import checkpoint, train
from fastdmd.batch import Batch, Cond
from fastdmd.cli import app
from fastdmd.evaluation import evaluate
from fastdmd.log import RunLog, read_metrics
from fastdmd.methods.method import Share, mean_metrics
from fastdmd.rng import Rng
from fastdmd.run import Run, build
from fastdmd.train import Diverged, Interrupted

NONE = Share(torch.tensor(0.0), torch.tensor(0.0))
RUNS = {
    "flow": ("flow",),
    "dmd": ("dmd",),
    "dmd, one rollout for two critic updates": ("dmd", "critic.updates_per_rollout=2"),
    "dmd in bfloat16": ("dmd", "precision.compute='bf16'"),
    "a row for three steps": ("dmd", "logging.every=3"),
    "with validation": ("dmd", "validation.every=2"),
    # stopped after an odd number of updates: a count that starts anew moves the average in other steps
    "EMA of every other update of the student": ("flow", "ema.every=2"),
    "causal sid": ("causal_sid",),
    "causal flow": ("causal_flow",),
    "lcm with an average as its target": ("lcm",),
    "adapters": ("lcm_lora",),
    "sdxl with its guidance": ("sdxl_lcm",),
    "dmd with a discriminator": (
        "dmd",
        "method.gan_weight=0.1",
        "method.gan_layers=[0]",
        "optim.disc.lr=1e-3",
    ),
    "sdxl dmd with a discriminator": (
        *("sdxl_dmd", "method.gan_weight=0.1", "method.gan_layers=[1, 2]", "optim.disc.lr=1e-3"),
    ),
    "dcm": ("dcm",),
    "dcm, detail expert": ("dcm", *DETAIL),
}


def stop_after(monkeypatch, step: int, signum: int) -> None:
    """Send a signal while step `step` runs."""
    real = train.take_step

    def take_step(run: Run) -> dict[str, float]:
        if run.step == step - 1:
            os.kill(os.getpid(), signum)
        return real(run)

    monkeypatch.setattr(train, "take_step", take_step)


def weights(run: Run) -> dict[str, Tensor]:
    """Masters, network parameters and EMA, as they are now."""
    found = {f"ema.{name}": value for name, value in (run.ema.shadow if run.ema else {}).items()}
    for role, optimizer in run.optimizers.items():
        found |= {f"{role}.master.{name}": value for name, value in optimizer.masters.items()}
        found |= {f"{role}.{name}": value for name, value in optimizer.params.items()}
    return {name: value.detach().clone() for name, value in found.items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert left.keys() == right.keys()
    assert not [name for name in left if not torch.equal(left[name], right[name])]


@pytest.mark.parametrize("how", RUNS)
@pytest.mark.parametrize("stop", [3, 5])
def test_a_stopped_run_resumes_bit_for_bit(tmp_path, monkeypatch, how, stop):
    whole = train.train(make_config(tmp_path / "whole", *RUNS[how]))
    config = make_config(tmp_path / "stopped", *RUNS[how])
    with monkeypatch.context() as patch:
        stop_after(patch, stop, signal.SIGTERM if stop == 3 else signal.SIGINT)
        with pytest.raises(Interrupted, match=f"stopped at step {stop} of 6"):
            train.train(config)
    assert manifest(tmp_path / "stopped" / "run")["step"] == stop
    resumed = train.train(config)

    assert_same(weights(whole), weights(resumed))
    there = manifest(whole.folder)["files"]
    assert manifest(resumed.folder)["files"] == there
    assert {"student.safetensors", "optim_student.safetensors", "ema.safetensors"} <= set(there)
    assert not {"dmd", "causal_sid"} & set(RUNS[how]) or {
        "critic.safetensors",
        "optim_critic.safetensors",
    } <= set(there)
    assert rows(resumed.folder) == rows(whole.folder)


def test_weights_and_moments_move(tmp_path):
    """Equal bits would prove nothing of a run that stands still."""
    run = build(make_config(tmp_path, "dmd"))
    start = weights(run)
    train.take_step(run)
    moved = {name for name, value in weights(run).items() if not torch.equal(value, start[name])}
    for kind in ("student.master", "critic.master", "ema"):
        assert any(name.startswith(kind) for name in moved), kind
    for optimizer in run.optimizers.values():
        assert {key.partition(".")[0] for key in optimizer.moments()} == {"step", "exp_avg", "exp_avg_sq"}
        assert all(value.abs().sum() > 0 for key, value in optimizer.moments().items() if "proj_out" in key)


def test_the_ema_follows_the_students_updates_only(tmp_path):
    """updates_per_generator = 2: the second step trains the critic alone."""
    run = build(make_config(tmp_path, "dmd", "ema.start_step=0"))
    assert [run.method.phases(step) for step in (0, 1)] == [("student", "critic"), ("critic",)]
    assert run.ema
    moved = []
    for _ in range(4):
        before = {name: value.clone() for name, value in run.ema.shadow.items()}
        train.take_step(run)
        moved.append(not all(torch.equal(value, before[name]) for name, value in run.ema.shadow.items()))
    assert moved == [True, False, True, False]
    assert run.ema.updates == 2


def two_steps(here, *overrides: str) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Return metrics and weights.

    eps is large: Adam's sign-like step would blow up the rounding of gradients near zero.
    """
    eps = ("optim.student.eps=1e-2", "optim.critic.eps=1e-2", "critic.updates_per_rollout=2")
    run = build(make_config(here, "dmd", *eps, *overrides))
    return [train.take_step(run) for _ in range(2)], weights(run)


def is_close(left, right) -> bool:
    """Compare metrics to 1e-5 of themselves, and weights to 1e-6, a few roundings near 1.

    The mutant below moves weights by 5e-4.
    """
    values = zip(left[0], right[0], strict=True)
    return all(
        a.keys() == b.keys() and all(math.isclose(a[k], b[k], rel_tol=1e-5) for k in a) for a, b in values
    ) and all(torch.allclose(value, right[1][name], rtol=0, atol=1e-6) for name, value in left[1].items())


def test_accumulated_micro_batches_are_one_batch(tmp_path, monkeypatch):
    whole = two_steps(tmp_path, "run.batch_size=4")
    assert {"train/loss_student", "train/loss_critic", "train/grad_norm_student"} <= set(whole[0][0])
    accumulated = "run.batch_size=1", "run.grad_accum=4"
    assert is_close(whole, two_steps(tmp_path, *accumulated))

    source = inspect.getsource(train.take_step)
    mutant = source.replace("(loss / config.grad_accum).backward()", "loss.backward()")
    assert mutant != source
    scope = dict(vars(train))
    exec(mutant, scope)
    monkeypatch.setattr(train, "take_step", scope["take_step"])
    assert not is_close(whole, two_steps(tmp_path, *accumulated))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("phase", "step"), [("student", 0), ("critic", 1)])
def test_a_gradient_that_is_not_finite_stops_before_the_update(tmp_path, phase, step, bad):
    run = build(make_config(tmp_path, "dmd"))
    for _ in range(step):
        train.take_step(run)
    name = "blocks.0.attn1.to_v.weight"
    run.nets[phase].net.get_parameter(name).requires_grad_(True).register_hook(lambda grad: grad * bad)
    before = weights(run)
    with pytest.raises(Diverged, match=f"step {step + 1}, phase {phase}: .*{name}.* not finite"):
        train.take_step(run)
    assert_same(weights(run), before)
    assert run.step == step

    path = run.folder / f"nonfinite_{step + 1:08d}"
    facts = json.loads((path / "dump.json").read_text())
    assert facts["not_finite"] == [f"grad_norm_{phase}", f"gradient of {phase}.{name}"]
    saved = load_file(path / "batch.safetensors")
    batch = Batch(Cond(saved["text.0"]), Cond(saved["uncond.0"]), run.world.latent_shape, saved["x0.0"])
    rng = Rng(facts["seed"], facts["step"] - 1, facts["stream"], range(2), "cpu")
    loss, _ = mlp.loss(run.method, facts["phase"], run.nets, batch, rng, {})
    assert repr(loss.item()) == facts["read"][f"loss_{phase}"]


def test_a_loss_that_is_not_finite_stops_the_command(tmp_path):
    config = write_toml(tmp_path, "flow")
    write_wan(tmp_path / "wan", nan=True)
    result = CliRunner().invoke(app, ["train", str(config)])
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(
        "error: step 1, phase student: loss_student, grad_norm_student, gradient of student."
    )
    assert str(tmp_path / "run" / "nonfinite_00000001") in result.stderr
    assert not checkpoint.complete(tmp_path / "run" / "checkpoints")


def test_a_nan_that_the_loss_hides_stops_the_run(tmp_path):
    """Keep the student's loss finite under a broken critic: dmd_loss replaces NaN in the gradient."""
    critic = write_wan(tmp_path / "critic", nan=True)
    config = make_config(tmp_path, "dmd", f"critic.path='{critic}'")
    with pytest.raises(Diverged, match="step 1, phase student: score_gap not finite"):
        train.train(config)
    facts = json.loads((tmp_path / "run" / "nonfinite_00000001" / "dump.json").read_text())
    assert facts["not_finite"] == ["score_gap"]
    assert math.isfinite(float(facts["read"]["loss_student"]))


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_validation_weights_are_the_ema_and_go_back(tmp_path, compute):
    run = build(make_config(tmp_path, "dmd", f"precision.compute='{compute}'"))
    for _ in range(3):
        train.take_step(run)
    before, student = weights(run), run.nets["student"].net
    with evaluate.validation_weights(run):
        for name, p in student.named_parameters():
            assert torch.equal(p, run.ema.shadow[name].to(p.dtype)), name
        assert not torch.equal(student.proj_out.weight, before["student.proj_out.weight"])
    assert_same(weights(run), before)
    with pytest.raises(KeyboardInterrupt), evaluate.validation_weights(run):
        raise KeyboardInterrupt
    assert_same(weights(run), before)


def test_bfloat16_computes_and_float32_remembers(tmp_path):
    run = build(make_config(tmp_path, "dmd", "precision.compute='bf16'"))
    values = [train.take_step(run) for _ in range(2)]
    assert all(math.isfinite(value) for each in values for value in each.values())
    for optimizer in run.optimizers.values():
        assert {master.dtype for master in optimizer.masters.values()} == {torch.float32}
        assert {value.dtype for value in optimizer.moments().values()} == {torch.float32}
        assert optimizer.params["proj_out.weight"].dtype == torch.bfloat16
        for name, p in optimizer.params.items():
            assert torch.equal(p, optimizer.masters[name].to(p.dtype)), name
    assert {value.dtype for value in run.ema.shadow.values()} == {torch.float32}
    assert run.nets["teacher"].net.proj_out.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("every", [1, 2])
def test_what_a_run_reports(tmp_path, every, monkeypatch):
    """A row has all steps since the last: the student learns in odd steps, rows may come in even ones.

    What share of the peak was used is there where the peak is known.
    """
    if every == 2:
        monkeypatch.setattr(train, "peak_flops", lambda *_: 1e12)
    run = train.train(make_config(tmp_path, "dmd", f"logging.every={every}"))
    found = read_metrics(run.folder / "metrics.jsonl")
    assert [row["step"] for row in found] == list(range(every, 7, every))
    critic = {"step", "train/loss_critic", "train/grad_norm_critic", "perf/step_s", "perf/mem_gb"}
    critic |= {"perf/mfu"} if every == 2 else set()
    student = {
        f"train/{name}"
        for name in ("loss_student", "grad_norm_student", "dmd_grad_abs", "normalizer", "score_gap")
    }
    for row in found:
        assert set(row) == critic | (student if every == 2 or row["step"] % 2 else set())
        assert row["perf/step_s"] > 0
        assert every == 1 or 0 < row["perf/mfu"] < 1
        assert row["perf/mem_gb"] > 0


def test_rows_are_on_the_disk_before_their_checkpoint(tmp_path, monkeypatch):
    order = []
    for owner, name in ((RunLog, "sync"), (train, "save")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda each, name=name, real=real: (order.append(name), real(each)))
    train.train(make_config(tmp_path, "flow"))
    assert order == ["sync", "save"] * 3


def test_summaries_have_the_same_keys(tmp_path):
    found = []
    for i, (method, *overrides) in enumerate(
        [("flow",), ("dmd",), ("dmd", "validation.teacher_reference=false")]
    ):
        run = train.train(make_config(tmp_path / str(i), method, "run.max_steps=1", *overrides))
        found.append(json.loads((run.folder / "summary.json").read_text()))
    for summary in found:
        keys = ["scores", "student_steps", "steps", "seconds", "peak_mem_gb", "planned_peak_gb", "capture"]
        assert list(summary) == keys
        assert list(summary["scores"]) == ["student", "teacher", "teacher_few"]
        assert all(list(scores) == ["oracle", "swd"] for scores in summary["scores"].values())
        assert summary["scores"]["student"]["swd"] > 0
    assert [summary["scores"]["teacher"]["swd"] is not None for summary in found] == [False, True, False]


def test_a_run_is_reopened_at_its_newest_checkpoint(tmp_path):
    """Reopen a run that was set to start anew, too."""
    run = train.train(make_config(tmp_path, "dmd", "run.max_steps=2", "checkpoint.resume=false"))
    again = reopen(run.folder.rename(tmp_path / "moved"))
    assert again.step == 2
    assert again.folder == tmp_path / "moved"
    assert_same(weights(again), weights(run))


def test_the_first_validation_is_before_training_and_there_is_one(tmp_path, monkeypatch):
    """Also after a kill before the first checkpoint."""
    config = make_config(tmp_path, "dmd", "validation.every=4")
    untrained = evaluate.validation_sample(build(config), "student")[1]

    def take_step(run: Run) -> dict[str, float]:
        raise RuntimeError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(train, "take_step", take_step)
        with pytest.raises(RuntimeError, match="killed"):
            train.train(config)
    run = train.train(config)
    found = [row for row in read_metrics(run.folder / "metrics.jsonl") if "valid/swd" in row]
    assert [row["step"] for row in found] == [0, 4]
    assert found[0] == {"step": 0, **{f"valid/{name}": score for name, score in untrained.items()}}
    assert found[1]["valid/swd"] != found[0]["valid/swd"]
    assert (run.folder / "samples" / "step_00000000" / "00.webp").is_file()


@pytest.mark.parametrize("method", ["dmd", "sdxl_dmd"])
def test_steps_that_cannot_be_exported_are_told_before_training(tmp_path, method):
    config = make_config(tmp_path, method, "method.denoising_timesteps=[1000, 900, 500, 250]")
    with pytest.raises(ValueError, match=r"^method.denoising_timesteps = \[1000.*are not"):
        train.train(config)
    assert not (tmp_path / "run").exists()


def test_a_metric_of_some_samples_is_their_mean_over_the_micro_batches():
    """And absent without any; other metrics are the mean of the micro-batches, as float32 has it."""
    micro = [
        {"loss": torch.tensor(1.0), "some": Share(torch.tensor(3.0), torch.tensor(2.0)), "none": NONE},
        {"loss": torch.tensor(2.0), "some": NONE, "none": NONE},
        {"loss": torch.tensor(4.0), "some": Share(torch.tensor(5.0), torch.tensor(3.0)), "none": NONE},
    ]
    means, counts = mean_metrics(micro)
    assert means["loss"] == torch.tensor([1.0, 2.0, 4.0]).mean()
    assert means["some"].item() == pytest.approx(8 / 5)
    assert means["none"].item() == 0
    assert {name: count.item() for name, count in counts.items()} == {"some": 5, "none": 0}


@pytest.mark.parametrize("every", [1, 3])
def test_a_row_has_loss_last_if_a_step_since_the_last_row_has(tmp_path, every):
    """Of steps with one sample, in which it is the loss itself; a row has the newest."""
    extra = ("run.max_steps=12", "run.batch_size=1", "method.solver_steps=3", f"logging.every={every}")
    run = train.train(make_config(tmp_path, "lcm", *extra))
    at_the_end = [int(Rng(0, step, "student0", range(1), "cpu").integers(3)) == 2 for step in range(12)]
    assert 1 < sum(at_the_end) < 11
    for row in rows(run.folder):
        steps = range(row["step"] - every, row["step"])
        newest = [step for step in steps if at_the_end[step]][-1:]
        assert ("train/loss_last" in row) == bool(newest)
        if newest == [row["step"] - 1]:
            assert row["train/loss_last"] == row["train/loss_student"]


@pytest.mark.parametrize(("target", "lines"), [("student", 1), ("ema", 0)])
def test_a_student_that_is_its_own_target_is_warned_of_once(tmp_path, capsys, target, lines):
    train.train(make_config(tmp_path, "lcm", f"method.target='{target}'"))
    assert capsys.readouterr().err.count("warning: method.target = 'student'") == lines
