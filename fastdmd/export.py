"""A student as a diffusers folder and as a file of adapters."""

from pathlib import Path
from typing import Any

from fastdmd.config import Config
from fastdmd.models.lora import export_lora, merged
from fastdmd.resume import reopen


def exported_scheduler(config: Config) -> Any:
    """diffusers' scheduler for the student's steps; ValueError when none has them."""
    method = config.make_method()
    times = method.times.tolist() if method.renoises and method.times is not None else None
    return config.family.make_scheduler(times, config.make_schedule(), exported_from(config))


def exported_from(config: Config) -> Path | None:
    """The folder whose frozen parts an export copies."""
    return Path(config.model.path) if config.model.path else None


def export_student(path: Path, out: Path) -> None:
    """The student of a run's newest checkpoint, under its validation weights, as a diffusers pipeline folder.

    Adapters are merged into it, and stand beside it as pytorch_lora_weights.safetensors where they are all there is.
    """
    run = reopen(path)
    config, net = run.config, run.nets["student"].net
    averaged = run.ema if config.validation.weights == "ema" else None
    weights = learned = averaged.shadow if averaged else run.optimizers["student"].masters
    if config.lora:
        parameters = dict(
            net.float().named_parameters()
        )  # in bf16 W + B A would lose what is under W / 256 of B A
        for name, value in learned.items():
            parameters[name].data.copy_(value)
        weights = merged(net)
    config.family.export(out, net.config, weights, exported_scheduler(config), exported_from(config))
    if config.lora and not config.lora.modules:
        file = out / "pytorch_lora_weights.safetensors"
        export_lora(file, learned, config.lora.rank, config.lora.alpha, config.family.lora_prefix)
