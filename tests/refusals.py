"""Run a command that is refused, and give the line that it ends with."""

from typer.testing import CliRunner

from fastdmd.cli import app

QUICK = ("run.max_steps=2", "validation.teacher_reference=false")


def refused(*arguments, code: int = 2) -> str:
    """Return the one line that a command ends with."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert (result.exit_code, isinstance(result.exception, SystemExit)) == (code, True), repr(
        result.exception
    )
    *progress, line = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert not any(other.startswith("error: ") for other in progress)
    return line
