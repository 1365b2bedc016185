"""Video sparse attention against its definition: values, all gradients, and that it is as sparse as it says.

By hand (einsum in loops, float64) -> `vsa_reference` (also gradcheck) -> each backend. Errors are judged
against those of the reference in the same dtype, with the same lists.
"""

import math

import pytest
import torch
import torch.nn.functional as nnf
from recomputed import recomputed
from torch import Tensor
from vsa_cases import EVEN, NAMES, RAGGED, choose, inputs, pair, rows_of, run

from fastdmd_kernels import Tiles, dispatch, topk_for, video_sparse_attention, vsa_reference
from fastdmd_kernels.vsa import reference
from fastdmd_kernels.vsa import torch as stages

CASES = {  # name -> (tiles, topk)
    "even": (EVEN, 2),
    "one kept": (EVEN, 1),
    "all kept": (EVEN, 4),
    "ragged t": (Tiles((5, 4, 8)), 2),
    "ragged h": (Tiles((4, 6, 8)), 2),
    "ragged w": (Tiles((4, 8, 5)), 2),
    "ragged": (RAGGED, 3),
    "one tile": (Tiles((3, 2, 3)), 1),
    "fewer queries": ((Tiles((2, 3, 4)), RAGGED), 3),
    "more queries": ((RAGGED, Tiles((4, 4, 8))), 1),
}


def assert_as_exact_as_the_reference(x: dict[str, Tensor], tiles, topk: int) -> None:
    """Allow at most twice the error of the reference in the same dtype, in root mean square.

    The largest of a few thousand errors is a matter of luck, up to 3 times that of an equally exact side.
    """
    lists, exact = choose(x, tiles, topk), {name: value.double() for name, value in x.items()}
    want = run(vsa_reference, exact, tiles, topk, lists=lists)
    same_dtype = run(vsa_reference, x, tiles, topk, lists=lists)
    got = run(video_sparse_attention, x, tiles, topk)
    for name in want:
        assert got[name].dtype == x["q"].dtype
        assert got[name].shape == want[name].shape
        error, allowed = ((side[name].double() - want[name]).norm().item() for side in (got, same_dtype))
        assert error <= 2 * allowed, (name, error, allowed)


# --------------------------------------------------------------------------------------------- the definition


def by_hand(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, tiles, topk: int) -> Tensor:
    rows_q, rows_k = (rows_of(of) for of in pair(tiles))
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            key_means, value_means = (torch.stack([x[b, r, h].mean(0) for r in rows_k]) for x in (k, v))
            for r in rows_q:
                scores = torch.einsum("c,jc->j", q[b, r, h].mean(0), key_means) / math.sqrt(q.shape[-1])
                kept = sorted(range(len(rows_k)), key=lambda j, s=scores: (-s[j].item(), j))[:topk]
                keys, values = (torch.cat([x[b, rows_k[j], h] for j in kept]) for x in (k, v))
                weights = torch.einsum("ic,jc->ij", q[b, r, h], keys).div(math.sqrt(q.shape[-1])).exp()
                out[b, r, h] = torch.einsum("ij,jc->ic", weights / weights.sum(1, keepdim=True), values)
                if gate is not None:
                    coarse = torch.einsum("j,jc->c", scores.exp() / scores.exp().sum(), value_means)
                    out[b, r, h] += coarse * gate[b, r, h]
    return out


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("gated", [True, False])
def test_the_reference_is_the_definition(case, gated):
    tiles, topk = CASES[case]
    x = inputs(tiles, dtype=torch.float64, K=4)
    args = (x["q"], x["k"], x["v"], x["gate"] if gated else None, tiles, topk)
    torch.testing.assert_close(vsa_reference(*args), by_hand(*args), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", [vsa_reference, video_sparse_attention])
def test_gradients_are_finite_differences(op):
    tiles = (Tiles((2, 1, 3), (2, 2, 2)), Tiles((2, 3, 2), (2, 2, 2)))
    x = inputs(tiles, B=1, N=1, K=2, dtype=torch.float64)
    leaves = [x[name].detach().requires_grad_() for name in NAMES]
    assert torch.autograd.gradcheck(lambda *given: op(*given, tiles, 1), leaves)


def test_given_lists_override_the_choice():
    x = inputs(RAGGED, dtype=torch.float64)
    own, other = choose(x, RAGGED, 2), choose(inputs(RAGGED, dtype=torch.float64, seed=1), RAGGED, 2)
    args = (*(x[name] for name in NAMES), RAGGED, 2)
    assert torch.equal(vsa_reference(*args, lists=own), vsa_reference(*args))
    assert not torch.allclose(vsa_reference(*args, lists=other), vsa_reference(*args))


def test_topk_is_a_ceiling_of_tiles():
    known = {
        (0.8, 455): 91,
        (0.9, 10): 1,
        (0.7, 10): 3,
        (0.0, 7): 7,
        (1.0, 7): 1,
        (0.9, 624): 63,
        (0.5, 3): 2,
    }
    assert {given: topk_for(*given) for given in known} == known
    assert [topk_for(0.03 * i, 100) for i in range(1, 31)] == [100 - 3 * i for i in range(1, 31)]
    for given in [(-0.1, 4), (1.1, 4), (0.5, 0), (math.nan, 4)]:
        with pytest.raises(ValueError, match="sparsity"):
            topk_for(*given)


# ----------------------------------------------------------------------------------------------- the backends


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, backend):
    tiles, topk = CASES[case]
    heads = 2 if case == "ragged" else 1  # the interpreter is slow
    assert_as_exact_as_the_reference(inputs(tiles, N=heads), tiles, topk)


@pytest.mark.parametrize("scale", [1, 4, 16])
def test_input_scales(scale, backend, monkeypatch):
    """What recomputes S^T judges the triton kernels, which do; test_vsa_triton.py has a sharper test."""
    if backend == "triton":
        monkeypatch.setattr(reference, "attend", recomputed)
    assert_as_exact_as_the_reference(inputs(RAGGED, N=1, scale=scale), RAGGED, 3)


@pytest.mark.parametrize("scale", [1, 4, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes(dtype, scale):
    assert_as_exact_as_the_reference(inputs(RAGGED, dtype=dtype, scale=scale), RAGGED, 3)


def test_three_samples_and_a_long_head(backend):
    assert_as_exact_as_the_reference(inputs(EVEN, B=3, N=1, K=64), EVEN, 2)


@pytest.mark.parametrize("cube", [(2, 2, 2), (1, 4, 3), (4, 5, 6)])
def test_other_cubes(cube):
    tiles = Tiles((5, 6, 7), cube)
    assert_as_exact_as_the_reference(inputs(tiles), tiles, min(3, tiles.n))


def test_lists_are_those_of_the_reference(backend):
    """Ascending words (row_start << 7) | n_valid of the highest scores."""
    x = inputs(RAGGED)
    rows, means = rows_of(RAGGED), {}
    for name in "qk":
        means[name] = torch.stack([x[name][:, r].double().mean(1) for r in rows], 2)
    best = (means["q"] @ means["k"].mT).topk(3).indices.sort().values
    words = torch.tensor([(r.start << 7) | (r.stop - r.start) for r in rows], dtype=torch.int32)
    assert torch.equal(choose(x, RAGGED, 3), words[best])


def tiles_taken(op, tiles: Tiles, levels: list[int], topk: int, K: int = 16) -> list[list[int]]:
    """Return the key tiles in whose direction each token's output points, for keys of one level per tile."""
    tile_of_row = tiles.on(torch.device("cpu")).tile_of_row
    k = torch.tensor(levels, dtype=torch.float32)[tile_of_row][None, :, None, None].repeat(1, 1, 1, K)
    v = nnf.one_hot(tile_of_row, K).float()[None, :, None]
    out = op(torch.full_like(k, 0.5), k, v, None, tiles, topk)
    return [row.nonzero().flatten().tolist() for row in out[0, :, 0]]


@pytest.mark.parametrize("topk", [1, 3, 6, 8, 10, 11])
@pytest.mark.parametrize("side", ["reference", "torch", "triton"])
@pytest.mark.parametrize("tiles", [Tiles((8, 8, 12)), Tiles((6, 5, 11))], ids=["even", "ragged"])
def test_of_equal_scores_at_the_cut_the_lowest_tiles_are_kept(tiles, side, topk):
    """The pooled scores are exact: integers times a constant."""
    if side == "triton":
        pytest.importorskip("triton")
    levels = [1, 2, 0, 2, 1, 2, 0, 1, 2, 1, 0, 2]
    kept = sorted(sorted(range(12), key=lambda i: (-levels[i], i))[:topk])
    highest = sorted(sorted(range(12), key=lambda i: (-levels[i], -i))[:topk])
    assert kept != highest  # the cut is between equals
    if side == "reference":
        taken = tiles_taken(vsa_reference, tiles, levels, topk)
    else:
        with dispatch.use(side):
            taken = tiles_taken(video_sparse_attention, tiles, levels, topk)
    assert taken == [kept] * tiles.L


@pytest.mark.parametrize("op", [vsa_reference, video_sparse_attention])
def test_all_equal_scores_keep_the_first_tiles(op):
    """Past the size at which a sort that is not stable still looks so."""
    tiles = Tiles((2, 2, 80), (2, 2, 2))
    for topk in (1, 17, 39):
        assert tiles_taken(op, tiles, [1] * 40, topk, K=64) == [list(range(topk))] * tiles.L


@pytest.mark.parametrize("tiles", [EVEN, RAGGED, (RAGGED, EVEN)], ids=["even", "ragged", "pair"])
def test_all_tiles_and_no_gate_is_dense_attention(tiles, backend):
    def dense(q, k, v, gate, tiles, topk):
        return nnf.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    x = inputs(tiles, B=1)
    del x["gate"]
    got, want = (run(op, x, tiles, pair(tiles)[1].n) for op in (video_sparse_attention, dense))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-5)


def test_a_gate_of_zero_is_no_gate_but_learns(backend):
    x = inputs(RAGGED, B=1, N=1)
    x["gate"] = torch.zeros_like(x["gate"])
    shut = run(video_sparse_attention, x, RAGGED, 3)
    assert shut.pop("dgate").abs().min() > 0
    del x["gate"]
    none = run(video_sparse_attention, x, RAGGED, 3)
    assert all(torch.equal(shut[name], none[name]) for name in none)


def test_the_choice_has_no_gradient():
    """What only the choice depends on gets none: keys of tiles that no query tile takes, with no gate."""
    x = inputs(EVEN, B=1, N=1)
    del x["gate"]
    taken = set((choose(x, EVEN, 1) >> 7).flatten().tolist())
    left = [r for r in rows_of(EVEN) if r.start not in taken]
    assert left
    got = run(video_sparse_attention, x, EVEN, 1)
    assert not any(got["dk"][:, r].any() or got["dv"][:, r].any() for r in left)


def test_what_is_not_written_is_not_read(backend, monkeypatch):
    x = inputs(RAGGED, N=1)
    want = run(video_sparse_attention, x, RAGGED, 3)
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(x: Tensor) -> Tensor:
        return x.fill_(math.nan) if x.is_floating_point() else x.fill_(-1)

    monkeypatch.setattr(torch, "empty", lambda *size, **kw: poisoned(empty(*size, **kw)))
    monkeypatch.setattr(torch, "empty_like", lambda *like, **kw: poisoned(empty_like(*like, **kw)))
    got = run(video_sparse_attention, x, RAGGED, 3)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_two_runs_agree_bit_for_bit(backend):
    first, again = (run(video_sparse_attention, inputs(RAGGED, B=1, N=1), RAGGED, 3) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_gradient_of_a_sum_is_expanded(backend):
    x = inputs(RAGGED, B=1, N=1)
    want = run(video_sparse_attention, x | {"dout": torch.ones_like(x["dout"])}, RAGGED, 3)
    got = run(video_sparse_attention, x | {"dout": torch.ones(()).expand_as(x["dout"])}, RAGGED, 3)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_keys_that_are_all_padding_give_zero():
    """No grid makes them; a list may. Neither its rows nor the rows that it stands before are read."""
    x = inputs(EVEN)
    geometry = EVEN.on(torch.device("cpu"))
    empty = (geometry.row_start << 7)[:2].expand(2, 2, 4, 2).contiguous()
    half = empty.clone()
    half[..., 1] |= 5  # five keys of the second
    for lists, keys in [(empty, slice(0, 0)), (half, slice(64, 69))]:
        q, k, v = (x[name].clone() for name in "qkv")
        outside = torch.ones(EVEN.L, dtype=torch.bool)
        outside[keys] = False
        k[:, outside] = v[:, outside] = math.nan
        out, lse = stages.fine_fwd(q, k, v, lists, geometry.row_start, geometry.n_valid)
        grads = stages.fine_bwd(x["dout"], q, k, v, out, lse, lists, *geometry[:2], *geometry[:2])
        want = torch.zeros_like(out)
        if keys.stop:
            per_head = (y.transpose(1, 2) for y in (q, k[:, keys], v[:, keys]))
            want = nnf.scaled_dot_product_attention(*per_head).transpose(1, 2)
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)
        assert all(grad.isfinite().all() for grad in grads)
        assert not any(grad[:, outside].any() for grad in grads[1:])


def test_chunks_do_not_show(monkeypatch):
    want = run(video_sparse_attention, inputs(RAGGED), RAGGED, 3)
    monkeypatch.setattr(stages, "CHUNK_BYTES", 1)
    got = run(video_sparse_attention, inputs(RAGGED), RAGGED, 3)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------------- what is refused


def refused(match: str, tiles=EVEN, topk=2, **change) -> None:
    x = inputs(EVEN, B=1, N=1) | change
    for op in (video_sparse_attention, vsa_reference):
        with pytest.raises(ValueError, match=match):
            op(*(x[name] for name in NAMES), tiles, topk)


def test_what_it_cannot_do_is_refused_with_the_shapes():
    x = torch.zeros(1, 256, 1, 16)
    refused(r"q \[256, 1, 16\].*needed are", q=x[0])
    refused("needed are", q=x[..., :8])
    refused("needed are", q=x.expand(2, -1, -1, -1))
    refused("needed are", v=x.expand(-1, -1, 2, -1))
    refused("needed are", v=x[:, :128])
    refused("nothing to attend to", **{name: torch.zeros(0, 256, 1, 16) for name in NAMES})
    refused(r"gate \[1, 256, 1, 1\] needs the shape of q", gate=x[..., :1])
    refused("dtypes", k=x.double())
    refused("dtypes", gate=x.bfloat16())
    refused("dtypes", **{name: x.long() for name in NAMES})
    refused("different devices", k=x.to("meta"), v=x.to("meta"))
    refused(r"grid \(5, 6, 7\) has 210 queries", tiles=RAGGED)
    refused(r"grid \(5, 6, 7\) has 210 keys", tiles=(EVEN, RAGGED))
    refused("tiles of queries .* differ", tiles=(EVEN, Tiles((8, 4, 8), (2, 2, 2))))
    refused("256 slots", tiles=Tiles((8, 4, 8), (8, 4, 8)), topk=1)
    for topk in (0, -1, 5):
        refused(rf"topk {topk} is not in 1\.\.4", topk=topk)


def test_the_kernels_refuse_more_slots_than_they_have():
    pytest.importorskip("triton")
    tiles = Tiles((5, 6, 7), (4, 5, 6))
    x = inputs(tiles)
    with dispatch.use("triton"), pytest.raises(ValueError, match="120 slots"):
        video_sparse_attention(*(x[name] for name in NAMES), tiles, 1)
