"""Our Wan against diffusers' on random weights, and its other promises: order, recomputing, types, cost."""

import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product

import mlp
import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastdmd.batch import Batch, Cond
from fastdmd.denoiser import Denoiser
from fastdmd.methods.dmd import DMD
from fastdmd.methods.score_distillation import CriticConfig
from fastdmd.models.net import Call, cast
from fastdmd.models.wan.layers import WanConfig, rope_table, rotate
from fastdmd.models.wan.net import Wan
from fastdmd.rollout import Config as RolloutConfig
from fastdmd.schedule import FlowSchedule
from fastdmd_kernels.tiles import Tiles, raster_order, tile_order

TINY = WanConfig(
    num_attention_heads=3, attention_head_dim=12, num_layers=2, ffn_dim=40, in_channels=4, out_channels=4,
    text_dim=24,
    freq_dim=32,
)  # fmt: skip
LATENT = (5, 6, 10)  # tokens 5, 3, 5
LIKE_DIFFUSERS = [
    pytest.param(replace(TINY, num_attention_heads=12), LATENT, id="1.3B"),
    pytest.param(replace(TINY, num_attention_heads=40), LATENT, id="14B"),
    pytest.param(replace(TINY, num_attention_heads=12, attention_head_dim=16), LATENT, id="K16"),
    # an eps that shows, no norm2, patches that tell all three axes apart
    pytest.param(
        replace(
            TINY, attention_head_dim=20, eps=0.1, cross_attn_norm=False, patch_size=(2, 1, 3), out_channels=5
        ),
        (6, 5, 9),
        id="odd",
    ),
]
TILINGS = [  # grid, tile: even, ragged along one axis and all, larger than the grid, a single token
    ((4, 8, 4), (4, 4, 4)),
    ((5, 3, 5), (4, 4, 4)),
    ((5, 3, 5), (2, 2, 3)),
    ((2, 3, 7), (1, 2, 8)),
    ((3, 1, 2), (4, 4, 4)),
    ((2, 2, 2), (1, 1, 1)),
]


def randomized(net: Wan) -> Wan:
    """Every parameter random, so that no norm is 1 and no bias 0."""
    for p in net.parameters():
        if p.ndim == 1:
            nn.init.normal_(p, mean=0.5, std=0.3)
        else:
            nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return net


def inputs(config: WanConfig, latent: Sequence[int], B: int = 3) -> tuple[Tensor, Tensor, Cond]:
    model_t = torch.tensor([1000.0, 757.3, 12.5])[:B]
    return torch.randn(B, config.in_channels, *latent), model_t, Cond(torch.randn(B, 7, config.text_dim))


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


def gradients(net: nn.Module, out: Tensor) -> dict[str, Tensor]:
    """Of every parameter, for a fixed random cotangent."""
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    names, parameters = zip(*net.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad((out * cotangent).sum(), parameters), strict=True))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize(("config", "latent"), LIKE_DIFFUSERS)
def test_equals_diffusers(config, latent):
    ours, theirs = randomized(Wan(config)), WanTransformer3DModel(**asdict(config))
    theirs.load_state_dict(ours.state_dict())
    x_t, model_t, cond = inputs(config, latent)
    F, reference = ours(x_t, model_t, cond).F, theirs(x_t, model_t, cond.text).sample
    assert F.shape == reference.shape
    assert relative(F, reference) <= 1e-5
    expected = gradients(theirs, reference)
    errors = {name: relative(g, expected[name]) for name, g in gradients(ours, F).items()}
    assert errors.keys() == expected.keys()
    assert max(errors.values()) <= 1e-4, max(errors, key=errors.__getitem__)


def slow_order(grid, tile):
    """Tile by tile, token by token."""
    order = []
    for corner in product(*(range(0, n, size) for n, size in zip(grid, tile, strict=True))):
        inside = (range(c, min(c + size, n)) for c, size, n in zip(corner, tile, grid, strict=True))
        order += [(t * grid[1] + h) * grid[2] + w for t, h, w in product(*inside)]
    return order


@pytest.mark.parametrize(("grid", "tile"), TILINGS)
def test_orders_equal_a_slow_loop(grid, tile):
    expected = slow_order(grid, tile)
    assert tile_order(grid, tile).tolist() == expected
    assert raster_order(grid, tile).tolist() == [expected.index(i) for i in range(len(expected))]


@pytest.mark.parametrize("bad", [((0, 2, 2), (4, 4, 4)), ((2, 2, 2), (4, 0, 4))])
def test_orders_refuse_empty(bad):
    with pytest.raises(ValueError, match="must be three positive numbers"):
        tile_order(*bad)


@pytest.mark.parametrize("K", [12, 16, 20])
def test_rope_table_equals_complex_powers(K):
    grid, tile, side = (3, 2, 5), (2, 2, 2), 2 * (K // 6)
    cos, sin = rope_table(grid, K, tile and Tiles(grid, tile), torch.device("cpu"))
    places = list(product(*map(range, grid)))
    for row, token in enumerate(slow_order(grid, tile)):
        angles = [
            n * 10000 ** (-2 * i / dim)
            for n, dim in zip(places[token], (K - 2 * side, side, side), strict=True)
            for i in range(dim // 2)
        ]
        rotation = torch.polar(
            torch.ones(K // 2, dtype=torch.float64), torch.tensor(angles, dtype=torch.float64)
        )
        pairs = torch.complex(cos[row, 0], sin[row, 0]).to(torch.complex128).view(-1, 2)
        torch.testing.assert_close(pairs[:, 1], rotation, rtol=0.0, atol=1e-7)
        torch.testing.assert_close(pairs[:, 0], rotation.conj(), rtol=0.0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rotate_is_a_complex_product(dtype):
    """Value and gradient; of bfloat16 rounded once."""
    x = torch.randn(2, 30, 3, 12, dtype=torch.float64, requires_grad=True)
    rope, dy = (
        rope_table((3, 2, 5), 12, None, torch.device("cpu")),
        torch.randn(2, 30, 3, 12, dtype=torch.float64),
    )
    rotation = torch.complex(rope[0, ..., ::2], rope[1, ..., 1::2]).to(torch.complex128)
    rounded = x.to(dtype)
    y = torch.view_as_real(torch.view_as_complex(rounded.double().unflatten(-1, (-1, 2))) * rotation).flatten(
        -2
    )
    z = rotate(rounded, rope)
    assert z.dtype == dtype
    tight = {"rtol": 0.0, "atol": 1e-15} if dtype == torch.float64 else {"rtol": 2**-8, "atol": 1e-6}
    torch.testing.assert_close(z.double(), y, **tight)
    (expected,) = torch.autograd.grad(y, x, dy.to(dtype).double(), retain_graph=True)
    (found,) = torch.autograd.grad(z, x, dy.to(dtype))
    torch.testing.assert_close(found, expected, rtol=tight["rtol"], atol=tight["atol"] or 1e-14)


@pytest.mark.parametrize(("grid", "tile"), TILINGS)
def test_sparse_attention_that_keeps_every_tile_is_dense(grid, tile):
    """In tile order, and with the gates as they start."""
    raster = randomized(Wan(TINY))
    tiled = Wan(TINY, tile=tile)
    unset = tiled.load_state_dict(raster.state_dict(), strict=False)
    assert all("to_gate_compress" in name for name in unset.missing_keys)
    assert not unset.unexpected_keys
    x_t, model_t, cond = inputs(TINY, (grid[0], 2 * grid[1], 2 * grid[2]))
    call = Call(attention=tiled.attention(x_t.shape, tiled.topk(x_t.shape, 0.0)))
    F, reference = tiled(x_t, model_t, cond, call).F, raster(x_t, model_t, cond).F
    assert relative(F, reference) <= 1e-5
    expected, found = gradients(raster, reference), gradients(tiled, F)
    assert max(relative(found[name], g) for name, g in expected.items()) <= 1e-4
    assert all(found[name].abs().max() > 0 for name in unset.missing_keys)


@pytest.mark.parametrize("shape", [(4, 5, 7, 10), (4, 5, 6, 9), (3, 5, 6, 10)])
def test_latent_that_does_not_fit(shape):
    with pytest.raises(ValueError, match=rf"{re.escape(str(list(shape)))}.*4 channels.*\[1, 2, 2\]"):
        Wan(TINY)(torch.zeros(1, *shape), torch.ones(1), Cond(torch.zeros(1, 7, 24)))


def test_random_weights_to_train_from_are_drawn_from_the_seed():
    nets = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        nets.append(Wan(TINY).start_from_scratch())
    first, again, other = (dict(net.named_parameters()) for net in nets)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    for i in range(TINY.num_layers):
        for name in ("to_q", "to_k"):
            bias = f"blocks.{i}.attn1.{name}.bias"
            assert 0.5 < first[bias].std() < 1.5
            assert not torch.equal(first[bias], other[bias])
        assert torch.all(first[f"blocks.{i}.scale_shift_table"][:, [2, 5]] == 1)


def test_checkpointing_changes_nothing():
    net = randomized(Wan(TINY))
    calls = []
    net.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    batch = inputs(TINY, LATENT)
    F = net(*batch).F
    expected = gradients(net, F)
    assert len(calls) == 1
    net.recompute_blocks("full")
    again = net(*batch).F
    assert torch.equal(again, F)
    assert all(torch.equal(g, expected[name]) for name, g in gradients(net, again).items())
    assert len(calls) == 3  # the block ran again in the backward
    with torch.no_grad():
        assert torch.equal(net(*batch).F, F)


def test_cast_rounds_what_diffusers_rounds(tmp_path):
    net = randomized(Wan(TINY))
    WanTransformer3DModel(**asdict(TINY)).save_pretrained(tmp_path)
    theirs = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    theirs.load_state_dict(net.state_dict())
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    batch = inputs(TINY, LATENT)
    exact = net(*batch).F

    masters = cast(net, torch.bfloat16)
    assert {n: p.dtype for n, p in net.named_parameters()} == {
        n: p.dtype for n, p in theirs.named_parameters()
    }
    assert masters.keys() == {name for name, p in net.named_parameters() if p.dtype == torch.bfloat16}
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name].to(p.dtype))
    for name, master in masters.items():
        assert master.dtype == torch.float32
        assert torch.equal(master, before[name])

    x_t, model_t, cond = batch
    reference = theirs(x_t.bfloat16(), model_t, cond.text.bfloat16()).sample
    assert relative(net(*batch).F.float(), exact) <= 1.1 * relative(reference.float(), exact)


def test_cast_to_float32_keeps_all():
    net = Wan(TINY)
    assert cast(net, torch.float32) == {}
    assert {p.dtype for p in net.parameters()} == {torch.float32}


@pytest.mark.parametrize("tile", [None, (2, 2, 2)])
def test_flops_equal_the_counter(tile):
    config = replace(TINY, out_channels=6)
    with torch.device("meta"):  # on the CPU attention is one op that the counter does not know
        net, x_t, model_t, text = (
            Wan(config, tile),
            torch.empty(3, 4, *LATENT),
            torch.empty(3),
            torch.empty(3, 7, 24),
        )
    call = Call(attention=net.attention(x_t.shape, net.topk(x_t.shape, 0.7)))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x_t, model_t, Cond(text), call)
    # the counter does not see into the fine stage of sparse attention: 6 of 18 tiles of 8 tokens kept, 3
    # heads of 12, two products, two blocks, batch 3
    fine = 0 if tile is None else 2 * 2 * (18 * 6 * 8 * 8) * 3 * 12 * 2 * 3
    assert net.flops(x_t.shape, 7, call) == counter.get_total_flops() + fine


class DeviceWatch(TorchDispatchMode):
    """Every op that touches the (meta) device: its name, and the types of the tensors there."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        there = [x for x in tensors if x.device.type == "meta"]
        if there:
            self.names.add(func.overloadpacket.__name__)
            self.dtypes |= {x.dtype for x in there}
        return out


class MetaRng:
    """Draws on the meta device; times on the host, as the real one."""

    def __init__(self, B: int) -> None:
        self.B = B

    def normal(self, shape: Sequence[int]) -> Tensor:
        return torch.empty(self.B, *shape, device="meta")

    def uniform(self) -> Tensor:
        return torch.rand(self.B, dtype=torch.float64)

    def shared_integer(self, high: int) -> int:
        return high - 1


@pytest.mark.parametrize(
    ("dtype", "tile", "guidance", "critic_guidance", "grad_frames"),
    [(torch.bfloat16, None, 6.0, 1.0, None), (torch.float32, (2, 2, 2), 1.0, 2.0, 2)],
)
def test_a_step_of_dmd_has_no_float64_and_no_sync(dtype, tile, guidance, critic_guidance, grad_frames):
    """On the device, that is: the meta device, which also refuses whatever would have to read a value."""
    config = DMD.Config(
        name="dmd", denoising_timesteps=(1000, 757, 522), guidance=guidance, critic_guidance=critic_guidance
    )
    method = DMD(
        config, FlowSchedule(5.0), rollout=RolloutConfig(grad_frames=grad_frames), critic=CriticConfig()
    )
    nets = {}
    for role in config.roles:
        with torch.device("meta"):
            net = Wan(TINY, tile)
        cast(net, dtype)
        net.recompute_blocks("full")
        nets[role] = Denoiser(net, FlowSchedule(5.0))
    text = torch.empty(3, 7, TINY.text_dim, device="meta")
    batch = Batch(Cond(text), Cond(text), (4, *LATENT))
    carry = {}
    with DeviceWatch() as watch:
        for phase in ("student", "critic"):
            for role, denoiser in nets.items():
                denoiser.learn(role == phase)
            loss, metrics = mlp.loss(method, phase, nets, batch, MetaRng(3), carry)
            loss.backward()
            assert all(value.device.type == "meta" for value in (loss, *metrics.values()))
            assert all(p.grad is not None for p in nets[phase].trainable.values())
    assert {"addmm", "native_layer_norm_backward"} <= watch.names  # forward and backward were watched
    assert torch.float64 not in watch.dtypes
    assert "_local_scalar_dense" not in watch.names
