"""How all commands answer: exit codes, errors, JSON, tables and remarks.

Nothing here imports torch, so that `gtrans --help` answers at once.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from gtrans.errors import (
    BudgetError,
    ContractError,
    GTransError,
    ModelError,
    OptionError,
    VerifyError,
)

if TYPE_CHECKING:
    from rich.console import Console

OK, CHECK_FAILED, BAD_INPUT, INTERNAL = 0, 1, 2, 3

TRACEBACK_VARIABLE = "GTRANS_TRACEBACK"


def examples(*lines: str) -> str:
    """The examples at the end of a command's help, one a line."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


@contextmanager
def reporting(as_json: bool) -> Iterator[None]:
    """Turns errors into a message and an exit code.

    Raises:
        typer.Exit: with 1, 2 or 3 in place of any error.
    """
    try:
        yield
    except GTransError as error:
        code = _code(error)
        _complain(error, code, as_json, hint="")
        raise typer.Exit(code) from error
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        hint = f"this is not your mistake; {TRACEBACK_VARIABLE}=1 shows the traceback"
        _complain(error, INTERNAL, as_json, hint=hint)
        raise typer.Exit(INTERNAL) from error


def print_json(value: dict[str, Any]) -> None:
    """Prints one JSON object to standard output. NaN and infinities become strings."""
    typer.echo(json.dumps(_finite(value), indent=2, default=str))


def console(*, stderr: bool = False) -> "Console":
    """A rich console; wide and plain where the output is no terminal."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else 140
    return Console(stderr=stderr, width=width, highlight=False, markup=False)


def remark(text: str) -> None:
    """A line about the run itself (what to try next, how long it took), on standard error."""
    typer.echo(text, err=True)


def progress_shown(as_json: bool) -> bool:
    """Whether to draw progress: only for people."""
    return not as_json and sys.stderr.isatty()


@contextmanager
def working(as_json: bool) -> Iterator[Callable[[str], None]]:
    """A line with what is being done and for how long, for people; call it with each new task."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    shown = progress_shown(as_json)
    with Progress(
        *columns, console=console(stderr=True), disable=not shown, transient=True
    ) as progress:
        task = progress.add_task("starting", total=None)
        yield lambda what: progress.update(task, description=what)


def _code(error: GTransError) -> int:
    if isinstance(error, (VerifyError, BudgetError)):
        return CHECK_FAILED
    bad_input = isinstance(error, (OptionError, ModelError, ContractError))
    return BAD_INPUT if bad_input else INTERNAL


def _complain(error: Exception, code: int, as_json: bool, hint: str) -> None:
    kind = type(error).__name__
    if as_json:
        print_json({"error": {"kind": kind, "message": str(error), "exit_code": code}})
    else:
        remark(f"error: {error}" if isinstance(error, GTransError) else f"error: {kind}: {error}")
        if hint:
            remark(f"  {hint}")
    if os.environ.get(TRACEBACK_VARIABLE):
        traceback.print_exception(error)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value
