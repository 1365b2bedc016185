"""What consistency methods measure with: float32 (float64 stays), whatever the inputs are."""

from typing import Literal

from torch import Tensor

from fastdmd.schedule import wide

Distance = Literal["l2", "huber"]


def huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """Pseudo-Huber mean(sqrt((a - b)^2 + c^2) - c): squares near zero, absolute values far away (2310.14189)."""
    square = (wide(a) - wide(b)).square()
    # sqrt(d^2 + c^2) - c would round to multiples of c's last bit
    return (square / ((square + c * c).sqrt() + c)).mean()


def distance(kind: Distance, a: Tensor, b: Tensor, c: float) -> Tensor:
    """Mean distance of two tensors of one shape; c is pseudo-Huber's."""
    return huber(a, b, c) if kind == "huber" else (wide(a) - wide(b)).square().mean()
