"""Launches and bytes: by hand, by the difference of two networks, and by the compiler's own schedule."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as nnf
from tiny import ARCHITECTURE
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[2]))

from bench import block
from bench.block import Shape
from bench.generated import compiler, count, fake_like, generating
from bench.launches import Counting, Launches
from fastdmd.batch import Cond
from fastdmd.models.net import PLAIN, cast
from fastdmd.models.wan.net import Wan
from fastdmd.plan.estimate import COMPILED
from fastdmd.plan.ops import Fused

TINY = Shape(replace(ARCHITECTURE, attention_head_dim=16), grid=(4, 4, 4), text=8)
L, D, H = 4096, 256, 512  # of the two layers below; large enough that no reduction is split


class Two(nn.Module):
    """Two linear layers, an activation and a scale between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x, scale):
        return self.second(nnf.gelu(self.first(x)) * scale)


def two() -> tuple[Two, torch.Tensor, torch.Tensor]:
    with torch.device("meta"):
        net, x, scale = Two(), torch.empty(L, D), torch.empty(1)
    return net.requires_grad_(False), x, scale


WEIGHTS = 4 * (2 * D * H + D + H)
ENDS = 4 * L * (D + H)  # what a product reads and writes of tokens
HIDDEN = 4 * L * H


def test_eager_ops_are_counted_by_hand():
    net, x, scale = two()
    with Counting() as counting:
        net(x, scale)
    found = counting.found
    assert found.count == {"products": 2, "attention": 0, "elementwise": 2}
    # gelu reads and writes the hidden tokens, and so does the product with the scale
    assert found.bytes == {"products": 2 * ENDS + WEIGHTS, "attention": 0, "elementwise": 4 * HIDDEN + 4}


def test_views_are_free_and_an_op_in_place_reads_and_writes():
    with torch.device("meta"), Counting() as counting:
        x = torch.empty(10, 20)
        x.view(20, 10).transpose(0, 1)[:5].detach()
        assert counting.found.total == 0
        x.add_(torch.empty(20).expand(10, 20))
    assert counting.found.bytes["elementwise"] == 4 * (200 + 20 + 200)


def test_compiled_code_is_counted_by_hand():
    net, x, scale = two()
    with FakeTensorMode(), generating() as codes:
        for layer in (net.first, net.second):
            layer.weight, layer.bias = (nn.Parameter(fake_like(p), False) for p in (layer.weight, layer.bias))
        out = torch.compile(net, fullgraph=True, backend=compiler)(*fake_like([x, scale]))
        assert out.shape == (L, D)
    found = count(codes[0])
    assert found.count == {"products": 2, "attention": 0, "elementwise": 1}
    # the first layer's bias is added by the kernel that activates
    assert found.bytes["products"] == 2 * ENDS + WEIGHTS - 4 * H
    assert found.bytes["elementwise"] == 2 * HIDDEN + 4 * H + 4


def test_code_that_calls_what_is_not_counted_is_refused():
    _, x, _ = two()
    with FakeTensorMode(), generating() as codes:
        torch.compile(nnf.gelu, fullgraph=True, backend=compiler)(fake_like(x))
    codes[0].text = codes[0].text.replace(".run(", ".launch(")
    with pytest.raises(AttributeError, match="launch"):
        count(codes[0])


@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_a_block_is_the_difference_of_two_networks(sparsity):
    """Beside it a network of one more block adds up the gradients of the text and of the modulation."""
    shape = replace(TINY, sparsity=sparsity)
    found = []
    for layers in (1, 2):
        with torch.device("meta"):
            net = Wan(replace(shape.config, num_layers=layers), None if sparsity is None else (4, 4, 4))
            x, t = torch.empty(1, 3, 4, 8, 8), torch.empty(1)
            cond = Cond(torch.empty(1, 8, 32, dtype=torch.bfloat16))
        cast(net, torch.bfloat16)
        seam = net.attention(x.shape, net.topk(x.shape, sparsity or 0.0))
        net.prepare(x.shape, x.device, torch.bfloat16)
        with Counting() as counting, Fused(lambda keeps: None):
            out = net(x, t, cond, replace(PLAIN, attention=seam)).F
        grad = torch.empty_like(out)
        forward = counting.found
        with Counting() as counting:
            torch.autograd.grad(out, list(net.parameters()), grad)
        found.append((forward, counting.found))
    (forward_1, backward_1), (forward_2, backward_2) = found
    passes = block.eager(shape)
    assert forward_2 - forward_1 == passes.forward
    width = shape.config.width
    added = Launches()
    for size in (8 * width, 6 * width):
        added.add("elementwise", 3 * 2 * size)
    assert backward_2 - backward_1 == passes.backward + added


@pytest.mark.slow
@pytest.mark.parametrize("learns", [True, False])
def test_generated_code_moves_what_the_compiler_scheduled(monkeypatch, learns):
    """Its schedule says what each kernel reads and writes, by ranges, without the code."""
    from torch._inductor.graph import GraphLowering

    scheduled = []
    codegen = GraphLowering.codegen

    def watched(graph):
        text = codegen(graph)
        nodes = [node for node in graph.scheduler.nodes if "Extern" not in type(node).__name__]
        scheduled.append([size for node in nodes if (size := node.get_read_write_buffers_sizes())])
        return text

    monkeypatch.setattr(GraphLowering, "codegen", watched)
    shape = replace(TINY, grid=(8, 16, 16), learns=learns)
    passes = block.compiled(shape)
    for each, sizes in zip((passes.forward, passes.backward), scheduled, strict=True):
        assert each.count["elementwise"] >= len(sizes)
        assert each.bytes["elementwise"] == pytest.approx(sum(sizes), rel=0.05)
    eager = block.eager(shape)
    for kind in ("products", "attention"):
        assert passes.both.count[kind] == eager.both.count[kind]
        assert passes.both.bytes[kind] == eager.both.bytes[kind]


@pytest.mark.slow
@pytest.mark.campaign
@pytest.mark.parametrize("linear", COMPILED)
@pytest.mark.parametrize("learns", [True, False])
def test_a_plan_s_share_of_compiled_bytes_is_counted(linear, learns):
    shape = Shape(learns=learns, linear=None if linear == "compute" else linear)
    eager, compiled = block.eager(shape).both, block.compiled(shape).both
    assert compiled.bytes["elementwise"] / eager.bytes["elementwise"] == pytest.approx(
        COMPILED[linear], abs=0.04
    )


def test_products_in_eight_bits_are_counted_as_products():
    """A byte for each number that goes in; their rounding is elementwise."""
    plain, low = (block.eager(replace(TINY, linear=linear)).forward for linear in (None, "float8"))
    assert low.count["products"] == plain.count["products"] == 10
    assert low.count["attention"] == plain.count["attention"]
    assert low.count["elementwise"] > plain.count["elementwise"]
    assert low.bytes["products"] < plain.bytes["products"]


@pytest.mark.slow
@pytest.mark.parametrize(("learns", "launches"), [(False, 0.4), (True, 0.65)])
def test_compiling_a_block_saves_launches_and_bytes(learns, launches):
    """Of 1.3B's width: frozen, as the base of adapters, and with gradients to every weight."""
    shape = Shape(learns=learns)
    eager, compiled = block.eager(shape).both, block.compiled(shape).both
    assert compiled.total <= launches * eager.total
    assert compiled.bytes["elementwise"] <= 0.5 * eager.bytes["elementwise"]
    assert compiled.total_bytes <= 0.62 * eager.total_bytes
