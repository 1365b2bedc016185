"""Norms of eager code: PyTorch's or Liger's, whichever this GPU runs faster.

D width, C channels. On CPU and MPS, and where a compiler fuses them with what is around, they are PyTorch's.
On a GPU both are tried once per (norm, device, dtype, sizes), as those of dense `attention` are: at the first
eager call, or in `prepare`, which has to come before a CUDA graph's capture. `use(name)` pins one.
"""

import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from fastdmd_kernels import trial
from fastdmd_kernels.trial import Choice, Choices

Sizes = tuple[int, ...]  # (D,) or, of group_norm, (C, groups)
Run = Callable[..., Tensor]  # of x, eps or groups and eps, then the weight and the bias

PROBE = {"rms_norm": (2, 4096), "layer_norm": (2, 4096), "group_norm": (2, 64, 64)}  # batch, then positions
SAMPLE = {"rms_norm": (2, 50), "layer_norm": (2, 50), "group_norm": (2, 9, 7)}  # of the check

# -------------------------------------------------------------------------------------------- implementations


def _torch_rms_norm(x: Tensor, eps: float, weight: Tensor) -> Tensor:
    return nnf.rms_norm(x, x.shape[-1:], weight, eps)


def _torch_layer_norm(
    x: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    return nnf.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _torch_group_norm(x: Tensor, groups: int, eps: float, weight: Tensor, bias: Tensor) -> Tensor:
    return nnf.group_norm(x, groups, weight, bias, eps)


def _liger(name: str, function: str) -> Any:
    # not the package's own names, which an environment variable may replace
    return getattr(importlib.import_module(f"liger_kernel.ops.{name}"), function)


def _liger_rms_norm(x: Tensor, eps: float, weight: Tensor) -> Tensor:
    # "gemma": all in float32 and rounded once, as PyTorch does
    return _liger("rms_norm", "LigerRMSNormFunction").apply(x, weight, eps, 0.0, "gemma", False)


def _liger_layer_norm(
    x: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    weight = x.new_ones(x.shape[-1]) if weight is None else weight
    bias = x.new_zeros(x.shape[-1]) if bias is None else bias
    return _liger("layer_norm", "LigerLayerNormFunction").apply(x, weight, bias, eps)


def _liger_group_norm(x: Tensor, groups: int, eps: float, weight: Tensor, bias: Tensor) -> Tensor:
    return _liger("group_norm", "LigerGroupNormFunction").apply(x, weight, bias, x.shape[1], groups, eps)


IMPLEMENTATIONS: Mapping[str, Mapping[str, Run]] = {
    "torch": {
        "rms_norm": _torch_rms_norm,
        "layer_norm": _torch_layer_norm,
        "group_norm": _torch_group_norm,
    },
    "liger": {
        "rms_norm": _liger_rms_norm,
        "layer_norm": _liger_layer_norm,
        "group_norm": _liger_group_norm,
    },
}
CANDIDATES = ("torch", "liger")  # on a GPU, in order of preference
PACKAGES = {"liger": "liger-kernel"}  # what a candidate needs beside torch


# ---------------------------------------------------------------------------------------------------- the ops

_choices = Choices("norms", IMPLEMENTATIONS, "torch", lambda *key: _probe(*key))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) weight over the last axis; x [.., D] and weight [D] of one dtype.

    Raises RuntimeError, as the other two do, where the choice would have to be made in a captured graph.
    """
    return _run("rms_norm", x, x.shape[-1:])(x, eps, weight)


def layer_norm(x: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Return (x - mean) / sqrt(var + eps) weight + bias over the last axis; x [.., D], all of one dtype."""
    return _run("layer_norm", x, x.shape[-1:])(x, eps, weight, bias)


def group_norm(x: Tensor, groups: int, eps: float, weight: Tensor, bias: Tensor) -> Tensor:
    """Return what `layer_norm` does over each of the groups of C / groups channels of x [B, C, ..].

    PyTorch's where the weight learns: Liger adds up its gradient by atomics, in no fixed order.
    """
    if weight.requires_grad and _choices.forced is None:
        return _torch_group_norm(x, groups, eps, weight, bias)
    return _run("group_norm", x, (x.shape[1], groups))(x, groups, eps, weight, bias)


def prepare(
    norm: str, device: torch.device, dtype: torch.dtype, sizes: Sizes, name: str | None = None
) -> str:
    """Choose now what a norm will use for this device, dtype and (D,) or (C, groups); return its name.

    The choice is made by trial, or is `name`. A choice once made stays; another `name` replaces it. On CPU
    and MPS there is nothing to choose.
    """
    return _choices.prepare(device, norm, dtype, tuple(sizes), name=name)


def use(name: str) -> AbstractContextManager[None]:
    """Run all eager norms of the process with one implementation, and restore what was before."""
    return _choices.use(name)


def describe(device: torch.device) -> dict[str, str]:
    """Tell `doctor` what is chosen, how long each took, and why others were not."""
    if _choices.forced:
        return {"norms": f"{_choices.forced} (forced)"}
    if device.type != "cuda":
        return {"norms": f"{_choices.default} ({device.type})"}
    chosen = {
        f"{norm} {str(dtype).removeprefix('torch.')} {'/'.join(map(str, sizes))}": str(choice)
        for (of, norm, dtype, sizes), choice in _choices.made.items()
        if device.index in (None, of.index)
    }
    return chosen or {"norms": "chosen at the first call"}


def _run(norm: str, x: Tensor, sizes: Sizes) -> Run:
    return IMPLEMENTATIONS[_name(norm, x.device, x.dtype, sizes)][norm]


def _name(norm: str, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> str:
    if torch.compiler.is_compiling():
        return "torch"
    if _choices.forced is not None:
        return _choices.forced
    if device.type != "cuda":
        return _choices.default
    key = (device, norm, dtype, tuple(sizes))
    if key not in _choices.made:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"call fastdmd_kernels.norm.prepare({norm!r}, device, dtype, {sizes}) before capturing"
            )
        _choices.prepare(*key)
    return _choices.made[key].name


# -------------------------------------------------------------------------------------------------- the trial


def _probe(device: torch.device, norm: str, dtype: torch.dtype, sizes: Sizes) -> Choice:
    """Choose of CANDIDATES by trial; RuntimeError, with all reasons, if none is right."""
    return trial.choose(
        f"{norm} for {dtype}, {sizes}",
        device,
        {name: IMPLEMENTATIONS[name][norm] for name in CANDIDATES},
        partial(_check_values, norm=norm, device=device, dtype=dtype, sizes=sizes),
        lambda run: _seconds(_bound(run, norm, sizes), _random(PROBE, norm, device, dtype, sizes)),
    )


def _bound(run: Run, norm: str, sizes: Sizes) -> Run:
    """Return a norm as a function of (x, weight, bias) alone, or of those that it has."""
    options = (sizes[1], 1e-5) if norm == "group_norm" else (1e-6,)
    return lambda x, *affine: run(x, *options, *affine)


def _random(
    shapes: Mapping[str, Sizes], norm: str, device: torch.device, dtype: torch.dtype, sizes: Sizes
) -> list[Tensor]:
    """Draw [x, weight, bias, dout] from a generator of their own; the mean of x is not zero."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, generator=generator)

    B, *positions = shapes[norm]
    shape = (B, sizes[0], *positions) if norm == "group_norm" else (B, *positions, sizes[0])
    affine = [draw(sizes[0]) for _ in range(1 if norm == "rms_norm" else 2)]
    inputs = [(draw(*shape) + 1).requires_grad_(), *(p.requires_grad_() for p in affine)]
    return [*inputs, draw(*shape)]


def _check_values(run: Run, norm: str, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> None:
    """Raise RuntimeError for errors of more than 4 times those of PyTorch's own."""
    *inputs, dout = _random(SAMPLE, norm, device, dtype, sizes)
    double = [x.detach().double().requires_grad_() for x in inputs]
    own = _bound(IMPLEMENTATIONS["torch"][norm], norm, sizes)
    trial.hold(
        ("out", "dx", "dweight", "dbias")[: 1 + len(inputs)],
        trial.values(own, double, dout.double()),
        trial.values(own, inputs, dout),
        trial.values(_bound(run, norm, sizes), inputs, dout),
    )


def _seconds(run: Run, inputs: list[Tensor]) -> float:
    """Return the median seconds of a forward and backward."""
    *leaves, dout = inputs
    return trial.median_seconds(lambda: trial.values(run, leaves, dout), dout.device)
