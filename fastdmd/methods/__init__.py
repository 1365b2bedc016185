"""The objectives. A method owns mathematics only: no optimizer, device, checkpoint or `requires_grad`."""

from collections.abc import Mapping, MutableMapping
from typing import Any, Literal, Protocol

from torch import Tensor

from fastdmd.denoiser import Batch, Denoiser
from fastdmd.methods.dmd import DMD
from fastdmd.methods.flow import Flow
from fastdmd.rng import Rng

Role = Literal["train", "frozen"]


class Method(Protocol):
    """One objective. A phase is named after the role that it trains."""

    roles: Mapping[str, Role]
    times: Tensor | None  # the student's own times, float64 [n] descending; None: it has no few-step sampler
    guidance: float  # of the teacher that the student is made after; 1 is off

    def phases(self, step: int) -> tuple[str, ...]:
        """What step `step` trains, in order."""
        ...

    def loss(
        self, phase: str, nets: Mapping[str, Denoiser], batch: Batch, rng: Rng, carry: MutableMapping[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics) of a micro-batch; `carry` is what the phases of one step share."""
        ...


METHODS = {"dmd": DMD, "flow": Flow}
