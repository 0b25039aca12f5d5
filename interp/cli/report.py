"""`interp report`: build the page of a run folder again from its saved scores."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[
        Path, typer.Argument(help="A run folder of `interp heads`, `interp attribute` or `interp evaluate`.")
    ],
) -> None:
    """Rebuild report.html, tables and figures from the scores saved in a run folder."""
    from interp.cli.folders import format_of

    makers = {"interp-evaluate-run": _evaluation, "interp-attribute-run": _attribution}
    typer.echo(f"report: {makers.get(str(format_of(folder)), _heads)(folder)}")


def _heads(folder: Path) -> Path:
    from interp.cli.page import write_page
    from interp.cli.runfolder import RunFolder
    from interp.errors import FileError

    run = RunFolder.read(folder)
    if not run.complete:
        raise FileError(f"{folder} holds no complete method yet; run the same `interp heads` command again.")
    run.write_tables()
    run.write_figures()
    return write_page(run)


def _attribution(folder: Path) -> Path:
    from interp.cli.attribution.folder import AttributionFolder
    from interp.cli.attribution.page import write_page
    from interp.cli.attribution.run import draw
    from interp.errors import FileError

    run = AttributionFolder.read(folder)
    if not run.complete:
        raise FileError(f"{folder} holds no complete method yet; run the same `interp attribute` command again.")
    run.write_table()
    draw(run)
    return write_page(run)


def _evaluation(folder: Path) -> Path:
    from interp.cli.evaluation.folder import EvaluationFolder
    from interp.cli.evaluation.page import write_page
    from interp.errors import FileError

    run = EvaluationFolder.read(folder)
    if not run.record["complete"]:
        raise FileError(f"{folder} is not complete; run the same `interp evaluate` command again.")
    return write_page(run)
