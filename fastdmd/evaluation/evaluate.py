"""How good the student is: scores during the run, and at its end the comparison with the teacher."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from fastdmd.causal import frame_blocks, ode_blocks
from fastdmd.evaluation import validate
from fastdmd.evaluation.film import comparison
from fastdmd.evaluation.report import write_report
from fastdmd.evaluation.validate import Sampler
from fastdmd.files import write_atomic
from fastdmd.hardware import peak_memory_gb
from fastdmd.log import RunLog, finite
from fastdmd.run import Run

Scores = dict[str, float | None]
NOT_SCORED: Scores = {"oracle": None, "swd": None}


@contextmanager
def validation_weights(run: Run) -> Iterator[None]:
    """Give the student the weights that `validation.weights` names, and restore its own bit for bit after."""
    if run.ema is None or run.config.validation.weights == "student":
        yield
        return
    student = run.nets["student"]
    kept = {name: p.detach().clone() for name, p in student.trainable.items()}
    try:
        run.ema.copy_to(student.net)
        yield
    finally:
        for name, p in student.trainable.items():
            p.data.copy_(kept[name])


def samplers(run: Run) -> dict[str, Sampler]:
    """Return the samplers by the names of summary.json.

    They are the student's, the teacher's with many steps, and the teacher's with as many as the student's.
    """
    config, grid = run.config.validation, run.schedule.solver_grid(run.config.validation.teacher_steps)
    student, teacher = run.nets["student"], run.nets.get("teacher")
    w = run.method.guidance if config.teacher_guidance is None else config.teacher_guidance
    if run.method.times is None:
        k = run.method.frames_per_block
        if k is None:
            return {"student": validate.ode_sampler(student, run.schedule, grid, w)}
        blocks = frame_blocks(run.world.latent_shape[1], k)
        return {"student": lambda noise, cond, uncond, rng: ode_blocks(student, noise, grid, blocks, cond)}
    found: dict[str, Sampler] = {
        "student": lambda noise, cond, uncond, rng: run.method.sample(run.nets, noise, cond, uncond, rng)
    }
    if teacher is not None:
        found["teacher_50"] = validate.ode_sampler(teacher, run.schedule, grid, w)
        found["teacher_few"] = validate.ode_sampler(teacher, run.schedule, few_grid(run), w)
    return found


def few_grid(run: Run) -> Tensor:
    """Return the Euler steps of a teacher with the student's budget, float64 [steps + 1]."""
    method, schedule = run.method, run.schedule
    if method.few_grid is not None:
        return method.few_grid
    steps = run.config.validation.teacher_steps if method.times is None else len(method.times)
    return schedule.solver_grid(steps)


def sample(run: Run, who: str, prompts: Sequence[str], seed: int) -> Tensor:
    """Return latents [n, C, T, H, W] of one sampler."""
    config, known = run.config.validation, samplers(run)
    if who not in known:
        raise ValueError(f"'{who}' is not one of {', '.join(known)}, the samplers of this run")
    with validation_weights(run):
        return validate.generate(
            known[who], run.world, prompts, config.batch_size, seed, run.device, f"sampling {who}"
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


def keep_pictures(run: Run, name: str, x0: Tensor) -> None:
    for i, pixels in enumerate(run.world.pixels(x0[: run.config.validation.show])):
        validate.save_webp(run.folder / "samples" / name / f"{i:02d}.webp", pixels)


def finish(run: Run) -> None:
    """Write summary.json, the pictures of every sampler, report.html and comparison.webp."""
    scores = {"student": NOT_SCORED, "teacher_50": NOT_SCORED, "teacher_few": NOT_SCORED}
    for who in samplers(run) if run.config.validation.teacher_reference else ["student"]:
        x0, scores[who] = validation_sample(run, who)
        keep_pictures(run, who, x0)
    summary = {
        "scores": {who: finite(each) for who, each in scores.items()},
        "student_steps": len(few_grid(run)) - 1,  # of its sampler; of teacher_few's too
        "steps": run.step,
        "seconds": round(run.seconds, 1),
        "peak_mem_gb": round(peak_memory_gb(run.device), 3),
    }
    write_atomic(run.folder / "summary.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    shown = validate.prompts_for(run.config.validation, run.world)[: run.config.validation.show]
    write_report(run.folder, shown)
    comparison(run.folder, shown, run.folder / "comparison.webp")
