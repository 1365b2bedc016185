"""What a GPU does in one kernel and the meta device would do in many: attention and RMSNorm, as ops.

Under `Fused` they stand in for PyTorch's functions, so that a plan keeps what a GPU keeps: of attention the
output and a log-sum-exp per query, of RMSNorm the reciprocal root per row. On the CPU they compute, so that a
plan can be held against a real step. B batch, N heads, L queries, K head dim, D width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten


@torch.library.custom_op("fastdmd::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return softmax(q k^T / sqrt(K)) v [B, N, L, K], and the log-sum-exp [B, N, L]."""
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return out.clone(), lse.clone()


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    B, N, L, K = q.shape
    # tokens before heads, as the kernels write them
    return q.new_empty(B, L, N, K).transpose(1, 2), q.new_empty(B, N, L, dtype=torch.float32)


@torch.library.custom_op("fastdmd::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients to q, k and v."""
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, False)


@attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _attention_setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _attention_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return attention_backward(grad.contiguous(), *ctx.saved_tensors)


attention.register_autograd(_attention_backward, setup_context=_attention_setup)


@torch.library.custom_op("fastdmd::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x / rms(x) weight over the last axis, [.., D], and 1 / rms(x) [..] float32."""
    scale = torch.rsqrt(x.float().square().mean(-1) + eps)
    return (x * scale[..., None] * weight).to(x.dtype), scale


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("fastdmd::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, learns: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients to x and to the weight, the second empty unless it learns."""
    normed = x * scale[..., None]
    inner = grad * weight
    dx = scale[..., None] * (inner - normed * (inner * normed).mean(-1, keepdim=True))
    if not learns:
        return dx.to(x.dtype), weight.new_empty(0)
    return dx.to(x.dtype), (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)


@rms_norm_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, learns: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape if learns else 0)


def _rms_norm_setup(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.mark_non_differentiable(output[1])


def _rms_norm_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None, None]:
    learns = ctx.needs_input_grad[1]
    dx, dweight = rms_norm_backward(grad, *ctx.saved_tensors, learns)
    return dx, dweight if learns else None, None


rms_norm.register_autograd(_rms_norm_backward, setup_context=_rms_norm_setup)


def backward(loss: Tensor) -> None:
    """Run a backward under `Fused`, recomputations included; torch's own by that name leaves the mode."""
    ones = torch.ones_like(loss)
    _engine_run_backward((loss,), (ones,), False, False, (), allow_unreachable=True, accumulate_grad=True)


class Fused(TorchFunctionMode):
    """Put the ops above in the place of PyTorch's functions; say before each call whether a graph is kept.

    An op that a graph keeps computes without grad mode itself, so only the call around it knows.
    """

    def __init__(self, before: Callable[[bool], None]) -> None:
        super().__init__()
        self.before = before

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.before(torch.is_grad_enabled())
        if func is nnf.scaled_dot_product_attention:
            q, k, v = args[:3]
            return attention(q, k, v)[0]
        if func is nnf.rms_norm:
            return rms_norm(args[0], kwargs["weight"], kwargs["eps"])[0]
        return func(*args, **kwargs)
