"""`interp report`: build the page of a run folder again from its saved scores."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[Path, typer.Argument(help="A run folder of `interp heads` or `interp evaluate`.")],
) -> None:
    """Rebuild report.html, tables and figures from the scores saved in a run folder."""
    if _is_evaluation(folder):
        _evaluation(folder)
        return
    from interp.cli.page import write_page
    from interp.cli.runfolder import RunFolder
    from interp.errors import FileError

    run = RunFolder.read(folder)
    if not run.complete:
        raise FileError(f"{folder} holds no complete method yet; run the same `interp heads` command again.")
    run.write_tables()
    run.write_figures()
    typer.echo(f"report: {write_page(run)}")


def _is_evaluation(folder: Path) -> bool:
    from interp.cli.evaluation.folder import FORMAT
    from interp.files import read_json

    record = read_json(folder / "run.json") if (folder / "run.json").is_file() else None
    return isinstance(record, dict) and record.get("format") == FORMAT


def _evaluation(folder: Path) -> None:
    from interp.cli.evaluation.folder import EvaluationFolder
    from interp.cli.evaluation.page import write_page
    from interp.errors import FileError

    run = EvaluationFolder.read(folder)
    if not run.record["complete"]:
        raise FileError(f"{folder} is not complete; run the same `interp evaluate` command again.")
    typer.echo(f"report: {write_page(run)}")
