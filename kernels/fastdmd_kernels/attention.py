"""Dense attention: the fastest implementation that this machine has, behind one signature.

B batch, Lq queries, Lk keys, N heads, K head dim. Not causal, scale 1 / sqrt(K).

On CPU and MPS it is PyTorch's own. On a GPU the candidates are tried once per (device, dtype, K) on random
inputs, forward and backward: those that fail or are wrong are put aside with the reason, the fastest of the
rest is remembered. That happens at the first eager call, or in `prepare`, which has to come before
torch.compile or a CUDA graph's capture sees the op. Where ranks must agree to the bit, let one choose:
`prepare(device, dtype, K, name=what_rank_0_chose)`. `use(name)` pins one for tests and benchmarks.
"""

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdmd_kernels import trial
from fastdmd_kernels.trial import Choice, Choices

Implementation = Callable[[Tensor, Tensor, Tensor], Tensor]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # q, k, v, dout

PROBE = (2, 4096, 4096, 8)  # B, Lq, Lk, N of the timing: about 1 ms forward and backward on a large GPU
SAMPLE = (2, 200, 77, 2)  # of the check of values and gradients; the same B, so that flex compiles once

# -------------------------------------------------------------------------------------------- implementations


def _sdpa(backend: SDPBackend) -> Implementation:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return _sdpa_default(q, k, v)

    return run


def _sdpa_default(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return nnf.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    ).transpose(1, 2)


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return importlib.import_module("xformers.ops").memory_efficient_attention(q, k, v)


def _flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # imported here: it brings the compiler's front end along
    from torch.nn.attention.flex_attention import flex_attention

    # uncompiled it is a dense attention in memory; inside a compiled function it is compiled with the rest
    run = flex_attention if torch.compiler.is_compiling() else torch.compile(flex_attention, dynamic=True)
    out = run(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    assert isinstance(out, Tensor)
    return out.transpose(1, 2)


IMPLEMENTATIONS: dict[str, Implementation] = {
    "sdpa": _sdpa_default,  # PyTorch's own choice
    "cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "flash": _sdpa(SDPBackend.FLASH_ATTENTION),
    "efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "xformers": _xformers,
    "flex": _flex,
    "math": _sdpa(SDPBackend.MATH),  # takes memory for all scores
}
CANDIDATES = ("cudnn", "flash", "efficient", "xformers", "flex", "math")  # on a GPU, in order of preference
PACKAGES = {"xformers": "xformers"}  # what a candidate needs beside torch


# ------------------------------------------------------------------------------------------------- the choice


_choices = Choices("attention", IMPLEMENTATIONS, "sdpa", lambda *key: _probe(*key))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute softmax(q k^T / sqrt(K)) v, [B, Lq, N, K], with gradients to all three.

    q [B, Lq, N, K], k, v [B, Lk, N, K], any strides. Raises ValueError, with the shapes, for others;
    RuntimeError where nothing on this GPU can do it, or where the choice would have to be made inside a
    compiled function or a captured graph.
    """
    _check(q, k, v)
    run = IMPLEMENTATIONS[_name(q.device, q.dtype, q.shape[-1])]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return run(q, k, v)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Compute `attention` in which a query sees only the keys for which mask [Lq, Lk], bool, is True.

    Every query has to see at least one. PyTorch's own on any device: of the implementations above most take
    no mask that is not made of causal or local windows. Work and memory are those of all Lq Lk pairs.
    """
    _check(q, k, v)
    if mask.dtype != torch.bool or mask.shape != (q.shape[1], k.shape[1]):
        raise ValueError(f"mask {mask.dtype} {list(mask.shape)}: needed is bool {[q.shape[1], k.shape[1]]}")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return nnf.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def prepare(device: torch.device, dtype: torch.dtype, K: int, name: str | None = None) -> str:
    """Choose now what `attention` will use for this device, dtype and head dim, and return its name.

    The choice is made by trial, or is `name`. A choice once made stays; another `name` replaces it. On CPU
    and MPS there is nothing to choose.
    """
    return _choices.prepare(device, dtype, K, name=name)


def use(name: str) -> AbstractContextManager[None]:
    """Run all dense attention of the process with one implementation, and restore what was before."""
    return _choices.use(name)


def describe(device: torch.device) -> dict[str, str]:
    """Tell `doctor` what is chosen, how long each took, and why others were not."""
    if _choices.forced:
        return {"attention": f"{_choices.forced} (forced)"}
    if device.type != "cuda":
        return {"attention": f"{_choices.default} ({device.type})"}
    chosen = {
        f"attention {str(dtype).removeprefix('torch.')} {K}": str(choice)
        for (of, dtype, K), choice in _choices.made.items()
        if device.index in (None, of.index)
    }
    return chosen or {"attention": "chosen at the first call"}


def _name(device: torch.device, dtype: torch.dtype, K: int) -> str:
    if _choices.forced is not None:
        return _choices.forced
    if device.type != "cuda":
        return _choices.default
    if (device, dtype, K) not in _choices.made:
        if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "call fastdmd_kernels.attention.prepare(device, dtype, K) before compiling or capturing"
            )
        prepare(device, dtype, K)
    return _choices.made[device, dtype, K].name


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if (
        q.ndim != 4
        or k.ndim != 4
        or v.shape != k.shape
        or k.shape[0] != q.shape[0]
        or k.shape[2:] != q.shape[2:]
    ):
        raise ValueError(f"{shapes}: needed are q [B, Lq, N, K], k and v [B, Lk, N, K]")
    if q.numel() == 0 or k.numel() == 0:
        raise ValueError(f"{shapes}: nothing to attend to")
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise ValueError(f"{shapes}: dtypes {[q.dtype, k.dtype, v.dtype]} are not one floating-point dtype")
    if not q.device == k.device == v.device:
        raise ValueError(f"{shapes}: on different devices {[str(x.device) for x in (q, k, v)]}")


# -------------------------------------------------------------------------------------------------- the probe


def _probe(device: torch.device, dtype: torch.dtype, K: int) -> Choice:
    """Choose of CANDIDATES by trial; RuntimeError, with all reasons, if none is right."""
    return trial.choose(
        f"attention for {dtype}, head dim {K}",
        device,
        {name: IMPLEMENTATIONS[name] for name in CANDIDATES},
        partial(_check_values, device=device, dtype=dtype, K=K),
        lambda run: _seconds(run, _random(PROBE, device, dtype, K)),
    )


def _random(sizes: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype, K: int) -> Inputs:
    """Draw inputs from a generator of their own: a run draws the same numbers with and without a probe."""
    B, Lq, Lk, N = sizes
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, dout = (
        torch.randn(B, L, N, K, device=device, dtype=dtype, generator=generator) for L in (Lq, Lk, Lk, Lq)
    )
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("blnk,bmnk->bnlm", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bnlm,bmnk->blnk", torch.softmax(scores, dim=-1), v)


def _check_values(run: Implementation, device: torch.device, dtype: torch.dtype, K: int) -> None:
    """Raise RuntimeError for errors of more than 4 times the rounding of the plain composition."""
    *inputs, dout = _random(SAMPLE, device, dtype, K)
    double = [x.detach().double().requires_grad_() for x in inputs]
    trial.hold(
        ("out", "dq", "dk", "dv"),
        trial.values(_plain, double, dout.double()),
        trial.values(_plain, inputs, dout),
        trial.values(run, inputs, dout),
    )


def _seconds(run: Implementation, inputs: Inputs) -> float:
    """Return the median seconds of a forward and backward."""
    *tokens, dout = inputs
    return trial.median_seconds(lambda: trial.values(run, tokens, dout), dout.device)
