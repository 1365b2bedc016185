"""bfloat16 weights without masters: roundings are right on average, and a run goes on bit for bit."""

import pytest
import torch
from test_train import assert_same
from tiny import make_config
from torch import nn

from fastdmd import train
from fastdmd.optim import EMA, Config, EMAConfig, Optimizer
from fastdmd.plan.step import trace
from fastdmd.run import build
from fastdmd.stochastic import StochasticAdamW, rounded

BF16 = ("precision.compute='bf16'", "precision.master='bf16-sr'")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_number_becomes_one_of_its_neighbours_as_often_as_it_is_near():
    x = torch.tensor([1.0, 1 + 2**-9, 1 + 2**-7 * 0.75, -3.0 - 2**-6 * 0.25, 1e-20, 0.0])
    draws = torch.stack([rounded(x, seeded(i)).float() for i in range(4000)])
    spacing = torch.tensor([2**-7, 2**-7, 2**-7, 2**-6, 0, 0])
    down, up = draws.abs().amin(0), draws.abs().amax(0)
    assert draws[:, 0].eq(1).all()  # what bfloat16 has stays
    assert draws[:, 5].eq(0).all()
    torch.testing.assert_close((up - down)[1:4], spacing[1:4])
    torch.testing.assert_close(draws.mean(0)[1:4], x[1:4], rtol=0, atol=4 * 0.5 * 2**-6 / 4000**0.5)
    shares = (draws[:, 1:4].abs() == up[1:4]).float().mean(0)
    torch.testing.assert_close(shares, torch.tensor([0.25, 0.75, 0.25]), rtol=0, atol=0.03)


def weights(seed: int | None, lr: float = 1e-5, weight_decay: float = 0.0) -> tuple[nn.Linear, Optimizer]:
    torch.manual_seed(0)
    net = nn.Linear(64, 64, bias=False)
    master = net.weight.detach().clone()
    net.bfloat16()
    masters = {"weight": master} if seed is None else {}
    config = Config(lr=lr, weight_decay=weight_decay)
    return net, Optimizer({"weight": net.weight}, config, 400, masters, seed)


def step(net: nn.Linear, optimizer: Optimizer, now: int) -> None:
    net.weight.grad = None
    (net.weight * 1.0).sum().backward()
    optimizer.step(now)


def test_steps_far_below_the_spacing_add_up():
    """300 of 1e-5 move weights of 0.1, whose spacing is 5e-4, by 3e-3 on average."""
    net, optimizer = weights(seed=1)
    before = net.weight.detach().float().clone()
    for now in range(300):
        step(net, optimizer, now)
    assert isinstance(optimizer.adamw, StochasticAdamW)
    assert float((net.weight.detach().float() - before).mean()) == pytest.approx(-300e-5, rel=0.02)
    assert net.weight.dtype == torch.bfloat16
    assert optimizer.masters["weight"] is net.weight
    moments = optimizer.moments()
    assert moments["exp_avg.weight"].dtype == moments["exp_avg_sq.weight"].dtype == torch.float32
    assert moments["step.weight"] == 300


def test_an_update_is_adamw_s_to_one_spacing():
    (net, ours), (other, theirs) = weights(1, 0.02, 0.1), weights(None, 0.02, 0.1)
    start = net.weight.detach().float()
    theirs.masters["weight"].copy_(start)
    generator = seeded(5)
    grad = torch.randn(64, 64, generator=generator)
    for optimizer in (ours, theirs):
        optimizer.accumulate("weight", grad)
        optimizer.step(0)
    exact = theirs.masters["weight"]
    assert ((net.weight.float() - exact).abs() <= exact.abs() * 2**-7 + 1e-9).all()
    assert (net.weight.float() - exact).mean().abs() < 2e-5
    assert not torch.equal(net.weight, other.weight)


def test_roundings_have_an_address():
    """The same seed and step round alike; another of either does not."""
    found = {}
    for seed, now in ((1, 0), (1, 0), (2, 0), (1, 1)):
        net, optimizer = weights(seed)
        step(net, optimizer, now)
        found.setdefault((seed, now), []).append(net.weight.detach().clone())
    assert torch.equal(*found[1, 0])
    assert not torch.equal(found[1, 0][0], found[2, 0][0])
    assert not torch.equal(found[1, 0][0], found[1, 1][0])


def test_micro_batches_add_up_in_float32():
    net, optimizer = weights(seed=1)
    exact = torch.zeros(64, 64, dtype=torch.float64)
    generator = seeded(3)
    for _ in range(64):
        x = (torch.randn(32, 64, generator=generator) + 0.5).bfloat16()
        dy = (torch.randn(32, 64, generator=generator) + 0.5).bfloat16()
        net(x).backward(dy)
        exact += dy.double().t() @ x.double()
    grad = optimizer.grads()["weight"]
    assert grad.dtype == torch.float32
    assert (grad.double() - exact).norm() / exact.norm() < 2.5e-3  # in bfloat16 7.8e-3
    norm = optimizer.clip()
    torch.testing.assert_close(norm, exact.norm().float(), rtol=1e-2, atol=0)


def test_an_average_of_bfloat16_weights_is_float32():
    masters = {"a": torch.tensor([1.0]).bfloat16(), "b": torch.tensor([1.0])}
    ema = EMA(masters, EMAConfig(decay=0.99))
    for value in masters.values():
        value.fill_(2.0)
    for now in range(1, 3):
        ema.update(now)
    for shadow in ema.shadow.values():
        torch.testing.assert_close(shadow, torch.tensor([2 - 0.99**2]))


@pytest.mark.parametrize("method", ["dmd", "dmd_lora"])
def test_a_run_without_masters_goes_on_bit_for_bit(tmp_path, method):
    keys = (*BF16, "run.max_steps=4", "validation.teacher_reference=false")
    straight = train.train(make_config(tmp_path / "a", method, *keys))
    train.train(make_config(tmp_path / "b", method, *BF16, "run.max_steps=2", *keys[3:]))
    again = train.train(make_config(tmp_path / "b", method, *keys))
    for role, optimizer in straight.optimizers.items():
        assert_same(optimizer.masters, again.optimizers[role].masters)
        assert_same(optimizer.moments(), again.optimizers[role].moments())
        assert {m.dtype for m in optimizer.masters.values()} <= {torch.bfloat16, torch.float32}
        assert torch.bfloat16 in {m.dtype for m in optimizer.masters.values()}
    other = straight.optimizers["critic"].adamw, straight.optimizers["student"].adamw
    assert other[0].seed != other[1].seed
    assert_same(straight.ema.shadow, again.ema.shadow)
    assert {m.dtype for m in straight.ema.shadow.values()} == {torch.float32}


def test_a_plan_has_no_masters(tmp_path):
    """A parameter that is trained takes 2 bytes and its moments 8, where it took 14."""
    fixed = {}
    for name, keys in (("fp32", BF16[:1]), ("bf16", BF16)):
        config = make_config(tmp_path / name, "dmd", *keys)
        fixed[name] = trace(config, None).fixed
    assert [key for key in fixed["fp32"] if key.startswith("masters")] == [
        "masters, student",
        "masters, critic",
    ]
    assert not [key for key in fixed["bf16"] if key.startswith("masters")]
    for key in ("moments, student", "weights, student"):
        assert fixed["fp32"][key] == fixed["bf16"][key]


def test_masters_are_not_read_either(tmp_path):
    run = build(make_config(tmp_path, "dmd", *BF16))
    for role in ("student", "critic"):
        optimizer = run.optimizers[role]
        assert all(optimizer.masters[name] is p for name, p in optimizer.params.items())
