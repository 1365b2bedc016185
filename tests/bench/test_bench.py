"""The benchmarks run, say how much work they did, and write it down."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastdmd_kernels import Tiles, dispatch, dmd_loss, sid_loss
from fastdmd_kernels.vsa.ops import pool, select

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY))

from bench import report  # noqa: E402
from bench.case import Work, check  # noqa: E402
from bench.sizes import BACKWARD, PLANS, Attention, dense_flops, loss_bytes, sparse_flops  # noqa: E402
from bench.sparse import block_mask, padded, unpadded  # noqa: E402

CPU = torch.device("cpu")
KEYS = {
    *(
        "op",
        "variant",
        "ours",
        "of",
        "shape",
        "dtype",
        "p20",
        "p50",
        "p80",
        "rounds",
        "graph",
        "flops",
        "bytes",
    ),
    *(
        "tflops",
        "gb_s",
        "of_matmul",
        "of_copy",
        "peak_memory_gb",
        "error",
        "launch",
        "ceilings",
        "device",
        "threads",
    ),
    *("versions", "commit", "dirty", "command", "date"),
}


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """Two folders of results of the smallest plan."""
    folders = [tmp_path_factory.mktemp(name) for name in ("a", "b")]
    arguments = [x for folder in folders for x in ("--results", str(folder))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])}
    environment = {k: v for k, v in environment.items() if not k.startswith(("PYTEST_", "TRITON_"))}
    subprocess.run(
        [*f"{sys.executable} -m pytest bench/kernels.py --plan tiny --benchmark-quiet".split(), *arguments],
        cwd=REPOSITORY,
        env=environment,
        check=True,
    )
    texts = [file.read_text() for folder in folders for file in folder.iterdir()]
    assert len(texts) == 2
    assert texts[0] == texts[1]
    return [json.loads(line) for line in texts[0].splitlines()]


def test_a_run_writes_every_op_with_all_keys(lines):
    assert all(set(line) == KEYS for line in lines)
    found = {(line["op"], line["of"]) for line in lines if line["ours"]}
    both = {(op, of) for op in ("vsa", "vsa_fine", "attention") for of in ("forward", "backward")}
    losses = {(op, of) for op in ("dmd_loss", "sid_loss") for of in ("forward", "both")}
    assert found >= both | losses | {("vsa_pool", "forward"), ("vsa_select", "forward")}
    for line in lines:
        assert 0 < line["p20"] <= line["p50"] <= line["p80"]
        assert line["error"] < (2**-8 if line["dtype"] == "mixed" else 2e-5)
        assert line["flops"] or line["bytes"]
        assert str(REPOSITORY) not in line["command"]


def test_the_report_puts_peers_side_by_side(lines):
    table = report.rows(lines)
    names = report.HEADER
    row = next(dict(zip(names, row, strict=True)) for row in table if row[1:3] == ("vsa", "forward"))
    assert row["best peer"].startswith("reference")
    assert float(row["x peer"]) > 0
    assert float(row["x dense"]) > 0
    markdown = report.text(table, markdown=True).splitlines()
    assert len(markdown) == len(table) + 2
    assert len({line.count("|") for line in markdown}) == 1


def test_the_last_of_equal_lines_counts():
    line = {
        "device": "x",
        "op": "o",
        "of": "forward",
        "shape": {"name": "s"},
        "dtype": "d",
        "variant": "ours",
    }
    line |= {"ours": True, "tflops": 2.0, "of_matmul": 0.5, "gb_s": None}
    assert report.rows([line | {"p50": 1.0}, line | {"p50": 2.5e-5}])[0][5:8] == ("25 us", "2 TFLOP/s", "50%")


def test_what_is_wrong_is_not_timed():
    exact = torch.randn(10, generator=torch.Generator().manual_seed(0))
    work = Work(lambda: None, lambda: [exact.bfloat16()], lambda: [exact])
    assert 0 < check(work) < 2**-8
    with pytest.raises(AssertionError, match=r"result 0 of \[10\] is off by \d\.\de[+-]0\d, more than"):
        check(Work(lambda: None, lambda: [exact.roll(1)], lambda: [exact]))
    with pytest.raises(AssertionError):
        check(Work(lambda: None, lambda: [exact * torch.nan], lambda: [exact]))


# ------------------------------------------------------------------------------------------------------- work


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def stage_inputs(shape: Attention):
    q, k, v, dout = (torch.randn(shape.B, shape.tiles.L, shape.N, shape.K) for _ in range(4))
    return q, k, v, dout, select(pool(q, shape.tiles), pool(k, shape.tiles), shape.tiles, shape.topk)


@pytest.mark.parametrize("topk", [1, 3, 8])
def test_flops_of_whole_tiles_are_those_counted(topk):
    shape = Attention("", (8, 8, 8), N=2, K=16, topk=topk, dtypes=(), B=2)
    q, k, v, dout, lists = stage_inputs(shape)
    of, stages = shape.tiles.on(CPU), dispatch.module("vsa", CPU)
    given = (q, k, v)
    flops = sparse_flops(shape, lists)
    assert flops == 4 * shape.B * shape.N * shape.tiles.L * topk * 64 * shape.K
    assert flops == counted(lambda: stages.fine_fwd(*given, lists, of.row_start, of.n_valid))
    out, lse = stages.fine_fwd(*given, lists, of.row_start, of.n_valid)
    backward = (dout, *given, out, lse, lists, of.row_start, of.n_valid, of.row_start, of.n_valid)
    assert BACKWARD * flops == counted(lambda: stages.fine_bwd(*backward))


def test_flops_of_ragged_tiles_are_those_of_tokens_that_there_are():
    shape = Attention("", (5, 6, 7), N=2, K=16, topk=8, dtypes=())
    *_, lists = stage_inputs(shape)
    assert sparse_flops(shape, lists) == dense_flops(shape)


def test_flops_of_dense_attention_are_those_counted():
    shape = Attention("", (5, 6, 7), N=2, K=16, topk=1, dtypes=(), B=3)
    q, k, v = (torch.randn(3, 2, 210, 16).requires_grad_() for _ in range(3))
    # the others' are not counted on a CPU
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        run = torch.nn.functional.scaled_dot_product_attention
        assert dense_flops(shape) == counted(lambda: run(q, k, v))
        out = run(q, k, v)
        # it keeps the probabilities: without the product that makes them anew
        assert (BACKWARD - 0.5) * dense_flops(shape) == counted(lambda: out.sum().backward())


@pytest.mark.parametrize(
    ("loss", "gradients", "passes"), [(dmd_loss, 1, 6), (sid_loss, 5, 10)], ids=["dmd", "sid"]
)
def test_bytes_of_a_loss_are_its_inputs_and_gradients(loss, gradients, passes):
    given = [torch.randn(2, 3, 4).requires_grad_() for _ in range(5)]
    loss(*given, 1.0, -0.5, 4.0, *([1.0] if loss is sid_loss else []))[0].backward()
    written = [x.grad for x in given if x.grad is not None]
    assert len(written) == gradients
    assert loss_bytes(given, written) == passes * 24 * 4


# ----------------------------------------------------------------------------------------------------- shapes


def test_the_shapes_are_those_of_the_models():
    shapes = {shape.name: shape for shape in PLANS["gpu"].attention}
    assert (shapes["29k"].tiles.L, shapes["29k"].tiles.n, shapes["29k"].topk) == (29_120, 455, 91)
    assert (shapes["1.3B 480p"].tiles.L, shapes["1.3B 480p"].tiles.n) == (32_760, 624)
    assert (shapes["14B 720p"].tiles.L, shapes["14B 720p"].N) == (75_600, 40)
    eight = PLANS["cpu"].attention[0]
    assert (eight.tiles.L, eight.topk / eight.tiles.n) == (8192, 1 - 0.875)
    assert all((shape.tiles.on(CPU).n_valid == 64).all() for shape in (shapes["29k"], shapes["8k"], eight))


def test_padding_for_flex_is_undone():
    tiles = Tiles((5, 6, 7))
    x = torch.randn(2, 210, 3, 4)
    assert padded(x, tiles).shape == (2, 3, 8 * 64, 4)
    assert torch.equal(unpadded(padded(x, tiles), tiles), x)
    assert padded(x, tiles).count_nonzero() == x.count_nonzero()


def test_the_block_mask_has_the_lists_tiles():
    shape = Attention("", (5, 6, 7), N=2, K=16, topk=3, dtypes=())
    *_, lists = stage_inputs(shape)
    mask = block_mask(shape.tiles, lists)
    assert ((mask.kv_num_blocks + mask.full_kv_num_blocks) == 3).all()
    assert mask.full_kv_num_blocks.sum() == (lists & 127 == 64).sum()
