"""Frozen linear layers of one byte a weight, with a scale for each output: int8, or float8 (e4m3).

Products are those of the compute dtype: it is a lever of memory, and saves no time. The backward keeps the
byte and its scale, and not a copy in the compute dtype, as torchao's tensors do (23.7 GB at 14B). Bytes and
scales are views of bfloat16, so that they shard, save and move as any other parameter of a block does.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from fastdmd.models.lora import is_own, modules_of

Kind = Literal["int8", "float8"]
DTYPES: dict[Kind, torch.dtype] = {"int8": torch.int8, "float8": torch.float8_e4m3fn}
LARGEST: dict[Kind, float] = {"int8": 127.0, "float8": 448.0}
PACKED, SCALE = "packed", "scale"


def is_code(name: str) -> bool:
    """Return whether a parameter has codes or scales, which are no numbers of its dtype."""
    return name.endswith((f".{PACKED}", f".{SCALE}"))


def quantized(weight: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """Return the codes [out, in] and the scales float32 [out, 1] of a weight [out, in]."""
    w = weight.float()
    scale = w.abs().amax(1, keepdim=True).clamp(min=1e-12) / LARGEST[kind]
    codes = w / scale
    if kind == "int8":
        codes = codes.round()
    return codes.to(DTYPES[kind]), scale


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


class LowBitLinear(nn.Module):
    """A frozen linear layer whose weight is one byte each."""

    def __init__(self, layer: nn.Linear, kind: Kind) -> None:
        """Take the sizes of a layer; its weight comes by `load`."""
        super().__init__()
        self.kind: Kind = kind
        self.in_features, self.out_features = layer.in_features, layer.out_features
        device = layer.weight.device
        packed = torch.empty(self.out_features, self.in_features // 2, dtype=torch.bfloat16, device=device)
        scale = torch.empty(self.out_features, 2, dtype=torch.bfloat16, device=device)
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = layer.bias

    def load(self, weight: Tensor, device: torch.device) -> None:
        """Take the codes of a weight [out, in]."""
        codes, scale = quantized(weight, self.kind)
        self.packed = nn.Parameter(codes.view(torch.bfloat16).to(device, copy=True), requires_grad=False)
        self.scale = nn.Parameter(scale.view(torch.bfloat16).to(device, copy=True), requires_grad=False)

    def parts(self) -> tuple[Tensor, Tensor]:
        """Return the codes [out, in] and the scales float32 [out, 1]."""
        return self.packed.view(DTYPES[self.kind]), self.scale.view(torch.float32)

    @property
    def weight(self) -> Tensor:
        """Return the weight float32 [out, in] that it computes with."""
        return restored(*self.parts(), torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        apply: Any = _Linear.apply  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        return apply(x, *self.parts(), self.bias)


def make_low_bit(blocks: Sequence[nn.Module], kind: Kind, keep: Callable[[str], bool]) -> int:
    """Put one-byte layers in the place of the linear layers of blocks, and return how many.

    Adapters and copies of modules, which train, stay; so do names that `keep` says. On the meta device:
    weights come by `LowBitLinear.load`.
    """
    count = 0
    for block in blocks:
        for name, layer in modules_of(block):
            if not isinstance(layer, nn.Linear) or is_own(f".{name}.") or keep(name) or layer.in_features % 2:
                continue
            above, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(above), leaf, LowBitLinear(layer, kind))
            count += 1
    return count
