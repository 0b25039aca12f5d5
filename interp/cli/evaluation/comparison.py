"""Several interventions beside the model as it is: the same images, every dose, every control, and what it costs."""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import typer

from interp.cli.console import table
from interp.cli.evaluation.data import Data
from interp.cli.evaluation.folder import EvaluationFolder
from interp.cli.evaluation.intervention import Acting, intervention
from interp.cli.evaluation.probing import Probe, probe_of
from interp.cli.evaluation.settings import EvaluateSettings
from interp.errors import FileError
from interp.evaluation import paired, write_questions
from interp.files import write_parquet

if TYPE_CHECKING:
    import pandas as pd

    from interp.lens import Lens

PLAIN = "plain"
METRICS = {
    "chair": ("chair_i", "chair_s", "recall", "length", "repetition"),
    "pope": ("accuracy", "yes_ratio", "auroc"),
}
ROUNDS, NEW = 5, 16


def run_comparison(
    settings: EvaluateSettings, data: Data, content: dict[str, str], out: str | os.PathLike[str], *, overwrite: bool
) -> EvaluationFolder:
    """Run what is missing of a comparison, and write its table and report.

    Raises:
        InterpError: something asked for does not fit the model, the data or the folder.
    """
    from interp.cli.evaluation.comparison_page import write_comparison
    from interp.cli.evaluation.run import Loaded, ask, keep_scores
    from interp.report import Provenance

    folder = EvaluationFolder.open(out, settings, content, overwrite=overwrite)
    if folder.record["complete"]:
        typer.echo(f"{settings.task}: complete in {folder.path} with the same settings; not computed again.")
        return folder
    if data.questions:
        write_questions(folder.path / "questions.jsonl", data.questions)
    loaded, probe = Loaded(settings), probe_of(settings, data)
    for name, _, part in settings.parts():
        one = EvaluationFolder.open(run_path(folder, name), part, content)
        if not one.record["complete"]:
            ask(one, data, loaded, probe=probe, name=name, surprise=settings.task == "chair")
            keep_scores(one, data)
            one.note(complete=True)
    if "latency" not in folder.record:
        folder.note(latency=_latency(loaded.lens, settings, probe))
    model = EvaluationFolder.read(run_path(folder, PLAIN)).record.get("model", {})
    estimated = {"iri rates": probe.source} if "iri" in settings.names else {}
    folder.note(model=model, estimated=estimated, provenance=asdict(Provenance.here({}, seed=settings.seed)))
    write_parquet(folder.path / "comparison.parquet", comparison(folder))
    write_comparison(folder)
    folder.note(complete=True)
    return folder


def run_path(folder: EvaluationFolder, name: str) -> Path:
    """The folder of one run of a comparison."""
    return folder.path / "runs" / name.replace(" ", "-")


def comparison(folder: EvaluationFolder) -> "pd.DataFrame":
    """A row for each run and metric: what acted, the number, its difference to the plain run, and their intervals.

    Raises:
        FileError: a run is missing or damaged.
    """
    runs, nats, about = {}, {}, {}
    for name, dose, part in folder.settings.parts():
        one = EvaluationFolder.read(run_path(folder, name))
        runs[name] = one.scores()
        nats[name] = np.array([[row.get("nats", 0.0), row.get("tokens", 0)] for row in one.done()])
        about[name] = {
            "intervention": part.intervention or "",
            "control": part.control or "",
            "dose": dose,
            "strength": part.force if part.intervention else np.nan,
        }
    task = folder.settings.task
    frame = paired(runs, PLAIN, METRICS[task], nats=nats if task == "chair" else None)
    for at, key in enumerate(("intervention", "control", "dose", "strength")):
        frame.insert(1 + at, key, [about[name][key] for name in frame["run"]])
    return frame


def zero_changes(folder: EvaluationFolder) -> dict[str, int]:
    """For each intervention how many texts it changes at a dose of zero; that has to be none."""
    plain = _texts(folder, PLAIN)
    found = {}
    for name, dose, part in folder.settings.parts():
        if part.intervention and dose == 0:
            said = _texts(folder, name)
            found[part.intervention] = sum(said[one] != text for one, text in plain.items())
    return found


def _texts(folder: EvaluationFolder, name: str) -> dict[str, str]:
    rows = EvaluationFolder.read(run_path(folder, name)).done()
    keys = ("image", "caption") if folder.settings.task == "chair" else ("id", "answer")
    if not rows:
        raise FileError(f"{run_path(folder, name)} holds no texts.")
    return {row[keys[0]]: row[keys[1]] for row in rows}


def _latency(lens: "Lens", settings: EvaluateSettings, probe: Probe) -> dict[str, float]:
    """Time of texts of the same length over that of the plain model in the same round, edits made anew; the median."""
    batch = probe.prompts(lens)
    ids = [str(i) for i in range(len(batch))]
    doses = settings.given_doses
    dose = 1.0 if 1.0 in doses else max(doses)
    makers: dict[str, Callable[[], Acting]] = {PLAIN: Acting}
    for _, at, part in settings.parts():
        if part.intervention and part.control is None and at == dose:
            made = intervention(lens, part, probe)
            assert made is not None
            makers[part.intervention] = lambda made=made: made(ids)
    times: dict[str, list[float]] = {name: [] for name in makers}
    for turn in range(ROUNDS + 1):
        for name, make in makers.items():
            start, acting = time.perf_counter(), make()
            lens.generate(
                batch,
                acting.edits(batch),
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                logits_processor=acting.processors(batch) or None,
            )
            if turn:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    ratios = {name: [a / b for a, b in zip(found, times[PLAIN], strict=True)] for name, found in times.items()}
    return {name: round(statistics.median(found), 3) for name, found in ratios.items()}


def show_comparison(folder: EvaluationFolder) -> None:
    """Print a row for each run: its numbers, and where its difference to the plain run leaves out zero."""
    frame = comparison(folder)
    metrics = list(dict.fromkeys(frame["metric"]))
    rows: list[list[Any]] = []
    for name, part in frame.groupby("run", sort=False):
        known = part.set_index("metric")
        cells = []
        for metric in metrics:
            row = known.loc[metric]
            apart = row["change_low"] > 0 or row["change_high"] < 0
            cells.append(f"{row['value']:.4f}{' *' if apart else ''}")
        rows.append([name, *cells])
    table(f"{folder.settings.task.upper()} (* differs from plain)", ["run", *metrics], rows, right=tuple(metrics))
