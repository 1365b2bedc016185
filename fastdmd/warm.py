"""Compile what a run will need before it starts: a step of it on the meta device, whose kernels compile and do not run.

Nothing is loaded but the shapes, so it takes no GPU and no weights: a job that starts later compiles nothing.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fastdmd.config import Config
from fastdmd.denoiser import Batch, Cond, Denoiser
from fastdmd.models.wan import WanConfig
from fastdmd.rng import Rng


class MetaRng(Rng):
    """Draws on the meta device; times and exits on the host, as any run has them."""

    def normal(self, shape: Sequence[int]) -> Tensor:
        return torch.empty(len(self._host), *shape, device="meta")


def step_on_meta(config: Config, sparsity: float) -> None:
    """Every phase of a step, forward and backward, with one of the networks' equal blocks; with all for heads."""
    method, schedule, nets = config.make_method(), config.make_schedule(), {}
    roles = config.method.roles
    for role, how in roles.items():
        if how == "heads":
            with torch.device("meta"):
                nets[role] = Denoiser(method.make_heads(nets), schedule)
            continue
        path, options = config.role_path(role), config.role_options(role)
        scratch = config.model.scratch
        architecture = config.family.read_config(Path(path)) if path else scratch and scratch[1]
        assert architecture  # the configuration was checked
        if isinstance(architecture, WanConfig) and "heads" not in roles.values():
            architecture = replace(architecture, num_layers=1)
        with torch.device("meta"):
            net = config.family.make(architecture, options)
        net.cast(config.precision.dtype)
        net.sparsity = sparsity if options.tile else 0.0
        nets[role] = Denoiser(net, schedule)
    B, shape = config.run.batch_size, config.data.latent_shape()
    text = Cond(torch.empty(B, 8, nets["student"].net.config.text_dim, device="meta"))
    batch, carry = Batch(text, text, shape, torch.empty(B, *shape, device="meta")), {}
    for index, phase in enumerate(dict.fromkeys(method.phases(0))):
        for role, denoiser in nets.items():
            denoiser.learn(role in method.trains(phase))
        rng = MetaRng(config.run.seed, 0, f"{phase}{index}", range(B), "cpu")
        loss, _ = method.loss(phase, nets, batch, rng, carry)
        loss.backward()


def sparsities(config: Config) -> set[float]:
    """All that the warm-up of [vsa] passes through: the lists of each have another length."""
    if config.vsa is None:
        return {0.0}
    every = config.vsa.warmup_every or config.run.max_steps
    return {config.vsa.sparsity_at(step) for step in range(0, config.run.max_steps, every)}


def warm(config: Config, target: str | None) -> str:
    """Compile for `target` ("sm_90", "gfx942", ..), or for this machine's GPU. -> what was done, in a line."""
    from fastdmd_kernels._triton.warm import compiling, this_gpu  # triton is not everywhere

    target = target or this_gpu()
    with compiling(target) as found:
        for sparsity in sorted(sparsities(config)):
            step_on_meta(config, sparsity)
    return f"{target}: compiled {found.count(False)} kernels, {found.count(True)} were in triton's cache"
