"""Carry out a run of `interp heads`: compute what is missing, keep it, write tables, figures and the page."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from interp.cli.console import load, progress, table
from interp.cli.runfolder import RunFolder, prompts_of
from interp.cli.settings import HeadsSettings
from interp.files import write_parquet

if TYPE_CHECKING:
    from interp.cli.batches import Chunk
    from interp.data import Prompt
    from interp.lens import Lens


def run_heads(
    settings: HeadsSettings,
    out: str | os.PathLike[str],
    *,
    prompts: "list[Prompt] | None" = None,
    overwrite: bool = False,
) -> RunFolder:
    """Compute the methods that are missing in a run folder, and write its tables, figures and report.

    Args:
        settings: what is asked.
        out: the run folder.
        prompts: instead of reading the file that the settings name.
        overwrite: replace a run that is there.

    Raises:
        InterpError: something asked for does not fit the model, the prompts or the folder.
    """
    from interp.cli.page import write_page

    prompts = prompts_of(settings) if prompts is None else prompts
    settings.check_prompts(prompts)
    folder = RunFolder.open(out, settings, prompts, overwrite=overwrite)
    missing = [m for m in settings.methods if m not in folder.complete]
    for method in settings.methods:
        if method not in missing:
            typer.echo(f"{method}: complete in {folder.path} with the same settings; not computed again.")
    if missing:
        _compute(folder, missing)
    folder.write_tables()
    folder.write_figures()
    write_page(folder)
    return folder


def _compute(folder: RunFolder, missing: Sequence[str]) -> None:
    from interp.cli.batches import compute
    from interp.cli.examples import answers_of, example, strongest
    from interp.cli.roles import mover, roles
    from interp.heads.common import token_ids
    from interp.report import Provenance

    settings, prompts = folder.settings, folder.prompts
    typer.echo(f"loading {settings.model} ...")
    lens = load(settings.model, device=settings.device, dtype=settings.dtype)
    for name in ("answer", "wrong"):  # every continuation is one token, before anything heavy runs
        words = [getattr(p, name) for p in prompts]
        if words and words[0] is not None:
            token_ids(lens, words, len(words), name)
    made: dict[str, list[Chunk]] = {}
    with progress() as bar:
        for method in missing:
            kind = _kind(method, settings)
            chunks = made[kind] if kind in made else made.setdefault(kind, _chunks(lens, method, settings, prompts))
            start = time.perf_counter()
            if method == "ablation":  # slow within a batch: it shows a bar of its own
                bar.stop()
                scores = compute(lens, method, chunks, settings, show=bar.console.is_terminal)
                bar.start()
            else:
                task = bar.add_task(method, total=len(chunks))
                scores = compute(lens, method, chunks, settings, done=lambda task=task: bar.advance(task))
            seconds = time.perf_counter() - start
            found = roles(lens, scores, chunks) if method == "direct_effect" else None
            shown = [(strongest(method, scores), "the strongest head by this method")]
            if found is not None and (head := mover(found)) not in (None, shown[0][0]):
                shown.append((head, "the head that raises the answer most while looking at it (a name mover)"))  # pyright: ignore[reportArgumentType]
            examples = [example(lens, scores, chunks, head, role) for head, role in shown]
            folder.keep(method, scores, seconds=seconds, examples=[e for e in examples if e], roles=found)
            typer.echo(f"{method}: {seconds:.1f} s")
        if prompts and prompts[0].answer is not None and not (folder.path / "answers.parquet").is_file():
            chunks = _chunks(lens, "answers", settings, prompts)
            task = bar.add_task("answers", total=len(chunks))
            write_parquet(
                folder.path / "answers.parquet", answers_of(lens, chunks, lambda task=task: bar.advance(task))
            )
    source = asdict(Provenance.here({}, seed=settings.seed))
    device = str(next(lens.model.parameters()).device)
    dtype = str(lens.dtype).removeprefix("torch.")
    folder.note(provenance=source, model={"device": device, "dtype": dtype, "class": type(lens.model).__name__})


def _kind(method: str, settings: HeadsSettings) -> str:
    if method == "patterns" and settings.repeated:
        return "repeated"
    return method if method == "ablation" else "prompts"


def _chunks(lens: "Lens", method: str, settings: HeadsSettings, prompts: "list[Prompt]") -> "list[Chunk]":
    from interp.cli.batches import prompt_chunks, repeated_chunks

    if method == "patterns" and settings.repeated:
        return repeated_chunks(lens, settings)
    size = settings.batch_size
    if method == "ablation":
        prompts = prompts[: settings.ablation_prompts or None]
        if settings.mode == "mean":
            size = len(prompts)  # the mean that stands in for a head is that of a batch: there must be one
    return prompt_chunks(lens, prompts, size)


def show_top(folder: RunFolder, method: str, k: int | None = None) -> None:
    """Print the strongest heads of one method."""
    from interp.cli.texts import TITLES

    scores = folder.scores()[method]
    top = scores.top(k or folder.settings.top, by="abs")
    interval: Any = None
    if scores.per_prompt is not None and len(scores.per_prompt) > 1:
        interval = scores.interval(seed=folder.settings.seed)
    rows: list[list[Any]] = []
    for row in top.to_dict("records"):
        layer, head, sign = row["layer"], row["head"], "+" if scores.scores.lt(0).any() else ""
        cells = [row["rank"], layer, head, f"{row['score']:{sign}.4f}"]
        if interval is not None:
            cells.append(f"{interval[0][layer, head]:.4f} to {interval[1][layer, head]:.4f}")
        rows.append(cells)
    columns = ["rank", "layer", "head", scores.unit or "score", *(["95% interval"] if interval is not None else [])]
    table(f"{TITLES[method]}: strongest heads", columns, rows, right=tuple(columns))
    sys.stdout.flush()
