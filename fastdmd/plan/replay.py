"""Calls of a network that keep no graph, traced once for each kind and replayed after.

Such a call leaves its outputs, its work, the peak of the memory inside it, and tokens in a causal cache.
"""

from collections import Counter
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fastdmd.batch import Cond
from fastdmd.models.net import PLAIN, Call, Net, Out
from fastdmd.plan.known import Made, described, made_of, remade, storage_of
from fastdmd.plan.live import Live, Phase


@dataclass(frozen=True)
class Recorded:
    """What a call leaves."""

    outputs: list[Made | None]  # F, then the maps
    kinds: list[str]  # what each output is for
    inside: Phase  # the bytes of its peak are those above what there was before
    tokens: int  # in its cache


class Replayed:
    """The forward of a network under `Live`."""

    def __init__(self, live: Live, net: Net) -> None:
        self.live, self.forward = live, net.forward
        self.parameters = list(net.parameters())
        self.calls: dict[Any, Recorded] = {}

    def __call__(self, x_t: Tensor, model_t: Tensor, cond: Cond, call: Call = PLAIN) -> Out:
        if torch.is_grad_enabled():
            return self.forward(x_t, model_t, cond, call)
        key = self.key(x_t, model_t, cond, call)
        if key not in self.calls:
            return self.record(key, x_t, model_t, cond, call)
        found = self.calls[key]
        if call.cache:
            call.cache.tokens = found.tokens
        self.live.include(found.inside, self.live.total, self.live.by)
        with _disable_current_modes():  # what it makes is added below
            F, *maps = remade(found.outputs, True, ())
        for output, kind in zip([F, *maps], found.kinds, strict=True):
            self.live.add(output, kind)
        return Out(F, maps)

    def key(self, x_t: Tensor, model_t: Tensor, cond: Cond, call: Call) -> Any:
        """Return what decides on the ops of a call: a product has others where gradient is asked for."""
        options = [getattr(call, f.name) for f in fields(call) if f.name != "cache"]
        tokens = call.cache.tokens if call.cache else None
        with torch._C.DisableTorchFunction():  # no shape that is read here is the network's
            learns = x_t.requires_grad, any(p.requires_grad for p in self.parameters)
            return described([x_t, model_t, *vars(cond).values(), *options, tokens, learns])

    def record(self, key: Any, x_t: Tensor, model_t: Tensor, cond: Cond, call: Call) -> Out:
        """Call the network, and keep what that leaves, unless there is more, as a table at first."""
        live, outer = self.live, self.live.phase
        total, by = live.total, Counter(live.by)
        live.phase = inside = Phase()
        out = self.forward(x_t, model_t, cond, call)
        live.phase = outer
        inside.peak -= total
        inside.by.subtract(by)
        live.include(inside, total, by)
        outputs = [out.F, *out.maps]
        held = [live.held[storage_of(x)] for x in outputs]
        with _disable_current_modes():
            made = made_of(outputs, [x_t, model_t, *vars(cond).values()])
        if made and live.total == total + sum(each.size for each in held):
            tokens = call.cache.tokens if call.cache else 0
            self.calls[key] = Recorded(made, [each.kind for each in held], inside, tokens)
        return out
