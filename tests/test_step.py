"""Test what one step does to which role: its own [optim] table, its own phase, recomputation if frozen."""

from collections import Counter

import pytest
import torch
from tiny import make_config
from torch import Tensor

from fastdmd import train
from fastdmd.optim import Config as OptimConfig
from fastdmd.optim import lr_at
from fastdmd.run import Run, build

SID = ("dmd", 'method.name="sid"')
GAN = ("method.gan_weight=0.1", "method.gan_layers=[0]")
# every number of one table is another one's, and each clips
TABLES = {
    "student": OptimConfig(
        lr=1e-3,
        betas=(0.5, 0.6),
        eps=1e-4,
        weight_decay=0.1,
        grad_clip_norm=1e-3,
        schedule="cosine",
        warmup_steps=2,
    ),
    "critic": OptimConfig(
        lr=2e-2,
        betas=(0.2, 0.9),
        eps=1e-6,
        weight_decay=0.3,
        grad_clip_norm=4e-3,
        schedule="constant",
        warmup_steps=5,
    ),
    "disc": OptimConfig(
        lr=5e-2,
        betas=(0.1, 0.8),
        eps=1e-5,
        weight_decay=0.2,
        grad_clip_norm=2e-3,
        schedule="constant",
        warmup_steps=3,
    ),
}


def as_override(role: str, table: OptimConfig) -> str:
    """Return a whole [optim.ROLE] table in TOML."""
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(table).items()}
    return f"optim.{role}={{{', '.join(f'{key} = {value!r}' for key, value in values.items())}}}"


def parameters(run: Run) -> dict[str, dict[str, Tensor]]:
    """Return a copy of each role's weights by name."""
    return {
        role: {name: p.detach().clone() for name, p in denoiser.net.named_parameters()}
        for role, denoiser in run.nets.items()
    }


def only(run: Run, phase: str) -> None:
    """Let each step of a run have one phase, this one."""
    run.method.phases = lambda step: (phase,)


def test_a_role_is_updated_by_its_own_optim_table(tmp_path):
    """After one step AdamW's moments show betas and clip norm; the weights, decay, eps and learning rate."""
    run = build(make_config(tmp_path, "dmd", *GAN, *(as_override(*item) for item in TABLES.items())))
    assert set(run.optimizers) == set(TABLES)
    before = {role: {n: m.clone() for n, m in each.masters.items()} for role, each in run.optimizers.items()}
    train.take_step(run)
    for role, table in TABLES.items():
        optimizer, (b1, b2) = run.optimizers[role], table.betas
        moments = optimizer.moments()
        first = {n: moments[f"exp_avg.{n}"] / (1 - b1) for n in before[role]}
        second = {n: moments[f"exp_avg_sq.{n}"] / (1 - b2) for n in before[role]}
        norm = torch.cat([value.flatten() for value in first.values()]).norm()
        assert norm.item() == pytest.approx(table.grad_clip_norm, rel=1e-3), role
        lr = lr_at(table, 0, run.config.run.max_steps)
        assert lr == table.lr / table.warmup_steps
        for name, old in before[role].items():
            torch.testing.assert_close(second[name], first[name].square(), rtol=1e-4, atol=1e-12)
            new = old * (1 - lr * table.weight_decay) - lr * first[name] / (second[name].sqrt() + table.eps)
            torch.testing.assert_close(optimizer.masters[name], new, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("how", "phase", "trained"),
    [
        (SID, "student", {"student"}),
        (SID, "critic", {"critic"}),
        (("causal_sid",), "student", {"student"}),
        (("dmd",), "student", {"student"}),
        (("dmd", *GAN, "optim.disc.lr=1e-3"), "student", {"student"}),
        (("dmd", *GAN, "optim.disc.lr=1e-3"), "critic", {"critic", "disc"}),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_a_phase_updates_its_roles_and_leaves_the_others_without_a_gradient(tmp_path, how, phase, trained):
    """A gradient that SiD's student phase left in the critic's weights would be part of its next update."""
    run = build(make_config(tmp_path, *how))
    only(run, phase)
    before = parameters(run)
    train.take_step(run)
    after = parameters(run)
    moved = set()
    for role, values in before.items():
        if any(not torch.equal(p, after[role][name]) for name, p in values.items()):
            moved.add(role)
    assert moved == trained
    assert {role for role, optimizer in run.optimizers.items() if optimizer.moments()} == trained
    held = []
    for role, denoiser in run.nets.items():
        weights = dict(denoiser.net.named_parameters())
        if role in run.optimizers:  # float32 masters collect gradients too
            weights |= {f"master.{name}": m for name, m in run.optimizers[role].masters.items()}
        held += [f"{role}.{name}" for name, p in weights.items() if p.grad is not None]
    assert held == []


@pytest.mark.parametrize(
    ("how", "phase", "recomputed"),
    [
        (SID, "student", {"student", "teacher", "critic"}),
        (("causal_sid",), "student", {"student", "teacher", "critic"}),
        (SID, "critic", {"critic"}),
        (("dmd",), "student", {"student"}),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_full_checkpointing_recomputes_what_a_gradient_passes_through(tmp_path, how, phase, recomputed):
    """SiD's gradient passes through its frozen networks: their activations are not kept either."""
    calls = {"none": Counter(), "full": Counter()}
    losses = {}
    for memory, count in calls.items():
        run = build(make_config(tmp_path / memory, *how, f"memory.checkpointing='{memory}'"))
        only(run, phase)
        for role, denoiser in run.nets.items():
            # before: a recomputation ends as soon as it has what the backward wants
            block = denoiser.net.blocks[0]
            block.register_forward_pre_hook(lambda *_, role=role, count=count: count.update([role]))
        losses[memory] = train.take_step(run)[f"train/loss_{phase}"]
    assert losses["none"] == pytest.approx(losses["full"], rel=1e-4)
    assert set(calls["full"] - calls["none"]) == recomputed
