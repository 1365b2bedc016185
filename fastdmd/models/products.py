"""Products of linear layers in eight bits: float8 (e4m3, a scale a row) and MXFP8 (a scale for each 32).

y = x W^T and dx = dy W have both sides in eight bits and sums in float32. dW = dy^T x, where W learns, stays
in the compute dtype: it sums over tokens, of which a video has 32,760, no multiple of 16. In dx the scales of
W's rows go into dy, so float8 codes of W serve both products. M rows, in and out features.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastdmd.precision import target_of

Products = Literal["float8", "mxfp8"]
GRAIN: dict[Products, int] = {"float8": 16, "mxfp8": 32}  # what in and out features are multiples of
BLOCK = 32  # numbers of MXFP8 that share a scale
TILE = (128, 4)  # rows and scales of a tile of MXFP8's scales, in the order that tensor cores read
# of a row's largest number, so that a row of zeros has a scale; far below gradients, which go down to 1e-15
# where they are of a mean over a video's numbers, times the scales of weights
LEAST = 1e-30


def float8_dtype(device: torch.device) -> torch.dtype:
    """Return the e4m3 that a device multiplies: AMD's CDNA 3 has one with another exponent and no -0."""
    return torch.float8_e4m3fnuz if target_of(device) == "gfx942" else torch.float8_e4m3fn


def coded_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the codes [M, K], int8 or float8, and the scales float32 [M, 1] of rows x [M, K]."""
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    # all read x as it is: eager code makes no float32 copy of it, and no absolute values
    most = torch.maximum(x.amax(1, keepdim=True), -x.amin(1, keepdim=True))
    scale = most.float().clamp(min=LEAST) / largest
    codes = x / scale
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scale


def mxfp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes [M, K] and the scales e8m0 [M, K / 32] of rows x [M, K].

    A scale is the power of two above largest / 448, as in NVIDIA's own conversion, so no code is cut off.
    """
    blocks = x.float().reshape(x.shape[0], -1, BLOCK)
    largest = blocks.abs().amax(2).clamp(min=LEAST)
    exponent = torch.log2(largest / torch.finfo(torch.float8_e4m3fn).max).ceil()
    codes = blocks * torch.exp2(-exponent)[:, :, None]
    return codes.flatten(1).to(torch.float8_e4m3fn), torch.exp2(exponent).to(torch.float8_e8m0fnu)


def tiled(scale: Tensor) -> Tensor:
    """Return scales [M, n] as tensor cores read them: tiles of 128 x 4, with rows 32 apart side by side.

    Source: cuBLAS, "1D block scaling factors layout".
    """
    rows, columns = (-(-size // tile) * tile for size, tile in zip(scale.shape, TILE, strict=True))
    # bytes, as e8m0 has no pad; those of the pad are never read
    padded = nn.functional.pad(
        scale.view(torch.uint8), (0, columns - scale.shape[1], 0, rows - scale.shape[0])
    )
    tiles = padded.view(rows // 128, 4, 32, columns // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.contiguous().flatten().view(torch.float8_e8m0fnu)


def product(
    a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], dtype: torch.dtype, fast: bool = False
) -> Tensor:
    """Return a b^T [M, N] of codes a [M, K] and b [N, K] with their scales.

    fast: sums of 14 bits between those in float32, which is what Hopper is quick with.
    """
    (a_codes, a_scale), (b_codes, b_scale) = a, b
    if a_scale.dtype == torch.float8_e8m0fnu:
        scales = tiled(a_scale), tiled(b_scale)
    else:
        scales = a_scale, b_scale.t()
    return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]
        # codes of a transposed weight, or of a gradient that comes transposed, are not in rows
        a_codes.contiguous(),
        b_codes.contiguous().t(),
        *scales,
        out_dtype=dtype,
        use_fast_accum=fast,
    )


def float8_input_gradient(grad: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Return dy W [M, in] of dy [M, out] and the codes and scales of W [out, in]."""
    columns = codes.t(), torch.ones_like(scale[:1]).expand(codes.shape[1], 1).contiguous()
    return product(coded_rows(grad * scale.t(), codes.dtype), columns, grad.dtype)


class _Float8(torch.autograd.Function):
    """x W^T in float8 of a weight in the compute dtype, with a gradient of W where it learns."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype, learns: bool) -> Tensor:
        ctx.save_for_backward(x if learns else None, weight)
        ctx.dtype = dtype
        rows, weights = coded_rows(x.flatten(0, -2), dtype), coded_rows(weight, dtype)
        return product(rows, weights, x.dtype, fast=True).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        rows = grads[0].flatten(0, -2)
        of_x = float8_input_gradient(rows, *coded_rows(weight, ctx.dtype)).view(*grads[0].shape[:-1], -1)
        return of_x, None if x is None else rows.t() @ x.flatten(0, -2), None, None


class _MXFP8(torch.autograd.Function):
    """The same in MXFP8: W has other codes in the backward, whose blocks are along its outputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, learns: bool) -> Tensor:
        ctx.save_for_backward(x if learns else None, weight)
        y = product(mxfp8_rows(x.flatten(0, -2)), mxfp8_rows(weight), x.dtype)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        rows = grads[0].flatten(0, -2)
        of_x = product(mxfp8_rows(rows), mxfp8_rows(weight.t()), rows.dtype).view(*grads[0].shape[:-1], -1)
        return of_x, None if x is None else rows.t() @ x.flatten(0, -2), None


class ProductLinear(nn.Linear):
    """A linear layer with products in eight bits, of a weight that is as large as ever."""

    bias: nn.Parameter | None  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, layer: nn.Linear, kind: Products, dtype: torch.dtype) -> None:
        """Take the parameters of a layer; dtype: of float8 codes."""
        with torch.device("meta"):
            super().__init__(layer.in_features, layer.out_features, bias=False)  # pyright: ignore[reportUnknownMemberType]
        self.weight, self.bias = layer.weight, layer.bias
        self.kind: Products = kind
        self.dtype = dtype

    def forward(self, input: Tensor) -> Tensor:
        float8: Any = _Float8.apply  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        mxfp8: Any = _MXFP8.apply  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        learns = self.weight.requires_grad
        if self.kind == "float8":
            y = float8(input, self.weight, self.dtype, learns)
        else:
            y = mxfp8(input, self.weight, learns)
        return y if self.bias is None else y + self.bias


def fits(layer: nn.Module, kind: Products) -> bool:
    """Return whether both sizes of a linear layer are such that its products can be in eight bits."""
    if not isinstance(layer, nn.Linear):
        return False
    return layer.in_features % GRAIN[kind] == 0 == layer.out_features % GRAIN[kind]
