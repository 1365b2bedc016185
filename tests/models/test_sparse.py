"""Video sparse attention in Wan and in a run: which roles have it, its gates, its sparsity at each step."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURE, make_config, reopen, write_wan
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdmd import train
from fastdmd.batch import Cond
from fastdmd.models import attention
from fastdmd.models.attention import VSAConfig
from fastdmd.models.net import Call
from fastdmd.models.wan import folder
from fastdmd.models.wan.net import Wan
from fastdmd.run import build
from fastdmd_kernels import vsa_reference

TILE = (2, 2, 2)
VSA = ("vsa={sparsity=0.5, tile=[2, 2, 2]}", "model.attention.student='vsa'")
ALL = (*VSA, "model.attention.teacher='vsa'", "model.attention.critic='vsa'")


def inputs(B: int = 2) -> tuple[torch.Tensor, torch.Tensor, Cond]:
    """Latents of 3 x 5 x 4 tokens: tiles cut by the edge in t and h."""
    return torch.randn(B, 3, 3, 10, 8), torch.full((B,), 500.0), Cond(torch.randn(B, 8, 32))


def called(net: Wan, batch: tuple[torch.Tensor, torch.Tensor, Cond], sparsity: float) -> torch.Tensor:
    """F at that sparsity."""
    return net(*batch, Call(attention=net.attention(batch[0].shape, net.topk(batch[0].shape, sparsity)))).F


def randomized(net: Wan) -> Wan:
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net


def test_a_sparse_wan_is_the_reference_in_every_block(monkeypatch):
    torch.manual_seed(0)
    net, batch = randomized(Wan(ARCHITECTURE, TILE)), inputs()
    F = called(net, batch, 0.6)
    kept = []

    def reference(q, k, v, gate, tiles, topk):
        kept.append((tiles.grid, tiles.n, topk))
        return vsa_reference(q, k, v, gate, tiles, topk)

    monkeypatch.setattr(attention, "video_sparse_attention", reference)
    torch.testing.assert_close(called(net, batch, 0.6), F)
    assert kept == [((3, 5, 4), 12, 5)]  # ceil(0.4 * 12) of 2 x 3 x 2 tiles, in the one block
    for sparsity in (0.0, 0.9):
        assert not torch.allclose(called(net, batch, sparsity), F, atol=1e-3)


def test_the_gate_is_read_from_the_modulated_tokens():
    """Zero: no coarse branch. It gets a gradient at zero, so it can leave it."""
    torch.manual_seed(0)
    net, batch = Wan(ARCHITECTURE, TILE), inputs()
    gate = net.blocks[0].attn1.to_gate_compress
    assert not gate.weight.any()
    assert not gate.bias.any()
    read = []
    for linear in (net.blocks[0].attn1.to_q, gate):
        linear.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    F = called(net, batch, 0.0)
    assert read[0] is read[1]
    F.square().mean().backward()
    assert gate.weight.grad.abs().max() > 0
    with torch.no_grad():
        gate.bias.fill_(1.0)
    assert not torch.allclose(called(net, batch, 0.0), F, atol=1e-4)


@pytest.mark.parametrize("dense", [None, attention.Dense()], ids=["unsaid", "said"])
def test_a_dense_call_of_a_network_with_gates_is_that_of_one_without(dense):
    """In raster order, bit for bit, before and after a sparse call."""
    torch.manual_seed(0)
    net, batch = randomized(Wan(ARCHITECTURE, TILE)), inputs()
    plain = Wan(ARCHITECTURE)
    plain.load_state_dict({name: x for name, x in net.state_dict().items() if "gate" not in name})
    assert torch.equal(net(*batch, Call(attention=dense)).F, plain(*batch).F)
    sparse = called(net, batch, 0.5)
    assert not torch.allclose(sparse, plain(*batch).F, atol=1e-3)
    assert torch.equal(net(*batch, Call(attention=dense)).F, plain(*batch).F)
    assert torch.equal(called(net, batch, 0.5), sparse)


@pytest.mark.parametrize("tile", [None, TILE], ids=["dense", "sparse"])
def test_networks_of_one_grid_and_device_have_tables_of_their_own(tile):
    """Fake tensors of one would stand in another's calls if a module kept them, by grid and device."""

    def tables(net: Wan) -> list[torch.Tensor]:
        geometry = net.geometry((3, 5, 4), torch.device("cpu"), tile is not None)
        return [geometry.rope, *(geometry.tiles.on(torch.device("cpu")) if geometry.tiles else ())]

    def output(net: Wan) -> torch.Tensor:
        batch = inputs()
        return called(net, batch, 0.5) if tile else net(*batch).F

    with FakeTensorMode():
        fake = Wan(ARCHITECTURE, tile)
        output(fake)
        assert {type(table).__name__ for table in tables(fake)} == {"FakeTensor"}
    first, second = Wan(ARCHITECTURE, tile), Wan(ARCHITECTURE, tile)
    for net in (first, second):
        assert output(net).isfinite().all()
    for one, other in zip(tables(first), tables(second), strict=True):
        assert type(one) is type(other) is torch.Tensor
        assert torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr()


@pytest.mark.parametrize("tile", [None, TILE])
def test_a_network_that_sampled_under_inference_mode_still_trains(tile):
    """Its tables are made at the first call, and autograd saves them in a later one."""
    net, batch = randomized(Wan(ARCHITECTURE, tile)), inputs()
    with torch.inference_mode():
        call = called(net, batch, 0.5) if tile else net(*batch).F
    F = called(net, batch, 0.5) if tile else net(*batch).F
    assert torch.equal(F, call)
    F.square().mean().backward()
    assert net.blocks[0].attn1.to_q.weight.grad.abs().max() > 0


def test_networks_share_no_tables():
    """What one makes on the meta device another never meets."""
    with torch.device("meta"):
        shapes = Wan(ARCHITECTURE, TILE)
        batch = inputs()
        called(shapes, batch, 0.5)
    assert {device.type for _, device, _ in shapes.geometries} == {"meta"}
    net = Wan(ARCHITECTURE, TILE)
    assert called(net, inputs(), 0.5).isfinite().all()
    assert {device.type for _, device, _ in net.geometries} == {"cpu"}


def test_cross_attention_stays_dense():
    assert not hasattr(Wan(ARCHITECTURE, TILE).blocks[0].attn2, "to_gate_compress")
    assert not [name for name in Wan(ARCHITECTURE).state_dict() if "gate" in name]


@pytest.mark.parametrize("name", ["blocks.0.attn1.to_gate_compress", "blocks.0.to_gate_compress"])
def test_gates_are_read_under_both_names_and_written_under_ours(tmp_path, name):
    write_wan(tmp_path)
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    D = ARCHITECTURE.width
    gate = {f"{name}.weight": torch.randn(D, D), f"{name}.bias": torch.randn(D)}
    save_file(load_file(file) | gate, file)
    net = folder.load(tmp_path, tile=TILE)
    found = net.blocks[0].attn1.to_gate_compress
    assert torch.equal(found.weight, gate[f"{name}.weight"])
    assert torch.equal(found.bias, gate[f"{name}.bias"])
    folder.save(tmp_path / "again", net.config, net.state_dict())
    again = load_file(tmp_path / "again" / "transformer" / file.name)
    assert torch.equal(again["blocks.0.attn1.to_gate_compress.weight"], found.weight)
    with pytest.raises(ValueError, match=r"gates of video sparse attention .*model.attention.*'vsa'"):
        folder.load(tmp_path)


def test_a_folder_without_gates_gives_zero_ones(tmp_path):
    net = folder.load(write_wan(tmp_path), tile=TILE)
    assert not net.blocks[0].attn1.to_gate_compress.weight.any()


def test_warm_up_rises_in_steps_to_the_sparsity():
    config = VSAConfig(sparsity=0.1, warmup_every=50)
    assert [round(config.sparsity_at(step), 6) for step in (0, 49, 50, 100, 149, 150, 199, 200, 9999)] == [
        *(0.0, 0.0, 0.03, 0.06, 0.06, 0.09, 0.09, 0.1, 0.1)
    ]
    assert VSAConfig(sparsity=0.8).sparsity_at(0) == 0.8


def test_each_role_has_the_attention_that_it_is_given(tmp_path):
    run = build(make_config(tmp_path, "dmd", *VSA))
    assert {role: denoiser.net.tile for role, denoiser in run.nets.items()} == {
        "student": TILE,
        "teacher": None,
        "critic": None,
    }
    assert {role: denoiser.sparsity for role, denoiser in run.nets.items()} == {
        "student": 0.5,
        "teacher": 0.0,
        "critic": 0.0,
    }


def test_a_run_warms_up_trains_its_gates_and_resumes_at_its_sparsity(tmp_path):
    config = make_config(
        tmp_path, "dmd", *ALL, "vsa.warmup_every=2", "vsa.warmup_step=0.2", "run.max_steps=5"
    )
    run = build(config)
    seen = []
    for _ in range(5):
        seen.append({denoiser.sparsity for denoiser in run.nets.values()})
        train.take_step(run)
    assert seen == [{0.0}, {0.0}, {0.2}, {0.2}, {0.4}]
    assert run.nets["student"].net.blocks[0].attn1.to_gate_compress.weight.abs().max() > 0

    done = train.train(config)
    reopened = reopen(done.folder)
    assert reopened.nets["student"].sparsity == done.nets["student"].sparsity == 0.4
    gate = "blocks.0.attn1.to_gate_compress.weight"
    masters = reopened.optimizers["student"].masters
    assert torch.equal(masters[gate], run.optimizers["student"].masters[gate])
