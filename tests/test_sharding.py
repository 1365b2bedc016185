"""Every method under FSDP2, on one gloo process: a network has one door, which is what FSDP2 hooks."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_capture import CASES, steps
from tiny import ARCHITECTURE, make_config
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from fastdmd.batch import Cond
from fastdmd.models.lora import own_parameters
from fastdmd.models.net import Net, cast
from fastdmd.models.wan.net import Wan
from fastdmd.run import Run, build

pytestmark = pytest.mark.dist
Found = list[tuple[str, Tensor, dict[str, Tensor]]]  # phase, loss, gradients


@pytest.fixture(scope="module")
def mesh(tmp_path_factory) -> Iterator[DeviceMesh]:
    store = tmp_path_factory.mktemp("dist") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def shard(net: Net, mesh: DeviceMesh, **options: Any) -> None:
    """Shard a network by its blocks.

    The root is resharded after its forward too: what it keeps gathered would have the `requires_grad` of the
    phase before, and get no gradient.
    """
    for block in net.blocks:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(net, mesh=mesh, reshard_after_forward=True, **options)


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def two_steps(run: Run) -> Found:
    found: Found = []
    for _, phase, batch, draws, carry in steps(run, 2):
        loss, _ = run.method.loss(phase, run.nets, batch, draws, carry)
        loss.backward()
        grads = {}
        for role in run.method.trains(phase):
            for name, p in run.nets[role].trainable.items():
                if p.grad is not None:
                    grads[f"{role}.{name}"] = whole(p.grad).clone()
                    p.grad = None
        found.append((phase, loss.detach(), grads))
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_sharded_step_has_the_gradients_of_the_whole(tmp_path, mesh, case):
    """To 1e-5 in relative norm, over two steps of every phase."""
    config = make_config(tmp_path, *CASES[case])
    expected, run = two_steps(build(config)), build(config)
    for net in {denoiser.net for denoiser in run.nets.values() if isinstance(denoiser.net, Net)}:
        shard(net, mesh)
        assert all(isinstance(p, DTensor) for p in net.parameters())
    for denoiser in run.nets.values():  # after sharding: parameters from before get no gradient
        if denoiser.role is not None:
            denoiser.trainable = own_parameters(denoiser.net, denoiser.role)
        elif denoiser.trainable and isinstance(denoiser.net, Net):
            denoiser.trainable = dict(denoiser.net.named_parameters())
    for (phase, loss, grads), (_, exact, wanted) in zip(two_steps(run), expected, strict=True):
        torch.testing.assert_close(loss, exact, rtol=1e-5, atol=0)
        assert grads.keys() == wanted.keys(), phase
        far = torch.stack([(grads[name] - wanted[name]).norm() for name in wanted]).norm()
        assert far <= 1e-5 * torch.stack([x.norm() for x in wanted.values()]).norm()


def test_what_is_kept_in_float32_is_used_in_float32(mesh):
    """Compare float32 shards under a policy without those parameters to the whole network rounded."""
    torch.manual_seed(0)
    net, plain = Wan(ARCHITECTURE), Wan(ARCHITECTURE)
    plain.load_state_dict(net.state_dict())
    cast(plain, torch.bfloat16)
    x_t, model_t, cond = torch.randn(2, 3, 3, 8, 8), torch.tensor([757.0, 522.0]), Cond(torch.randn(2, 5, 32))
    kept = {p for name, p in net.named_parameters() if net.keeps_float32(name)}
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    shard(net, mesh, mp_policy=policy, ignored_params=kept)
    used: dict[str, torch.dtype] = {}
    for name, layer in net.named_modules():
        layer.register_forward_hook(
            lambda layer, *_, name=name: used.update(
                {f"{name}.{n}": p.dtype for n, p in layer.named_parameters(recurse=False)}
            )
        )
    F, exact = net(x_t, model_t, cond).F, plain(x_t, model_t, cond).F
    assert torch.equal(F, exact)
    for name, dtype in used.items():
        assert (dtype == torch.float32) == net.keeps_float32(name), name
    F.float().square().mean().backward()
    assert {whole(p.grad).dtype for p in net.parameters() if p.grad is not None} == {torch.float32}
