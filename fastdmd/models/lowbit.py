"""Frozen linear layers of one byte a weight, with a scale for each output: int8, or float8 (e4m3).

Products are those of the compute dtype, which saves memory and no time, or of the float8 codes themselves
(`products`). The backward keeps the byte and its scale, and not a copy in the compute dtype, as torchao's
tensors do (23.7 GB at 14B). Bytes and scales are views of bfloat16, so that they shard, save and move as any
other parameter of a block does.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from fastdmd.models.lora import is_own, modules_of
from fastdmd.models.products import (
    ProductLinear,
    Products,
    coded_rows,
    fits,
    float8_dtype,
    float8_input_gradient,
    product,
)

Kind = Literal["int8", "float8"]
PACKED, SCALE = "packed", "scale"


def is_code(name: str) -> bool:
    """Return whether a parameter has codes or scales, which are no numbers of its dtype."""
    return name.endswith((f".{PACKED}", f".{SCALE}"))


def restored(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight [out, in] of codes and scales."""
    return (codes.float() * scale).to(dtype)


class _Linear(torch.autograd.Function):
    """y = x W^T + b, where the graph keeps W's codes and scales alone; W has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, scale)
        return nnf.linear(x, restored(codes, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        codes, scale = ctx.saved_tensors
        (grad,) = grads
        return grad @ restored(codes, scale, grad.dtype), None, None, None


class _Float8Product(torch.autograd.Function):
    """y = x W^T with products of W's float8 codes, which are all that the graph keeps; W has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scale)
        y = product(coded_rows(x.flatten(0, -2), codes.dtype), (codes, scale), x.dtype, fast=True)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        (grad,) = grads
        of_x = float8_input_gradient(grad.flatten(0, -2), *ctx.saved_tensors)
        return of_x.view(*grad.shape[:-1], -1), None, None


class LowBitLinear(nn.Module):
    """A frozen linear layer whose weight is one byte each."""

    weight = None  # T5 asks whether its projection has one, for the dtype

    def __init__(self, layer: nn.Linear, dtype: torch.dtype, in_float8: bool = False) -> None:
        """Take the sizes of a layer; its weight comes by `load`.

        dtype: of the codes. in_float8: whether products are of the codes, and not of the compute dtype.
        """
        super().__init__()
        self.dtype, self.in_float8 = dtype, in_float8
        self.in_features, self.out_features = layer.in_features, layer.out_features
        device = layer.weight.device
        packed = torch.empty(self.out_features, self.in_features // 2, dtype=torch.bfloat16, device=device)
        scale = torch.empty(self.out_features, 2, dtype=torch.bfloat16, device=device)
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias: nn.Parameter | None = layer.bias

    def load(self, weight: Tensor, device: torch.device) -> None:
        """Take the codes of a weight [out, in]."""
        codes, scale = coded_rows(weight, self.dtype)
        self.packed = nn.Parameter(codes.view(torch.bfloat16).to(device, copy=True), requires_grad=False)
        self.scale = nn.Parameter(scale.view(torch.bfloat16).to(device, copy=True), requires_grad=False)

    def parts(self) -> tuple[Tensor, Tensor]:
        """Return the codes [out, in] and the scales float32 [out, 1]."""
        return self.packed.view(self.dtype), self.scale.view(torch.float32)

    def dense(self) -> Tensor:
        """Return the weight float32 [out, in] that it computes with."""
        return restored(*self.parts(), torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        plain: Any = _Linear.apply  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        in_float8: Any = _Float8Product.apply  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        if not self.in_float8:
            return plain(x, *self.parts(), self.bias)
        y = in_float8(x, *self.parts())
        return y if self.bias is None else y + self.bias


def code_dtype(kind: Kind, device: torch.device) -> torch.dtype:
    """Return the type of the codes of a kind on a device."""
    return torch.int8 if kind == "int8" else float8_dtype(device)


def layers_of(block: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Return the linear layers of a block by name, without adapters and copies of modules, which train."""
    modules = [(name, layer) for name, layer in modules_of(block) if isinstance(layer, nn.Linear)]
    return [(name, layer) for name, layer in modules if not is_own(f".{name}.")]


def replace_layer(block: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of another."""
    above, _, leaf = name.rpartition(".")
    setattr(block.get_submodule(above), leaf, layer)


def make_low_bit(
    blocks: Iterable[nn.Module], dtype: torch.dtype, keep: Callable[[str], bool], in_float8: bool
) -> None:
    """Put one-byte layers in the place of the linear layers of blocks, but for those that `keep` names.

    On the meta device: weights come by `LowBitLinear.load`.
    """
    for block in blocks:
        for name, layer in layers_of(block):
            if not keep(name) and layer.in_features % 2 == 0:
                replace_layer(block, name, LowBitLinear(layer, dtype, in_float8 and fits(layer, "float8")))


def make_products(
    blocks: Iterable[nn.Module], kind: Products, dtype: torch.dtype, keep: Callable[[str], bool]
) -> None:
    """Put layers with products in eight bits in the place of those of blocks.

    Those that `keep` names stay, and one-byte layers, which have products of their own.

    dtype: of float8 codes.
    """
    for block in blocks:
        for name, layer in layers_of(block):
            if not keep(name) and fits(layer, kind):
                replace_layer(block, name, ProductLinear(layer, kind, dtype))


def store_low_bit(module: nn.Module, dtype: torch.dtype) -> None:
    """Take the weights of a module's linear layers as one byte each, where they are."""
    for name, layer in layers_of(module):
        if layer.in_features % 2 == 0:
            low = LowBitLinear(layer, dtype)
            low.load(layer.weight.detach(), layer.weight.device)
            replace_layer(module, name, low)
