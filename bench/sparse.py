"""Video sparse attention and its stages beside the definition, FlexAttention over the lists, inductor."""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from bench.case import Case, Tensors, Work, random, upcast, values
from bench.sizes import BACKWARD, Attention, Plan, sparse_flops
from fastdmd_kernels import dispatch
from fastdmd_kernels.tiles import N_VALID_BITS, Tiles
from fastdmd_kernels.vsa import torch as torch_stages
from fastdmd_kernels.vsa import video_sparse_attention, vsa_reference
from fastdmd_kernels.vsa.ops import fine, pool, select, spread

FORWARD_KERNELS = ("vsa_fwd",)
BACKWARD_KERNELS = ("vsa_bwd_dq", "vsa_bwd_dkdv")
REFERENCE_TOKENS = 32_768  # above, the gather-based torch backend in float32 stands for the definition


class Given(NamedTuple):
    q: Tensor  # [B, L, N, K], as are the others
    k: Tensor
    v: Tensor
    gate: Tensor
    dout: Tensor
    lists: Tensor  # as the op makes them: what bfloat16 chooses, all sides share


@lru_cache(maxsize=1)
def given(shape: Attention, dtype: torch.dtype, device: torch.device) -> Given:
    size = (shape.B, shape.tiles.L, shape.N, shape.K)
    q, k, v, gate, dout = (random(*size, dtype=dtype, device=device, seed=seed) for seed in range(5))
    lists = select(pool(q, shape.tiles), pool(k, shape.tiles), shape.tiles, shape.topk)
    return Given(*(x.requires_grad_() for x in (q, k, v, gate)), dout, lists)


def with_lists(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, tiles: Tiles, lists: Tensor) -> Tensor:
    """Run the op's stages on given lists."""
    out = fine(q, k, v, lists, tiles, tiles)
    if gate is None:
        return out
    out_c = torch.softmax(pool(q, tiles) @ pool(k, tiles).mT * q.shape[-1] ** -0.5, dim=-1) @ pool(v, tiles)
    return torch.addcmul(out, spread(out_c, tiles, out.dtype), gate)


@lru_cache(maxsize=2)
def exact_values(shape: Attention, dtype: torch.dtype, device: torch.device, gated: bool) -> Tensors:
    """Return [out, dq, dk, dv (, dgate)] of the last head in float32.

    All heads would not fit.
    """
    *tokens, dout, lists = given(shape, dtype, device)
    inputs, dout = [upcast(x[:, :, -1:]) for x in tokens[: 3 + gated]], dout[:, :, -1:].float()
    lists = lists[:, -1:]

    def reference(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None = None) -> Tensor:
        if shape.tiles.L > REFERENCE_TOKENS:
            return with_lists(q, k, v, gate, shape.tiles, lists)
        return vsa_reference(q, k, v, gate, shape.tiles, shape.topk, lists)

    with dispatch.use("torch"):
        return values(reference, inputs, dout)


def timed(
    run: Callable[..., Tensor],
    inputs: Tensors,
    dout: Tensor,
    of: str,
    results: Callable[[Tensors], Tensors],
    exact: Callable[[], Tensors],
    flops: int,
) -> Work:
    """Time a forward as training runs it, or the backward of one; check both."""

    def checked() -> Tensors:
        return results(values(run, inputs, dout))

    if of == "forward":
        return Work(lambda: run(*inputs), checked, exact, flops=flops, kernels=FORWARD_KERNELS)
    out = run(*inputs)
    return Work(
        lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True),
        checked,
        exact,
        flops=int(BACKWARD * flops),
        kernels=BACKWARD_KERNELS,
    )


def last_head(tensors: Tensors) -> Tensors:
    return [x[:, :, -1:] for x in tensors]


def _whole(name: str, shape: Attention, dtype: torch.dtype, of: str, device: torch.device) -> Work:
    *tokens, dout, lists = given(shape, dtype, device)
    runs = {
        "ours": partial(video_sparse_attention, tiles=shape.tiles, topk=shape.topk),
        "reference": partial(vsa_reference, tiles=shape.tiles, topk=shape.topk, lists=lists),
    }
    run = runs[name.removesuffix(", compiled")]
    if name.endswith(", compiled"):
        run = torch.compile(run, fullgraph=True)
    exact = partial(exact_values, shape, dtype, device, True)
    return timed(run, tokens, dout, of, last_head, exact, sparse_flops(shape, lists))


def _fine(shape: Attention, dtype: torch.dtype, of: str, device: torch.device) -> Work:
    q, k, v, _, dout, lists = given(shape, dtype, device)
    run = partial(fine, lists=lists, q_tiles=shape.tiles, k_tiles=shape.tiles)
    exact = partial(exact_values, shape, dtype, device, False)
    return timed(run, [q, k, v], dout, of, last_head, exact, sparse_flops(shape, lists))


def masked(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Compute the fine stage as a dense masked attention; keep [B, N, L, L]."""
    scores = torch.einsum("blnk,bmnk->bnlm", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bnlm,bmnk->blnk", torch.softmax(scores.masked_fill(~keep, -math.inf), dim=-1), v)


def _masked(shape: Attention, dtype: torch.dtype, of: str, device: torch.device) -> Work:
    q, k, v, _, dout, lists = given(shape, dtype, device)
    tile = shape.tiles.on(device).tile_of_row
    keep = picked_tiles(shape.tiles, lists)[:, :, tile][..., tile]
    run = partial(torch.compile(masked, fullgraph=True), keep=keep)
    exact = partial(exact_values, shape, dtype, device, False)
    return timed(run, [q, k, v], dout, of, last_head, exact, sparse_flops(shape, lists))


def picked_tiles(tiles: Tiles, lists: Tensor) -> Tensor:
    """Turn lists into a map, bool [B, N, nq, nk]."""
    chosen = torch.searchsorted(tiles.on(lists.device).row_start, (lists >> N_VALID_BITS).contiguous())
    empty = torch.zeros(*lists.shape[:3], tiles.n, dtype=torch.bool, device=lists.device)
    return empty.scatter(-1, chosen, True)


# ---------------------------------------------------------------------------------------------- FlexAttention


def block_mask(tiles: Tiles, lists: Tensor) -> BlockMask:
    """Turn the lists into a mask over tokens padded to whole tiles.

    Full tiles need no mask, ragged ones keep their valid keys.
    """
    geometry = tiles.on(lists.device)
    picked, full = picked_tiles(tiles, lists), geometry.n_valid == tiles.slots

    def ordered(keep: Tensor) -> Tensors:
        return [
            keep.sum(-1, dtype=torch.int32),
            keep.byte().argsort(dim=-1, descending=True, stable=True).int(),
        ]

    def valid(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j % tiles.slots < geometry.n_valid[j // tiles.slots]

    return BlockMask.from_kv_blocks(
        *ordered(picked & ~full), *ordered(picked & full), BLOCK_SIZE=tiles.slots, mask_mod=valid
    )


def padded(x: Tensor, tiles: Tiles) -> Tensor:
    """Copy [B, L, N, K] to [B, N, n * slots, K], each tile's tokens at its front and zeros behind."""
    geometry = tiles.on(x.device)
    slot = torch.arange(tiles.slots, device=x.device)
    rows = (geometry.row_start.long()[:, None] + slot).clamp(max=tiles.L - 1).flatten()
    x = (
        x.detach()
        .index_select(1, rows)
        .masked_fill((slot >= geometry.n_valid[:, None]).flatten()[:, None, None], 0)
    )
    return x.transpose(1, 2)


def unpadded(x: Tensor, tiles: Tiles) -> Tensor:
    geometry = tiles.on(x.device)
    slot = torch.arange(tiles.L, device=x.device) - geometry.row_start.long()[geometry.tile_of_row]
    return x[:, :, geometry.tile_of_row * tiles.slots + slot].transpose(1, 2)


def _flex(shape: Attention, dtype: torch.dtype, of: str, device: torch.device) -> Work:
    q, k, v, _, dout, lists = given(shape, dtype, device)
    inputs = [padded(x, shape.tiles).requires_grad_() for x in (q, k, v)]
    # its kernels' blocks have to divide the tiles
    blocks = dict.fromkeys(("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2"), 64)
    attend = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention
    options = {"kernel_options": blocks} if device.type == "cuda" else {}
    run = partial(attend, block_mask=block_mask(shape.tiles, lists), **options)

    def results(tensors: Tensors) -> Tensors:
        return last_head([unpadded(x, shape.tiles) for x in tensors])

    exact = partial(exact_values, shape, dtype, device, False)
    return timed(run, inputs, padded(dout, shape.tiles), of, results, exact, sparse_flops(shape, lists))


# ----------------------------------------------------------------------------------------------------- stages


def _stage(stage: str, ours: bool, shape: Attention, dtype: torch.dtype, device: torch.device) -> Work:
    """Time a stage that moves bytes: inputs read once, the output written once.

    Both sides give the same, to rounding.
    """
    q, k, *_, lists = (x.detach() for x in given(shape, dtype, device))
    tiles = shape.tiles.on(device)
    q_c, k_c = pool(q, shape.tiles), pool(k, shape.tiles)
    calls = {  # arguments
        "pool": (q, tiles.row_start, tiles.n_valid),
        "select": (q_c, k_c, tiles.row_start, tiles.n_valid, shape.topk),
        "invert": (lists, tiles.row_start, shape.tiles.n),
    }[stage]
    module = dispatch.module("vsa", device) if ours else torch_stages
    run = partial(getattr(module, stage), *calls)

    def results() -> Tensors:
        out = run()
        return [x.float() for x in (out if isinstance(out, tuple) else (out,))]

    def exact() -> Tensors:
        if stage == "invert":
            return inverse(shape, lists)
        return [getattr(torch_stages, stage)(*calls).float()]

    moved = [x for x in calls if isinstance(x, Tensor)] + results()
    return Work(
        run,
        results,
        exact,
        flops=2 * q_c.numel() * shape.tiles.n if stage == "select" else 0,
        bytes=sum(x.numel() * x.element_size() for x in moved),
        kernels=(f"vsa_{stage}",),
    )


def inverse(shape: Attention, lists: Tensor) -> Tensors:
    """Compute what `invert` gives, by sorting."""
    chosen = torch.searchsorted(shape.tiles.on(lists.device).row_start, (lists >> N_VALID_BITS).contiguous())
    flat = chosen.flatten(2)  # [B, N, nq * topk], query tile by query tile
    order = flat.argsort(dim=-1, stable=True)
    counts = torch.zeros(*flat.shape[:2], shape.tiles.n + 1, device=lists.device)
    counts.scatter_add_(-1, flat + 1, torch.ones_like(flat, dtype=counts.dtype))
    return [counts.cumsum(-1), (order // shape.topk).float()]


# ------------------------------------------------------------------------------------------------------ cases


def cases(plan: Plan, device: torch.device) -> Iterator[Case]:
    gpu = device.type == "cuda"
    for shape in plan.attention:
        for dtype in shape.dtypes:
            row = {"shape": shape, "dtype": str(dtype).removeprefix("torch.")}
            whole = ["ours", *(["ours, compiled"] if plan.compiled and shape.holds_all_scores else [])]
            if shape.holds_all_scores:
                whole.append("reference")
            for of in ("forward", "backward"):
                for name in whole:
                    build = partial(_whole, name, shape, dtype, of)
                    yield Case("vsa", name, of, **row, build=build, ours=name == "ours")
                yield Case("vsa_fine", "ours", of, **row, build=partial(_fine, shape, dtype, of), ours=True)
                if plan.compiled and shape.holds_all_scores:
                    build = partial(_masked, shape, dtype, of)
                    yield Case("vsa_fine", "masked, compiled", of, **row, build=build)
                if shape.flex and dtype == shape.dtypes[0]:
                    yield Case("vsa_fine", "flex", of, **row, build=partial(_flex, shape, dtype, of))
            for stage in ("pool", "select", *(["invert"] if gpu else [])):
                for ours in (
                    True,
                    *([False] if gpu and stage != "invert" and shape.holds_all_scores else []),
                ):
                    yield Case(
                        f"vsa_{stage}",
                        "ours" if ours else "torch",
                        "forward",
                        **row,
                        build=partial(_stage, stage, ours, shape, dtype),
                        ours=ours,
                        captured=ours,  # the torch backend asks the device for sizes
                    )
