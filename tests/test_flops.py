"""FLOPs of a step, counted from shapes, against the calls of a step and torch's own counter."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlp
import pytest
import torch
from tiny import ARCHITECTURE, DETAIL, make_config
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastdmd import train
from fastdmd.batch import Cond
from fastdmd.denoiser import Denoiser
from fastdmd.flops import Shapes, step_flops
from fastdmd.models.net import PLAIN, Net, Out
from fastdmd.models.wan.net import Wan
from fastdmd.run import build
from fastdmd.schedule import FlowSchedule, coeffs
from fastdmd_kernels.attention import use

CPU = torch.device("cpu")
SCHEDULE = FlowSchedule(3.0)


def test_a_call_is_counted_with_its_backward():
    """A forward, one more where inputs want a gradient, one more where parameters do."""
    batch, t = mlp.make_batch(), torch.full((4,), 0.6, dtype=torch.float64)
    x_t, net = batch.x0, mlp.MLP(0)
    c, forward = coeffs(SCHEDULE, t, x_t), net.flops(x_t.shape, mlp.TOKENS)

    def cost(x: Tensor, learns: bool) -> float:
        counted = Shapes(net, learns, CPU)
        F = Denoiser(counted, SCHEDULE).raw(x, c, batch.cond)
        assert (F.shape, F.dtype) == (x.shape, torch.float32)
        return sum(counted.count) / forward

    assert cost(x_t, learns=True) == 3
    assert cost(x_t, learns=False) == 1
    assert cost(x_t.clone().requires_grad_(), learns=False) == 2
    assert cost(x_t.clone().requires_grad_(), learns=True) == 3
    with torch.no_grad():
        assert cost(x_t, learns=True) == 1
    both = Shapes(net, False, CPU)
    Denoiser(both, SCHEDULE).raw_pair(x_t, c, batch.cond, batch.uncond)
    assert sum(both.count) == 2 * forward
    assert not net.calls


@pytest.mark.parametrize("learns", [True, False])
def test_a_backward_is_what_torch_counts(learns):
    """Attention's has a gradient for both sides of its products, whether or not weights learn."""
    net = Wan(replace(ARCHITECTURE, num_layers=2)).requires_grad_(learns)
    x_t, t = torch.randn(1, 3, 8, 16, 16).requires_grad_(), torch.full((1,), 500.0)
    cond = Cond(torch.randn(1, 2, 32))  # two tokens of text, which gets no gradient
    with use("math"):
        F = net(x_t, t, cond).F
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(F.sum(), [x_t, *(p for p in net.parameters() if learns)])
    counted = Shapes(net, learns, CPU)
    counted(x_t, t, cond)
    assert counted.count.backward == pytest.approx(counter.get_total_flops(), rel=0.01)


@dataclass
class Cost:
    """What one call of a network cost, by the network's own rules."""

    forward: int
    backward: int  # if one comes to it
    came: bool = False


class Calls:
    """Watch the calls that networks make, and the backwards that come to them."""

    def __init__(self, nets: Mapping[str, Denoiser]) -> None:
        self.made: list[Cost] = []
        self.networks = dict.fromkeys(d.net for d in nets.values() if isinstance(d.net, Net))
        for net in self.networks:
            net.register_forward_pre_hook(self.begin)
            net.register_forward_hook(self.end)

    def begin(self, net: Any, args: tuple[Any, ...]) -> None:
        """Count before the call, which may write to a cache."""
        x_t, _, cond, call = args
        forward = net.flops(x_t.shape, cond.text.shape[1], call)
        # inputs, and parameters, of which adapters are few
        whole = any(p.requires_grad for name, p in net.named_parameters() if ".lora_" not in name)
        attention = net.attention_flops(x_t.shape, cond.text.shape[1], call)
        self.made.append(Cost(forward, forward + (forward if whole else attention)))

    def end(self, net: Any, args: tuple[Any, ...], out: Out) -> None:
        cost = self.made[-1]

        def mark(_: Tensor) -> None:
            cost.came = True

        for made in (out.F, *out.maps):
            if made.requires_grad:
                made.register_hook(mark)

    def flops(self) -> int:
        return sum(cost.forward + cost.came * cost.backward for cost in self.made)


RUNS = [
    ("flow", ()),
    ("dmd", ()),
    ("dmd", ("run.grad_accum=2", "method.critic_guidance=2.0")),
    ("dmd", ("method.gan_weight=0.1", "method.gan_layers=[0]", "optim.disc.lr=1e-3")),
    ("causal_sid", ()),
    ("causal_sid", ("rollout.grad_frames=2", "rollout.context_noise=0.1", "memory.checkpointing='full'")),
    ("causal_flow", ()),
    ("dcm", ()),
    ("dcm", DETAIL),
    ("lcm", ()),
    ("lcm_lora", ()),
    ("sdxl_lcm", ()),
]


@pytest.mark.parametrize(("method", "overrides"), RUNS, ids=str)
def test_a_step_costs_what_its_calls_do(tmp_path, method, overrides):
    """Foreseen without a call, and the same in steps with different draws and phases."""
    run = build(make_config(tmp_path, method, *overrides))
    calls = Calls(run.nets)
    for _ in range(4):
        foreseen = step_flops(run)
        assert calls.made == []
        train.take_step(run)
        assert foreseen == calls.flops() > 0
        assert any(cost.came for cost in calls.made)
        calls.made.clear()


def test_a_forward_of_wan_costs_what_torch_counts():
    config = replace(ARCHITECTURE, num_layers=2, patch_size=(1, 2, 1), out_channels=5)
    with torch.device("meta"):  # on the CPU attention is one op that the counter does not know
        net, x_t, model_t = Wan(config), torch.empty(2, 3, 3, 4, 6), torch.empty(2)
        cond = Cond(torch.empty(2, 7, config.text_dim))
    counted = Shapes(net, False, torch.device("meta"))
    counted(x_t, model_t, cond, PLAIN)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x_t, model_t, cond, PLAIN)
    assert sum(counted.count) == counter.get_total_flops() > 0
