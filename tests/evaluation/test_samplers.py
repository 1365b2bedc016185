"""Test that a sampler says which networks it takes, and that `sample` and `eval` build no others."""

import pytest
import torch
from tiny import DETAIL, make_config, reopen

from fastdmd import train
from fastdmd.evaluation import evaluate
from fastdmd.resume import config_of

# by the configuration of tiny.py: the roles of each sampler, in the order of the report, and of the whole run
ROLES = {
    "dmd": ({"student"}, {"student", "teacher", "critic"}),
    "lcm": ({"student"}, {"student", "teacher", "target"}),
    "dcm": ({"student", "teacher"}, {"student", "teacher", "target"}),
    "detail": ({"semantic", "student"}, {"student", "teacher", "target", "semantic", "disc"}),
}


def of(how: str) -> tuple[str, tuple[str, ...]]:
    return ("dcm", DETAIL) if how == "detail" else (how, ())


@pytest.mark.parametrize("how", ROLES)
def test_only_the_networks_that_a_sampler_takes_are_built(tmp_path, how):
    """They make the same samples as the whole run does."""
    student, whole = ROLES[how]
    name, overrides = of(how)
    done = train.train(make_config(tmp_path, name, "run.max_steps=1", *overrides))
    assert set(done.nets) == whole
    config, full = config_of(done.folder), reopen(done.folder)
    known = evaluate.samplers(config)
    assert {who: set(sampler.roles) for who, sampler in known.items()} == {
        "student": student,
        "teacher": {"teacher"},
        "teacher_few": {"teacher"},
    }
    for who, sampler in known.items():
        part = evaluate.opened(config, [sampler])
        assert set(part.nets) == set(sampler.roles)
        assert part.step == 1
        prompts = part.world.prompts[:2]
        assert torch.equal(evaluate.sample(part, who, prompts, 0), evaluate.sample(full, who, prompts, 0))
    assert set(evaluate.opened(config, evaluate.compared(config).values()).nets) == student | {"teacher"}


@pytest.mark.parametrize("how", ["flow", "causal_flow"])
def test_a_flow_model_has_one_sampler(tmp_path, how):
    """It is of the model itself, and takes as many steps as a report's teacher."""
    config = make_config(tmp_path, how, "validation.teacher_steps=3")
    assert {who: (s.roles, s.steps) for who, s in evaluate.samplers(config).items()} == {
        "student": (("student",), 3)
    }


def test_a_run_compares_the_student_alone_without_a_reference(tmp_path):
    config = make_config(tmp_path, "dmd", "validation.teacher_reference=false")
    assert list(evaluate.compared(config)) == ["student"]
    assert set(evaluate.samplers(config)) == {"student", "teacher", "teacher_few"}


def test_a_sampler_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="'critic' is not one of student, teacher, teacher_few"):
        evaluate.named(make_config(tmp_path, "dmd"), "critic")
