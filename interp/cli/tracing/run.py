"""Carry out a run of `interp trace`: compute what is missing part by part, write tables, figures and the page."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import typer

from interp.cli.console import load, table
from interp.cli.together import Together
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
    together: Together | None = None,
) -> TraceFolder:
    """Compute what is missing in a run folder, and write its tables, figures and report.

    Args:
        settings: what is asked.
        out: the run folder.
        lens: the model, where it is loaded already.
        overwrite: replace a run that is there.
        together: the processes that divide the prompts; only the first returns with everything written.

    Raises:
        InterpError: something asked for does not fit the model, the prompts or the folder.
    """
    from interp.cli.tracing.page import write_page

    together, prompts = together or Together(settings.device), prompts_of(settings)
    if together.first:
        folder = TraceFolder.open(out, settings, prompts, overwrite=overwrite)
    together.wait()
    if not together.first:
        folder = replace(TraceFolder.read(out), prompts=prompts)
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
        _compute(folder, lens, missing, together)
    if not together.first:
        return folder
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


def _compute(folder: TraceFolder, lens: "Lens", missing: Sequence[str], together: Together) -> None:
    from interp.cli.tracing.asking import WHOLE, trace
    from interp.report import Provenance

    settings, prompts = folder.settings, folder.prompts
    if any(m in (*PAIRED, "cross_modal") for m in missing):
        check_lengths(lens, prompts, 0)
    device = str(lens.input_device)
    about = {"device": device, "dtype": str(lens.dtype).removeprefix("torch."), "class": type(lens.model).__name__}
    if together.first:
        folder.note(model=about, provenance=asdict(Provenance.here({}, seed=settings.seed)))
    each = seconds_each(lens, prompts[:SAMPLE])
    costs = dict(folder.record.get("costs", {}))
    for method in missing:
        rest = prompts[folder.done(method) :]
        cost = cost_of(lens, method, settings, rest, SAMPLE, each)
        if len(rest) == len(prompts):
            costs[method] = asdict(cost)
        typer.echo(f"{method}: {cost}")
    if together.first:
        folder.note(costs=costs)
    for method in missing:
        if together.first:
            folder.begin(method)
        size = len(prompts) if method in WHOLE else min(settings.batch_size, -(-len(prompts) // together.world))
        cuts = _cuts(folder.done(method), len(prompts), size)
        for at in range(0, len(cuts), together.world):
            beside = cuts[at : at + together.world]  # parts that the processes compute at the same time
            if len(prompts) > size:
                typer.echo(f"{method}: prompts {beside[0][0] + 1} to {beside[-1][1]} of {len(prompts)}")
            start, made = time.perf_counter(), {}
            for number in together.mine(len(beside)):
                first, stop = beside[number]
                passes = folder.passes(method) / str(together.rank) if together.world > 1 else folder.passes(method)
                made[number] = trace(lens, method, settings, prompts[first:stop], first, passes)
            found = together.exchanged(made, folder.path / method / "beside")
            seconds = (time.perf_counter() - start) / len(found)
            for one, (first, stop) in zip(found, beside, strict=True):
                if together.first:
                    folder.keep(method, one, stop - first, seconds)
            together.wait()
        if together.first:
            typer.echo(f"{method}: {folder.record['methods'][method]['seconds']:.1f} s")


def _cuts(first: int, total: int, size: int) -> list[tuple[int, int]]:
    """Where parts of nearly equal size begin and end, from a prompt on."""
    found = []
    while first < total:
        rest = total - first
        stop = first + -(-rest // -(-rest // size))
        found.append((first, stop))
        first = stop
    return found


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
