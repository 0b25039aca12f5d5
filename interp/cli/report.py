"""`interp report`: the standard report of a model, or the page of a run folder again from its saved scores."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    what: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|FOLDER",
            help="A model (packaged, a local folder, a hub id), or a run folder of `interp heads`, `attribute`, "
            "`trace`, `train` or `evaluate`.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="For a model: the folder. Default: runs/NAME.")
    ] = None,
    prompts: Annotated[int | None, typer.Option("--prompts", min=4, help="For a model: how many prompts.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="For a model: seed of every random choice.")] = 0,
    device: Annotated[str | None, typer.Option("--device", help="For a model: cpu, cuda, ...")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="For a model: float32, bfloat16, ...")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="For a model: replace the run that is there.")] = False,
) -> None:
    """Rank a MODEL's heads by every method that fits, on prompts made for its kind; or rebuild a run FOLDER's page.

    A language model is asked to complete indirect objects, a vision-language model for the colour of drawn scenes. For
    prompts of your own: `interp heads`.
    """
    folder = Path(what)
    if (folder / "run.json").is_file() or (folder.is_dir() and not (folder / "config.json").is_file()):
        from interp.errors import SettingsError

        if out is not None or prompts is not None or seed or device or dtype or overwrite:
            raise SettingsError(
                f"{folder} is a run folder, whose page is rebuilt as it is: the options are for models."
            )
        typer.echo(f"report: {_rebuilt(folder)}")
        return
    from interp.cli.named import check_model

    check_model(what)
    from interp.cli.console import load
    from interp.cli.ranking.run import show_top
    from interp.cli.ranking.standard import standard_report

    typer.echo(f"loading {what} ...")
    lens = load(what, device=device, dtype=dtype)
    target = out or Path("runs") / Path(what).name
    run = standard_report(lens, what, target, prompts=prompts, seed=seed, overwrite=overwrite)
    for method in run.complete:
        show_top(run, method, 5)
    typer.echo(f"report: {run.path / 'report.html'}")


def _rebuilt(folder: Path) -> Path:
    from interp.cli.folders import format_of

    makers = {
        "interp-evaluate-run": _evaluation,
        "interp-attribute-run": _attribution,
        "interp-trace-run": _trace,
        "interp-evaluate-sae-run": _dictionary,
        "interp-train-run": _training,
    }
    return makers.get(str(format_of(folder)), _heads)(folder)


def _heads(folder: Path) -> Path:
    from interp.cli.ranking.folder import RunFolder
    from interp.cli.ranking.page import write_page
    from interp.cli.ranking.summary import write_summary
    from interp.errors import FileError

    run = RunFolder.read(folder)
    if not run.complete:
        raise FileError(f"{folder} holds no complete method yet; run the same `interp heads` command again.")
    run.write_tables()
    run.write_figures()
    write_summary(run)
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


def _trace(folder: Path) -> Path:
    from interp.cli.tracing.folder import TraceFolder
    from interp.cli.tracing.page import write_page
    from interp.errors import FileError

    run = TraceFolder.read(folder)
    if not run.complete:
        raise FileError(f"{folder} holds no complete method yet; run the same `interp trace` command again.")
    run.write_tables()
    run.write_figures()
    return write_page(run)


def _training(folder: Path) -> Path:
    import pandas as pd

    from interp.cli.training.page import write_page
    from interp.cli.training.run import KIND
    from interp.errors import FileError

    record = KIND.read(folder)
    if not (folder / "metrics.parquet").is_file():
        raise FileError(f"{folder} holds no log yet; run the same `interp train` command again.")
    return write_page(folder, record, pd.read_parquet(folder / "metrics.parquet"))


def _dictionary(folder: Path) -> Path:
    from interp.cli.dictionaries.page import write_page
    from interp.cli.dictionaries.run import KIND, write_tables
    from interp.dictionaries.evaluation import DictionaryScores
    from interp.errors import FileError

    record = KIND.read(folder)
    if not record["complete"]:
        raise FileError(f"{folder} is not complete; run the same `interp evaluate sae` command again.")
    scores = DictionaryScores.load(folder / "scores")
    write_tables(folder, scores)
    return write_page(folder, record, scores)


def _evaluation(folder: Path) -> Path:
    from interp.cli.evaluation.folder import EvaluationFolder
    from interp.cli.evaluation.page import write_page
    from interp.errors import FileError

    run = EvaluationFolder.read(folder)
    if not run.record["complete"]:
        raise FileError(f"{folder} is not complete; run the same `interp evaluate` command again.")
    return write_page(run)
