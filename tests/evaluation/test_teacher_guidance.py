"""Test that a report's teacher is sampled under the guidance that the student was made after."""

import pytest
import torch
from tiny import make_config, write_toml
from torch import Tensor

from fastdmd import config as configs
from fastdmd.evaluation import evaluate
from fastdmd.run import build

# method.guidance in these configurations of tiny.py
GUIDANCE = {"dmd": 3.0, "causal_sid": 3.0, "lcm": 2.0, "sdxl_dmd": 3.0}


def teachers(here, how: str, *overrides: str) -> dict[str, Tensor]:
    """Return samples [2, C, ..] of every sampler of a run that is the teacher's."""
    run = build(make_config(here, how, *overrides))
    names = [name for name in evaluate.samplers(run.config) if name.startswith("teacher")]
    assert len(names) == 2  # in many steps, and in as few as the student's
    return {name: evaluate.sample(run, name, run.world.prompts[:2], seed=0) for name in names}


@pytest.mark.parametrize("how", GUIDANCE)
def test_a_report_s_teacher_is_guided_by_the_method(tmp_path, how):
    found = teachers(tmp_path, how)
    same = teachers(tmp_path, how, f"validation.teacher_guidance={GUIDANCE[how]}")
    other = teachers(tmp_path, how, f"validation.teacher_guidance={GUIDANCE[how] + 1}")
    for name, x0 in found.items():
        assert torch.equal(x0, same[name]), name
        assert not torch.allclose(x0, other[name], atol=1e-3), name


def test_it_follows_the_method_s_guidance_and_no_other_key(tmp_path):
    found = teachers(tmp_path, "dmd", "method.guidance=5.0")
    others = ("method.guidance=5.0", "method.critic_guidance=2.0", "method.critic_train_guidance=1.5")
    assert all(torch.equal(x0, found[name]) for name, x0 in teachers(tmp_path, "dmd", *others).items())
    for name, x0 in teachers(tmp_path, "dmd").items():
        assert not torch.allclose(x0, found[name], atol=1e-3), name


def test_guidance_is_uncond_plus_w_times_the_difference(tmp_path):
    """A sample in one Euler step is linear in w: x0(w) = x0(0) + w (x0(1) - x0(0)); x0(0) sees no prompt."""
    one = ("validation.teacher_steps=1", "method.denoising_timesteps=[1000]")
    at = {w: teachers(tmp_path, "dmd", *one, f"validation.teacher_guidance={w}") for w in (0.0, 1.0, 3.0)}
    for name, x0 in at[3.0].items():
        free, conditional = at[0.0][name], at[1.0][name]
        torch.testing.assert_close(x0, free + 3.0 * (conditional - free), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(free, conditional, atol=1e-3), name

    path = write_toml(tmp_path, "dmd")
    for w, sees in ((0.0, False), (1.0, True)):
        run = build(configs.load(path, [*one, f"validation.teacher_guidance={w}"]))
        for name in at[w]:
            first, second = (evaluate.sample(run, name, [prompt], seed=0) for prompt in run.world.prompts[:2])
            assert torch.equal(first, second) != sees, (name, w)
