"""What a run's validations take: its student's samples now and then, and at the end its teacher's too."""

from collections.abc import Mapping

import torch

from fastdmd.batch import Cond
from fastdmd.config import Config
from fastdmd.denoiser import Denoiser
from fastdmd.methods import Method
from fastdmd.plan.live import Live, Phase
from fastdmd.plan.work import Work
from fastdmd.warm import MetaRng


def sampled(
    live: Live, config: Config, method: Method, nets: Mapping[str, Denoiser], cond: Cond, uncond: Cond
) -> dict[str, Phase]:
    """Return what a batch of validation samples takes, by sampler of those that a run's end compares.

    Where the student's average samples, what it learns lies aside. cond, uncond: of the batch.
    """
    settings = config.validation
    rng = MetaRng(settings.seed, 0, "sample", range(settings.batch_size), "cpu")
    found: dict[str, Phase] = {}
    swapped = config.ema and settings.weights == "ema"
    with torch.no_grad():
        with live.made_as("weights aside, student"):
            kept = [torch.empty_like(p) for p in nets["student"].trainable.values()] if swapped else []
        noise = rng.normal(config.latent_shape())
        for who, sampler in method.samplers(settings.teacher_steps, settings.teacher_guidance).items():
            if who == "student" or settings.teacher_reference:
                live.begin(f"validation: {who}")
                sampler.run(nets, noise, cond, uncond, rng)
                found[who] = live.phase
        del kept
    return found


def of_validations(config: Config, samplers: Mapping[str, Work]) -> Work:
    """Return the work of all validations of a run, from that of one batch by sampler."""
    settings = config.validation
    during = 1 + (config.run.max_steps - 1) // settings.every if settings.every else 0
    work = Work()
    for who, batch in samplers.items():
        times = during + 1 if who == "student" else 1
        work += batch * (times * settings.samples / settings.batch_size)
    return work
