"""A dense attention whose backward recomputes S^T as a product of its own, as the triton kernels do."""

import math

import torch
from torch import Tensor


class Recomputed(torch.autograd.Function):
    """Keep the rows' maxima and sums, and compute the probabilities again in the backward.

    They come from S for dq and from S^T for dk and dv. S^T is summed from the last channel to the first: it
    rounds otherwise than S whatever the processor does.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~keep, -math.inf)
        top = scores.amax(-1, keepdim=True)
        total = (scores - top).exp().sum(-1, keepdim=True)
        out = ((scores - top).exp() / total) @ v
        ctx.save_for_backward(q, k, v, keep, scores, top, total, out)
        return out

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, keep, scores, top, total, out = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        delta = (dout * out).sum(-1, keepdim=True)
        p = (scores - top).exp() / total
        dq = (p * (dout @ v.mT - delta)) @ k * scale
        scores_t = (k.flip(-1) @ q.flip(-1).mT * scale).masked_fill(~keep.mT, -math.inf)
        p_t = (scores_t - top.mT).exp() / total.mT
        dk = (p_t * (v @ dout.mT - delta.mT)) @ q * scale
        return dq, dk, p_t @ dout, None


def recomputed(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Attend over the pairs that `keep` [B, N, Lq, Lk] allows, at least one a row; q, k, v [B, N, L, K]."""
    return Recomputed.apply(q, k, v, keep)
