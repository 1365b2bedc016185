"""The command line. Heavy imports are inside the commands: `fastdmd --help` has to answer at once."""

import contextlib
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
USER_ERROR, DIVERGED, INTERRUPTED = 2, 1, 130


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """What the user can mend is told in clear lines, without a traceback."""
    try:
        yield
    except (ValueError, OSError) as e:
        for line in str(e).split("\n"):
            print(f"error: {line}", file=sys.stderr)
        raise typer.Exit(USER_ERROR) from None


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A complete TOML file; see configs/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.path=value, values in TOML syntax.")
    ] = None,
) -> None:
    """Distil (or pre-train) as CONFIG says; goes on from the newest checkpoint of its output_dir."""
    from fastdmd import config as configs
    from fastdmd import train as trainer

    with user_errors():
        loaded = configs.load(config, overrides or ())
        try:
            run = trainer.train(loaded)
        except trainer.Diverged as e:
            print(f"error: {e}", file=sys.stderr)
            raise typer.Exit(DIVERGED) from None
        except (trainer.Interrupted, KeyboardInterrupt) as e:
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
    prompt: Annotated[
        list[str] | None, typer.Option(help="May be given several times; absent: the validation prompts.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the videos; absent: RUN/samples/cli.")] = None,
    seed: Annotated[int, typer.Option(help="Sample i's noise depends on the seed and i only.")] = 0,
    who: Annotated[str, typer.Option(help="student, teacher_50 or teacher_few.")] = "student",
) -> None:
    """Sample videos with a run's student; writes NN.webp and latents.safetensors."""
    with user_errors():
        from fastdmd.evaluation import evaluate
        from fastdmd.resume import reopen

        opened = reopen(run)
        folder = evaluate.write_samples(opened, who, prompt or None, out or run / "samples" / "cli", seed)
    print(f"wrote {folder}")


@app.command(name="eval")
def evaluate_run(run: RunFolder) -> None:
    """Score a run's newest checkpoint against its teacher again; writes summary.json and report.html."""
    with user_errors():
        from fastdmd.evaluation import evaluate
        from fastdmd.evaluation.report import table
        from fastdmd.resume import reopen

        evaluate.finish(reopen(run))
    print(table(run))


@app.command()
def export(
    run: RunFolder,
    out: Annotated[Path, typer.Option(help="The diffusers folder to write.")],
) -> None:
    """Write a run's student as a diffusers folder whose scheduler takes its own few steps (a flow model: UniPC)."""
    with user_errors():
        from fastdmd.export import export_student

        export_student(run, out)
    print(f"wrote {out}")


@app.command()
def warm(
    config: Annotated[Path, typer.Argument(help="The TOML file of a run that will start later.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.path=value, values in TOML syntax.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="sm_90, sm_100, gfx942, ..; absent: this machine's GPU.")
    ] = None,
) -> None:
    """Compile the kernels that CONFIG's run needs into triton's cache: its first step then compiles nothing."""
    from fastdmd import config as configs
    from fastdmd.warm import warm as compile_kernels

    with user_errors():
        print(compile_kernels(configs.load(config, overrides or ()), target))


@app.command()
def doctor() -> None:
    """Show versions, the device, and which backend each op will use."""
    from fastdmd.doctor import report

    print(report())


def main() -> None:
    app()
