"""Every draw has an address: (seed, step, stream, sample)."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fastdmd.rng import Rng, seed_of

DRAWS: dict[str, Callable[[Rng], Tensor]] = {
    "normal": lambda rng: rng.normal((3, 50)),
    "uniform": lambda rng: torch.stack([rng.uniform() for _ in range(20)], dim=1),
    "integers": lambda rng: rng.integers(1000, (20,)),
    "shared_integer": lambda rng: torch.tensor([rng.shared_integer(1000) for _ in range(20)]),
}


def make(seed: int = 0, step: int = 7, stream: str = "student0", samples: range = range(8)) -> Rng:
    return Rng(seed, step, stream, samples, "cpu")


@pytest.mark.parametrize("name", ["normal", "uniform", "integers"])
def test_a_sample_draws_the_same_however_the_batch_is_split(name):
    draw = DRAWS[name]
    whole = draw(make())
    for cuts in ([0, 4, 8], [0, 1, 3, 8]):
        parts = [draw(make(samples=range(a, b))) for a, b in pairwise(cuts)]
        assert torch.equal(torch.cat(parts), whole)
    assert len(whole.unique(dim=0)) == 8


def test_shared_draws_are_the_same_for_all_samples():
    assert torch.equal(DRAWS["shared_integer"](make()), DRAWS["shared_integer"](make(samples=range(8, 10))))


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_addresses_differ_and_repeat(draw):
    first, torch_state = draw(make()), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(draw(make()), first)
    torch.set_rng_state(torch_state)
    for other in (make(seed=1), make(step=8), make(stream="critic1"), make(stream="student1")):
        assert not torch.equal(draw(other), first)
    rng = make()
    assert not torch.equal(draw(rng), draw(rng))
    assert torch.equal(torch.get_rng_state(), torch_state)  # the global generator is not used


def test_kinds_of_draws_do_not_move_each_other():
    """Draw noise on the device, times on the host: neither depends on how many of the other were drawn."""
    one, other = make(), make()
    one.normal((5,))
    one.shared_integer(4)
    assert torch.equal(one.uniform(), other.uniform())
    assert torch.equal(make().normal((5,)), other.normal((5,)))


def test_normal_is_standard():
    x = make(samples=range(64)).normal((4096,))
    assert x.dtype == torch.float32
    n = x.numel() ** 0.5
    moments = torch.stack([x.mean(), x.square().mean() - 1, x.pow(3).mean(), x.pow(4).mean() - 3])
    assert (moments.abs() * n < 4 * torch.tensor([1, 2, 15, 96]).sqrt()).all()
    correlation = torch.corrcoef(x) - torch.eye(64)
    assert correlation.abs().max() < 5 / 4096**0.5


def test_uniform_fills_the_unit_interval_in_float64():
    u = make(samples=range(2000)).uniform()
    assert u.dtype == torch.float64
    assert 0 <= u.min() < u.max() < 1
    steps = torch.linspace(0, 1, 2000, dtype=torch.float64)
    assert (u.sort().values - steps).abs().max() < 1.63 / 2000**0.5  # Kolmogorov, 1 %
    assert (u * 2**32 % 1 != 0).any()


def test_integers_are_uniform():
    counts = make(samples=range(50)).integers(4, (40,)).unique(return_counts=True)
    assert counts[0].tolist() == [0, 1, 2, 3]
    assert ((counts[1] - 500).abs() < 4 * (2000 * 3 / 16) ** 0.5).all()


def test_seeds_have_the_bits_that_a_device_s_generator_keeps():
    """A CPU's Mersenne Twister is seeded with 32 bits, a GPU's Philox has a key of 64."""
    addresses = [(0, step, "student0", sample, "noise") for step in range(64) for sample in range(8)]
    cpu, cuda = ([seed_of(device, *address) for address in addresses] for device in ("cpu", "cuda"))
    assert [seed % 2**32 for seed in cuda] == cpu
    assert 2**63 < max(cuda) < 2**64
    assert len(set(cpu)) == len(set(cuda)) == len(addresses)
    draws = [torch.rand(4, generator=torch.Generator().manual_seed(seed)) for seed in (cpu[0], cuda[0])]
    assert torch.equal(*draws)  # the CPU would drop the other 32
