"""The fused losses against float64: values and gradients have at most twice the float32 composition's error.

Without a GPU in triton's interpreter, in float32 and float16 (its bfloat16 is wrong).
"""

import math

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

pytest.importorskip("triton")

from fastdmd_kernels import dmd_loss, sid_loss
from fastdmd_kernels.dispatch import use
from fastdmd_kernels.losses.triton_shared import BLOCK, CHUNKS, chunks_of, mask_args

# numpy, of NaN and 0 / 0 in the interpreter
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TENSORS = ("x0_g", "z", "F_fake", "F_c", "F_u")
SHAPES = [(1, 1), (3, 1), (1, 2 * BLOCK), (3, 2, 3, 11, 37), (2, BLOCK + 1), (1, 5, 13)]
LOSSES = {"dmd": dmd_loss, "sid": lambda *args: sid_loss(*args, 1.2)}
both = pytest.mark.parametrize("name", LOSSES)

Result = tuple[Tensor, dict[str, Tensor], list[Tensor | None]]


def arguments(shape, guided=True, seed=0):
    """x0_g, z, F_fake, F_c, F_u and per-sample a, b, w."""
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=g) for _ in TENSORS]
    a, b, w = (low + torch.rand(shape[0], generator=g) for low in (0.5, -1.5, 3.0))
    if not guided:
        tensors[4], w = None, 1.0
    return [*tensors, a, b, w]


def run(backend, name, args, mask=None, dtype=None, upstream=0.3) -> Result:
    """(loss, metrics, gradients); `dtype` casts all floats first."""
    args = [x.to(DEVICE, dtype) if isinstance(x, Tensor) else x for x in args]
    leaves = [None if x is None else x.detach().requires_grad_() for x in args[:5]]
    with use(backend):
        more = () if mask is None else (mask.to(DEVICE),)
        loss, metrics = LOSSES[name](*leaves, *args[5:], *more)
        (upstream * loss).backward()
    return loss.detach(), metrics, [None if x is None else x.grad for x in leaves]


def results(result: Result) -> dict[str, Tensor]:
    loss, metrics, grads = result
    return {"loss": loss, **metrics, **{k: x for k, x in zip(TENSORS, grads, strict=True) if x is not None}}


def assert_no_worse(name, *cases, mask=None):
    """Relative errors by root mean square over the cases: that of one number is luck."""
    errors: dict[str, list[tuple[float, float]]] = {}
    for args in cases:
        exact, plain, fused = (
            results(run(backend, name, args, mask, dtype))
            for backend, dtype in (("torch", torch.float64), ("torch", None), ("triton", None))
        )
        assert fused.keys() == plain.keys()
        for key, want in exact.items():
            assert fused[key].dtype == plain[key].dtype
            assert fused[key].shape == plain[key].shape
            pair = [float((x[key].double() - want).norm() / want.norm()) for x in (fused, plain)]
            errors.setdefault(key, []).append((pair[0], pair[1]))
    for key, pairs in errors.items():
        error, allowed = torch.tensor(pairs, dtype=torch.float64).square().mean(0).sqrt()
        assert error <= 2 * allowed + 6e-8, key  # one rounding is granted: a sum may be exact by luck


@pytest.fixture
def poisoned(monkeypatch):
    """Fill new memory with NaN, so that an element that no kernel writes is seen."""
    before = torch.Tensor.new_empty

    def new_empty(self, *args, **kwargs):
        made = before(self, *args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


@both
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("guided", [True, False])
def test_no_worse_than_the_float32_composition(name, shape, guided, poisoned):
    seeds = range(2 if math.prod(shape) > 100 else 24)
    assert_no_worse(name, *(arguments(shape, guided, seed) for seed in seeds))


@both
def test_numbers_for_scalars(name):
    assert_no_worse(name, *([*arguments((2, 7, 9), seed=seed)[:5], 0.8, -0.6, 4.0] for seed in range(12)))


@both
def test_zero_dimensional_scalars(name):
    scalars = [torch.tensor(value) for value in (0.8, -0.6, 4.0)]
    assert_no_worse(name, *([*arguments((2, 7, 9), seed=seed)[:5], *scalars] for seed in range(12)))


def test_poison_is_seen(poisoned):
    assert torch.zeros(1).new_empty(3).isnan().all()


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 3, 1, 1), (5, 1), (2, 1, 3, 1, 4), (2, 3, 3, 5, 4), (1,), (2, 3, 1, 5, 1), (1, 3, 1, 5, 1)],
    ids=str,
)
def test_masks_broadcast(shape, poisoned):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.7
    mask.view(-1)[0] = True
    assert_no_worse("dmd", arguments((2, 3, 3, 5, 4)), mask=mask)


def test_mask_over_several_blocks(poisoned):
    mask = torch.arange(7).view(1, 1, -1, 1) > 3
    assert_no_worse("dmd", arguments((2, 3, 7, 200)), mask=mask)


def test_a_mask_that_keeps_nothing_has_no_gradient():
    loss, _, grads = run("triton", "dmd", arguments((2, 30)), torch.zeros(2, 1, dtype=torch.bool))
    assert loss.isnan()
    assert not grads[0].any()


def test_a_mask_by_strides_is_not_copied():
    x, mask = torch.empty(2, 3, 4, 5, 6), torch.ones(2, 1, 4, 1, 1, dtype=torch.bool)
    assert mask_args(mask, x)["mask_ptr"].data_ptr() == mask.data_ptr()


@both
def test_dmd_and_sid_of_a_sample_do_not_depend_on_the_batch(name):
    args = arguments((3, 2 * BLOCK + 3))
    whole = run("triton", name, args)
    for i in range(3):
        alone = run("triton", name, [x[i : i + 1] for x in args], upstream=0.1)
        for x, y in zip(alone[2], whole[2], strict=True):
            if y is not None:
                torch.testing.assert_close(x[0], y[i], rtol=1e-6, atol=0)


@both
def test_more_chunks_than_one_program_sums_are_longer_chunks(name, monkeypatch):
    from fastdmd_kernels.losses import triton_shared

    monkeypatch.setattr(triton_shared, "CHUNKS", 3)  # as if a sample had 340 times as many elements
    args = arguments((2, 8 * BLOCK + 5))
    assert chunks_of(args[0]) == (8 * BLOCK + 5, 3, 3)
    assert_no_worse(name, args)


@pytest.mark.parametrize("n", [1, BLOCK * CHUNKS, BLOCK * CHUNKS + 1, 2**31 + 7, 2**40])
def test_chunks_cover_a_sample(n):
    n, chunks, iters = chunks_of(torch.empty(1, n, device="meta"))
    assert chunks <= CHUNKS
    assert (chunks - 1) * iters * BLOCK < n <= chunks * iters * BLOCK


@both
def test_two_runs_agree_bit_for_bit(name):
    first, second = (results(run("triton", name, arguments((3, 5 * BLOCK + 3)))) for _ in range(2))
    assert all(torch.equal(x, second[key]) for key, x in first.items())


@both
@pytest.mark.parametrize("half", [("F_fake", "F_c", "F_u"), TENSORS], ids=["scores", "all"])
def test_float16_is_computed_in_float32(name, half):
    args = arguments((2, 3, 50))
    args = [x.half() if name_ in half else x for name_, x in zip((*TENSORS, *"abw"), args, strict=True)]
    plain, fused = (results(run(backend, name, args)) for backend in ("torch", "triton"))
    for key, want in plain.items():
        assert fused[key].dtype == want.dtype
        # what is stored in float16 may round to the other side
        rtol = 2e-3 if want.dtype == torch.float16 else 1e-5
        torch.testing.assert_close(fused[key], want, rtol=rtol, atol=rtol * float(want.abs().mean()))


@both
def test_any_strides(name):
    """Halves of a batched output, channels last, a transpose, an expanded sample."""
    args = arguments((2, 6, 4, 5))
    want = run("triton", name, args)[2]
    other = list(args)
    other[3], other[4] = torch.cat([args[3], args[4]]).chunk(2)
    other[0] = args[0].contiguous(memory_format=torch.channels_last)
    other[1] = args[1].transpose(0, 3).contiguous().transpose(0, 3)
    got = run("triton", name, other)[2]
    assert all(x is y or torch.equal(x, y) for x, y in zip(got, want, strict=True))
    args[1] = args[1][:1].repeat(2, 1, 1, 1)
    other[1] = args[1][:1].expand(2, -1, -1, -1)
    assert torch.equal(run("triton", name, args)[0], run("triton", name, other)[0])


INF, NAN = float("inf"), float("nan")


def assert_same_gradient(fused: Result, plain: Result):
    """Have the largest float over numel, where the reference's autograd doubles it first and has inf."""
    want = plain[2][0]
    largest = 0.3 * torch.finfo(torch.float32).max / want.numel()
    torch.testing.assert_close(fused[2][0], want.clamp(-largest, largest), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", TENSORS)
def test_dmd_nan_to_num_as_the_reference(name, value):
    """Loss and gradient of both, sample by sample; where x0_g itself is broken the loss says so."""
    args = arguments((3, 40))
    args[TENSORS.index(name)][1, 3] = value
    plain, fused = (run(backend, "dmd", args) for backend in ("torch", "triton"))
    torch.testing.assert_close(fused[0], plain[0], rtol=1e-6, atol=0, equal_nan=True)
    for key in ("normalizer", "score_gap"):
        torch.testing.assert_close(fused[1][key], plain[1][key], rtol=1e-6, atol=0, equal_nan=True)
    if name == "x0_g":
        assert fused[0].isnan()
        plain[2][0][1, 3] = 0.0
    assert_same_gradient(fused, plain)


def test_dmd_zero_normalizer():
    """0 / 0 is no gradient, gap / 0 the largest float and a loss of inf."""
    args = arguments((3, 40), guided=False)
    args[5:7] = 1.0, -0.5
    args[0][1] = args[1][1] - 0.5 * args[3][1]
    agree = [x.clone() if isinstance(x, Tensor) else x for x in args]
    agree[2][1] = agree[3][1]
    for case in (agree, args):
        plain, fused = (run(backend, "dmd", case) for backend in ("torch", "triton"))
        assert plain[0].isinf() == (case is args)
        torch.testing.assert_close(fused[0], plain[0], rtol=1e-6, atol=0)
        assert_same_gradient(fused, plain)


@pytest.mark.parametrize("value", [NAN, INF])
def test_sid_does_not_hide_what_is_not_finite(value):
    args = arguments((2, 40))
    args[2][1, 3] = value
    loss, _, grads = run("triton", "sid", args)
    assert not loss.isfinite()
    assert all(x[0].isfinite().all() for x in grads)
    assert not grads[0][1].isfinite().all()


def test_dmd_gradient_reaches_the_student_only():
    _, metrics, grads = run("triton", "dmd", arguments((2, 9)))
    assert [x is not None for x in grads] == [True, False, False, False, False]
    assert not any(x.requires_grad for x in metrics.values())


def op_arguments(name, guided, masked=False):
    *tensors, a, b, _ = (x.to(DEVICE) if isinstance(x, Tensor) else x for x in arguments((2, 3, 5), guided))
    tensors = [None if x is None else x.requires_grad_() for x in tensors]
    mask = torch.tensor([[[True], [False], [True]]], device=DEVICE) if masked else None
    return (*tensors, a, b, None, 0.0, 0.0, 4.0 if guided else 1.0, mask if name == "dmd" else 1.2)


@both
@pytest.mark.parametrize("guided", [True, False])
def test_opcheck(name, guided):
    args = op_arguments(name, guided, masked=True)
    opcheck(getattr(torch.ops.fastdmd, f"{name}_loss").default, args)
    permuted = [x.detach().transpose(1, 2) if isinstance(x, Tensor) and x.ndim == 3 else x for x in args]
    opcheck(getattr(torch.ops.fastdmd, f"{name}_loss").default, tuple(permuted))


@both
@pytest.mark.parametrize("guided", [True, False])
def test_compiles_to_one_graph(name, guided):
    args = [x.to(DEVICE) if isinstance(x, Tensor) else x for x in arguments((2, 3, 50), guided)]
    x0 = args[0].clone().requires_grad_()
    with use("triton"):
        eager = LOSSES[name](*args)[0]
        compiled = torch.compile(LOSSES[name], fullgraph=True, backend="aot_eager")
        loss, metrics = compiled(x0, *args[1:])
        (0.3 * loss).backward()
    assert torch.equal(loss, eager)
    assert x0.grad is not None
    assert torch.equal(x0.grad, run("triton", name, args)[2][0])
    assert not any(x.requires_grad for x in metrics.values())


class TestErrors:
    """What the kernels do not read is an error with its shape or dtype, never another answer."""

    @both
    def test_float64(self, name):
        args = [x.double() for x in arguments((2, 3))]
        with use("triton"), pytest.raises(ValueError, match=r"float64.*\[2, 3\].*want float32"):
            LOSSES[name](*args)

    @both
    def test_devices_that_differ(self, name):
        args = arguments((2, 3))
        args[2] = args[2].to("meta")
        with use("triton"), pytest.raises(ValueError, match="different devices"):
            LOSSES[name](*args)

    @both
    @pytest.mark.parametrize("backend", ["torch", "triton"])
    def test_shapes(self, name, backend):
        args = arguments((2, 3, 4))
        with use(backend):
            for i in range(5):
                with pytest.raises(ValueError, match="shapes differ"):
                    LOSSES[name](*args[:i], args[i][:, :1], *args[i + 1 :])
            for i in range(5, 8):
                with pytest.raises(ValueError, match="per-sample"):
                    LOSSES[name](*args[:i], args[i][:1], *args[i + 1 :])
            with pytest.raises(ValueError, match=r"want \[B, ..\]"):
                LOSSES[name](*(x.flatten() for x in args))
            with pytest.raises(ValueError, match="needs F_u"):
                LOSSES[name](*args[:4], None, *args[5:])

    @both
    def test_nothing(self, name):
        with use("triton"), pytest.raises(ValueError, match="no elements"):
            LOSSES[name](*arguments((2, 0, 3)))

    @pytest.mark.parametrize("backend", ["torch", "triton"])
    @pytest.mark.parametrize(
        "mask", [torch.ones(2, 3), torch.ones(2, 2, dtype=torch.bool)], ids=["float", "shape"]
    )
    def test_masks(self, backend, mask):
        with use(backend), pytest.raises(ValueError, match="want bool, broadcastable"):
            dmd_loss(*arguments((2, 3)), mask)

    def test_scalars_that_want_a_gradient(self):
        args = arguments((2, 3))
        args[5].requires_grad_()
        with use("triton"), pytest.raises(ValueError, match="no gradient"):
            sid_loss(*args, 1.0)
