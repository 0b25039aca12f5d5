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

    from interp.data.corpora import Corpus
    from interp.dictionaries import Job
    from interp.dictionaries.activations import ActivationStream, Rows, Source
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
        kind: `sae` or `transcoder`.
        settings: what is asked.
        out: the run folder.
        lens: the model, where it is loaded already.
        overwrite: replace a run that is there.

    Raises:
        InterpError: something asked for does not fit the model, the data or the folder.
    """
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
    stream = stream_of(kind, settings, lens, texts, processes)
    jobs = jobs_of(kind, settings, stream)
    if processes.first:
        record["dictionaries"] = {name: {"read": job.read, "target": job.target} for name, job in jobs.items()}
        write_settings(path, record["settings"], f"interp train {kind}")
        write_json(path / "run.json", record)
    source = source_of(settings, stream, processes, say)
    say(f"{len(jobs)} dictionaries, {settings.training().steps:,} steps of {settings.batch_size:,} tokens")
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


def stream_of(kind: str, settings: Any, lens: "Lens", texts: "Corpus", processes: "Processes") -> "ActivationStream":
    """This process's share of the activations of the corpus."""
    from interp.dictionaries.activations import ActivationStream

    reads = dict.fromkeys(read for pair in settings.reads(kind) for read in pair if read is not None)
    options = {**settings.stream_options(), "rank": processes.rank, "world": processes.world}
    return ActivationStream(lens, texts, list(reads), **options)


def jobs_of(kind: str, settings: Any, stream: "ActivationStream") -> "dict[str, Job]":
    """The dictionaries by name, such as `resid_post.10-topk-k32`, on the model's device."""
    from interp.dictionaries import SAE, Job, Transcoder

    jobs = {}
    device = next(stream.lens.model.parameters()).device
    asked = dict.fromkeys(read for pair in settings.reads(kind) for read in pair if read is not None)
    named = dict(zip(asked, stream.reads, strict=True))  # layers from the end have their number there
    for one, other in settings.reads(kind):
        read, target = named[one], None if other is None else named[other]
        for options in settings.dictionaries(stream.d_in[read]):
            sized = [f"k{options['k']:g}"] if "k" in options else []
            parts = [read.replace(":", "-"), options["architecture"], *sized]
            if target is not None:
                options = {**options, "d_out": stream.d_in[target]}
            made = (SAE if target is None else Transcoder)(**options)
            jobs["-".join(parts)] = Job(made.to(device), read, target)
    return jobs


def source_of(settings: Any, stream: "ActivationStream", processes: "Processes", say: Any) -> "Source[Rows]":
    """Batches of this process: mixed from the stream, or from the store where one is named."""
    import torch

    from interp.dictionaries.activations import ActivationStore, MixingBuffer, Prefetch, harvest

    device, world = next(stream.lens.model.parameters()).device, processes.world
    # On a CPU a thread that reads ahead would take the cores of the training.
    ahead = Prefetch(stream) if device.type == "cuda" else stream
    if settings.store is None:
        share = {"rows": settings.buffer // world, "batch": settings.batch_size // world}
        return MixingBuffer(ahead, **share, seed=settings.seed + processes.rank, dtype=torch.float32)
    say(f"activations are kept in {settings.store}")
    tokens = -(-settings.tokens // world)
    harvest(ahead, settings.store, tokens=tokens, dtype=settings.store_dtype, keep="rows")
    ahead.close()
    processes.wait()
    store = ActivationStore(settings.store)
    options = {"batch": settings.batch_size, "seed": settings.seed, "epochs": None, "device": device}
    return store.rows(**options, rank=processes.rank, world=world)


def show(metrics: "pd.DataFrame") -> None:
    """Print the last row of each dictionary."""
    if not len(metrics):
        return
    last = metrics.groupby("dictionary", sort=False).last().reset_index()
    rows = [[r["dictionary"], r["step"], *(f"{r[name]:.4g}" for name in COLUMNS)] for r in last.to_dict("records")]
    table("Trained (numbers of the last batch)", ["dictionary", "steps", *COLUMNS], rows, right=("steps", *COLUMNS))
