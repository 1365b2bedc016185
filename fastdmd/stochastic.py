"""AdamW on bfloat16 weights that have no float32 masters: updates are rounded at random (2010.06192).

Rounded to the nearest, an update of less than 1/512 of a weight is lost, and at a learning rate of 1e-5
nearly all are. Rounded up with the probability of what is cut off, the weight moves by the update on average.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastdmd.rng import seed_of

CUT = 16  # bits of a float32 that bfloat16 has not


def rounded(x: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 to one of its neighbours in bfloat16: to the larger by the share that is cut off."""
    noise = torch.randint(1 << CUT, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    bits = (x.view(torch.int32) + noise) & ~((1 << CUT) - 1)
    return bits.view(torch.float32).to(torch.bfloat16)


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW by torch's fused kernel, one tensor at a time in float32; moments are float32."""

    def __init__(
        self,
        weights: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        seed: int,
    ) -> None:
        """seed: of the roundings, which the run's step and a weight's place in the list complete."""
        super().__init__(weights, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.seed = seed
        self.now = 0  # the run's step, to be set before each update: a weight's own count is on the device

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the weights that have a gradient, which is float32."""
        (group,) = self.param_groups
        for index, weight in enumerate(group["params"]):
            if weight.grad is None:
                continue
            state = self.state[weight]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
                for moment in ("exp_avg", "exp_avg_sq"):
                    state[moment] = torch.zeros_like(weight, dtype=torch.float32)
            value = weight.float()
            state["step"] += 1
            torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
                [value],
                [weight.grad],
                [state["exp_avg"]],
                [state["exp_avg_sq"]],
                [],
                [state["step"]],
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
            if weight.dtype == torch.bfloat16:
                address = seed_of(weight.device.type, self.seed, self.now, "rounding", index)
                weight.copy_(rounded(value, torch.Generator(weight.device).manual_seed(address)))
