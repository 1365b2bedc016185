"""How good the student is: scores during the run, and at its end the comparison with the teacher."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from fastdmd.config import Config
from fastdmd.evaluation import validate
from fastdmd.evaluation.film import comparison
from fastdmd.evaluation.report import write_report
from fastdmd.files import write_atomic
from fastdmd.hardware import peak_memory_gb
from fastdmd.log import RunLog, finite
from fastdmd.methods.method import Sampler
from fastdmd.plan.preflight import planned_gb
from fastdmd.resume import restored
from fastdmd.run import Run
from fastdmd.warm import count_transfers

Scores = dict[str, float | None]
NOT_SCORED: Scores = {"oracle": None, "swd": None}


@contextmanager
def validation_weights(run: Run) -> Iterator[None]:
    """Give the student the weights that `validation.weights` names, and restore its own bit for bit after."""
    if run.ema is None or run.config.validation.weights == "student":  # or the student is not built
        yield
        return
    student = run.nets["student"]
    kept = {name: p.detach().clone() for name, p in student.trainable.items()}
    try:
        run.ema.copy_to(student.trainable)
        yield
    finally:
        for name, p in student.trainable.items():
            p.data.copy_(kept[name])


def samplers(config: Config) -> dict[str, Sampler]:
    """Return the samplers of a run by the names of summary.json."""
    settings = config.validation
    return config.make_method().samplers(settings.teacher_steps, settings.teacher_guidance)


def compared(config: Config) -> dict[str, Sampler]:
    """Return the samplers that a run's end compares, the student's first."""
    every = samplers(config)
    return every if config.validation.teacher_reference else {"student": every["student"]}


def named(config: Config, who: str) -> Sampler:
    """Return a sampler by its name; ValueError for a name that this run has not."""
    known = samplers(config)
    if who not in known:
        raise ValueError(f"'{who}' is not one of {', '.join(known)}, the samplers of this run")
    return known[who]


def opened(config: Config, wanted: Iterable[Sampler]) -> Run:
    """Return a run at its newest checkpoint, with the networks that some samplers take and no others."""
    return restored(config, {role for sampler in wanted for role in sampler.roles})


def sample(run: Run, who: str, prompts: Sequence[str], seed: int) -> Tensor:
    """Return latents [n, C, T, H, W] of one sampler."""
    sampler, size = named(run.config, who), run.config.validation.batch_size
    with validation_weights(run):
        return validate.generate(
            sampler, run.nets, run.world, prompts, size, seed, run.device, f"sampling {who}"
        )


def validation_sample(run: Run, who: str) -> tuple[Tensor, Scores]:
    """Return the fixed validation videos of one sampler, and their scores."""
    config = run.config.validation
    prompts = validate.prompts_for(config, run.world)
    x0 = sample(run, who, prompts, config.seed)
    return x0, run.world.scores(x0, prompts, config.seed)


def write_samples(run: Run, who: str, prompts: Sequence[str] | None, folder: Path, seed: int) -> Path:
    """Write videos for prompts as NN.webp, and latents.safetensors; return the folder.

    prompts: absent, those of the validation that are shown.
    """
    prompts = prompts or validate.prompts_for(run.config.validation, run.world)[: run.config.validation.show]
    x0 = sample(run, who, prompts, seed)
    for i, pixels in enumerate(run.world.pixels(x0)):
        validate.save_webp(folder / f"{i:02d}.webp", pixels)
    save_file({"x0": x0.cpu().contiguous()}, folder / "latents.safetensors")
    return folder


def validate_step(run: Run, log: RunLog) -> None:
    """Keep the student's pictures now, and its scores."""
    x0, scores = validation_sample(run, "student")
    keep_pictures(run, f"step_{run.step:08d}", x0)
    log.write(run.step, {f"valid/{name}": value for name, value in scores.items()})


def transfers(run: Run) -> dict[str, int]:
    """Return the reads of the device and the constants of a phase, where the run is compiled."""
    if run.capture.mode == "off":
        return {}
    reads, constants = count_transfers(run.config)
    return {"reads_per_phase": reads + 1, "constants": constants}  # the trainer's own read of all numbers


def keep_pictures(run: Run, name: str, x0: Tensor) -> None:
    for i, pixels in enumerate(run.world.pixels(x0[: run.config.validation.show])):
        validate.save_webp(run.folder / "samples" / name / f"{i:02d}.webp", pixels)


def finish(run: Run) -> None:
    """Write summary.json, the pictures of every sampler, report.html and comparison.webp."""
    scores = {"student": NOT_SCORED, "teacher": NOT_SCORED, "teacher_few": NOT_SCORED}
    for who in compared(run.config):
        x0, scores[who] = validation_sample(run, who)
        keep_pictures(run, who, x0)
    summary = {
        "scores": {who: finite(each) for who, each in scores.items()},
        "student_steps": samplers(run.config)["student"].steps,  # teacher_few's too
        "steps": run.step,
        "seconds": round(run.seconds, 1),
        "peak_mem_gb": round(peak_memory_gb(run.device), 3),
        "planned_peak_gb": planned_gb(run.folder),
        "capture": run.capture.summary() | transfers(run),
    }
    write_atomic(run.folder / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    shown = validate.prompts_for(run.config.validation, run.world)[: run.config.validation.show]
    write_report(run.folder, shown)
    comparison(run.folder, shown, run.folder / "comparison.webp")
