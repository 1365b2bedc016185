"""Reading a network's weights: how much memory it takes, and what becomes of each tensor."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import write_wan
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdmd.models import component
from fastdmd.models.net import cast
from fastdmd.models.wan import folder
from fastdmd.models.wan.layers import WanConfig
from fastdmd.models.wan.net import Wan

WIDE = WanConfig(
    num_attention_heads=8, attention_head_dim=64, num_layers=4, ffn_dim=1024, in_channels=16, out_channels=16,
    text_dim=64, freq_dim=32,
)  # fmt: skip


class Live(TorchDispatchMode):
    """The bytes of all storages that were made under it and are still there, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, int] = {}
        self.peak = 0

    def add(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if x.is_meta or key in self.known:
            return
        self.known[key] = storage.nbytes()
        weakref.finalize(storage, self.known.pop, key, None)
        self.peak = max(self.peak, sum(self.known.values()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.add(x)
        return out


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return write_wan(tmp_path_factory.mktemp("wide"), WIDE)


def read(path: Path, trained: bool) -> tuple[Wan, dict[str, Tensor], Live]:
    """Return a network in bfloat16, its masters, and what reading took, each tensor of the file included."""
    with torch.device("meta"):
        net = Wan(WIDE)
    weights, live = folder.open_weights(path, net), Live()

    class Counted(component.Weights):
        def __iter__(self):
            for name, value in super().__iter__():
                live.add(value)
                yield name, value

    names = frozenset(name for name, _ in net.named_parameters()) if trained else frozenset()
    gc.collect()
    with live:
        counted = Counted(weights.path, weights.shapes, weights.places)
        masters = component.read_into(net, counted, torch.device("cpu"), torch.bfloat16, names)
    return net, masters, live


def test_a_frozen_network_takes_two_bytes_a_parameter(saved):
    """And one tensor: the whole in float32 first took six."""
    net, masters, live = read(saved, trained=False)
    count = sum(p.numel() for p in net.parameters())
    kept = sum(2 * p.numel() for n, p in net.named_parameters() if net.keeps_float32(n))  # two bytes more
    largest = max(4 * p.numel() for p in net.parameters())
    assert masters == {}
    assert live.peak <= 2 * count + kept + largest
    assert (live.peak - kept - largest) / count <= 2.1
    assert {p.requires_grad for p in net.parameters()} == {False}


def test_a_trained_network_has_masters_beside(saved):
    """What is read is what rounding the whole gives, and masters are the unrounded."""
    net, masters, live = read(saved, trained=True)
    plain, file = folder.load(saved), load_file(next((saved / "transformer").glob("*.safetensors")))
    wanted = cast(plain, torch.bfloat16)
    assert masters.keys() == wanted.keys()
    assert all(torch.equal(value, file[name]) for name, value in masters.items())
    for (name, ours), theirs in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs), name
    count = sum(p.numel() for p in net.parameters())
    assert live.peak <= 6.1 * count + max(4 * p.numel() for p in net.parameters())
