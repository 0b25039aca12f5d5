"""Where a command prints: results on stdout, bars and notes on stderr; the libraries below stay quiet."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from interp.lens import Lens

PIPED_WIDTH = 200


def out() -> "Console":
    """The console of results. What is no terminal gets wide lines, so that tables stay whole in files and pipes."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)


def note(text: str) -> None:
    """One line on stderr that is no error."""
    typer.echo(text, err=True)


def table(title: str, columns: list[str], rows: list[list[Any]], *, right: tuple[str, ...] = ()) -> None:
    """Print a table; cells are shown letter by letter.

    Args:
        title: above the table.
        columns: their names.
        rows: cells, turned into text.
        right: names of the columns that hold numbers.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    made = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(str(cell)) for cell in row))
    out().print(made)


@contextmanager
def progress() -> Iterator["Progress"]:
    """A progress bar on stderr; without a terminal nothing is drawn."""
    import rich
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    # Bars of the methods themselves go through rich's own console: that one writes to stderr as well.
    rich.reconfigure(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield bar


def quiet() -> None:
    """Silence the weight-loading bars, advice and warnings of the libraries below."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def load(name: str, *, device: str | None = None, dtype: str | None = None, trust_remote_code: bool = False) -> "Lens":
    """Load and wrap a model; interp's own warnings become lines on stderr, others are dropped.

    Raises:
        InterpError: as `interp.load`.
    """
    import interp

    quiet()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lens = interp.load(name, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    for line in dict.fromkeys(str(w.message) for w in caught if "drawn at random" in str(w.message)):
        note(f"warning: {line}")
    return lens
