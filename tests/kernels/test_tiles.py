"""Cubes of tokens over a grid: every token is in one tile, tiles are compact, and nothing is made twice."""

import itertools
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fastdmd_kernels.tiles import Tiles, raster_order, tile_order

CPU = torch.device("cpu")
GRIDS = [(1, 1, 1), (4, 4, 4), (8, 4, 12), (5, 8, 8), (8, 7, 8), (8, 8, 6), (5, 6, 7), (1, 9, 2), (3, 2, 1)]
CUBES = [(4, 4, 4), (2, 2, 2), (1, 3, 5), (4, 8, 2)]
CASES = list(itertools.product(GRIDS, CUBES))


def tiles_by_hand(grid, cube):
    """Per tile its raster tokens, by the definition: tiles run t, h, w; inside a tile tokens do."""
    (T, H, W), (t, h, w) = grid, cube
    return [
        [
            (i * H + j) * W + k
            for i in range(a, min(a + t, T))
            for j in range(b, min(b + h, H))
            for k in range(c, min(c + w, W))
        ]
        for a in range(0, T, t)
        for b in range(0, H, h)
        for c in range(0, W, w)
    ]


@pytest.mark.parametrize(("grid", "cube"), CASES)
def test_tiles_are_those_of_the_definition(grid, cube):
    want, tiles = tiles_by_hand(grid, cube), Tiles(grid, cube)
    row_start, n_valid, tile_of_row, order, inverse = tiles.on(CPU)
    assert tiles.n == len(want)
    assert tiles.L == math.prod(grid) == len(order)
    assert order.tolist() == [token for tile in want for token in tile]
    assert n_valid.tolist() == [len(tile) for tile in want]
    assert row_start.tolist() == [0, *itertools.accumulate(map(len, want))][:-1]
    assert tile_of_row.tolist() == [i for i, tile in enumerate(want) for _ in tile]
    assert torch.equal(order[inverse], torch.arange(tiles.L))
    assert 1 <= n_valid.min() <= n_valid.max() <= tiles.slots
    assert [x.dtype for x in (row_start, n_valid, order, inverse)] == [torch.int32] * 2 + [torch.int64] * 2


@pytest.mark.parametrize(("grid", "n", "L"), [((21, 30, 52), 624, 32_760), ((21, 45, 80), 1_440, 75_600)])
def test_counts_of_wan_at_480p_and_720p(grid, n, L):
    assert (Tiles(grid).n, Tiles(grid).L, len(Tiles(grid).on(CPU).row_start)) == (n, L, n)


def test_a_cube_is_a_neighbourhood():
    """A token's tile mates are at most 3 steps away on each axis, also at the ragged edge."""
    grid = (5, 6, 7)
    place = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), -1).view(-1, 3)
    geometry = Tiles(grid).on(CPU)
    for tile in place[geometry.order].split(geometry.n_valid.tolist()):
        assert (tile.amax(0) - tile.amin(0)).max() <= 3


def test_order_and_back_along_any_dimension():
    tiles = Tiles((3, 5, 6))
    for shape, dim in [((2, 90, 3), 1), ((90,), 0), ((2, 90, 1, 4), -3)]:
        x = torch.randn(shape)
        moved = tiles.to_tile_order(x, dim)
        one_by_one = [x.select(dim, i) for i in tiles.on(CPU).order.tolist()]
        assert torch.equal(moved, torch.stack(one_by_one, dim))
        assert torch.equal(tiles.to_raster_order(moved, dim), x)


def test_equal_tiles_are_one_key_and_hold_their_own_tensors():
    tiles, other = Tiles((5, 6, 7)), Tiles((5, 6, 7), (4, 4, 4))
    assert tiles.on(CPU) is tiles.on(CPU)
    assert tiles.on(CPU).order is not other.on(CPU).order
    assert tiles == other
    assert hash(tiles) == hash(other)
    assert repr(tiles) == "Tiles(grid=(5, 6, 7), tile=(4, 4, 4))"
    assert len({tiles, other, Tiles((5, 6, 8)), Tiles((5, 6, 7), (2, 2, 2))}) == 3


def test_the_fullest_tile():
    for grid, cube in CASES:
        assert Tiles(grid, cube).fullest == max(map(len, tiles_by_hand(grid, cube)))


def test_a_first_use_with_fake_tensors_does_not_reach_other_instances():
    grid = (4, 7, 9)
    fakes = [Tiles(grid), Tiles(grid)]
    for tiles in fakes:
        with FakeTensorMode():
            moved = tiles.to_raster_order(tiles.to_tile_order(torch.zeros(2, tiles.L), 1), 1)
        assert isinstance(moved, FakeTensor)
    x = torch.arange(math.prod(grid))
    real = Tiles(grid)
    assert real.to_tile_order(x, 0).tolist() == [
        token for tile in tiles_by_hand(grid, real.tile) for token in tile
    ]
    assert not any(isinstance(y, FakeTensor) for y in (*real.on(CPU), tile_order(grid, real.tile)))


@pytest.mark.parametrize("prepared", [True, False])
def test_a_prepared_geometry_is_an_input_of_the_graph(prepared):
    """No order is computed in it. Where nobody prepared it is, once: the next call finds the tensors."""
    graphs = []

    def kept(graph, example_inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op.startswith("call")])
        return graph

    def there_and_back(x, tiles):
        return tiles.to_raster_order(tiles.to_tile_order(x, 1).neg(), 1)

    torch._dynamo.reset()
    compiled = torch.compile(there_and_back, fullgraph=True, backend=kept)
    tiles, x = Tiles((4, 5, 6)), torch.randn(2, 120)
    if prepared:
        tiles.on(CPU)
    for _ in range(3):
        assert torch.equal(compiled(x, tiles), -x)
    if prepared:
        assert graphs == [["index_select", "neg", "index_select"]]
    else:
        assert ["argsort" in " ".join(graph) for graph in graphs] == [True, False]


def test_tensors_of_a_first_call_in_inference_mode_can_be_saved_for_backward():
    with torch.inference_mode():
        geometry = Tiles((2, 3, 7)).on(CPU)
    assert not any(x.is_inference() for x in geometry)


def test_the_orders_are_those_of_the_functions():
    geometry = Tiles((5, 6, 7)).on(CPU)
    assert torch.equal(geometry.order, tile_order((5, 6, 7), (4, 4, 4)))
    assert torch.equal(geometry.inverse, raster_order((5, 6, 7), (4, 4, 4)))


@pytest.mark.parametrize(
    ("grid", "cube"), [((0, 4, 4), (4, 4, 4)), ((4, 4, 4), (4, 0, 4)), ((4, 4), (4, 4, 4))]
)
def test_wrong_grids_are_refused(grid, cube):
    for make in (Tiles, tile_order):
        with pytest.raises(ValueError, match="three positive"):
            make(grid, cube)


def test_wrong_lengths_are_refused():
    for move in (Tiles((2, 3, 4)).to_tile_order, Tiles((2, 3, 4)).to_raster_order):
        with pytest.raises(ValueError, match=r"dimension 1 of \[2, 23\] is not the 24 tokens"):
            move(torch.zeros(2, 23), 1)
