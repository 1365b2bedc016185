"""Products in eight bits: values, gradients to inputs and weights, bytes that are kept, and runs on them."""

import itertools
from dataclasses import replace

import pytest
import torch
from test_compiled import far, gradients
from tiny import ARCHITECTURE, kept_bytes, make_config, write_wan
from torch import Tensor, nn

from fastdmd import config as configs
from fastdmd import train
from fastdmd.config import Config
from fastdmd.data import shapes
from fastdmd.models import products
from fastdmd.models.lowbit import LowBitLinear
from fastdmd.models.products import ProductLinear, coded_rows, fits, mxfp8_rows, tiled
from fastdmd.plan.gpus import GPUS
from fastdmd.plan.step import trace
from fastdmd.resume import restored
from fastdmd.rng import Rng
from fastdmd.run import Run, build

E4M3 = torch.float8_e4m3fn
KINDS = pytest.mark.parametrize("kind", ["float8", "mxfp8"])
FULL = "memory.checkpointing='full'"


def e4m3_values() -> Tensor:
    """Return the positive numbers of e4m3 (OCP FP8): three bits of mantissa, none infinite."""
    normal = [2.0**e * (1 + m / 8) for e, m in itertools.product(range(-6, 9), range(8))]
    return torch.tensor([2.0**-6 * m / 8 for m in range(8)] + normal[:-1], dtype=torch.float64)


def nearest(x: Tensor) -> Tensor:
    """Return each number's nearest in e4m3, float64; ties may go either way."""
    table = e4m3_values()
    return table[(x.abs()[..., None].double() - table).abs().argmin(-1)] * x.sign()


def by_rows(x: Tensor) -> Tensor:
    """Return what rows stand for in float8 with a scale each, float64."""
    scale = x.double().abs().amax(1, keepdim=True) / 448
    return nearest(x.double() / scale) * scale


def by_blocks(x: Tensor) -> Tensor:
    """Return what rows stand for in MXFP8, float64."""
    blocks = x.double().view(len(x), -1, 32)
    scale = 2.0 ** (blocks.abs().amax(2, keepdim=True) / 448).log2().ceil()
    return (nearest(blocks / scale) * scale).view(x.shape)


def emulated(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, **options) -> Tensor:
    """Multiply as tensor cores do in MXFP8: scales are read from where cuBLAS's layout says they lie."""
    assert options["out_dtype"] == torch.float32
    sides = []
    for codes, scale in ((a, scale_a), (b.t(), scale_b)):
        rows, n = codes.shape[0], codes.shape[1] // 32
        tiles = -(-n // 4)
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(n), indexing="ij")
        tile = row // 128 * tiles + column // 4
        where = tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4
        factors = scale.float()[where].repeat_interleave(32, 1)
        sides.append(codes.float() * factors)
    return sides[0] @ sides[1].t()


@pytest.fixture
def tensor_cores(monkeypatch):
    """Let a CPU multiply in MXFP8."""
    plain = torch._scaled_mm

    def multiply(a, b, scale_a, scale_b, **options):
        assert a.is_contiguous() and b.t().is_contiguous()  # noqa: PT018  # what tensor cores ask for
        mx = scale_a.dtype == torch.float8_e8m0fnu
        return (emulated if mx else plain)(a, b, scale_a, scale_b, **options)

    monkeypatch.setattr(torch, "_scaled_mm", multiply)


def layers(kind, bias=True, sizes=(64, 96)) -> tuple[ProductLinear, nn.Linear]:
    torch.manual_seed(0)
    plain = nn.Linear(*sizes, bias=bias)
    with torch.no_grad():
        plain.weight.mul_(torch.logspace(-2, 1, sizes[1])[:, None])
    return ProductLinear(plain, kind, E4M3), plain


@KINDS
@pytest.mark.parametrize("learns", [True, False])
def test_products_are_exact_ones_of_what_is_rounded(kind, learns, tensor_cores):
    """Output and input gradient have both sides rounded, the weight gradient none."""
    low, plain = layers(kind)
    plain.weight.requires_grad_(learns)
    x = torch.randn(3, 37, 64) * torch.logspace(-2, 2, 37)[:, None]
    x.requires_grad_()
    out = low(x)
    grad = torch.randn(96, 37, 3).permute(2, 1, 0)  # as an attention may pass it on
    out.backward(grad)
    rounded = by_rows if kind == "float8" else by_blocks
    w, rows, grads = plain.weight.detach(), x.detach().view(-1, 64), grad.reshape(-1, 96)
    exact = rounded(rows) @ rounded(w).t() + plain.bias.double()
    scale = exact.norm(dim=1, keepdim=True)
    assert ((out.view(-1, 96) - exact) / scale).abs().max() < 2e-3  # ties, and sums in float32
    if kind == "float8":  # the scales of W's rows go into the gradient
        scales = w.double().abs().amax(1, keepdim=True) / 448
        exact = by_rows(grads * scales.t().float()) @ nearest(w.double() / scales)
    else:
        exact = by_blocks(grads) @ by_blocks(w.t().contiguous()).t()
    assert ((x.grad.view(-1, 64) - exact) / exact.norm(dim=1, keepdim=True)).abs().max() < 2e-3
    if learns:
        torch.testing.assert_close(plain.weight.grad, grads.t() @ rows)
        torch.testing.assert_close(plain.bias.grad, grads.sum(0))
    else:
        assert plain.weight.grad is None


@KINDS
@pytest.mark.parametrize("factor", [2.0**-60, 2.0**40])
def test_a_gradient_may_be_of_any_size(kind, factor, tensor_cores):
    """The mean over a video's numbers makes them tiny, and accumulation tinier: nothing is lost."""
    low, _ = layers(kind)
    grad = torch.randn(5, 96)
    found = []
    for each in (grad, factor * grad):
        x = torch.ones(5, 64, requires_grad=True)
        low(x).backward(each)
        found.append(x.grad)
    assert torch.equal(found[1], factor * found[0])
    assert found[0].abs().amax(1).min() > 0


def test_errors_are_those_of_torchao_at_most():
    """Its recipe has the weight's gradient in high precision as well, and one scale for W in the backward."""
    pytest.importorskip("torchao")
    from torchao.float8 import Float8LinearConfig
    from torchao.float8.float8_linear import Float8Linear

    low, plain = layers("float8")
    config = Float8LinearConfig.from_recipe_name("rowwise_with_gw_hp")
    theirs = Float8Linear.from_float(plain, config)
    errors = {}
    for name, layer in (("ours", low), ("theirs", theirs)):
        torch.manual_seed(1)
        x = torch.randn(40, 64, requires_grad=True)
        grad = torch.randn(40, 96)
        layer(x).backward(grad)
        out, exact = layer(x).detach(), nn.functional.linear(x.detach(), plain.weight.detach(), plain.bias)
        of_x = grad @ plain.weight.detach()
        pairs = ((out, exact.detach()), (x.grad, of_x))
        errors[name] = [float((a - b).norm() / b.norm()) for a, b in pairs]
    assert 0.005 < errors["ours"][0] <= 1.01 * errors["theirs"][0]
    assert 0.005 < errors["ours"][1] <= errors["theirs"][1]


def test_mxfp8_is_torchao_s_bit_for_bit():
    pytest.importorskip("torchao")
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx
    from torchao.prototype.mx_formats.utils import to_blocked

    torch.manual_seed(0)
    x = (torch.randn(200, 320) * torch.logspace(-6, 6, 200)[:, None]).bfloat16()
    x[3] = 0
    scale, codes = to_mx(x, E4M3, 32, ScaleCalculationMode.RCEIL)
    found, found_scale = mxfp8_rows(x)
    some = torch.arange(200) != 3  # of nothing but zeros any scale is right
    assert torch.equal(found.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(found_scale.view(torch.uint8)[some], scale.view(torch.uint8)[some])
    assert torch.equal(tiled(scale).view(torch.uint8), to_blocked(scale.view(torch.uint8)).flatten())


@KINDS
def test_rows_of_zeros_stay_zero(kind, tensor_cores):
    low, plain = layers(kind, bias=False)
    with torch.no_grad():
        plain.weight[0] = 0
    out = low(torch.cat([torch.zeros(1, 64), torch.randn(2, 64)]))
    assert out.isfinite().all()
    assert not out[0].any()
    assert not out[:, 0].any()


@pytest.mark.parametrize(
    ("frozen", "learns"), [("compute", True), ("compute", False), ("float8", False), ("mxfp8", False)]
)
def test_a_graph_keeps_an_input_where_the_weight_learns_and_no_copy(frozen, learns, tensor_cores):
    """At most the layer's input and 1.1 times the bytes of its weight."""
    _, plain = layers("float8", bias=False)
    plain.weight.requires_grad_(learns)
    if frozen == "float8":
        layer = LowBitLinear(plain, E4M3, in_float8=True)
        layer.load(plain.weight.detach(), torch.device("cpu"))
        size = 64 * 96 + 4 * 96
    else:
        layer = ProductLinear(plain, "mxfp8" if frozen == "mxfp8" else "float8", E4M3)
        size = plain.weight.nbytes
    x = torch.randn(3, 64, requires_grad=True)
    assert size <= kept_bytes(lambda: layer(x * 1.0).sum()) <= x.nbytes * learns + 1.1 * size


def test_frozen_codes_are_multiplied_as_they_are():
    """W's codes are those of its storage: as a weight that is rounded at each call, without the rounding."""
    low, plain = layers("float8")
    plain.requires_grad_(False)
    stored = LowBitLinear(plain, E4M3, in_float8=True)
    stored.load(plain.weight, torch.device("cpu"))
    x = torch.randn(5, 64)
    found, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
    grad = torch.randn(5, 96)
    out, exact = stored(found), low(wanted)
    out.backward(grad)
    exact.backward(grad)
    assert torch.equal(out, exact)
    assert torch.equal(found.grad, wanted.grad)
    assert found.grad.any()


def test_layers_fit_by_both_sizes():
    assert fits(nn.Linear(16, 48), "float8")
    assert not fits(nn.Linear(24, 48), "float8")
    assert not fits(nn.Linear(48, 24), "float8")
    assert not fits(nn.Linear(16, 48), "mxfp8")
    assert not fits(nn.Embedding(16, 48), "float8")


def test_int8_codes_are_rounded_to_the_nearest():
    codes, scale = coded_rows(torch.tensor([[1.0, 0.498, -0.51, 127.0]]), torch.int8)
    assert codes.tolist() == [[1, 0, -1, 127]]
    assert scale.tolist() == [[1.0]]


# -------------------------------------------------------------------------------------- runs


def wide(here, method: str, *overrides: str) -> Config:
    """Return a configuration of a Wan whose layers are multiples of 16."""
    make_config(here, method)
    write_wan(here / "wan", replace(ARCHITECTURE, attention_head_dim=16, num_layers=2))
    return configs.load(here / f"{method}.toml", overrides)


def raw(run: Run, role: str) -> Tensor:
    batch = run.world.batch(Rng(0, 0, "data", range(2), "cpu"))
    x_t = torch.randn(2, *run.world.latent_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return run.nets[role].features(x_t, torch.tensor([900.0, 300.0]), batch.cond, ())[0]


def swapped(run: Run, role: str) -> list[str]:
    modules = run.nets[role].net.named_modules()
    return [
        name
        for name, layer in modules
        if isinstance(layer, ProductLinear) or (isinstance(layer, LowBitLinear) and layer.in_float8)
    ]


CASES = {
    "whole": ("dmd", ()),
    "adapters": ("dmd_lora", ()),
    "adapters, recomputed": ("dmd_lora", (FULL,)),
    "adapters on codes": ("dmd_lora", ("precision.frozen='float8'",)),
    "adapters on codes, streamed": (
        "dmd_lora",
        ("precision.frozen='float8'", FULL, "memory.stream_base=true"),
    ),
    "lcm, adapters": ("lcm_lora", ()),
    "sid": ("dmd", ("method.name='sid'",)),
}


@pytest.mark.parametrize("case", CASES)
def test_every_role_learns_as_without(tmp_path, case):
    """The same parameters have gradients, and outputs are near; embedders, norms and heads stay."""
    method, keys = CASES[case]
    found = {}
    for linear in ("compute", "float8"):
        run = build(wide(tmp_path / linear, method, *keys, f"precision.linear='{linear}'"))
        outputs = {role: raw(run, role) for role in run.nets}
        train.take_step(run)
        moments = {role: opt.moments() for role, opt in run.optimizers.items()}
        learned = {
            f"{role} {n}"
            for role, each in moments.items()
            for n, x in each.items()
            if "avg." in n and x.any()
        }
        found[linear] = learned, outputs
        names = swapped(run, "student")
        assert len(names) == (20 if linear == "float8" else 0)
        assert all(name.startswith("blocks.") for name in names)
    assert found["float8"][0] == found["compute"][0] != set()
    for role, wanted in found["compute"][1].items():
        error = (found["float8"][1][role] - wanted).norm() / wanted.norm()
        assert 0 < error < 0.1


def test_parameters_have_their_names_and_a_run_goes_on_bit_for_bit(tmp_path):
    keys = ("precision.linear='float8'", "run.max_steps=4", "validation.teacher_reference=false")
    straight = train.train(wide(tmp_path / "a", "dmd", *keys))
    plain = build(wide(tmp_path / "plain", "dmd"))
    assert straight.optimizers["student"].masters.keys() == plain.optimizers["student"].masters.keys()
    saved = straight.folder / "checkpoints" / "step_00000002"
    again = restored(wide(tmp_path / "a", "dmd", *keys, f"checkpoint.resume='{saved}'"))
    assert again.step == 2
    while again.step < 4:
        train.take_step(again)
        again.step += 1
    for name, master in straight.optimizers["student"].masters.items():
        assert torch.equal(master, again.optimizers["student"].masters[name])


def test_a_unet_s_attention_is_in_float8_too(tmp_path):
    learned = {}
    for linear in ("compute", "float8"):
        run = build(make_config(tmp_path / linear, "sdxl_lcm_lora", f"precision.linear='{linear}'"))
        train.take_step(run)
        learned[linear] = {
            n for n, x in run.optimizers["student"].moments().items() if "avg." in n and x.any()
        }
    assert learned["float8"] == learned["compute"] != set()
    names = swapped(run, "student")
    assert names
    assert all(".attentions." in name for name in names)
    assert not [name for name in names if "time_emb_proj" in name or ".lora_" in name]


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    "keys", [pytest.param((), marks=pytest.mark.campaign), ("precision.frozen='float8'",)], ids=str
)
def test_compiled_blocks_have_the_same_gradients(tmp_path, monkeypatch, keys):
    config = wide(tmp_path, "dmd_lora", "precision.linear='float8'", *keys)
    eager = gradients(config, monkeypatch)
    compiled = replace(config, compile=replace(config.compile, mode="blocks"))
    assert far(gradients(compiled, monkeypatch), eager) <= 1e-6


@KINDS
def test_a_plan_counts_products_in_eight_bits_apart(tmp_path, kind):
    """What is no product of a block stays: the FLOPs of both together are those of the plain plan."""
    works = {}
    for linear in ("compute", kind):
        config = wide(tmp_path / linear, "dmd_lora", f"precision.linear='{linear}'")
        works[linear] = trace(config, None).phases["critic: critic, forward"].work
    plain, low = works["compute"], works[kind]
    assert plain.float8 == 0
    assert plain.matmul == low.matmul + low.float8
    D, hidden, tokens, words = 32, ARCHITECTURE.ffn_dim, 3 * 4 * 4, shapes.TEXT_TOKENS
    block = 2 * (6 * D * D * tokens + 2 * D * D * words + 2 * D * hidden * tokens)
    # a rollout of three steps and the critic's forward, two samples, two blocks
    assert low.float8 == (3 + 1) * 2 * 2 * block
    h100, a100 = GPUS["h100"], GPUS["a100"]
    assert h100.seconds(low)["products"] < h100.seconds(plain)["products"]
    assert a100.seconds(low)["products"] == pytest.approx(a100.seconds(plain)["products"])


def test_layers_that_are_kept_stay_plain(monkeypatch):
    block = nn.ModuleDict({"a": nn.Linear(32, 32), "gate": nn.Linear(32, 32), "odd": nn.Linear(20, 32)})
    from fastdmd.models.lowbit import make_products

    make_products([block], "mxfp8", E4M3, lambda name: name == "gate")
    kinds = {name: type(layer) for name, layer in block.items()}
    assert kinds == {"a": ProductLinear, "gate": nn.Linear, "odd": nn.Linear}
    assert products.GRAIN == {"float8": 16, "mxfp8": 32}
