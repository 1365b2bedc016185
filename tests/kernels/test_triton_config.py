"""Launch configurations: which row a version of triton takes, and what a row may change."""

from itertools import product

import pytest

pytest.importorskip("triton")

from fastdmd_kernels import triton_config
from fastdmd_kernels.aot_rules import TARGETS
from fastdmd_kernels.aot_spec import DTYPES, HEAD_DIMS
from fastdmd_kernels.triton_config import config, float32_row

OPS = ("vsa_fwd", "vsa_bwd_dq", "vsa_bwd_dkdv", "vsa_select", "vsa_pool")
EVERY = list(product(OPS, TARGETS, DTYPES, HEAD_DIMS))


@pytest.mark.parametrize(
    ("version", "row"),
    [
        ("3.5.1", "a"),  # older than all
        ("3.6.0", "a"),
        ("3.7.1", "a"),
        ("3.8.0", "b"),
        ("3.9.0+git1a2b", "b"),
        ("3.10.0", "c"),  # a number, not text: after 3.9
        ("3.11.0rc1", "c"),
        ("4.0.0", "c"),
    ],
)
def test_a_version_takes_the_newest_row_that_is_not_newer(version, row, monkeypatch):
    monkeypatch.setattr(triton_config, "_FLOAT32", {(3, 8): "b", (3, 10): "c", (3, 6): "a"})
    assert float32_row(version) == row


def launch(op, target, dtype, K, version):
    _, options = config(op, target, dtype, K, version)
    return options["num_warps"], options["num_stages"]


@pytest.mark.parametrize(
    ("op", "target", "K", "before", "since_3_8"),
    [
        ("vsa_bwd_dkdv", "sm_90", 128, (4, 1), (8, 1)),
        ("vsa_bwd_dkdv", "sm_90", 64, (4, 1), (4, 1)),
        ("vsa_bwd_dkdv", "sm_100", 16, (4, 1), (16, 1)),  # as of 64
        ("vsa_bwd_dq", "sm_80", 128, (4, 1), (8, 2)),
        ("vsa_bwd_dq", "sm_120", 128, (8, 1), (8, 1)),  # of the row before
        ("vsa_select", "sm_90", 64, (16, 2), (32, 2)),
        ("vsa_select", "gfx942", 64, (16, 2), (16, 2)),
        ("vsa_pool", "sm_90", 64, (4, 2), (4, 2)),
    ],
)
def test_float32_has_other_warps_since_triton_3_8(op, target, K, before, since_3_8):
    for version in ("3.6.0", "3.7.1"):
        assert launch(op, target, "fp32", K, version) == before
    for version in ("3.8.0", "3.9.0", "9.0.0"):
        assert launch(op, target, "fp32", K, version) == since_3_8


def test_a_version_changes_warps_and_stages_of_float32_alone():
    """So what triton's interpreter proves, which has neither, holds for every row."""
    changed = set()
    for op, target, dtype, K in EVERY:
        constexprs, options = config(op, target, dtype, K, "3.7.1")
        newer_constexprs, newer_options = config(op, target, dtype, K, "3.9.0")
        assert newer_constexprs == constexprs
        changed |= {name for name in options if options[name] != newer_options[name]}
        if dtype != "fp32" and op != "vsa_select":  # whose products are float32 whatever the tokens are
            assert newer_options == options
    assert changed == {"num_warps", "num_stages"}


def test_the_version_is_that_of_the_triton_at_hand():
    for arguments in EVERY:
        assert config(*arguments) == config(*arguments, triton_config.triton.__version__)
