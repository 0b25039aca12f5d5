"""`interp report`: build the page of a run folder again from its saved scores."""

from pathlib import Path
from typing import Annotated

import typer


def report(folder: Annotated[Path, typer.Argument(help="A run folder of `interp heads`.")]) -> None:
    """Rebuild report.html, tables and figures from the scores saved in a run folder."""
    from interp.cli.page import write_page
    from interp.cli.runfolder import RunFolder
    from interp.errors import FileError

    run = RunFolder.read(folder)
    if not run.complete:
        raise FileError(f"{folder} holds no complete method yet; run the same `interp heads` command again.")
    run.write_tables()
    run.write_figures()
    typer.echo(f"report: {write_page(run)}")
