"""Eager norms: PyTorch's own on the CPU, Liger's against float64 by triton's interpreter, and the choice."""

import importlib
import sys

import pytest
import torch
from torch import Tensor, nn

from fastdmd.models.norm import GroupNorm, LayerNorm, RMSNorm, replace_group_norms
from fastdmd_kernels import norm
from fastdmd_kernels.trial import Choice

CPU = torch.device("cpu")
D, C, GROUPS = 48, 16, 4
CASES = {  # the op, and its inputs: x, then the weight and the bias where it has them
    "rms_norm": (lambda x, w: norm.rms_norm(x, w, 1e-6), ((2, 5, D), (D,))),
    "layer_norm": (lambda x, w, b: norm.layer_norm(x, 1e-6, w, b), ((2, 5, D), (D,), (D,))),
    "layer_norm without weights": (lambda x: norm.layer_norm(x, 1e-6), ((2, 5, D),)),
    "group_norm": (
        lambda x, w, b: norm.group_norm(x, GROUPS, 1e-5, w, b),
        ((2, C, 3, 5), (C,), (C,)),
    ),
}


def random(*shape: int, seed: int = 0, dtype=torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs_of(case: str, dtype=torch.float32) -> list[Tensor]:
    """Return inputs whose mean is not zero."""
    return [(random(*shape, seed=i) + 1).to(dtype).requires_grad_() for i, shape in enumerate(CASES[case][1])]


def values(run, inputs: list[Tensor]) -> list[Tensor]:
    out = run(*inputs)
    dout = random(*out.shape, seed=9).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


def closed_form(case: str, x: Tensor, w: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """Compute the norms from means."""
    groups = GROUPS if case == "group_norm" else 1
    rows = x.unflatten(1, (groups, -1)).flatten(2)[:, :, None] if groups > 1 else x
    centred = rows if case == "rms_norm" else rows - rows.mean(-1, keepdim=True)
    eps = 1e-5 if groups > 1 else 1e-6
    y = (centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()).reshape(x.shape)
    side = (-1, 1, 1) if groups > 1 else (-1,)
    return y * (1 if w is None else w.view(side)) + (0 if b is None else b.view(side))


def test_a_norm_on_the_cpu_is_pytorch_s_bit_for_bit():
    x, image = random(2, 5, D), random(2, C, 3, 5)
    pairs = [
        (RMSNorm(D, eps=1e-6), nn.RMSNorm(D, eps=1e-6), x),
        (LayerNorm(D, eps=1e-6), nn.LayerNorm(D, eps=1e-6), x),
        (GroupNorm(GROUPS, C), nn.GroupNorm(GROUPS, C), image),
    ]
    for ours, theirs, given in pairs:
        for parameter in theirs.parameters():
            nn.init.normal_(parameter)
        ours.load_state_dict(theirs.state_dict())
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(ours.to(dtype)(given.to(dtype)), theirs.to(dtype)(given.to(dtype)))
    assert torch.equal(norm.layer_norm(x, 1e-6), nn.functional.layer_norm(x, (D,), eps=1e-6))


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case):
    given = inputs_of(case, torch.float64)
    ours = values(CASES[case][0], given)
    exact = values(lambda *x: closed_form(case, *x), given)
    for x, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(x, true, rtol=1e-11, atol=1e-11)


def test_group_norms_are_replaced_where_they_are_and_keep_their_names():
    net = nn.Sequential(
        nn.GroupNorm(GROUPS, C, eps=1e-3), nn.Sequential(nn.Conv2d(C, C, 1), nn.GroupNorm(2, C))
    )
    names = list(net.state_dict())
    x = random(2, C, 3, 5)
    before = net(x)
    replace_group_norms(net)
    assert [type(m) for m in net.modules() if isinstance(m, nn.GroupNorm)] == [GroupNorm, GroupNorm]
    assert list(net.state_dict()) == names
    assert torch.equal(net(x), before)


# ------------------------------------------------------------------------------------------------------ Liger


@pytest.fixture
def liger(monkeypatch):
    """Run Liger's kernels in triton's interpreter, which lacks two things that they use.

    They are CUDA's rsqrt, and numbers as arguments that have a `to`.
    """
    pytest.importorskip("liger_kernel")
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    converted = interpreter._implicit_cvt

    def convert(argument):
        if isinstance(argument, float):
            handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return converted(argument)

    monkeypatch.setattr(interpreter, "_implicit_cvt", convert)
    for name in ("rms_norm", "layer_norm", "group_norm"):
        module = importlib.import_module(f"liger_kernel.ops.{name}")
        monkeypatch.setattr(module, "rsqrt", lambda x: tl.math.rsqrt(x))
    with norm.use("liger"):
        yield


def errors(results: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [((x.double() - e).norm() / e.norm()).item() for x, e in zip(results, exact, strict=True)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize("case", CASES)
def test_liger_errs_no_more_than_four_times_as_much_as_pytorch(case, liger):
    given = inputs_of(case)
    exact = values(lambda *x: closed_form(case, *x), [x.detach().double().requires_grad_() for x in given])
    with norm.use("torch"):
        own = values(CASES[case][0], given)
    results = values(CASES[case][0], given)
    assert not torch.equal(results[0], own[0])  # it was another implementation
    for ours, theirs in zip(errors(results, exact), errors(own, exact), strict=True):
        assert ours <= 4 * theirs


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_liger_leaves_its_inputs_and_the_gradient_as_they_were(liger):
    """By default its RMSNorm writes the gradient of x over that of the output."""
    for case in CASES:
        given = inputs_of(case)
        out = CASES[case][0](*given)
        dout = random(*out.shape, seed=9)
        before = [x.detach().clone() for x in (*given, dout)]
        torch.autograd.grad(out, given, dout)
        for x, y in zip((*given, dout), before, strict=True):
            assert torch.equal(x, y), case


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize(
    ("kind", "sizes"), [("rms_norm", (D,)), ("layer_norm", (D,)), ("group_norm", (C, 4))]
)
def test_the_real_candidates_are_both_right(kind, sizes, liger, monkeypatch):
    monkeypatch.setattr(norm, "PROBE", norm.SAMPLE)
    monkeypatch.setattr(norm.trial, "median_seconds", lambda call, device: call() and 1.0)
    choice = norm._probe(CPU, kind, torch.float32, sizes)
    assert choice.refused == {}
    assert list(choice.seconds) == ["torch", "liger"]
    assert choice.name == "torch"  # equally fast: the first


# ------------------------------------------------------------------------------------------------- the choice


def doubled(x, eps, weight):
    return 2 * norm.IMPLEMENTATIONS["torch"]["rms_norm"](x, eps, weight)


@pytest.fixture
def gpu(monkeypatch):
    """Let CPU tensors count as a GPU's, its device number 0."""

    class Device:
        type, index = "cuda", 0

    probes = []

    def probe(*key):
        probes.append(key)
        return Choice("liger", {"liger": 1.0})

    monkeypatch.setattr(norm._choices, "made", {})
    monkeypatch.setattr(norm, "_probe", probe)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return Device(), probes


def test_a_wrong_candidate_is_refused(monkeypatch):
    own = norm.IMPLEMENTATIONS["torch"]
    monkeypatch.setattr(norm, "IMPLEMENTATIONS", {"torch": own, "liger": {"rms_norm": doubled}})
    monkeypatch.setattr(norm.trial, "median_seconds", lambda call, device: call() and 1.0)
    choice = norm._probe(CPU, "rms_norm", torch.float32, (D,))
    assert choice.name == "torch"
    assert "wrong out" in choice.refused["liger"]


def test_what_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(norm, "PROBE", norm.SAMPLE)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.rms_norm", None)
    choice = norm._probe(CPU, "rms_norm", torch.float32, (D,))
    assert choice.name == "torch"
    assert "liger_kernel" in choice.refused["liger"]


def test_the_choice_is_made_once_per_norm_device_dtype_and_sizes(gpu):
    device, probes = gpu
    keys = [
        ("rms_norm", torch.float32, (16,)),
        ("rms_norm", torch.bfloat16, (16,)),
        ("layer_norm", torch.float32, (16,)),
        ("group_norm", torch.float32, (16, 4)),
        ("group_norm", torch.float32, (16, 8)),
    ]
    for kind, dtype, sizes in [*keys, *keys]:
        assert norm._name(kind, device, dtype, sizes) == "liger"
    assert [(kind, dtype, sizes) for _, kind, dtype, sizes in probes] == keys
    assert norm.prepare("rms_norm", device, torch.float32, (16,), name="torch") == "torch"
    assert norm._name("rms_norm", device, torch.float32, (16,)) == "torch"
    assert norm.describe(device)["rms_norm float32 16"] == "torch (pinned)"
    assert norm.describe(device)["group_norm float32 16/8"] == "liger; liger 1000.00 ms"


def test_a_captured_graph_does_not_choose(gpu, monkeypatch):
    device, probes = gpu
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(
        RuntimeError, match=r"call fastdmd_kernels\.norm\.prepare\('rms_norm', device, dtype, \(16,\)"
    ):
        norm._name("rms_norm", device, torch.float32, (16,))
    assert not probes
    norm.prepare("rms_norm", device, torch.float32, (16,))
    assert norm._name("rms_norm", device, torch.float32, (16,)) == "liger"


def test_a_group_norm_that_learns_is_pytorch_s(monkeypatch):
    """Liger's has a weight's gradient from atomics: two runs would differ."""
    asked = []
    monkeypatch.setattr(norm, "_name", lambda kind, *_: asked.append(kind) or "torch")
    module = GroupNorm(GROUPS, C)
    module(random(2, C, 3, 5))
    assert asked == []
    module.requires_grad_(False)(random(2, C, 3, 5))
    assert asked == ["group_norm"]


def test_use_pins_and_restores():
    assert norm.describe(CPU) == {"norms": "torch (cpu)"}
    with norm.use("liger"):
        assert norm.describe(CPU) == {"norms": "liger (forced)"}
        assert norm.prepare("rms_norm", CPU, torch.float32, (D,)) == "liger"
    assert norm.prepare("rms_norm", CPU, torch.float32, (D,)) == "torch"
    with pytest.raises(ValueError, match="no norms by 'apex': torch, liger"), norm.use("apex"):
        pass
    with pytest.raises(ValueError, match="no norms by 'apex'"):
        norm.prepare("rms_norm", CPU, torch.float32, (D,), name="apex")


@pytest.mark.parametrize("case", CASES)
def test_compiled_it_is_pytorch_s_in_one_graph_whatever_is_chosen(case, monkeypatch):
    torch._dynamo.reset()
    given = inputs_of(case)
    compiled = torch.compile(CASES[case][0], fullgraph=True, backend="aot_eager")
    own = values(CASES[case][0], given)
    with norm.use("liger"):
        for x, y in zip(values(compiled, given), own, strict=True):
            torch.testing.assert_close(x, y)
