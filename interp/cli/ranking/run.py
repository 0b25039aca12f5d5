"""Carry out a run of `interp heads`: compute what is missing, keep it, write tables, figures and the page."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import typer

from interp.cli.console import load, progress, table
from interp.cli.ranking.folder import RunFolder, keywords_of, prompts_of
from interp.cli.ranking.settings import CONCEPTUAL, HeadsSettings
from interp.cli.together import Together
from interp.files import write_parquet

if TYPE_CHECKING:
    from interp.cli.ranking.batches import Chunk
    from interp.cli.ranking.evidence import Evidence
    from interp.data import Prompt
    from interp.heads import Keywords
    from interp.lens import Lens
    from interp.scores import HeadScores


def run_heads(
    settings: HeadsSettings,
    out: str | os.PathLike[str],
    *,
    lens: "Lens | None" = None,
    overwrite: bool = False,
    together: Together | None = None,
) -> RunFolder:
    """Compute the methods that are missing in a run folder, and write its tables, figures and report.

    Args:
        settings: what is asked.
        out: the run folder.
        lens: the model, where it is loaded already.
        overwrite: replace a run that is there.
        together: the processes that divide the prompts; only the first returns with everything written.

    Raises:
        InterpError: something asked for does not fit the model, the prompts or the folder.
    """
    from interp.cli.ranking.page import write_page
    from interp.cli.ranking.summary import write_summary

    prompts, keywords = prompts_of(settings), keywords_of(settings)
    settings.check_prompts(prompts)
    together = together or Together(settings.device)
    if together.first:
        folder = RunFolder.open(out, settings, prompts, keywords, overwrite=overwrite)
    together.wait()
    if not together.first:
        folder = replace(RunFolder.read(out), prompts=prompts)
    missing = [m for m in settings.methods if m not in folder.complete]
    for method in settings.methods:
        if method not in missing:
            typer.echo(f"{method}: complete in {folder.path} with the same settings; not computed again.")
    if missing:
        if lens is None:
            typer.echo(f"loading {settings.model} ...")
            lens = load(settings.model, device=settings.device, dtype=settings.dtype)
        _compute(folder, lens, missing, together)
    if not together.first:
        return folder
    folder.write_tables()
    folder.write_figures()
    write_summary(folder)
    write_page(folder)
    return folder


def _compute(folder: RunFolder, lens: "Lens", missing: Sequence[str], together: Together) -> None:
    from interp.cli.ranking.batches import compute
    from interp.cli.ranking.evidence import Evidence
    from interp.cli.ranking.examples import answers_of
    from interp.report import Provenance

    settings, prompts = folder.settings, folder.prompts
    words = _check(lens, folder, missing)

    def share(count: int, piece: "Callable[[int], HeadScores]") -> "Sequence[HeadScores]":
        return together.exchanged({n: piece(n) for n in together.mine(count)}, folder.path / "pieces")

    made: dict[str, list[Chunk]] = {}
    with progress() as bar:
        whole = _chunks(lens, "prompts", settings, prompts)
        if whole and (rows := _rows(lens, settings, whole, missing, together)) < settings.batch_size:
            settings = replace(settings, batch_size=rows)
            whole = _chunks(lens, "prompts", settings, prompts)
        made["prompts"] = whole
        few = settings.effect_prompts and settings.effect_prompts < len(prompts)
        some = _chunks(lens, "prompts", settings, prompts[: settings.effect_prompts]) if few else whole
        evidence = Evidence(lens, settings, whole, some)
        for method in missing:
            kind = _kind(method, settings)
            chunks = made[kind] if kind in made else made.setdefault(kind, _chunks(lens, kind, settings, prompts))
            start = time.perf_counter()
            if method == "ablation":  # slow within a batch: it shows a bar of its own
                bar.stop()
                show = bar.console.is_terminal and together.first
                scores = compute(lens, method, chunks, settings, show=show, share=share)
                bar.start()
            else:
                task = bar.add_task(method, total=len(chunks))
                done = lambda task=task: bar.advance(task)  # noqa: E731
                scores = compute(lens, method, chunks, settings, keywords=words, done=done, share=share)
            if not together.first:
                continue
            seconds = time.perf_counter() - start
            task = bar.add_task(f"{method}: what its heads do", total=None)
            _keep(folder, evidence, method, scores, chunks, seconds)
            bar.remove_task(task)
            typer.echo(f"{method}: {seconds:.1f} s")
        if not together.first:
            return
        if prompts and prompts[0].answer is not None and not (folder.path / "answers.parquet").is_file():
            task = bar.add_task("answers", total=len(whole))
            write_parquet(folder.path / "answers.parquet", answers_of(lens, whole, lambda task=task: bar.advance(task)))
    source = asdict(Provenance.here({}, seed=settings.seed))
    device = str(lens.input_device)
    dtype = str(lens.dtype).removeprefix("torch.")
    about: dict[str, Any] = {"device": device, "dtype": dtype, "class": type(lens.model).__name__}
    if words is not None:
        about["keyword tokens"] = words.report()
    folder.note(provenance=source, model=about, left_out={**folder.record.get("left_out", {}), **evidence.reasons})


def _rows(
    lens: "Lens", settings: HeadsSettings, chunks: "list[Chunk]", missing: Sequence[str], together: Together
) -> int:
    """How many prompts go through the model at once; says what a pass over them takes.

    Raises:
        InputError: not even one prompt fits.
    """
    from interp.cli.cost import Need, costs_of, rows_of

    batches = [chunk.batch for chunk in chunks]
    widest = max(batches, key=lambda batch: batch.mask.shape[1])
    prompts = sum(map(len, batches))
    share = sum(len(b) * b.mask.shape[1] for b in batches) / prompts / widest.mask.shape[1]
    need = Need("a pass over the prompts", ("z",), "importance" in missing)
    costs = list(costs_of(lens, widest, [need], prompts, share=share).values())
    rows = rows_of(costs, settings.batch_size, least=together.least)
    for cost in costs:
        typer.echo(cost.line(min(rows, len(widest))))
    return rows


def _check(lens: "Lens", folder: RunFolder, missing: Sequence[str]) -> "Keywords | None":
    """What can be known to be wrong before anything heavy runs; and the keywords as tokens, where they are needed.

    Raises:
        InputError: an answer that is not one token, or no keyword that the tokenizer can express.
        UnsupportedError: images for a model that takes none.
    """
    from interp.errors import UnsupportedError
    from interp.heads import keyword_tokens
    from interp.heads.common import token_ids
    from interp.inputs import placeholder

    prompts, settings = folder.prompts, folder.settings
    if any(p.image is not None for p in prompts) and (lens.processor is None or placeholder(lens.processor) is None):
        raise UnsupportedError(f"the prompts have images, but {lens.name} takes none: use a vision-language model.")
    for name in ("answer", "wrong"):
        words = [getattr(p, name) for p in prompts]
        if words and words[0] is not None:
            token_ids(lens, words, len(words), name)
    if not set(missing) & set(CONCEPTUAL):
        return None
    pieces: Any = settings.pieces
    return keyword_tokens(lens, folder.keywords, variants=settings.variants, pieces=pieces)


def _keep(
    folder: RunFolder,
    evidence: "Evidence",
    method: str,
    scores: "HeadScores",
    chunks: "list[Chunk]",
    seconds: float,
) -> None:
    """Save one method's result with what stands beside it."""
    from interp.cli.ranking.examples import example, strongest
    from interp.cli.ranking.maps import keep_maps
    from interp.cli.ranking.roles import mover, roles

    lens = evidence.lens
    found = roles(lens, scores, chunks) if method == "direct_effect" else None
    shown = [(strongest(method, scores), "the strongest head by this method")]
    if found is not None and (head := mover(found)) not in (None, shown[0][0]):
        shown.append((head, "the head that raises the answer most while looking at it (a name mover)"))  # pyright: ignore[reportArgumentType]
    examples = [example(lens, scores, chunks, head, role) for head, role in shown]
    topics = evidence.topics(method, scores)
    if reason := keep_maps(folder, lens, method, topics):
        evidence.reasons["attention maps"] = reason
    folder.keep(
        method,
        scores,
        seconds=seconds,
        examples=[e for e in examples if e],
        roles=found,
        topics=topics,
        intervals=evidence.intervals(method, scores),
        effects=evidence.effects(method, scores, chunks),
    )


def _kind(method: str, settings: HeadsSettings) -> str:
    """Which inputs a method runs on."""
    if method == "patterns" and settings.repeated:
        return "repeated"
    return method if method == "ablation" else "prompts"


def _chunks(lens: "Lens", kind: str, settings: HeadsSettings, prompts: "list[Prompt]") -> "list[Chunk]":
    from interp.cli.ranking.batches import prompt_chunks, repeated_chunks

    if kind == "repeated":
        return repeated_chunks(lens, settings)
    size = settings.batch_size
    if kind == "ablation":
        prompts = prompts[: settings.ablation_prompts or None]
        if settings.mode == "mean":
            size = len(prompts)  # the mean that stands in for a head is that of a batch: there must be one
    return prompt_chunks(lens, prompts, size)


def show_top(folder: RunFolder, method: str, k: int | None = None) -> None:
    """Print the strongest heads of one method."""
    from interp.cli.ranking.evidence import leading
    from interp.cli.ranking.folder import with_interval
    from interp.cli.ranking.texts import TITLES

    scores = folder.scores()[method]
    top = scores.top(k or folder.settings.top, by=leading(method, scores))
    frame = with_interval(scores, folder.settings.seed, folder.intervals(method))
    several = "low" in frame
    rows: list[list[Any]] = []
    for row in top.merge(frame[["layer", "head", *(["low", "high"] if several else [])]]).to_dict("records"):
        sign = "+" if scores.scores.lt(0).any() else ""
        cells = [row["rank"], row["layer"], row["head"], f"{row['score']:{sign}.4f}"]
        if several:
            cells.append(f"{row['low']:.4f} to {row['high']:.4f}")
        rows.append(cells)
    columns = ["rank", "layer", "head", scores.unit or "score", *(["95% interval"] if several else [])]
    by = " above the floor of random lists" if leading(method, scores) == "above_floor" else ""
    table(f"{TITLES[method]}: strongest heads{by}", columns, rows, right=tuple(columns))
    sys.stdout.flush()
