"""What a run's validations compute: its student's samples now and then, and at the end its teacher's too."""

from collections.abc import Mapping

import torch

from fastdmd.batch import Batch
from fastdmd.config import Config
from fastdmd.denoiser import Denoiser
from fastdmd.methods import Method
from fastdmd.plan.live import Live
from fastdmd.plan.work import Work
from fastdmd.warm import MetaRng


def sampled(
    live: Live, config: Config, method: Method, nets: Mapping[str, Denoiser], batch: Batch
) -> dict[str, Work]:
    """Return the work of a batch of validation samples, by sampler of those that a run's end compares."""
    settings = config.validation
    rng = MetaRng(settings.seed, 0, "sample", range(settings.batch_size), "cpu")
    found: dict[str, Work] = {}
    with torch.no_grad():
        rows = torch.zeros(settings.batch_size, dtype=torch.int64, device="meta")
        cond, uncond = batch.cond.rows(rows), batch.uncond.rows(rows)
        noise = rng.normal(batch.latent_shape)
        for who, sampler in method.samplers(settings.teacher_steps, settings.teacher_guidance).items():
            if who == "student" or settings.teacher_reference:
                live.begin(f"sampling, {who}")
                sampler.run(nets, noise, cond, uncond, rng)
                found[who] = live.phase.work
    return found


def of_validations(config: Config, samplers: Mapping[str, Work]) -> Work:
    """Return the work of all validations of a run, from that of one batch."""
    settings = config.validation
    during = 1 + (config.run.max_steps - 1) // settings.every if settings.every else 0
    work = Work()
    for who, batch in samplers.items():
        times = during + 1 if who == "student" else 1
        work += batch * (times * settings.samples / settings.batch_size)
    return work
