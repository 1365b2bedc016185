"""Dense attention: values and gradients against float64, and how an implementation is chosen."""

import pytest
import torch
from torch import Tensor

from fastdmd_kernels import attention as dense
from fastdmd_kernels.attention import attention, masked_attention

CPU = torch.device("cpu")


@pytest.fixture
def fresh(monkeypatch):
    """No choice made yet, and a probe of milliseconds."""
    monkeypatch.setattr(dense._choices, "made", {})
    monkeypatch.setattr(dense, "PROBE", (1, 32, 32, 1))


def random(*shape: int, dtype=torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(Lq: int = 10, Lk: int = 7, dtype=torch.float32) -> list[Tensor]:
    return [random(2, L, 3, 16, dtype=dtype, seed=i).requires_grad_() for i, L in enumerate((Lq, Lk, Lk))]


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("blnk,bmnk->bnlm", q.double(), k.double()) / 4
    return torch.einsum("bnlm,bmnk->blnk", scores.softmax(-1), v.double())


def values(run, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    out = run(q, k, v)
    return [out, *torch.autograd.grad(out, (q, k, v), random(*q.shape, seed=9).to(out.dtype))]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("Lk", [10, 7, 1])
def test_values_and_gradients(dtype, tolerance, Lk):
    given = qkv(Lk=Lk, dtype=dtype)
    for x, true in zip(values(attention, *given), values(exact, *given), strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), true.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "view",
    [
        lambda: random(2, 10, 3, 3, 16).unbind(2),  # of a fused projection
        lambda: [random(2, 3, 10, 16, seed=i).transpose(1, 2) for i in range(3)],
        lambda: [random(2, 10, 3, 32, seed=i)[..., ::2] for i in range(3)],
        lambda: [random(2, 1, 3, 16, seed=i).expand(2, 10, 3, 16) for i in range(3)],
    ],
    ids=["fused", "heads first", "every other channel", "expanded"],
)
def test_any_strides(view):
    given = view()
    assert not all(x.is_contiguous() for x in given)
    torch.testing.assert_close(attention(*given).double(), exact(*given), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (lambda q, k, v: (q[0], k, v), r"q \[10, 3, 16\]"),
        (lambda q, k, v: (q, k, v[:, :3]), r"v \[2, 3, 3, 16\]"),
        (lambda q, k, v: (q[:1], k, v), r"q \[1, 10, 3, 16\], k \[2, 7, 3, 16\]"),
        (lambda q, k, v: (q[:, :, :1], k, v), r"q \[2, 10, 1, 16\]"),
        (lambda q, k, v: (q[..., :8], k, v), r"q \[2, 10, 3, 8\]"),
        (lambda q, k, v: (q, k[:, :0], v[:, :0]), "nothing to attend to"),
        (lambda q, k, v: (q, k.double(), v), "torch.float64"),
        (lambda q, k, v: (q.int(), k.int(), v.int()), "torch.int32"),
        (lambda q, k, v: (q, k.to("meta"), v), "different devices"),
    ],
)
def test_what_it_cannot_do_raises_with_the_shapes(bad, match):
    with pytest.raises(ValueError, match=match):
        attention(*bad(*qkv()))
    with pytest.raises(ValueError, match=match):
        masked_attention(*bad(*qkv()), torch.ones(10, 7, dtype=torch.bool))


def test_masked_values_and_gradients():
    """Row by row: a query and the keys that it sees. A row of the mask is of queries, not of keys."""
    q, k, v = qkv(dtype=torch.float64)
    mask = random(10, 7) > 0
    mask[:, 3] = True

    def rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([exact(q[:, i : i + 1], k[:, seen], v[:, seen]) for i, seen in enumerate(mask)], 1)

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return masked_attention(q, k, v, mask)

    for x, true in zip(values(masked, q, k, v), values(rows, q, k, v), strict=True):
        torch.testing.assert_close(x, true, rtol=1e-12, atol=1e-12)
    for wrong in (mask.T, mask[None], mask.double()):
        with pytest.raises(ValueError, match=r"needed is bool \[10, 7\]"):
            masked_attention(q, k, v, wrong)


# ------------------------------------------------------------------------------------------------- the choice


def plain(q, k, v):
    return dense._plain(q, k, v)


def failing(q, k, v):
    raise NotImplementedError("needs a newer GPU\nand a second line")


def wrong(q, k, v):
    return dense._plain(q, k, v) * 1.001


def wrong_gradient(q, k, v):
    return dense._plain(q, k.detach() + 0 * k, v)


@pytest.fixture
def candidates(monkeypatch, fresh):
    """Stand-ins, and the seconds that each is said to take."""

    def set_to(**given):
        implementations = {name: lambda q, k, v, run=run: run(q, k, v) for name, (run, _) in given.items()}
        times = {id(implementations[name]): seconds for name, (_, seconds) in given.items()}
        monkeypatch.setattr(dense, "IMPLEMENTATIONS", implementations)
        monkeypatch.setattr(dense._choices, "names", implementations)
        monkeypatch.setattr(dense, "CANDIDATES", tuple(given))
        monkeypatch.setattr(dense, "_seconds", lambda run, inputs: times[id(run)])

    return set_to


def test_the_fastest_is_chosen(candidates):
    candidates(a=(plain, 3.0), b=(plain, 1.0), c=(plain, 2.0))
    assert dense._probe(CPU, torch.float32, 16).name == "b"


def test_times_that_differ_by_noise_choose_the_first(candidates):
    for b in (0.99, 1.0, 1.01):
        candidates(a=(plain, 1.0), b=(plain, b), c=(plain, 3.0))
        assert dense._probe(CPU, torch.float32, 16).name == "a"


def test_what_fails_or_is_wrong_is_reported_and_not_chosen(candidates):
    candidates(a=(failing, 1.0), b=(wrong, 1.0), c=(wrong_gradient, 1.0), d=(plain, 9.0))
    choice = dense._probe(CPU, torch.float32, 16)
    assert choice.name == "d"
    assert choice.refused["a"] == "needs a newer GPU"
    assert "wrong out: relative error 1.0e-03" in choice.refused["b"]
    assert "wrong dk" in choice.refused["c"]
    assert str(choice).startswith("d; d 9000.00 ms; no a: needs a newer GPU; no b: wrong out")


def test_when_all_fail_the_reasons_are_given(candidates):
    candidates(a=(failing, 1.0), b=(wrong, 1.0))
    with pytest.raises(
        RuntimeError, match=r"no attention for torch.float32, head dim 16 .*newer GPU.*wrong out"
    ):
        dense._probe(CPU, torch.float32, 16)


def test_a_mistake_of_ours_is_no_refusal(candidates):
    candidates(a=(lambda q, k, v: {}["typo"], 1.0), b=(plain, 1.0))
    with pytest.raises(KeyError):
        dense._probe(CPU, torch.float32, 16)


def test_the_real_candidates_on_this_machine(fresh, monkeypatch):
    """On a CPU flash and math run; cuDNN and the memory-efficient kernel do not, and say so."""
    monkeypatch.setattr(dense, "CANDIDATES", ("cudnn", "flash", "efficient", "math"))
    with torch.inference_mode(), torch.autocast("cpu"):
        choice = dense._probe(CPU, torch.float32, 16)
    assert set(choice.seconds) == {"flash", "math"}
    assert all(seconds > 0 for seconds in choice.seconds.values())
    assert "No viable backend" in choice.refused["cudnn"]


def test_a_probe_draws_no_random_numbers_of_the_run(candidates):
    candidates(a=(plain, 1.0))
    before = torch.get_rng_state()
    dense._probe(CPU, torch.float32, 16)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def gpu(monkeypatch, candidates):
    """Let CPU tensors count as a GPU's, its device number 0."""

    class Device:
        type, index = "cuda", 0

    probes = []

    def probe(*key):
        probes.append(key)
        return dense.Choice("a", {"a": 1.0})

    candidates(a=(plain, 1.0), b=(plain, 1.0))
    monkeypatch.setattr(dense, "_probe", probe)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return Device(), probes


def test_the_choice_is_made_once_per_device_dtype_and_head_dim(gpu):
    device, probes = gpu
    keys = [
        (torch.float32, 16),
        (torch.float32, 16),
        (torch.bfloat16, 16),
        (torch.float32, 64),
        (torch.float32, 16),
    ]
    assert {dense._name(device, *key) for key in keys} == {"a"}
    assert [key[1:] for key in probes] == [(torch.float32, 16), (torch.bfloat16, 16), (torch.float32, 64)]
    assert dense.prepare(device, torch.float32, 16) == "a"
    assert len(probes) == 3
    assert set(dense.describe(device)) == {
        "attention float32 16",
        "attention bfloat16 16",
        "attention float32 64",
    }


def test_a_rank_can_be_told_the_choice_of_another(gpu):
    device, probes = gpu
    assert dense.prepare(device, torch.float32, 16, name="b") == "b"
    assert dense._name(device, torch.float32, 16) == "b"
    assert dense.describe(device) == {"attention float32 16": "b (pinned)"}
    assert not probes


def test_a_captured_graph_does_not_choose(gpu, monkeypatch):
    device, _ = gpu
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"call fastdmd_kernels\.attention\.prepare"):
        dense._name(device, torch.float32, 16)
    dense.prepare(device, torch.float32, 16)
    assert dense._name(device, torch.float32, 16) == "a"


def test_use_pins_and_restores():
    given = qkv()
    assert dense.describe(CPU) == {"attention": "sdpa (cpu)"}
    with dense.use("math"):
        assert dense.describe(CPU) == {"attention": "math (forced)"}
        with pytest.raises(RuntimeError), dense.use("cudnn"):
            attention(*given)
        assert dense._name(CPU, torch.float32, 16) == "math"
        attention(*given)
    assert dense._name(CPU, torch.float32, 16) == "sdpa"
    with pytest.raises(ValueError, match="no attention by 'fast': sdpa, cudnn"), dense.use("fast"):
        pass
    with pytest.raises(ValueError, match="no attention by 'fast'"):
        dense.prepare(CPU, torch.float32, 16, name="fast")


# ---------------------------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("name", ["sdpa", "flash", "math"])
def test_compiled_without_a_graph_break(name):
    torch._dynamo.reset()
    given = qkv()
    with dense.use(name):
        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
        for x, y in zip(values(compiled, *given), values(attention, *given), strict=True):
            torch.testing.assert_close(x, y)


def test_compiled_code_follows_a_later_choice(monkeypatch):
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    given = qkv()
    torch.testing.assert_close(compiled(*given), attention(*given))
    monkeypatch.setitem(dense.IMPLEMENTATIONS, "math", lambda q, k, v: q + 1)
    with dense.use("math"):
        assert torch.equal(compiled(*given), given[0] + 1)
    torch.testing.assert_close(compiled(*given), attention(*given))


def test_tracing_an_unmade_choice_says_what_to_call(gpu, monkeypatch):
    torch._dynamo.reset()
    device, probes = gpu
    monkeypatch.setattr(dense, "_check", lambda *_: None)

    def run(q):
        return dense.IMPLEMENTATIONS[dense._name(device, q.dtype, q.shape[-1])](q, q, q)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    q = qkv()[0]
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"attention\.prepare"):
        compiled(q)
    assert not probes
    dense.prepare(device, q.dtype, q.shape[-1])
    torch.testing.assert_close(compiled(q), plain(q, q, q))
