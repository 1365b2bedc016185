"""All randomness of a run, addressed by (seed, step, stream, sample).

So nothing has to be saved to resume exactly. Sample i of the global batch draws the same numbers however the
batch is split over ranks and micro-batches.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def seed_of(device_type: str, *address: int | str) -> int:
    """Return the seed of a generator at an address.

    It has 32 bits on the CPU, whose generator keeps no more, and 64 elsewhere: among 65,000 seeds of 32 bits
    two are equal in two of five runs.
    """
    digest = hashlib.sha256(repr(address).encode()).digest()
    return int.from_bytes(digest[: 4 if device_type == "cpu" else 8], "little")


def _generator(device: torch.device | str, *address: int | str) -> torch.Generator:
    device = torch.device(device)
    return torch.Generator(device).manual_seed(seed_of(device.type, *address))


class Rng:
    """The draws of one stream of one step, for samples of the global batch.

    Streams are "data", "student0", "critic1" and so on.
    """

    def __init__(
        self, seed: int, step: int, stream: str, samples: Sequence[int], device: torch.device | str
    ) -> None:
        self.device = torch.device(device)
        self._shared = _generator("cpu", seed, step, stream, "shared")
        self._host = [_generator("cpu", seed, step, stream, i, "host") for i in samples]
        self._noise = [_generator(self.device, seed, step, stream, i, "noise") for i in samples]

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Draw standard normal float32 [B, *shape] on the device."""
        return torch.stack([torch.randn(*shape, generator=g, device=self.device) for g in self._noise])

    def uniform(self) -> Tensor:
        """Draw U[0, 1) float64 [B] on the host."""
        return torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in self._host])

    def integers(self, high: int, shape: Sequence[int] = ()) -> Tensor:
        """Draw U{0 .. high - 1} int64 [B, *shape] on the host."""
        return torch.stack([torch.randint(high, tuple(shape), generator=g) for g in self._host])

    def shared_integer(self, high: int) -> int:
        """Draw U{0 .. high - 1} once, equal on all ranks and in all micro-batches of the step."""
        return int(torch.randint(high, (), generator=self._shared))
