"""Bad input ends a command with exit code 2 and one line on stderr; `--debug` shows the traceback instead."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from interp.errors import InterpError

EXIT_CODE = 2


class OneLineGroup(TyperGroup):
    """The root command: every expected error below it becomes one line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take `--debug` from wherever it stands."""
        if "--debug" in args:
            args = ["--debug", *(a for a in args if a != "--debug")]
        return super().parse_args(ctx, args)

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Read the global options."""
        with one_line():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        """Read a command's options and run it."""
        with one_line(debug=bool(ctx.params.get("debug"))):
            return super().invoke(ctx)


@contextmanager
def one_line(*, debug: bool = False) -> Iterator[None]:
    """Turn an expected error into its line and the exit code 2.

    Args:
        debug: let the error through instead.
    """
    try:
        yield
    except Exception as error:
        line = None if debug else line_of(error)
        if line is None:
            raise
        typer.echo(f"error: {line}", err=True)
        raise typer.Exit(EXIT_CODE) from error


def line_of(error: Exception) -> str | None:
    """The one line that an expected error ends with; None for a fault in the program."""
    if isinstance(error, BrokenPipeError):
        return None
    if isinstance(error, InterpError):
        return _flat(str(error))
    if isinstance(error, OSError):
        name = f"{error.filename}: " if error.filename else ""
        return _flat(f"{name}{error.strerror or error}")
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # a usage error of the command line
        command = getattr(getattr(error, "ctx", None), "command_path", None)
        hint = f" See: {command} --help" if command else ""
        return _flat(f"{error.format_message()}{hint}")  # pyright: ignore[reportAttributeAccessIssue]
    if type(error).__name__ == "OutOfMemoryError":
        return "the device has no memory left for this: lower --batch-size."
    return None


def _flat(text: str) -> str:
    return " ".join(part.strip() for part in text.splitlines() if part.strip())
