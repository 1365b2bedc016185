"""Compile what a run will need before it starts: a step of it on the meta device, whose kernels compile and do not run.

Nothing is loaded but the shapes, so it takes no GPU and no weights: a job that starts later compiles nothing.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdmd.config import Config
from fastdmd.denoiser import Batch, Cond, Denoiser
from fastdmd.methods import Method
from fastdmd.models.lora import add_lora, lora_parameters
from fastdmd.models.sdxl.net import SDXLConfig
from fastdmd.models.wan.layers import WanConfig
from fastdmd.rng import Rng

TEXT_TOKENS = 8  # of a prompt; no kernel depends on it


class MetaRng(Rng):
    """Draws on the meta device; times and exits on the host, as any run has them."""

    def normal(self, shape: Sequence[int]) -> Tensor:
        return torch.empty(len(self._host), *shape, device="meta")


def nets_on_meta(config: Config, method: Method, depth: int | None = None) -> dict[str, Denoiser]:
    """Every role's network as a run makes it, without values; `depth` of equal blocks in a row, absent: all."""
    schedule, nets = config.make_schedule(), {}
    for role, how in config.method.roles.items():
        lora = config.role_lora(role)
        with torch.device("meta"):
            if how == "heads":
                net = method.make_heads(nets)
            else:
                architecture = read_architecture(config, role)
                if depth is not None:
                    architecture = shallow(architecture, depth)
                net = config.family.make(architecture, config.role_options(role))
                if lora:
                    add_lora(net, lora.rank, lora.alpha, lora.targets, config.run.seed)
                net.checkpointing = config.memory.checkpointing == "full"
                net.cast(config.precision.dtype)
        nets[role] = Denoiser(net, schedule, lora_parameters(net, lora.modules) if lora else None)
    return nets


def read_architecture(config: Config, role: str) -> Any:
    if config.model.scratch:
        return config.model.scratch[1]
    path = config.role_path(role)
    assert path  # the configuration was checked
    return config.family.read_config(Path(path))


def shallow(architecture: Any, depth: int) -> Any:
    """With at most `depth` of the blocks that are alike: Wan's, or an SDXL's transformer blocks of one level."""
    if isinstance(architecture, WanConfig):
        return replace(architecture, num_layers=min(depth, architecture.num_layers))
    levels = tuple(min(depth, n) for n in architecture.transformer_layers_per_block)
    return replace(architecture, transformer_layers_per_block=levels)


def step_on_meta(config: Config, sparsity: float, depth: int | None = None) -> dict[str, Denoiser]:
    """Every phase of a step, forward and backward, with `depth` blocks; absent: with one, or with all for heads.

    -> the networks, with gradients.
    """
    method = config.make_method()
    if depth is None and "heads" not in config.method.roles.values():
        depth = 1
    nets = nets_on_meta(config, method, depth)
    for role, denoiser in nets.items():
        if config.role_options(role).tile:
            denoiser.net.sparsity = sparsity
    B, shape, net = config.run.batch_size, config.data.latent_shape(), nets["student"].net
    with torch.device("meta"):
        cond, x0 = config.data.with_size(empty_cond(B, net.config)), torch.empty(B, *shape)
    batch, carry = Batch(cond, cond, shape, x0), {}
    for index, phase in enumerate(dict.fromkeys(method.phases(0))):
        for role, denoiser in nets.items():
            denoiser.learn(role in method.trains(phase))
        rng = MetaRng(config.run.seed, 0, f"{phase}{index}", range(B), "cpu")
        loss, _ = method.loss(phase, nets, batch, rng, carry)
        loss.backward()
    return nets


def empty_cond(B: int, architecture: Any) -> Cond:
    """Embeddings of B prompts for a network of that architecture, on torch's current device."""
    pooled = torch.empty(B, architecture.pooled_dim) if isinstance(architecture, SDXLConfig) else None
    return Cond(torch.empty(B, TEXT_TOKENS, architecture.text_dim), pooled)


def sparsities(config: Config) -> set[float]:
    """All that the warm-up of [vsa] passes through: the lists of each have another length."""
    if config.vsa is None:
        return {0.0}
    every = config.vsa.warmup_every or config.run.max_steps
    return {config.vsa.sparsity_at(step) for step in range(0, config.run.max_steps, every)}


def warm(config: Config, target: str | None) -> str:
    """Compile for `target` ("sm_90", "gfx942", ..), or for this machine's GPU. -> what was done, in a line."""
    from fastdmd_kernels.triton_warm import compiling, this_gpu  # triton is not everywhere

    target = target or this_gpu()
    with compiling(target) as found:
        for sparsity in sorted(sparsities(config)):
            step_on_meta(config, sparsity)
    return f"{target}: compiled {found.count(False)} kernels, {found.count(True)} were in triton's cache"
