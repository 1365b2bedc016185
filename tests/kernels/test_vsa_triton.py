"""The Triton kernels of video sparse attention against dense masked attention in float64.

Without a GPU they run in triton's interpreter (tests/conftest.py), which proves arithmetic and indexing.
Lists are built by sorting (tests/vsa_tiles.py), and not by the kernel under test.
"""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from recomputed import recomputed
from torch import Tensor
from vsa_tiles import (
    ALIGNED,
    ALL_RAGGED,
    DEVICE,
    best,
    error,
    from_counts,
    pack,
    pooled,
    random,
    rows_of,
    tiles_of,
)

from fastdmd_kernels.triton_config import config
from fastdmd_kernels.vsa import triton as vsa
from fastdmd_kernels.vsa import triton_bwd, triton_fwd, triton_select
from fastdmd_kernels.vsa.triton_tokens import store_tile

pytestmark = [
    pytest.mark.usefixtures("poison"),
    # in the rows of pad keys, which are not stored, probabilities have no bound
    pytest.mark.filterwarnings("ignore:overflow encountered|invalid value encountered:RuntimeWarning"),
]

GRIDS = {
    "aligned": ALIGNED,
    "t": (5, 4, 8),
    "h": (4, 6, 8),
    "w": (4, 8, 5),
    "all": ALL_RAGGED,
    "one tile": (3, 2, 3),
}


def lend_16_bits(op: str, target: str, dtype: str, K: int):
    constexprs, options = config(op, target, "fp16", K)
    return constexprs | ({"EXACT": True} if "EXACT" in constexprs else {}), options


@pytest.fixture(params=["descriptors", "pointers"])
def path(request, monkeypatch):
    """Lend float32 the configuration of 16 bits; its own has pointers and 16 rows per program."""
    for module in (triton_fwd, triton_bwd):
        if request.param == "pointers":
            monkeypatch.setattr(module, "can_describe", lambda x: False)
        elif DEVICE == "cpu":
            monkeypatch.setattr(module, "config", lend_16_bits)


def allowed(index: Tensor, tiles_q, tiles_k) -> Tensor:
    """[B, N, Lq, Lk]: the tokens that `index` [B, N, nq, topk] lets see each other."""
    chosen = torch.zeros(*index.shape[:3], len(tiles_k[0]), dtype=torch.bool, device=DEVICE).scatter_(
        3, index, True
    )
    tile_q = torch.repeat_interleave(torch.arange(len(tiles_q[0]), device=DEVICE), tiles_q[1])
    tile_k = torch.repeat_interleave(torch.arange(len(tiles_k[0]), device=DEVICE), tiles_k[1])
    return chosen[:, :, tile_q][..., tile_k]


def dense(q, k, v, dout, mask, dtype) -> list[Tensor]:
    """[out, dq, dk, dv] of masked attention in `dtype`, rows without keys zero."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (q, k, v))
    s = torch.einsum("blnk,bmnk->bnlm", q, k) * q.shape[-1] ** -0.5
    s = s.masked_fill(~mask, -1e4)
    p = s.softmax(-1)
    out = torch.einsum("bnlm,bmnk->blnk", p.masked_fill(~mask, 0), v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout.to(dtype))]


def dense_recomputed(q, k, v, dout, mask, dtype) -> list[Tensor]:
    """Return the same of an attention whose backward recomputes S^T; every row has a key."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (q, k, v))
    out = recomputed(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout.to(dtype))]


def sparse(q, k, v, dout, lists, tiles_q, tiles_k) -> list[Tensor]:
    out, lse = vsa.fine_fwd(q, k, v, lists, *tiles_q)
    return [out, *vsa.fine_bwd(dout, q, k, v, out, lse, lists, *tiles_q, *tiles_k)]


def check(q, k, v, index, tiles_q, tiles_k, composition=dense) -> list[Tensor]:
    """Allow values and gradients at most twice the error of the composition in PyTorch in the same dtype."""
    dout = random(*q.shape, dtype=q.dtype, seed=3)
    mask = allowed(index, tiles_q, tiles_k)
    exact = dense(q, k, v, dout, mask, torch.float64)
    torch_errors = [
        error(x, e) for x, e in zip(composition(q, k, v, dout, mask, q.dtype), exact, strict=True)
    ]
    result = sparse(q, k, v, dout, pack(index, tiles_k), tiles_q, tiles_k)
    for name, x, e, torch_error in zip(("out", "dq", "dk", "dv"), result, exact, torch_errors, strict=True):
        assert x.dtype == q.dtype
        assert error(x, e) <= 2 * torch_error + 1e-9, f"{name}: {error(x, e):.2e}, torch {torch_error:.2e}"
    return result


def tokens(grid, B=1, N=1, K=16, dtype=torch.float32, scale=1.0) -> list[Tensor]:
    return [random(B, math.prod(grid), N, K, dtype=dtype, seed=i, scale=scale) for i in range(3)]


def index_of(q, k, tiles_q, tiles_k, topk: int) -> Tensor:
    return best(pooled(q, tiles_q) @ pooled(k, tiles_k).mT, topk)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_grids(grid, path):
    q, k, v = tokens(grid)
    tiles = tiles_of(grid)
    check(q, k, v, index_of(q, k, tiles, tiles, min(2, len(tiles[0]))), tiles, tiles)


@pytest.mark.parametrize("K", [16, 32, 64, 128])
def test_head_dims(K, path):
    q, k, v = tokens((4, 4, 7), K=K)
    tiles = tiles_of((4, 4, 7))
    check(q, k, v, index_of(q, k, tiles, tiles, 1), tiles, tiles)


def of_triton_3_9(op: str, target: str, dtype: str, K: int):
    return config(op, target, dtype, K, "3.9.0")


@pytest.mark.parametrize("K", [64, 128])
def test_what_a_newer_compiler_is_launched_with(K, monkeypatch):
    """Other warps and stages; lists too come from the kernel."""
    for module in (triton_select, triton_fwd, triton_bwd):
        monkeypatch.setattr(module, "config", of_triton_3_9)
    q, k, v = tokens((4, 4, 7), K=K)
    tiles = tiles_of((4, 4, 7))
    index = index_of(q, k, tiles, tiles, 1)
    assert torch.equal(vsa.select(vsa.pool(q, *tiles), vsa.pool(k, *tiles), *tiles, 1), pack(index, tiles))
    check(q, k, v, index, tiles, tiles)


@pytest.mark.parametrize("scale", [1.0, 4.0, 16.0])
def test_input_scales(scale):
    """At 16, keys scaled before they are rounded lose the output altogether.

    S^T of dk and dv may round otherwise than S (numpy with OPENBLAS_CORETYPE=Haswell: in 30 % of its
    elements).
    """
    q, k, v = tokens(ALL_RAGGED, scale=scale)
    tiles = tiles_of(ALL_RAGGED)
    check(q, k, v, index_of(q, k, tiles, tiles, 3), tiles, tiles, dense_recomputed)


def in_the_order_of_k(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Multiply [M, K] by [K, N], summing k by k: [N, K] by [K, M] of the same rows rounds alike."""
    return np.cumsum(a[:, :, None] * b[None], axis=1, dtype=dtype)[:, -1]


@pytest.mark.skipif(DEVICE != "cpu", reason="the order of a GPU's sums is its own")
@pytest.mark.parametrize("scale", [1.0, 4.0, 16.0])
def test_input_scales_where_s_and_its_transpose_round_alike(scale, monkeypatch):
    """Then a plain softmax is the measure: the rounding of the log-sum-exp must not show in dv."""
    monkeypatch.setattr(np, "matmul", in_the_order_of_k)
    q, k, v = tokens(ALL_RAGGED, scale=scale)
    tiles = tiles_of(ALL_RAGGED)
    check(q, k, v, index_of(q, k, tiles, tiles, 3), tiles, tiles)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_float16(scale, path):
    q, k, v = tokens(ALL_RAGGED, dtype=torch.float16, scale=scale)
    tiles = tiles_of(ALL_RAGGED)
    check(q, k, v, index_of(q, k, tiles, tiles, 3), tiles, tiles)


def test_batch_heads_and_strides(path):
    """Slices of a fused projection, batch 3, two heads: a sample must not read or write its neighbour."""
    tiles = tiles_of((5, 4, 5))
    q, k, v = random(3, 100, 3, 2, 16).unbind(2)
    assert not q.is_contiguous()
    check(q, k, v, index_of(q, k, tiles, tiles, 2), tiles, tiles)


def test_unaligned_strides_take_the_pointers():
    tiles = tiles_of((4, 4, 5))
    q, k, v = (random(1, 80, 1, 17, seed=i)[..., :16] for i in range(3))
    check(q, k, v, index_of(q, k, tiles, tiles, 1), tiles, tiles)


@pytest.mark.parametrize(("grid_q", "grid_k"), [(ALL_RAGGED, (4, 4, 5)), ((4, 4, 5), ALL_RAGGED)])
def test_lengths_that_differ(grid_q, grid_k, path):
    q = tokens(grid_q)[0]
    _, k, v = tokens(grid_k)
    tiles_q, tiles_k = tiles_of(grid_q), tiles_of(grid_k)
    check(q, k, v, index_of(q, k, tiles_q, tiles_k, 2), tiles_q, tiles_k)


def test_all_tiles_is_dense_attention():
    tiles = tiles_of(ALL_RAGGED)
    q, k, v = (x.requires_grad_() for x in tokens(ALL_RAGGED, N=2))
    dout = random(*q.shape, seed=3)
    lists = vsa.select(*(vsa.pool(x.detach(), *tiles) for x in (q, k)), *tiles, 8)
    ours = sparse(*(x.detach() for x in (q, k, v)), dout, lists, tiles, tiles)
    out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(
        1, 2
    )
    for x, y in zip(ours, [out, *torch.autograd.grad(out, (q, k, v), dout)], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_key_tile_nobody_chose(path):
    tiles = tiles_of(ALL_RAGGED)
    q, k, v = tokens(ALL_RAGGED)
    index = torch.tensor([0, 2, 7], device=DEVICE).expand(1, 1, 8, 3)
    _, _, dk, dv = check(q, k, v, index, tiles, tiles)
    for tile, (row, n) in enumerate(rows_of(tiles)):
        for x in (dk, dv):
            assert (x[:, row : row + n] == 0).all() == (tile not in (0, 2, 7))


def test_tiles_without_rows(path):
    """First, between and last; for a query tile one of several keys, and for another its only one."""
    tiles_q, tiles_k = from_counts([64, 30, 0, 7]), from_counts([0, 64, 0, 20, 0])
    q = random(1, 101, 1, 16)
    k, v = (random(1, 84, 1, 16, seed=i) for i in (1, 2))
    index = torch.tensor([[0, 1], [2, 4], [0, 3], [3, 4]], device=DEVICE)[None, None]
    out, dq, *_ = check(q, k, v, index, tiles_q, tiles_k)
    assert (out[:, 64:94] == 0).all()
    assert (dq[:, 64:94] == 0).all()


def test_lse_is_base_2_with_a_sentinel_in_pad_slots(path):
    tiles = tiles_of(ALL_RAGGED)
    q, k, v = tokens(ALL_RAGGED)
    index = index_of(q, k, tiles, tiles, 2)
    _, lse = vsa.fine_fwd(q, k, v, pack(index, tiles), *tiles)
    s = torch.einsum("blnk,bmnk->bnlm", q.double(), k.double()) / 4
    exact = s.masked_fill(~allowed(index, tiles, tiles), -math.inf).logsumexp(-1) / math.log(2)
    for tile, (row, n) in enumerate(rows_of(tiles)):
        torch.testing.assert_close(
            lse[:, :, tile, :n].double(), exact[:, :, row : row + n], rtol=1e-6, atol=1e-6
        )
        assert (lse[:, :, tile, n:] == 1e30).all()


def test_two_runs_agree_bit_for_bit():
    tiles = tiles_of(ALL_RAGGED)
    q, k, v = tokens(ALL_RAGGED)
    dout = random(*q.shape, seed=3)

    def run() -> list[Tensor]:
        lists = vsa.select(vsa.pool(q, *tiles), vsa.pool(k, *tiles), *tiles, 3)
        return [lists, *vsa.invert(lists, tiles[0], 8), *sparse(q, k, v, dout, lists, tiles, tiles)]

    assert all(torch.equal(x, y) for x, y in zip(run(), run(), strict=True))


def test_an_expanded_gradient():
    """As `out.sum().backward()` gives it: all strides 0."""
    tiles = tiles_of((4, 4, 5))
    q, k, v = tokens((4, 4, 5))
    lists = pack(index_of(q, k, tiles, tiles, 1), tiles)
    one = torch.ones((), device=DEVICE).expand(q.shape)
    for x, y in zip(
        sparse(q, k, v, one, lists, tiles, tiles),
        sparse(q, k, v, one.contiguous(), lists, tiles, tiles),
        strict=True,
    ):
        assert torch.equal(x, y)


def test_inputs_that_no_kernel_reads():
    tiles = tiles_of((4, 4, 4))
    q, k, v = tokens((4, 4, 4))
    lists = pack(torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=DEVICE), tiles)
    with pytest.raises(ValueError, match=r"q: shape \[1, 64, 1, 16\], strides \[1024, 16, 16, 2\]"):
        vsa.fine_fwd(
            random(1, 64, 1, 32)[..., ::2].as_strided(q.shape, (1024, 16, 16, 2)), k, v, lists, *tiles
        )
    with pytest.raises(ValueError, match=r"k \[1, 64, 1, 16\] torch.float16"):
        vsa.fine_fwd(q, k.half(), v, lists, *tiles)
    with pytest.raises(ValueError, match="topk = 2 of 1 tiles"):
        vsa.select(vsa.pool(q, *tiles), vsa.pool(k, *tiles), *tiles, 2)


@triton.jit
def _store_far(x_ptr, b, h, row, L, N):
    b, h, row = (tl.load(p) for p in (b, h, row))
    store_tile(x_ptr, tl.full([64, 16], 3.0, tl.float16), b, h, row, 1, L, N, 64, 16)


class TestFarAddresses:
    """Past 2^31 elements, where a 32-bit offset wraps. The memory is reserved and not touched."""

    SIZE = 2**31 + 2**20

    @pytest.fixture
    def memory(self, monkeypatch):
        monkeypatch.undo()  # no NaN into 4 GB
        return torch.empty(self.SIZE, dtype=torch.float16, device=DEVICE)

    @pytest.mark.parametrize(
        ("shape", "strides"),
        [
            ((1, 4, 2, 16), (64, 16, 2**31, 1)),
            ((2, 4, 1, 16), (2**31, 16, 16, 1)),
            ((1, 65, 1, 16), (16, 2**25, 16, 1)),
        ],
        ids=["heads", "batch", "rows"],
    )
    def test_reads(self, memory, shape, strides, monkeypatch):
        x = memory.as_strided(shape, strides)
        x.copy_(random(*shape))
        tiles = from_counts([1, shape[1] - 1] if shape[1] <= 64 else [1, 63, 1])
        assert error(vsa.pool(x, *tiles), pooled(x, tiles)) < 1e-6
        lists = pack(
            torch.zeros(*shape[:1], shape[2], len(tiles[0]), 1, dtype=torch.int64, device=DEVICE) + 1, tiles
        )
        for can in (lambda x: True, lambda x: False):
            monkeypatch.setattr(triton_fwd, "can_describe", can)
            near, far = (vsa.fine_fwd(y, y, y, lists, *tiles)[0] for y in (x.contiguous(), x))
            assert torch.equal(near, far)

    def test_writes(self, memory):
        """Row 2^17 of sample 1 of [2, 2^17 + 1, 512, 16]."""
        at = [torch.tensor([i], dtype=torch.int32, device=DEVICE) for i in (1, 0, 0)]
        L = 2**17 + 4
        _store_far[(1,)](memory, *at, L, 1024)
        assert (memory[L * 1024 * 16 :][:16] == 3).all()
