"""What consistency methods measure with: float32 (float64 stays), whatever the inputs are. B batch."""

from collections.abc import Iterator
from typing import Literal

from torch import Tensor

from fastdmd.methods.method import Share
from fastdmd.schedule import wide

Distance = Literal["l2", "huber"]
Target = Literal["ema", "student"]


def huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """Return pseudo-Huber sqrt((a - b)^2 + c^2) - c of each element (2310.14189).

    It is a square near zero and an absolute value far away; a loss is its mean.
    """
    square = (wide(a) - wide(b)).square()
    # sqrt(d^2 + c^2) - c would round to multiples of c's last bit
    return square / ((square + c * c).sqrt() + c)


def errors(kind: Distance, a: Tensor, b: Tensor, c: float) -> Tensor:
    """Return the error of each element of two tensors of one shape; c is pseudo-Huber's."""
    return huber(a, b, c) if kind == "huber" else (wide(a) - wide(b)).square()


def last_share(error: Tensor, weight: Tensor) -> Share:
    """Return the loss of the samples at the interval whose target is the teacher's own step.

    There the target's jump has no length, and nothing of the target network is in it. Over a long run this
    loss must not rise above where it began. The whole loss cannot show that: its other targets drift with the
    student.

    Args: error [B, ..] of each element; weight [B], 1 for those samples and 0 for the others.
    """
    return Share((weight * error.detach().flatten(1).mean(1)).sum(), weight.sum())


def target_warnings(target: Target) -> Iterator[str]:
    """Yield a line for a target network that is the student itself (bench/LOG.md has the measurements)."""
    if target == "student":
        yield (
            "method.target = 'student' moves with every step, and over a long run the samples' contrast "
            "drifts while the loss stays; set method.target = 'ema' with ema.decay = 0.99, or watch "
            "train/loss_last"
        )
