"""Carry out a run of `interp train`: the source of activations, the dictionaries, training, the table and the page."""

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from interp.cli.console import load, table
from interp.cli.folders import Kind, write_settings
from interp.files import write_json

if TYPE_CHECKING:
    import pandas as pd

    from interp.dictionaries import Job
    from interp.dictionaries.training import Processes
    from interp.lens import Lens

KIND = Kind(
    "interp-train-run",
    "interp train",
    frozenset({"fingerprint", "settings", "kind", "dictionaries"}),
    ("settings.yaml", "metrics.parquet", "report.html"),
    ("checkpoints", "tensorboard"),
)
COLUMNS = ("fvu", "l0", "dead", "loss")


def run_training(
    kind: str,
    settings: Any,
    out: str | os.PathLike[str],
    *,
    lens: "Lens | None" = None,
    overwrite: bool = False,
) -> Path:
    """Train what is asked for into a run folder, or go on with what is there.

    Args:
        kind: `sae`, `transcoder` or `lorsa`.
        settings: what is asked.
        out: the run folder.
        lens: the model, where it is loaded already.
        overwrite: replace a run that is there.

    Raises:
        InterpError: something asked for does not fit the model, the data or the folder.
    """
    from interp.cli.training import contexts, rows
    from interp.data.corpora import corpus
    from interp.dictionaries.training import Processes, train
    from interp.report import Provenance

    processes = Processes.join(settings.device)
    path = Path(out)
    texts = corpus(settings.data, **settings.data_options())
    say = typer.echo if processes.first else lambda text: None
    if lens is None:
        say(f"loading {settings.model} ...")
        lens = load(settings.model, device=_device(settings.device, processes), dtype=settings.dtype)
    asked = {"kind": kind, **settings.hashed(), "corpus": texts.identity, "processes": processes.world}
    record: dict[str, Any] = {}
    if processes.first:
        record = {"dictionaries": {}, **KIND.open(path, asked, overwrite=overwrite), "kind": kind}
        record["settings"] = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(settings).items()}
        record["provenance"] = asdict(Provenance.here({}, seed=settings.seed))
    processes.wait()
    part: Any = contexts if kind == "lorsa" else rows
    stream, jobs = part.begun(kind, settings, lens, texts, processes)
    if processes.first:
        record["dictionaries"] = {name: described(job) for name, job in jobs.items()}
        write_settings(path, record["settings"], f"interp train {kind}")
        write_json(path / "run.json", record)
    source = part.source_of(settings, stream, processes, say)
    say(f"{len(jobs)} dictionaries, {settings.steps:,} steps of {settings.per_step}")
    try:
        trained = train(
            jobs,
            source,
            settings.training(),
            folder=path,
            metadata={"model_name": lens.name, "context_size": settings.context, "data": str(settings.data)},
            writers=settings.log_to,
            progress=sys.stderr.isatty(),
        )
    finally:
        source.close()
    if processes.first:
        from interp.cli.training.page import write_page

        show(trained.metrics)
        write_page(path, record, trained.metrics)
        say(f"report: {path / 'report.html'}")
    return path


def _device(asked: str | None, processes: "Processes") -> str | None:
    import torch

    alone = processes.world == 1 or asked == "cpu" or not torch.cuda.is_available()
    return asked if alone else f"cuda:{torch.cuda.current_device()}"


def described(job: "Job") -> dict[str, Any]:
    """What the record says of a dictionary."""
    found: dict[str, Any] = {"read": job.read, "target": job.target}
    if job.dictionary.sequences:
        found |= {name: getattr(job.dictionary.cfg, name) for name in ("n_qk", "n_ov", "d_qk")}
        found |= {name: job.dictionary.metadata[name] for name in ("init", "freeze_qk")}
    return found


def show(metrics: "pd.DataFrame") -> None:
    """Print the last row of each dictionary."""
    if not len(metrics):
        return
    last = metrics.groupby("dictionary", sort=False).last().reset_index()
    rows = [[r["dictionary"], r["step"], *(f"{r[name]:.4g}" for name in COLUMNS)] for r in last.to_dict("records")]
    table("Trained (numbers of the last batch)", ["dictionary", "steps", *COLUMNS], rows, right=("steps", *COLUMNS))
