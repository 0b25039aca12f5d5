"""Carry out a run of `interp attribute`: compute what is missing batch by batch, write tables, figures and the page."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any

import typer

from interp.cli.attribution.folder import AttributionFolder, label, targets_of
from interp.cli.attribution.settings import AttributeSettings
from interp.cli.console import load, progress, table
from interp.cli.folders import write_figures
from interp.data import Prompt, read_prompts

if TYPE_CHECKING:
    from interp.cli.attribution.asking import Asked
    from interp.tokens import TokenScores

PRINTED, PRINTED_TARGETS = 3, 6  # prompts, and targets of them all, in the table that is printed


def prompts_of(settings: AttributeSettings) -> list[Prompt]:
    """The prompts of a run, checked against what is asked.

    Raises:
        FileError, InputError: the prompt file cannot be used, or does not fit; the message gives the line or prompt.
        SettingsError, UnsupportedError: as `AttributeSettings.check_prompts`.
    """
    prompts = read_prompts(str(settings.prompts), images=settings.images)
    settings.check_prompts(prompts)
    return prompts


def run_attribution(
    settings: AttributeSettings, out: str | os.PathLike[str], *, overwrite: bool = False
) -> AttributionFolder:
    """Compute what is missing in a run folder, and write its tables, figures and report.

    Args:
        settings: what is asked.
        out: the run folder.
        overwrite: replace a run that is there.

    Raises:
        InterpError: something asked for does not fit the model, the prompts or the folder.
    """
    from interp.cli.attribution.page import write_page

    folder = AttributionFolder.open(out, settings, prompts_of(settings), overwrite=overwrite)
    for method in settings.methods:
        done = len(folder.done(method))
        if done == len(folder.prompts):
            typer.echo(f"{method}: complete in {folder.path} with the same settings; not computed again.")
        elif done:
            typer.echo(f"{method}: {done} of {len(folder.prompts)} prompts are in {folder.path} already.")
    missing = [m for m in settings.methods if m not in folder.complete]
    if missing:
        _compute(folder, missing)
    folder.write_table()
    draw(folder)
    write_page(folder)
    return folder


def _compute(folder: AttributionFolder, methods: Sequence[str]) -> None:
    from interp.cli.attribution.asking import Asker
    from interp.cli.attribution.needs import costs
    from interp.cli.cost import rows_of
    from interp.report import Provenance

    settings = folder.settings
    typer.echo(f"loading {settings.model} ...")
    lens = load(settings.model, device=settings.device, dtype=settings.dtype)
    asker = Asker(lens, settings, folder.prompts)
    device = str(lens.input_device)
    about = {"device": device, "dtype": str(lens.dtype).removeprefix("torch."), "class": type(lens.model).__name__}
    folder.note(model=about, provenance=asdict(Provenance.here({}, seed=settings.seed)))
    total = len(folder.prompts)
    done = {m: set(folder.done(m)) for m in methods}
    with progress() as bar:
        missing = [i for i in range(total) if any(i not in rows for rows in done.values())]
        checking, lengths = bar.add_task("checking prompts", total=len(missing)), {}
        for i in missing:
            lengths[i] = asker.check(i)
            bar.advance(checking)
        bar.remove_task(checking)
        found = costs(asker, methods, lengths)
        size = rows_of(list(found.values()), settings.batch_size)
        for cost in found.values():
            typer.echo(cost.line(min(size, len(missing))))
        if "blank_out" in found:
            asker.room = found["blank_out"].fits
        tasks = {m: bar.add_task(m, total=total, completed=len(done[m])) for m in methods}
        for rows, named in folder.todo(methods, size):
            asked = asker.of(rows)
            for method in named:
                start = time.perf_counter()
                scores = asker.attribute(method, asked)
                folder.keep(method, scores, rows, time.perf_counter() - start)
                _keep_pictures(folder, scores, asked)
                bar.advance(tasks[method], len(rows))
    for method in methods:
        typer.echo(f"{method}: {folder.record['methods'][method]['seconds']:.1f} s")


def _keep_pictures(folder: AttributionFolder, scores: "TokenScores", asked: "Asked") -> None:
    """The pictures that the report draws maps over."""
    from interp.cli.pictures import keep_picture
    from interp.cli.prompts import images_of

    for n, i in enumerate(asked.rows):
        if i < folder.settings.examples and folder.prompts[i].image is not None:
            given = (images_of([folder.prompts[i]]) or [None])[0]
            keep_picture(folder.path / "pictures", i, scores, n, asked.batch, given)


def draw(folder: AttributionFolder) -> None:
    """One figure for each method and drawn prompt, of its first target, in `figures/`."""
    from interp.cli.attribution.page import has_map
    from interp.cli.pictures import picture_of

    figures = {}
    for i, found in folder.results():
        if i >= folder.settings.examples:
            break
        for method, scores in found.items():
            picture = picture_of(folder.path / "pictures", i, scores) if has_map(scores) else None
            title = f"{method}: {label(found, 0)}"
            figures[f"{method}-prompt-{i + 1}"] = scores.plot(target=0, picture=picture, title=title)
    write_figures(folder.path / "figures", figures)


def show_top(folder: AttributionFolder) -> None:
    """Print the strongest tokens of the first prompts, by every method."""
    from interp.cli.attribution.page import best

    rows: list[list[Any]] = []
    each = PRINTED_TARGETS // min(PRINTED, len(folder.prompts))
    for i, found in islice(folder.results(), PRINTED):
        for t in range(min(each, targets_of(found))):
            for method, scores in found.items():
                tokens = ", ".join(f"{name} {value:.2g}" for name, value in best(scores, t, folder.settings.top))
                rows.append([i + 1, label(found, t), method, tokens])
    left = len(folder.prompts) - PRINTED
    more = f" ({left} more prompts in the report and in tokens.parquet)" if left > 0 else ""
    table(f"Strongest tokens{more}", ["prompt", "explained", "method", "tokens and scores"], rows, right=("prompt",))
    sys.stdout.flush()
