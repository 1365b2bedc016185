"""The kernels on a GPU, in the dtypes that runs have: what the interpreter cannot show.

An error is judged against float64 (float32 where that would not fit), and may be twice that of the same
composition in PyTorch and the same dtype. Both sides share the lists of tiles: one that bfloat16 flips moves
an output by 20 %.
"""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

from fastdmd_kernels import Tiles, dispatch, dmd_loss, sid_loss, video_sparse_attention, vsa_reference
from fastdmd_kernels import attention as dense
from fastdmd_kernels.vsa.ops import fine, pool, select

GPU = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA or ROCm device")]

DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])

ALIGNED, RAGGED, ONE_TILE, WAN = (8, 8, 16), (9, 10, 11), (3, 2, 3), (21, 30, 52)


@pytest.fixture
def poison(monkeypatch):
    """Fill new memory with NaN: what a kernel leaves unwritten is seen."""
    empty = torch.empty

    def poisoned(*size, **options):
        x = empty(*size, **options)
        return x.fill_(math.nan if x.is_floating_point() else -1)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda x: poisoned(x.shape, dtype=x.dtype, device=x.device))


def random(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, device=DEVICE)).to(dtype)


def tokens(grid, dtype, B: int = 1, N: int = 2, K: int = 128, scale: float = 1.0) -> list[Tensor]:
    """q, k, v, gate."""
    size = (B, math.prod(grid), N, K)
    return [random(*size, dtype=dtype, seed=i, scale=scale if i < 3 else 1.0) for i in range(4)]


def dout_of(q: Tensor) -> Tensor:
    return random(*q.shape, dtype=q.dtype, seed=9)


def values(
    run: Callable[..., Tensor],
    given: list[Tensor],
    dtype: torch.dtype | None = None,
    dout: Tensor | None = None,
) -> list[Tensor]:
    """[out, gradient of each input], all computed in `dtype`."""
    dout = dout_of(given[0]) if dout is None else dout
    inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in given]
    out = run(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout.to(out.dtype))]


def error(x: Tensor, exact: Tensor) -> float:
    assert x.isfinite().all()
    return ((x.to(exact.dtype) - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def assert_as_good_as(
    composition: list[Tensor], ours: list[Tensor], exact: list[Tensor], floor: float = 1e-6
) -> None:
    """Errors at most twice those of the composition, and a few float32 roundings."""
    for i, (c, x, true) in enumerate(zip(composition, ours, exact, strict=True)):
        assert error(x, true) <= 2 * error(c, true) + floor, (
            f"result {i}: {error(x, true):.1e}, {error(c, true):.1e}"
        )


def check_vsa(
    given: list[Tensor], tiles, topk: int, heads: slice = slice(None), exact_dtype=torch.float64
) -> None:
    """`heads` are compared: dense scores of all may not fit."""
    q_tiles, k_tiles = (tiles, tiles) if isinstance(tiles, Tiles) else tiles
    lists = select(pool(given[0], q_tiles), pool(given[1], k_tiles), k_tiles, topk)
    ours = values(partial(video_sparse_attention, tiles=tiles, topk=topk), given)
    assert all(x.dtype == given[0].dtype for x in ours)
    dout = dout_of(given[0])[:, :, heads]
    shown = [x[:, :, heads] for x in given]

    def composition(dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.detach().to(dtype).requires_grad_() for x in shown]
        out = vsa_reference(*inputs, tiles, topk, lists[:, heads])
        return [out.detach(), *torch.autograd.grad(out, inputs, dout.to(dtype))]

    exact = composition(exact_dtype)
    assert_as_good_as(composition(given[0].dtype), [x[:, :, heads] for x in ours], exact)


@HALF
@pytest.mark.usefixtures("poison")
class TestVideoSparseAttention:
    @pytest.mark.parametrize("K", [64, 128])
    @pytest.mark.parametrize(
        ("grid", "topk"), [(ALIGNED, 5), (RAGGED, 5), (ONE_TILE, 1)], ids=["aligned", "ragged", "one tile"]
    )
    def test_grids(self, dtype, grid, topk, K):
        check_vsa(tokens(grid, dtype, K=K), Tiles(grid), topk)

    def test_the_grid_of_wan(self, dtype):
        check_vsa(tokens(WAN, dtype, N=12), Tiles(WAN), 125, slice(11, 12), torch.float32)

    def test_lengths_that_differ(self, dtype):
        tiles = Tiles(RAGGED), Tiles((4, 9, 7))
        q, _, _, gate = tokens(RAGGED, dtype)
        _, k, v, _ = tokens((4, 9, 7), dtype)
        check_vsa([q, k, v, gate], tiles, 3)

    def test_batch_and_strides(self, dtype):
        """Slices of a fused projection."""
        *qkv, gate = random(3, math.prod(RAGGED), 4, 2, 128, dtype=dtype).unbind(2)
        assert not gate.is_contiguous()
        tiles = Tiles(RAGGED)
        check_vsa([*qkv, gate], tiles, 5)

    @pytest.mark.parametrize("scale", [1.0, 4.0, 16.0])
    def test_input_scales(self, dtype, scale):
        """Keys scaled before they are rounded lose the output at 16; float16 dense scores overflow there."""
        if dtype == torch.float16 and scale == 16:
            pytest.skip("the composition overflows in float16")
        check_vsa(tokens(RAGGED, dtype, scale=scale), Tiles(RAGGED), 5)

    def test_two_runs_agree_bit_for_bit(self, dtype):
        given, tiles = tokens(WAN, dtype, N=12), Tiles(WAN)
        runs = [values(partial(video_sparse_attention, tiles=tiles, topk=63), given) for _ in range(2)]
        assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))

    def test_all_tiles_is_dense_attention(self, dtype):
        tiles = Tiles(RAGGED)
        *qkv, _ = tokens(RAGGED, dtype)
        ours = values(partial(video_sparse_attention, gate=None, tiles=tiles, topk=tiles.n), qkv)
        assert_as_good_as(values(sdpa, qkv), ours, values(sdpa, qkv, torch.float64))


@HALF
class TestVideoSparseAttentionAsARunHasIt:
    def test_a_captured_graph_of_forward_and_backward(self, dtype):
        op = partial(video_sparse_attention, tiles=Tiles(RAGGED), topk=5)
        run = partial(values, op, dout=dout_of(tokens(RAGGED, dtype)[0]))
        static, other = tokens(RAGGED, dtype), [x.flip(1) for x in tokens(RAGGED, dtype)]
        outputs, graph = capture(lambda: run(static))
        for x, new in zip(static, other, strict=True):
            x.copy_(new)
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(outputs, run(other), strict=True))

    def test_compiled_without_graph_breaks_and_recompilations(self, dtype):
        torch._dynamo.reset()
        op = partial(video_sparse_attention, tiles=Tiles(RAGGED), topk=5)
        compiled = torch.compile(lambda q, k, v, gate: 2 * op(q, k, v, 1 + gate), fullgraph=True)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for scale in (1.0, 2.0, 3.0):
                given = tokens(RAGGED, dtype, scale=scale)
                eager = values(lambda q, k, v, gate: 2 * op(q, k, v, 1 + gate), given)
                for x, y in zip(values(compiled, given), eager, strict=True):
                    assert error(x, y.float()) < 2 * torch.finfo(dtype).eps


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return nnf.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def capture(run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], "torch.cuda.CUDAGraph"]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return outputs, graph


def test_all_tiles_is_dense_attention_in_float32():
    tiles = Tiles(RAGGED)
    *qkv, gate = tokens(RAGGED, torch.float32, K=64)
    ours = values(lambda q, k, v: video_sparse_attention(q, k, v, 0 * gate, tiles, tiles.n), qkv)
    for x, y in zip(ours, values(sdpa, qkv), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_more_than_2_31_elements():
    """The last of 40 heads, and the last rows, against the same head alone: bit for bit."""
    grid = (64, 80, 84)
    tiles, N, K = Tiles(grid), 40, 128
    assert tiles.L * N * K > 2**31
    if (free := torch.cuda.mem_get_info(DEVICE)[0]) < 60e9:
        pytest.skip(f"needs 60 GB, {free / 1e9:.0f} are free")
    given = [
        torch.randn(1, tiles.L, N, K, dtype=torch.bfloat16, device=DEVICE).requires_grad_() for _ in range(3)
    ]
    lists = select(pool(given[0].detach(), tiles), pool(given[1].detach(), tiles), tiles, 2)
    out = fine(*given, lists, tiles, tiles)
    dout = torch.randn_like(out)
    far = [out.detach(), *torch.autograd.grad(out, given, dout)]
    alone = [x.detach()[:, :, -1:].contiguous().requires_grad_() for x in given]
    out = fine(*alone, lists[:, -1:].contiguous(), tiles, tiles)
    near = [out.detach(), *torch.autograd.grad(out, alone, dout[:, :, -1:])]
    for x, y in zip(far, near, strict=True):
        assert torch.equal(x[:, :, -1:], y)


# ----------------------------------------------------------------------------------------------------- losses

LOSSES = {"dmd": (dmd_loss, 1), "sid": (partial(sid_loss, alpha=1.2), 5)}  # how many inputs get a gradient
LATENTS = {"wan": (1, 16, 21, 60, 104), "sdxl": (4, 4, 128, 128), "odd": (3, 5, 7, 11)}
MIXED = (torch.float32, torch.float32, *[torch.bfloat16] * 3)
DTYPES = {
    "fp32": (torch.float32,) * 5,
    "bf16": (torch.bfloat16,) * 5,
    "fp16": (torch.float16,) * 5,
    "mixed": MIXED,
}


def latents(shape: tuple[int, ...], dtypes) -> list[Tensor]:
    """x0_g, z, F_fake, F_c, F_u."""
    return [random(*shape, dtype=dtype, seed=i) for i, dtype in enumerate(dtypes)]


def loss_values(
    name: str, given: list[Tensor | None], dtype: torch.dtype | None = None, **options
) -> list[Tensor]:
    """[loss, metrics .., gradients ..]"""
    loss, n = LOSSES[name]
    inputs = [None if x is None else x.detach().to(dtype or x.dtype) for x in given]
    leaves = [x.requires_grad_() for x in inputs[:n] if x is not None]
    first = leaves[0]
    b = -torch.linspace(0.2, 0.8, first.shape[0], device=first.device)
    b = b.to(dtype or torch.float32)
    w = 1.0 if inputs[4] is None else 4.0
    value, metrics = loss(*inputs, a=torch.ones_like(b), b=b, w=w, **options)
    return [value.detach(), *metrics.values(), *torch.autograd.grad(value, leaves)]


def check_loss(name: str, given: list[Tensor | None], **options) -> list[Tensor]:
    ours = loss_values(name, given, **options)
    with dispatch.use("torch"):
        exact = loss_values(name, given, torch.float64, **options)
        assert_as_good_as(loss_values(name, given, **options), ours, exact)
    return ours


@pytest.mark.parametrize("name", LOSSES)
class TestLosses:
    @pytest.mark.parametrize("shape", LATENTS.values(), ids=LATENTS)
    @pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
    @pytest.mark.usefixtures("poison")
    def test_values_and_gradients(self, name, dtypes, shape):
        given = latents(shape, dtypes)
        first, second = check_loss(name, given), loss_values(name, given)
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
        assert first[-1].dtype == dtypes[LOSSES[name][1] - 1]

    def test_without_guidance(self, name):
        check_loss(name, [*latents(LATENTS["odd"], MIXED)[:4], None])

    def test_strides(self, name):
        given = latents(LATENTS["sdxl"], MIXED)
        check_loss(name, [given[0], *(x.contiguous(memory_format=torch.channels_last) for x in given[1:])])

    def test_a_captured_graph_of_forward_and_backward(self, name):
        shape = LATENTS["sdxl"]
        static, other = latents(shape, MIXED), [x.flip(0) for x in latents(shape, MIXED)]
        outputs, graph = capture(lambda: loss_values(name, static))
        for x, new in zip(static, other, strict=True):
            x.copy_(new)
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(outputs, loss_values(name, other), strict=True))

    def test_compiled_without_graph_breaks_and_recompilations(self, name):
        torch._dynamo.reset()
        loss, n = LOSSES[name]
        b = -torch.linspace(0.2, 0.8, 4, device=DEVICE)
        compiled = torch.compile(lambda *x: loss(*x, a=1.0, b=b, w=4.0)[0], fullgraph=True)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for seed in range(3):
                given = [x.roll(seed) for x in latents(LATENTS["sdxl"], MIXED)]
                leaves = [x.requires_grad_() for x in given[:n]]
                ours, eager = compiled(*given), loss(*given, a=1.0, b=b, w=4.0)[0]
                for x, y in zip(
                    torch.autograd.grad(ours, leaves), torch.autograd.grad(eager, leaves), strict=True
                ):
                    assert error(x, y.float()) < 1e-5


def test_dmd_mask():
    mask = torch.rand(1, 1, 21, 60, 104, device=DEVICE) < 0.5
    ours = check_loss("dmd", latents(LATENTS["wan"], MIXED), mask=mask)
    assert not ours[-1].masked_select(~mask).any()


# -------------------------------------------------------------------------------------------- dense attention


@HALF
@pytest.mark.parametrize("Lk", [4096, 512], ids=["self", "cross"])
def test_the_dense_attention_that_this_gpu_chooses(dtype, Lk):
    name = dense.prepare(DEVICE, dtype, 128)
    assert name in dense.CANDIDATES
    print(dense.describe(DEVICE))
    q, k, v = (random(2, L, 2, 128, dtype=dtype, seed=i) for i, L in enumerate((4096, Lk, Lk)))
    with dense.use("math"):
        exact, plain = (values(dense.attention, [q, k, v], d) for d in (torch.float64, dtype))
    assert_as_good_as(plain, values(dense.attention, [q, k, v]), exact, floor=torch.finfo(dtype).eps)


def test_dense_attention_compiled():
    torch._dynamo.reset()
    dense.prepare(DEVICE, torch.bfloat16, 128)
    given = [random(2, 1000, 2, 128, dtype=torch.bfloat16, seed=i) for i in range(3)]
    compiled = torch.compile(dense.attention, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            for x, y in zip(values(compiled, given), values(dense.attention, given), strict=True):
                assert error(x, y.float()) < 0.02
