"""Roles that share one frozen base: what each owns, what it computes, and what a step changes."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny import ARCHITECTURE, make_config, manifest, reopen, write_toml, write_wan
from torch import Tensor, nn

from fastdmd import config as configs
from fastdmd import train
from fastdmd.config import Config
from fastdmd.evaluation import evaluate
from fastdmd.export import export_student
from fastdmd.models.lora import merged
from fastdmd.models.net import Call
from fastdmd.models.wan import folder
from fastdmd.models.wan.net import Wan
from fastdmd.rng import Rng
from fastdmd.roles import roles_of
from fastdmd.run import Run, build

VSA = ("vsa={sparsity=0.5, tile=[2, 2, 2]}", "model.attention.student='vsa'")
ALL = ("student", "teacher", "critic")


def networks(config: Config) -> dict[str, str]:
    return {name: role.network for name, role in roles_of(config).items()}


def open_up(run: Run, *roles: str) -> None:
    """Give the adapters of some roles values that do something."""
    generator = torch.Generator().manual_seed(3)
    for role in roles:
        for name, p in run.nets[role].trainable.items():
            if ".lora_B." in name:
                p.data.copy_(torch.randn(p.shape, generator=generator) * 0.3)


def raw(run: Run, role: str) -> Tensor:
    """Return F of a role on a fixed input."""
    batch = run.world.batch(Rng(0, 0, "data", range(2), "cpu"))
    x_t = torch.randn(2, *run.world.latent_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return run.nets[role].features(x_t, torch.tensor([900.0, 300.0]), batch.cond, ())[0]


def whole(run: Run) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in run.nets["teacher"].net.named_parameters()}


@pytest.mark.parametrize("method", ["dmd_lora", "sdxl_dmd_lora"])
def test_three_roles_start_on_one_network_as_the_teacher(tmp_path, method):
    config = make_config(tmp_path, method)
    assert networks(config) == dict.fromkeys(ALL, "student")
    run = build(config)
    assert len({run.nets[role].net for role in ALL}) == 1
    assert torch.equal(raw(run, "student"), raw(run, "teacher"))
    assert torch.equal(raw(run, "critic"), raw(run, "teacher"))


def test_roles_share_where_none_trains_the_weights(tmp_path):
    path = write_toml(tmp_path, "dmd_lora")
    write_wan(tmp_path / "other")

    def shared(*overrides: str) -> dict[str, str]:
        return networks(configs.load(path, overrides))

    assert shared("student.train='full'") == {"student": "student", "teacher": "teacher", "critic": "teacher"}
    assert shared("critic.train='full'") == {"student": "student", "teacher": "student", "critic": "critic"}
    other = f"'{tmp_path}/other'"
    assert shared(f"teacher.path={other}")["teacher"] == "teacher"
    assert shared(f"student.path={other}") == {
        "student": "student",
        "teacher": "teacher",
        "critic": "teacher",
    }
    assert shared(f"critic.path={other}")["critic"] == "critic"
    assert shared(*VSA) == dict.fromkeys(ALL, "student")
    causal = ("rollout={mode='causal', frames_per_block=1}", "data.frames=4")
    assert shared(*causal) == dict.fromkeys(ALL, "student")
    # a network that goes block by block has no sparse attention
    apart = shared(*causal, "vsa={sparsity=0.5, tile=[2, 2, 2]}", "model.attention.critic='vsa'")
    assert apart == {"student": "student", "teacher": "student", "critic": "critic"}


def test_a_student_trained_whole_shares_nothing(tmp_path):
    config = make_config(tmp_path, "dmd")
    assert networks(config) == {role: role for role in ALL}


@pytest.mark.parametrize(
    "overrides", [(), ("memory.checkpointing='full'",), VSA, ("precision.compute='bf16'",)]
)
def test_a_step_moves_the_adapters_of_its_phases_only(tmp_path, overrides):
    run = build(make_config(tmp_path, "dmd_lora", *overrides))
    for _ in range(4):
        before, phases = whole(run), run.method.phases(run.step)
        train.take_step(run)
        moved = {name for name, x in whole(run).items() if not torch.equal(x, before[name])}
        assert all(any(f".{role}." in name for role in phases) for name in moved)
        for role in phases:
            assert [name for name in moved if f".lora_B.{role}." in name], (phases, role)


def gradients(run: Run, phase: str) -> dict[str, Tensor]:
    """Return what a phase's loss gives to what it trains."""
    batch = run.world.batch(Rng(0, 0, "data", range(2), "cpu"))
    draws = run.method.draw(phase, Rng(0, 0, f"{phase}0", range(2), "cpu"), batch.latent_shape, {})
    for role, denoiser in run.nets.items():
        denoiser.learn(role == phase)
        denoiser.net.zero_grad(set_to_none=True)
    loss, _ = run.method.loss(phase, run.nets, batch, draws, {})
    loss.backward()
    return {name: p.grad for name, p in run.nets[phase].trainable.items() if p.grad is not None}


@pytest.mark.parametrize("phase", ["student", "critic"])
@pytest.mark.parametrize("method", ["dmd", "sid"])
def test_gradients_of_adapters_are_those_of_the_weights_they_change(tmp_path, method, phase):
    """For W + s B A that of B is s G A^T and that of A is s B^T G, G that of a network trained whole."""
    name = f"method.name='{method}'"
    run = build(make_config(tmp_path, "dmd_lora", name, "memory.checkpointing='full'"))
    open_up(run, "student", "critic")
    for role in ("student", "critic"):
        folder.save(tmp_path / role, ARCHITECTURE, merged(run.nets[role].net, role))
    paths = [f"{role}.path='{tmp_path}/{role}'" for role in ("student", "critic")]
    plain = build(make_config(tmp_path / "whole", "dmd", name, *paths))
    found, G = gradients(run, phase), gradients(plain, phase)
    scale = 4.0 / 2
    layers = {name.partition(".lora_")[0] for name in found}
    assert len(found) == 2 * len(layers) == len(run.nets[phase].trainable)
    for layer in layers:
        A, B = (run.nets[phase].trainable[f"{layer}.lora_{side}.weight"] for side in "AB")
        G_layer = G[f"{layer}.weight"]
        size = float(G_layer.norm())
        torch.testing.assert_close(
            found[f"{layer}.lora_B.weight"], scale * G_layer @ A.T, rtol=1e-3, atol=1e-5 * size
        )
        torch.testing.assert_close(
            found[f"{layer}.lora_A.weight"], scale * B.T @ G_layer, rtol=1e-3, atol=1e-5 * size
        )


def test_the_gates_of_a_sparse_student_are_adapters_over_zeros(tmp_path):
    run = build(make_config(tmp_path, "dmd_lora", *VSA))
    net = run.nets["student"].net
    gates = [name for name in run.nets["student"].trainable if "to_gate_compress" in name]
    assert sorted(gates) == [f"blocks.0.attn1.to_gate_compress.lora_{side}.weight" for side in "AB"]
    assert not [name for name in run.nets["critic"].trainable if "to_gate_compress" in name]
    assert not [n for n, _ in net.named_parameters() if "to_gate_compress" in n and ".lora_" not in n]
    plain = build(make_config(tmp_path / "dense", "dmd_lora"))
    assert torch.equal(raw(run, "teacher"), raw(plain, "teacher"))
    assert torch.equal(raw(run, "critic"), raw(plain, "critic"))
    run.nets["student"].keep(0.0, run.world.latent_shape)
    torch.testing.assert_close(raw(run, "student"), raw(plain, "student"))  # all tiles, and a gate of zero
    open_up(run, "student")
    assert not torch.allclose(raw(run, "student"), raw(plain, "student"), atol=1e-2)


def test_a_sparse_student_is_exported_with_its_gates(tmp_path):
    run = train.train(make_config(tmp_path, "dmd_lora", *VSA, "run.max_steps=2", "optim.student.lr=0.1"))
    export_student(run.folder, tmp_path / "out")
    net = folder.load(tmp_path / "out", (2, 2, 2))
    shape = (2, *run.world.latent_shape)
    batch = run.world.batch(Rng(0, 0, "data", range(2), "cpu"))
    x_t, t = torch.randn(shape), torch.tensor([900.0, 300.0])
    gate = net.get_parameter("blocks.0.attn1.to_gate_compress.weight")
    assert float(gate.abs().max()) > 0
    student = run.nets["student"]
    call = student.features
    with torch.no_grad(), evaluate.validation_weights(run):
        want = call(x_t, t, batch.cond, ())[0]
        attention = net.attention(shape, net.topk(shape, student.sparsity))
        torch.testing.assert_close(
            net(x_t, t, batch.cond, Call(attention=attention)).F, want, rtol=1e-4, atol=1e-4
        )


def test_a_dense_role_refuses_a_folder_with_gates(tmp_path):
    path = write_toml(tmp_path, "dmd_lora")
    net = Wan(ARCHITECTURE, (2, 2, 2))
    nn.init.ones_(net.get_parameter("blocks.0.attn1.to_gate_compress.weight"))
    folder.save(tmp_path / "wan", ARCHITECTURE, net.state_dict())
    with pytest.raises(ValueError, match=r"has gates .*; set model.attention.teacher to 'vsa'"):
        build(configs.load(path, VSA))
    every = [*VSA, "model.attention.teacher='vsa'", "model.attention.critic='vsa'"]
    run = build(configs.load(path, every))
    name = "blocks.0.attn1.to_gate_compress.base_layer.weight"
    assert run.nets["student"].net.get_parameter(name).mean() == 1


def test_a_checkpoint_holds_adapters_only_and_a_run_goes_on_from_it(tmp_path):
    config = make_config(tmp_path, "dmd_lora", "run.max_steps=4")
    run = train.train(config)
    saved = sorted((run.folder / "checkpoints").iterdir())[-1]
    for role in ("student", "critic"):
        assert all(".lora_" in name for name in load_file(saved / f"{role}.safetensors"))
    halves = make_config(tmp_path / "halves", "dmd_lora", "run.max_steps=2", f"model.path='{tmp_path}/wan'")
    train.train(halves)
    longer = replace(halves, run=replace(halves.run, max_steps=4))
    assert manifest(train.train(longer).folder)["files"] == manifest(run.folder)["files"]
    again = reopen(run.folder)
    for role in ALL:
        assert torch.equal(raw(again, role), raw(run, role)), role


def test_a_student_starts_from_a_file_of_adapters(tmp_path):
    """And its critic from nothing: it begins as the teacher."""
    run = train.train(make_config(tmp_path, "dmd_lora", "run.max_steps=2", "optim.student.lr=0.1"))
    export_student(run.folder, tmp_path / "out")
    file = tmp_path / "out" / "pytorch_lora_weights.safetensors"
    new = build(make_config(tmp_path / "new", "dmd_lora", f"lora.path='{file}'", "lora.alpha=7.0"))
    with evaluate.validation_weights(run):
        torch.testing.assert_close(raw(new, "student"), raw(run, "student"), rtol=1e-5, atol=1e-6)
    assert torch.equal(raw(new, "critic"), raw(new, "teacher"))
    assert not torch.allclose(raw(new, "student"), raw(new, "teacher"), atol=1e-3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora.path='/nowhere'"], "lora.path: '/nowhere' is no file; name a .safetensors file of adapters"),
        (
            ["lora.path='/nowhere'", "student.train='full'"],
            "lora.path: the student has no adapters; set student.train = 'lora', or remove the key",
        ),
        (
            ["student.train='full'", "critic.train='full'"],
            "lora: no role uses it; set student.train = 'lora'",
        ),
    ],
)
def test_what_the_table_of_adapters_refuses(tmp_path, overrides, message):
    with pytest.raises(ValueError, match="lora") as e:
        make_config(tmp_path, "dmd_lora", *overrides)
    assert message in str(e.value)


def test_a_critic_alone_can_have_adapters(tmp_path):
    run = build(make_config(tmp_path, "dmd_lora", "student.train='full'"))
    assert set(run.nets["student"].trainable) == {n for n, _ in run.nets["student"].net.named_parameters()}
    assert all(".lora_" in name for name in run.nets["critic"].trainable)
    assert json.dumps([train.take_step(run) for _ in range(2)])


def test_guidance_in_two_calls_is_that_of_one(tmp_path):
    """Each of half the samples; and gradients of SiD pass through both."""
    found, calls = {}, {}
    for how in ("one_call", "two_calls"):
        keys = ("method.name='sid'", "method.critic_guidance=2.0", f"memory.guidance='{how}'")
        run = build(make_config(tmp_path / how, "dmd_lora", *keys))
        open_up(run, "student", "critic")
        calls[how] = []
        run.nets["teacher"].net.register_forward_pre_hook(
            lambda net, args, seen=calls[how]: seen.append((args[3].role, len(args[0])))
        )
        found[how] = gradients(run, "student")
    [(_, n)] = {call for call in calls["one_call"] if call[0] is None}
    assert [call for call in calls["two_calls"] if call[0] is None] == 2 * [(None, n // 2)]
    assert [call for call in calls["two_calls"] if call[0] == "critic"] == 2 * [("critic", n // 2)]
    far = torch.stack([(found["two_calls"][name] - x).norm() for name, x in found["one_call"].items()]).norm()
    assert far <= 1e-5 * torch.stack([x.norm() for x in found["one_call"].values()]).norm()
