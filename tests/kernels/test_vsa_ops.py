"""Sparse attention under autocast, checkpointing and torch.compile; its registered ops; its work."""

import statistics
import time

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from vsa_cases import RAGGED, choose, inputs, run

from fastdmd_kernels import Tiles, topk_for, video_sparse_attention
from fastdmd_kernels.vsa import ops as vsa_ops
from fastdmd_kernels.vsa import torch as stages

# ------------------------------------------------------------------------------ autocast, checkpoint, compile


def test_autocast_does_not_reach_the_scores():
    def under_autocast(*args):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return video_sparse_attention(*args)

    x = inputs(RAGGED)
    want, got = (run(op, x, RAGGED, 3) for op in (video_sparse_attention, under_autocast))
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_checkpointing_gives_the_same_gradients(backend):
    def recomputed(*args):
        return checkpoint(video_sparse_attention, *args, use_reentrant=False)

    x = inputs(RAGGED, B=1, N=1)
    want, got = (run(op, x, RAGGED, 3) for op in (video_sparse_attention, recomputed))
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("gated", [True, False])
def test_torch_compile_sees_one_graph(gated):
    x = inputs(RAGGED)
    if not gated:
        del x["gate"]
    torch._dynamo.reset()
    compiled = torch.compile(video_sparse_attention, fullgraph=True, backend="aot_eager")
    want, got = (run(op, x, RAGGED, 3) for op in (video_sparse_attention, compiled))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("downwards", [True, False])
def test_ten_sparsities_give_two_graphs(downwards):
    """The first topk is a constant of its graph, all others share a second; forward and backward."""
    graphs = {"dynamo": 0, "forward": 0, "backward": 0}

    def counted(name: str, backend):
        def compiled(graph, example_inputs):
            graphs[name] += 1
            return backend(graph, example_inputs)

        return compiled

    def as_it_is(graph, example_inputs):
        return graph

    parts = {"fw_compiler": counted("forward", as_it_is), "bw_compiler": counted("backward", as_it_is)}
    tiles = Tiles((4, 8, 24))
    topks = [topk_for(0.09 * i, tiles.n) for i in range(10)]
    assert (tiles.n, topks) == (12, [12, 11, 10, 9, 8, 7, 6, 5, 4, 3])
    torch._dynamo.reset()
    compiled = torch.compile(
        video_sparse_attention, fullgraph=True, backend=counted("dynamo", aot_autograd(**parts))
    )
    x = inputs(tiles, B=1)
    for topk in topks if downwards else reversed(topks):
        want, got = (run(op, x, tiles, topk) for op in (video_sparse_attention, compiled))
        assert all(torch.equal(got[name], want[name]) for name in want)
    assert graphs == {"dynamo": 2, "forward": 2, "backward": 2}


@pytest.mark.parametrize("tiles", [RAGGED, Tiles((2, 3, 3)), Tiles((5, 6, 7), (4, 5, 6))], ids=str)
def test_registered_ops_are_what_they_claim(tiles, backend):
    """Schemas, fake kernels (shapes, strides, dtypes) and autograd, on strided inputs."""
    if backend == "triton" and tiles is not RAGGED:
        pytest.skip("the interpreter is slow, and the kernels take 64 slots")
    ops, x = torch.ops.fastdmd, inputs(tiles, B=1, N=1 if backend == "triton" else 2)
    topk, slots = min(2, tiles.n), max(64, tiles.fullest)
    geometry = tiles.on(x["q"].device)[:3]
    row_start, n_valid, _ = geometry
    pair_of = (row_start, n_valid, row_start, n_valid)
    q, k, v = (x[name].detach().requires_grad_() for name in "qkv")
    q_c, k_c = (vsa_ops.pool(x[name], tiles) for name in "qk")
    lists = choose(x, tiles, topk)
    out, lse = ops.vsa_fine(x["q"], x["k"], x["v"], lists, *pair_of, slots)
    for mean in (True, False):
        torch.library.opcheck(ops.vsa_pool.default, (q, *geometry, mean))
        torch.library.opcheck(ops.vsa_spread.default, (q_c.requires_grad_(), *geometry, mean, torch.float32))
    torch.library.opcheck(ops.vsa_select.default, (q_c.detach(), k_c, row_start, n_valid, topk))
    torch.library.opcheck(ops.vsa_fine.default, (q, k, v, lists, *pair_of, slots))
    given = (x["dout"], x["q"], x["k"], x["v"], out, lse, lists, *pair_of)
    torch.library.opcheck(ops.vsa_fine_backward.default, given)


# ---------------------------------------------------------------------------------------------- how much work


class Inside(TorchDispatchMode):
    """Lets the modes around it see what the registered ops do: they are one call otherwise."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func._schema.name.split("::")
        if namespace == "fastdmd":
            return vsa_ops.IMPLEMENTATIONS[name][1](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class Largest(TorchDispatchMode):
    """The most bytes that any one tensor had."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, Tensor)]
        self.bytes = max([self.bytes, *(x.untyped_storage().nbytes() for x in tensors)])
        return out


def test_no_map_of_tokens_is_made():
    tiles = Tiles((4, 32, 32))  # 64 tiles, 4,096 tokens
    x = inputs(tiles, B=1, N=1)
    token_map = tiles.L**2 * 4
    with Largest() as dense:
        x_t = {name: value.transpose(1, 2).requires_grad_() for name, value in x.items()}
        with sdpa_kernel(SDPBackend.MATH):
            nnf.scaled_dot_product_attention(x_t["q"], x_t["k"], x_t["v"]).sum().backward()
    assert dense.bytes >= token_map  # the watch sees it where it is
    with Largest() as sparse, Inside():
        run(video_sparse_attention, x, tiles, 8)
    assert sparse.bytes <= stages.CHUNK_BYTES <= token_map / 16


DENSE_FLOPS = {  # torch has no formula for its CPU kernels
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, **__: flop_counter.sdpa_flop_count(q, k, v)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda dout, q, k, v, *_, **__: flop_counter.sdpa_backward_flop_count(dout, q, k, v)
    ),
}


def test_sparse_is_an_eighth_of_dense_s_work_and_less_time():
    """8,192 tokens, 87.5 % sparse, forward and backward on one thread."""
    tiles = Tiles((8, 32, 32))
    topk = topk_for(0.875, tiles.n)
    assert (tiles.L, tiles.n, topk) == (8192, 128, 16)
    x = inputs(tiles, B=1, N=1, K=64)
    per_head = [x[name].transpose(1, 2).contiguous().requires_grad_() for name in "qkv"]
    dout = x["dout"].transpose(1, 2).contiguous()

    def dense() -> None:
        torch.autograd.grad(nnf.scaled_dot_product_attention(*per_head), per_head, dout)

    def sparse() -> None:
        run(video_sparse_attention, x, tiles, topk)

    with flop_counter.FlopCounterMode(display=False, custom_mapping=DENSE_FLOPS) as flops_dense:
        dense()
    with flop_counter.FlopCounterMode(display=False) as flops_sparse, Inside():
        sparse()
    assert flops_dense.get_total_flops() == 14 * tiles.L**2 * 64
    assert flops_sparse.get_total_flops() >= 14 * tiles.L * topk * 64 * 64
    ratio_flops = flops_dense.get_total_flops() / flops_sparse.get_total_flops()

    ratios = []
    for _ in range(3):
        seconds = []
        for side in (dense, sparse):
            start = time.thread_time()  # of this thread: other processes do not count
            side()
            seconds.append(time.thread_time() - start)
        ratios.append(seconds[0] / seconds[1])
    print(f"dense / sparse: {ratio_flops:.2f} in FLOPs, {statistics.median(ratios):.2f} in time")
    assert ratio_flops >= 7.5
    assert max(ratios) >= 1.5  # 2.5 to 4 by the processor, and by what runs beside
