"""Block-causal Wan, against the bidirectional one and a float64 definition, and what its cache promises.

The definition has no cache.
B batch, C channel, T frames, H W space. Latents have four tokens a frame.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import causal_reference as reference
import pytest
import torch
from causal_reference import CONFIG
from test_wan import gradients, randomized, relative
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastdmd.batch import Cond
from fastdmd.models.net import Call, cast
from fastdmd.models.wan.causal import CausalWan
from fastdmd.models.wan.net import Wan

FRAMES = (1, 2, 3)  # of the blocks
SLICES = [slice(0, 1), slice(1, 3), slice(3, 6)]
NUMBERS = [0, 1, 1, 2, 2, 2]  # of each frame's block
SIZE = 4  # tokens of a frame


@pytest.fixture
def net(float64) -> CausalWan:
    torch.manual_seed(0)
    net = CausalWan(CONFIG)
    randomized(net)
    return net.double()


def inputs(B: int = 2, T: int = 6) -> tuple[Tensor, Tensor, Cond]:
    """x_t, times [B, n] in [0, 1] of three blocks, text."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    times = torch.tensor([[0.9, 0.3, 0.6], [0.1, 1.0, 0.5]], dtype=torch.float64)
    return normal(B, 3, T, 4, 4), times[:B], Cond(normal(B, 5, CONFIG.text_dim))


def in_turn(net: CausalWan, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """Each block held as it is, without gradient."""
    cache = net.start_video(x.shape)
    with torch.no_grad():
        return torch.cat(
            [
                net(x[:, :, frames], 1000 * t[:, i], cond, Call(cache=cache, write=True)).F
                for i, frames in enumerate(SLICES)
            ],
            dim=2,
        )


def far(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Of the gradients of all parameters, the largest relative distance."""
    return max(relative(value, b[name]) for name, value in a.items())


def test_one_block_of_all_frames_is_wan(net):
    plain = Wan(CONFIG).double()
    plain.load_state_dict(net.state_dict())
    x, t, cond = inputs()
    t = 1000 * t[:, 0]
    expected = plain(x, t, cond).F
    for F in (
        net(x, t, cond).F,
        net(x, t, cond, Call(cache=net.start_video(x.shape))).F,
        net(x, t[:, None], cond, Call(blocks=(6,))).F,
    ):
        assert relative(F, expected) <= 1e-12
        assert far(gradients(net, F), gradients(plain, plain(x, t, cond).F)) <= 1e-12


def test_blocks_in_turn_are_one_pass_with_a_mask(net):
    x, t, cond = inputs()
    F = net(x, 1000 * t, cond, Call(blocks=FRAMES)).F
    assert relative(in_turn(net, x, t, cond), F) <= 1e-12
    expected = reference.velocity(net, x, t[:, NUMBERS], cond.text, NUMBERS)
    assert relative(F, expected) <= 1e-10
    assert far(gradients(net, F), gradients(net, expected)) <= 1e-10


def test_a_block_s_gradient_stops_at_what_is_held(net):
    """And neither the context pass of that block nor the next video, which write to the cache, disturb it."""
    x, t, cond = inputs()
    cache = net.start_video(x.shape)
    for i, frames in enumerate(SLICES[:2]):
        with torch.no_grad():
            net(x[:, :, frames], 1000 * t[:, i], cond, Call(cache=cache, write=True))
    F = net(x[:, :, 3:], 1000 * t[:, 2], cond, Call(cache=cache)).F
    with torch.no_grad():
        net(x[:, :, 3:] + 1, 1000 * t[:, 2], cond, Call(cache=cache, write=True))
    in_turn(net, x + 2, t, cond)
    got = gradients(net, F)
    held, leaking = (
        reference.velocity(net, x, t[:, NUMBERS], cond.text, NUMBERS, held=n)[:, :, 3:] for n in (3, 0)
    )
    assert relative(F, held) <= 1e-10
    assert far(got, gradients(net, held)) <= 1e-10
    assert far(got, gradients(net, leaking)) > 0.3


def test_keys_are_held_at_their_own_frames(net):
    """Repeat a block: the first layer has the same values, and keys whose temporal pairs turn further."""
    x, t, cond = inputs(T=4)
    cache = net.start_video(x.shape)
    with torch.no_grad():
        for _ in range(2):
            net(x[:, :, :2], 1000 * t[:, 0], cond, Call(cache=cache, write=True))
    first, second = cache.cache.k[0].chunk(2, dim=1)
    angle = 2 * 10000.0 ** -(torch.arange(2, dtype=torch.float64) / 2)  # K 12: 2 pairs for t, h and w each
    turn = torch.polar(torch.ones(6, dtype=torch.float64), torch.cat([angle, torch.zeros(4)]))
    pairs = torch.view_as_complex(first.unflatten(-1, (-1, 2)).contiguous())
    assert relative(second, torch.view_as_real(pairs * turn).flatten(-2)) <= 1e-12
    assert relative(second, first) > 0.1
    assert torch.equal(*cache.cache.v[0].chunk(2, dim=1))


def test_only_a_write_changes_the_cache(net):
    x, t, cond = inputs()
    cache = net.start_video(x.shape)
    for tensor in (*cache.cache.k, *cache.cache.v):
        tensor.fill_(torch.nan)
    net(x[:, :, :1], 1000 * t[:, 0], cond, Call(cache=cache))
    assert cache.tokens == 0
    assert all(tensor.isnan().all() for tensor in (*cache.cache.k, *cache.cache.v))
    with torch.no_grad():
        net(x[:, :, :1], 1000 * t[:, 0], cond, Call(cache=cache, write=True))
    assert cache.tokens == SIZE
    for tensor in (*cache.cache.k, *cache.cache.v):
        assert not tensor[:, :SIZE].isnan().any()
        assert tensor[:, SIZE:].isnan().all()
    with pytest.raises(AssertionError):
        net(x[:, :, 1:2], 1000 * t[:, 0], cond, Call(cache=cache, write=True))


def test_one_cache_serves_all_videos(net):
    """Of one size; and what an earlier video left in it is never read."""
    x, t, cond = inputs()
    first = in_turn(net, x, t, cond)
    cache = net.start_video(x.shape)
    places = [tensor.data_ptr() for tensor in (*cache.cache.k, *cache.cache.v)]
    assert {tuple(tensor.shape) for tensor in (*cache.cache.k, *cache.cache.v)} == {(2, 6 * SIZE, 2, 12)}
    for tensor in (*cache.cache.k, *cache.cache.v):
        tensor.fill_(torch.nan)
    assert torch.equal(in_turn(net, x, t, cond), first)
    assert net.start_video(x.shape).cache is cache.cache
    assert [tensor.data_ptr() for tensor in (*cache.cache.k, *cache.cache.v)] == places
    for other in (x[:1], x[:, :, :5]):
        assert net.start_video(other.shape).cache is not cache.cache
    net.to(torch.float32)
    assert {tensor.dtype for tensor in net.start_video(x.shape).cache.k} == {torch.float32}
    assert "_cache" not in "".join(net.state_dict())


def test_checkpointing_changes_nothing(net):
    """Come back to the cache after the block's context pass; refuse a cache that serves another video."""
    x, t, cond = inputs()

    def exit_of_the_second() -> Tensor:
        cache = net.start_video(x.shape)
        with torch.no_grad():
            net(x[:, :, :1], 1000 * t[:, 0], cond, Call(cache=cache, write=True))
        F = net(x[:, :, 1:3], 1000 * t[:, 1], cond, Call(cache=cache)).F
        with torch.no_grad():
            net(x[:, :, 1:3] + 1, 1000 * t[:, 1], cond, Call(cache=cache, write=True))
        return F

    expected = gradients(net, exit_of_the_second())
    net.recompute_blocks("full")
    again = gradients(net, exit_of_the_second())
    assert all(torch.equal(value, expected[name]) for name, value in again.items())
    F = exit_of_the_second()
    net.start_video(x.shape)
    with pytest.raises(RuntimeError, match="call backward before the next rollout"):
        gradients(net, F)


def test_blocks_that_do_not_fit(net):
    x, t, cond = inputs()
    cache = net.start_video((2, 3, 5, 4, 4))
    for wrong in (x, x[:1, :, :1], x[:, :, :1, :2]):
        with pytest.raises(ValueError, match=rf"B = {len(wrong)}, .*B = 2, tokens \[5, 2, 2\] that holds 0"):
            net(wrong, 1000 * t[: len(wrong), 0], cond, Call(cache=cache))
    for frames in ((1, 2), (1, 2, 2), (0, 3, 3)):
        with pytest.raises(ValueError, match="do not make up 6 frames in 3 times"):
            net(x, 1000 * t, cond, Call(blocks=frames))


def test_no_sparse_attention():
    reason = r"rollout\.mode = 'causal' has no sparse attention for the student"
    with pytest.raises(ValueError, match=rf"^{reason}; set model\.attention\.student = 'dense'$"):
        CausalWan(CONFIG, tile=(4, 4, 4))


def test_flops_equal_the_counter():
    config: Any = replace(CONFIG, patch_size=(1, 1, 2))
    with torch.device("meta"):
        net, text = CausalWan(config), Cond(torch.empty(2, 5, CONFIG.text_dim))
        x, t = torch.empty(2, 3, 5, 4, 4), torch.empty(2)
    cache = net.start_video(x.shape)
    with torch.no_grad():
        for frames, cached in ((slice(0, 2), 0), (slice(2, 5), 16)):
            assert cache.tokens == cached
            held = SimpleNamespace(tokens=cached)
            with FlopCounterMode(display=False) as counter:
                net(x[:, :, frames], t, text, Call(cache=cache, write=True))
            assert net.flops(x[:, :, frames].shape, 5, Call(cache=held)) == counter.get_total_flops()


def test_the_cache_has_the_compute_dtype():
    torch.manual_seed(0)
    net = CausalWan(CONFIG)
    randomized(net)
    x, t, cond = inputs()
    x, t, cond = x.float(), t.float(), Cond(cond.text.float())
    exact = in_turn(net, x, t, cond)
    cast(net, torch.bfloat16)
    F = in_turn(net, x, t, cond)
    assert {tensor.dtype for tensor in net.start_video(x.shape).cache.k} == {torch.bfloat16}
    assert relative(F.float(), exact) < 0.1
