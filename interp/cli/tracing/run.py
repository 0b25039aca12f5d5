"""Carry out a run of `interp trace`: compute what is missing part by part, write tables, figures and the page."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from interp.cli.console import load, table
from interp.cli.tracing.cost import cost_of, seconds_each
from interp.cli.tracing.folder import TraceFolder
from interp.cli.tracing.inputs import check_lengths, prompts_of
from interp.cli.tracing.settings import PAIRED, TraceSettings

if TYPE_CHECKING:
    from interp.lens import Lens

SAMPLE = 8  # prompts of which the cost is taken


def run_trace(
    settings: TraceSettings,
    out: str | os.PathLike[str],
    *,
    lens: "Lens | None" = None,
    overwrite: bool = False,
) -> TraceFolder:
    """Compute what is missing in a run folder, and write its tables, figures and report.

    Args:
        settings: what is asked.
        out: the run folder.
        lens: the model, where it is loaded already.
        overwrite: replace a run that is there.

    Raises:
        InterpError: something asked for does not fit the model, the prompts or the folder.
    """
    from interp.cli.tracing.page import write_page

    folder = TraceFolder.open(out, settings, prompts_of(settings), overwrite=overwrite)
    total = len(folder.prompts)
    for method in settings.methods:
        done = folder.done(method)
        if done == total:
            typer.echo(f"{method}: complete in {folder.path} with the same settings; not computed again.")
        elif done or folder.passes(method).is_dir():
            typer.echo(f"{method}: {done} of {total} prompts are in {folder.path} already; it goes on from there.")
    missing = [m for m in settings.methods if m not in folder.complete]
    if missing:
        if lens is None:
            typer.echo(f"loading {settings.model} ...")
            lens = load(settings.model, device=settings.device, dtype=settings.dtype)
        _compute(folder, lens, missing)
    folder.write_tables()
    folder.write_figures()
    write_page(folder)
    return folder


def estimate(settings: TraceSettings) -> None:
    """Print what a run would cost, and compute nothing.

    Raises:
        InterpError: something asked for does not fit the model or the prompts.
    """
    prompts = prompts_of(settings)
    typer.echo(f"loading {settings.model} ...")
    lens = load(settings.model, device=settings.device, dtype=settings.dtype)
    check_lengths(lens, prompts, 0)
    each = seconds_each(lens, prompts[:SAMPLE])
    for method in settings.methods:
        typer.echo(f"{method}: {cost_of(lens, method, settings, prompts, SAMPLE, each)}")


def _compute(folder: TraceFolder, lens: "Lens", missing: Sequence[str]) -> None:
    from interp.cli.tracing.asking import WHOLE, trace
    from interp.report import Provenance

    settings, prompts = folder.settings, folder.prompts
    if any(m in (*PAIRED, "cross_modal") for m in missing):
        check_lengths(lens, prompts, 0)
    device = str(next(lens.model.parameters()).device)
    about = {"device": device, "dtype": str(lens.dtype).removeprefix("torch."), "class": type(lens.model).__name__}
    folder.note(model=about, provenance=asdict(Provenance.here({}, seed=settings.seed)))
    each = seconds_each(lens, prompts[:SAMPLE])
    costs = dict(folder.record.get("costs", {}))
    for method in missing:
        rest = prompts[folder.done(method) :]
        cost = cost_of(lens, method, settings, rest, SAMPLE, each)
        if len(rest) == len(prompts):
            costs[method] = asdict(cost)
        typer.echo(f"{method}: {cost}")
    folder.note(costs=costs)
    for method in missing:
        folder.begin(method)
        size = len(prompts) if method in WHOLE else settings.batch_size
        while (first := folder.done(method)) < len(prompts):
            rest = len(prompts) - first
            some = prompts[first : first + -(-rest // -(-rest // size))]  # parts of nearly equal size
            if len(prompts) > size:
                typer.echo(f"{method}: prompts {first + 1} to {first + len(some)} of {len(prompts)}")
            start = time.perf_counter()
            found = trace(lens, method, settings, some, first, folder.passes(method))
            folder.keep(method, found, len(some), time.perf_counter() - start)
        typer.echo(f"{method}: {folder.record['methods'][method]['seconds']:.1f} s")


def show_top(folder: TraceFolder) -> None:
    """Print the strongest cells of each method."""
    from interp.cli.tracing.page import place
    from interp.cli.tracing.texts import TITLES

    for method, found in folder.results():
        rows: list[list[Any]] = []
        for row in found.top(folder.settings.top, by="abs").to_dict("records"):
            ends = f"{row['low']:.3f} to {row['high']:.3f}" if row["low"] == row["low"] else ""
            rows.append([row["site"], row["layer"], place(row), f"{row['effect']:+.3f}", ends, row["prompts"]])
        columns = ["site", "layer", "where", "effect", "95% interval", "prompts"]
        right = ("layer", "effect", "95% interval", "prompts")
        table(f"{TITLES[method]}: strongest cells ({found.metric}, {found.direction})", columns, rows, right=right)
    sys.stdout.flush()
