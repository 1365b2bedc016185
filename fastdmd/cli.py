"""The command line. Heavy imports are inside the commands: `fastdmd --help` has to answer at once."""

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Few-step distillation of video and image diffusion models.",
)

RunFolder = Annotated[Path, typer.Argument(help="A run's folder (its output_dir).")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.path=value, values in TOML syntax.")]
USER_ERROR, DIVERGED, INTERRUPTED = 2, 1, 130


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Print user errors as one line each, without a traceback."""
    one_process()
    import torch
    from safetensors import SafetensorError

    memory = (
        "out of memory ({}); lower run.batch_size and raise run.grad_accum, "
        "or set memory.checkpointing = 'full'"
    )
    try:
        yield
    except (ValueError, OSError) as e:
        raise failure(str(e)) from None
    except SafetensorError as e:  # of a text encoder or a VAE; other files are named
        raise failure(f"a weights file cannot be read ({e}); download or save the folder again") from None
    except (torch.OutOfMemoryError, MemoryError) as e:
        raise failure(memory.format(first_words(e))) from None
    except RuntimeError as e:
        if "can't allocate memory" not in str(e):  # as a CPU's allocator says it
            raise
        raise failure(memory.format(first_words(e))) from None


def first_words(e: BaseException) -> str:
    """Return the first two sentences of an error: what was asked for, without the allocator's advice."""
    return ". ".join(str(e).split("\n")[0].split(". ")[:2]).rstrip(".") or "the host's"


def failure(text: str, code: int = USER_ERROR) -> typer.Exit:
    """Print an error, a line each, and return the exit to raise."""
    for line in text.split("\n"):
        print(f"error: {line}", file=sys.stderr)
    return typer.Exit(code)


def one_process() -> None:
    """Stop when a launcher has started several processes: each would train, or write, the same run alone."""
    world = os.environ.get("WORLD_SIZE", "1")
    if world not in ("", "1"):
        raise failure(
            f"WORLD_SIZE = {world}: several GPUs are not built yet; start one process, without a launcher"
        )


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A complete TOML file; see configs/.")],
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="Start a run that cannot fit.")] = False,
) -> None:
    """Distil (or pre-train) as CONFIG says; goes on from the newest checkpoint of its output_dir."""
    with user_errors():
        from fastdmd import config as configs
        from fastdmd import run as runs
        from fastdmd import train as trainer

        loaded = configs.load(config, overrides or ())
        try:
            run = trainer.train(loaded, force)
        except runs.Diverged as e:
            raise failure(str(e), DIVERGED) from None
        except (runs.Interrupted, KeyboardInterrupt) as e:
            again = [] if loaded.checkpoint.resume == "latest" else ['checkpoint.resume="latest"']
            words = shlex.join(["fastdmd", "train", str(config), *(overrides or ()), *again])
            print(f"\n{str(e) or 'interrupted'}\nresume with: {words}", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
    from fastdmd.evaluation.report import table

    print(table(run.folder))
    print(f"report: {run.folder / 'report.html'}")


@app.command()
def sample(
    run: RunFolder,
    overrides: Overrides = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="May be given several times; absent: the validation prompts.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="Folder for the videos; absent: RUN/samples/cli.")] = None,
    seed: Annotated[int, typer.Option(help="Sample i's noise depends on the seed and i only.")] = 0,
    who: Annotated[str, typer.Option(help="student, teacher or teacher_few.")] = "student",
) -> None:
    """Sample videos with a run's student; writes NN.webp and latents.safetensors."""
    with user_errors():
        from fastdmd.evaluation import evaluate
        from fastdmd.export import check_samples
        from fastdmd.resume import config_of

        config = config_of(run, overrides or ())
        folder = run / "samples" / "cli" if out is None else check_samples(out, config)
        opened = evaluate.opened(config, [evaluate.named(config, who)])
        evaluate.write_samples(opened, who, prompt or None, folder, seed)
    print(f"wrote {folder}")


@app.command(name="eval")
def evaluate_run(run: RunFolder, overrides: Overrides = None) -> None:
    """Score a run's newest checkpoint against its teacher again; writes summary.json and report.html."""
    with user_errors():
        from fastdmd.evaluation import evaluate
        from fastdmd.evaluation.report import table
        from fastdmd.resume import config_of

        config = config_of(run, overrides or ())
        evaluate.finish(evaluate.opened(config, evaluate.compared(config).values()))
    print(table(run))


@app.command()
def export(
    run: RunFolder,
    out: Annotated[str, typer.Option(help="The diffusers folder to write.")],
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
) -> None:
    """Write a run's student as a diffusers folder, whose scheduler takes its own few steps."""
    with user_errors():
        from fastdmd.export import export_student, opening

        notes = export_student(run, out, force, overrides or ())
        line = opening(Path(out).expanduser(), out)
    for note in notes:
        print(f"warning: {note}; use `fastdmd sample`", file=sys.stderr)
    print(f"wrote {out}\nopen it with diffusers: {line}")


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="A complete TOML file; its data may be elsewhere.")],
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="a100, b200, h100, h200, mi300x, rtx4090 or rtx5090.")] = "h100",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of text.")] = False,
) -> None:
    """Say what CONFIG's run takes: memory by phase and role, time, updates, and whether it fits."""
    with user_errors():
        import json

        from fastdmd import config as configs
        from fastdmd.plan import report
        from fastdmd.plan.estimate import make_plan
        from fastdmd.plan.gpus import gpu_named
        from fastdmd.plan.levers import largest_batch, remedies
        from fastdmd.precision import became

        loaded, card = configs.load(config, overrides or (), elsewhere=True), gpu_named(gpu)
        became(loaded.precision, card.target)  # or the card cannot do it
        made = make_plan(loaded)
        if not as_json:
            print(report.page(loaded, made, gpu, card), flush=True)  # before the plan of one sample more
        room = largest_batch(loaded, made, card)
        if as_json:
            print(json.dumps(report.as_json(loaded, made, gpu, card, room), indent=1))
        elif room:
            print(report.room_line(loaded, room))
        else:
            print(*remedies(loaded, made, card), sep="\n")


@app.command()
def warm(
    config: Annotated[Path, typer.Argument(help="The TOML file of a run that will start later.")],
    overrides: Overrides = None,
    target: Annotated[
        str | None,
        typer.Option(help="sm_90, sm_100, gfx942, ..: its kernels alone; absent: the device at hand."),
    ] = None,
) -> None:
    """Compile what CONFIG's run needs before it starts: kernels into triton's cache, graphs into torch's."""
    with user_errors():
        from fastdmd import config as configs
        from fastdmd.warm_graphs import warm as compiled

        for line in compiled(configs.load(config, overrides or (), elsewhere=True), target):
            print(line, flush=True)


@app.command()
def doctor() -> None:
    """Show versions, the device, and which backend each op will use."""
    from fastdmd.doctor import report

    print(report())


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)
    ] = False,
) -> None:
    """Few-step distillation of video and image diffusion models."""
    if show:
        from importlib.metadata import version

        print(f"fastdmd {version('fastdmd')}")
        raise typer.Exit


def main() -> None:
    app()
