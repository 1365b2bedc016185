"""Compile the kernels that a run will need before it starts: a step of it on the meta device.

There they compile and do not run. Nothing is loaded but the shapes, so it takes no GPU and no weights.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fastdmd.batch import Batch, Cond
from fastdmd.capture import Transfers
from fastdmd.config import Config
from fastdmd.denoiser import Denoiser
from fastdmd.latents import Resolution
from fastdmd.methods import Method
from fastdmd.models.family import AnyFamily
from fastdmd.rng import Rng
from fastdmd.roles import Place, build_nets, roles_of

TEXT_TOKENS = 8  # of a prompt; no kernel depends on it


class MetaRng(Rng):
    """Draws on the meta device; times and exits on the host, as any run has them."""

    def normal(self, shape: Sequence[int]) -> Tensor:
        return torch.empty(len(self._host), *shape, device="meta")


def nets_on_meta(config: Config, method: Method, depth: int | None = None) -> dict[str, Denoiser]:
    """Return every role's network as a run has it, without values.

    depth: of the blocks that are alike, at most so many; absent: all.
    """
    place = Place(torch.device("meta"), config.precision.dtype)
    roles = roles_of(config)
    depths = None if depth is None else dict.fromkeys(roles, depth)
    built = build_nets(config, roles, method, config.make_schedule(), place, depths)
    return {name: each.denoiser for name, each in built.items()}


def step_on_meta(
    config: Config, sparsity: float, depth: int | None = None, watch: Transfers | None = None
) -> dict[str, Denoiser]:
    """Do every phase of a step, forward and backward, and return the networks with gradients.

    depth: of the blocks that are alike; absent: one, or all where a method has heads. watch: counts in losses
    and backwards.
    """
    method = config.make_method()
    if depth is None and "heads" not in config.method.roles.values():
        depth = 1
    nets = nets_on_meta(config, method, depth)
    for role, denoiser in nets.items():
        if config.role_options(role).tile:
            denoiser.keep(sparsity, config.latent_shape())
    B = config.run.batch_size
    shape = config.latent_shape()
    net = nets["student"].net
    with torch.device("meta"):
        cond = empty_cond(B, config.family, net.config, config.data.resolution)
        x0 = torch.empty(B, *shape)
    batch, carry = Batch(cond, cond, shape, x0), {}
    for index, phase in enumerate(dict.fromkeys(method.phases(0))):
        for role, denoiser in nets.items():
            denoiser.learn(role in method.trains(phase))
        rng = MetaRng(config.run.seed, 0, f"{phase}{index}", range(B), "cpu")
        draws = method.draw(phase, rng, shape, carry)
        with watch or nullcontext():
            loss, _ = method.loss(phase, nets, batch, draws, carry)
            loss.backward()
    return nets


def count_transfers(config: Config) -> tuple[int, int]:
    """Return how often the phases of a step read the device, and how many constants they copy to it.

    Draws and coefficients come before them, in one copy. A read of the meta device is refused.
    """
    watch = Transfers()
    step_on_meta(config, config.vsa.sparsity if config.vsa else 0.0, watch=watch)
    return sum(watch.reads.values()), sum(watch.constants.values())


def empty_cond(
    B: int, family: AnyFamily, architecture: Any, resolution: Resolution, text_tokens: int = TEXT_TOKENS
) -> Cond:
    """Return what B samples are conditioned on, for a network of that architecture.

    It is on torch's current device.
    """
    pooled = torch.empty(B, architecture.pooled_dim) if "pooled_dim" in family.conditioning else None
    cond = Cond(torch.empty(B, text_tokens, architecture.text_dim), pooled)
    return family.sized(cond, resolution)


def sparsities(config: Config) -> set[float]:
    """Return all sparsities that the warm-up of [vsa] passes through: each has lists of another length."""
    if config.vsa is None:
        return {0.0}
    every = config.vsa.warmup_every or config.run.max_steps
    return {config.vsa.sparsity_at(step) for step in range(0, config.run.max_steps, every)}


def warm_kernels(config: Config, target: str | None) -> str:
    """Compile for `target` ("sm_90", "gfx942", ..), or for this machine's GPU; return what was done."""
    from fastdmd_kernels.triton_warm import compiling, this_gpu  # triton is not everywhere

    target = target or this_gpu()
    with compiling(target) as found:
        for sparsity in sorted(sparsities(config)):
            step_on_meta(config, sparsity)
    return f"{target}: compiled {found.count(False)} kernels, {found.count(True)} were in triton's cache"
