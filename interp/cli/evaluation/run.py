"""Carry out a run of `interp evaluate`: get the texts that are missing, score them, write tables and the page."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from interp.cli.console import load, progress, table
from interp.cli.evaluation.data import Data, load_data, png
from interp.cli.evaluation.folder import EvaluationFolder
from interp.cli.evaluation.intervention import Acting, Maker, intervention
from interp.cli.evaluation.page import examples, write_page
from interp.cli.evaluation.probing import Probe, probe_of
from interp.cli.evaluation.settings import EvaluateSettings
from interp.errors import FileError
from interp.evaluation import (
    ChairScores,
    PopeScores,
    answer_questions,
    caption_images,
    caption_surprise,
    chair,
    pope,
    read_answers,
    read_captions,
    write_questions,
)
from interp.files import sha256, write_bytes, write_parquet

if TYPE_CHECKING:
    from interp.lens import Lens

Row = dict[str, Any]


def run_evaluation(
    settings: EvaluateSettings, out: str | os.PathLike[str], *, overwrite: bool = False
) -> EvaluationFolder:
    """Get the texts that are missing in a run folder, score them, and write its tables and report.

    Args:
        settings: what is asked.
        out: the run folder.
        overwrite: replace a run that is there.

    Raises:
        InterpError: something asked for does not fit the model, the data or the folder.
    """
    data = load_data(settings)
    content = content_of(settings, data)
    if settings.compares:
        from interp.cli.evaluation.comparison import run_comparison

        return run_comparison(settings, data, content, out, overwrite=overwrite)
    given = None if settings.texts is None else given_rows(settings, data)
    folder = EvaluationFolder.open(out, settings, content, overwrite=overwrite)
    if folder.record["complete"]:
        typer.echo(f"{settings.task}: complete in {folder.path} with the same settings; not computed again.")
        return folder
    if data.questions:
        write_questions(folder.path / "questions.jsonl", data.questions)
    if given is None:
        ask(folder, data, Loaded(settings))
    else:
        folder.texts.unlink(missing_ok=True)
        folder.append(given)
    scores = keep_scores(folder, data)
    if data.images is not None:
        for number, one in enumerate(examples(scores, settings.examples)):
            write_bytes(folder.path / "examples" / f"{number}.png", png(data.images[one]))
    from interp.report import Provenance

    folder.note(provenance=asdict(Provenance.here({}, seed=settings.seed)))
    write_page(folder)
    folder.note(complete=True)
    return folder


def content_of(settings: EvaluateSettings, data: Data) -> dict[str, str]:
    """The sha256 of everything that the files hold, by name."""
    content = {"data": data.sha256}
    if settings.texts is not None:
        content["texts"] = _digest(settings.texts)
    elif data.images is not None:
        content["images"] = data.images.digest()
    return content


def keep_scores(folder: EvaluationFolder, data: Data) -> "ChairScores | PopeScores":
    """Score the texts in a folder, and write the scores and their tables."""
    scores = _score(folder, data)
    scores.save(folder.path / "scores")
    write_parquet(folder.path / "results.parquet", scores.frame())
    write_parquet(folder.path / "numbers.parquet", scores.summary())
    return scores


class Loaded:
    """The model of a run, loaded when it is first needed."""

    def __init__(self, settings: EvaluateSettings) -> None:
        self.settings = settings
        self.found: Lens | None = None

    @property
    def lens(self) -> "Lens":
        """The model."""
        if self.found is None:
            typer.echo(f"loading {self.settings.model} ...")
            self.found = load(self.settings.model, device=self.settings.device, dtype=self.settings.dtype)
        return self.found


def given_rows(settings: EvaluateSettings, data: Data) -> list[Row]:
    """The rows of the file of captions or answers that the settings name, checked against the data.

    Raises:
        FileError, InputError: the file cannot be used, or does not fit the data.
    """
    if settings.task == "chair":
        wanted = None if settings.subset else list(data.objects)
        captions = read_captions(str(settings.captions), images=wanted)
        rows = [{"image": one, "caption": text} for one, text in captions.items()]
        _chair(settings, data, rows)
        return rows
    answers, chance = read_answers(str(settings.answers), questions=data.questions)
    more = {} if chance is None else chance
    return [{"id": one, "answer": text} | ({"p_yes": more[one]} if more else {}) for one, text in answers.items()]


def ask(
    folder: EvaluationFolder,
    data: Data,
    loaded: Loaded,
    *,
    probe: Probe | None = None,
    name: str | None = None,
    surprise: bool = False,
) -> None:
    """Get from the model what is not in the folder yet, batch by batch.

    Args:
        folder: of the run.
        data: what it is about.
        loaded: the model.
        probe: what interventions are estimated on, where several runs share it.
        name: what the run is called on the console; None for its task.
        surprise: whether to keep beside each caption what it costs under the model as it is.
    """
    settings, name = folder.settings, name or folder.settings.task
    key = "image" if settings.task == "chair" else "id"
    done = {row[key] for row in folder.done()}
    images = data.images
    assert images is not None  # the settings see to it
    wanted = list(images) if settings.task == "chair" else [question.id for question in data.questions]
    todo = [one for one in wanted if one not in done]
    if done:
        typer.echo(f"{name}: {len(done)} of {len(wanted)} are in {folder.path} already.")
    if not todo:
        return
    lens = loaded.lens
    device = str(lens.input_device)
    dtype = str(lens.dtype).removeprefix("torch.")
    folder.note(model={"device": device, "dtype": dtype, "class": type(lens.model).__name__})
    acting = intervention(lens, settings, probe or probe_of(settings, data))
    chair = settings.task == "chair"
    asked = _captioner(lens, settings, data, acting, surprise) if chair else _answerer(lens, settings, data, acting)
    start, size = time.perf_counter(), settings.batch_size
    with progress() as bar:
        task = bar.add_task(name, total=len(wanted), completed=len(done))
        for at in range(0, len(todo), size):
            chunk = todo[at : at + size]
            folder.append(asked(chunk))
            bar.advance(task, len(chunk))
    seconds = folder.record.get("seconds", 0.0) + time.perf_counter() - start
    folder.note(seconds=round(seconds, 2))
    typer.echo(f"{name}: {len(todo)} {'images' if chair else 'questions'}, {seconds:.1f} s")


def _captioner(
    lens: "Lens", settings: EvaluateSettings, data: Data, acting: Maker | None, surprise: bool
) -> Callable[[list[str]], list[Row]]:
    images: Mapping[str, Any] = data.images or {}

    def ask(chunk: list[str]) -> list[Row]:
        made, costs = Acting() if acting is None else acting(chunk), []
        found = caption_images(
            lens,
            {one: images[one] for one in chunk},
            prompt=data.prompt,
            max_new_tokens=settings.longest,
            batch_size=settings.batch_size,
            edits=made.edits,
            processors=made.processors,
            chat=settings.chat,
            watch=lambda batch, said: (
                costs.extend(caption_surprise(lens, batch, said.tokens).tolist()) if surprise else None
            ),
        )
        rows: list[Row] = [{"image": one, "caption": text} for one, text in found.items()]
        for row, (nats, tokens) in zip(rows, costs, strict=False):
            row |= {"nats": nats, "tokens": int(tokens)}
        return rows

    return ask


def _answerer(
    lens: "Lens", settings: EvaluateSettings, data: Data, acting: Maker | None
) -> Callable[[list[str]], list[Row]]:
    images: Mapping[str, Any] = data.images or {}
    questions = {question.id: question for question in data.questions}

    def ask(chunk: list[str]) -> list[Row]:
        made = Acting() if acting is None else acting(chunk)
        found = answer_questions(
            lens,
            [questions[one] for one in chunk],
            images,
            prompt=data.prompt,
            max_new_tokens=settings.longest,
            batch_size=settings.batch_size,
            edits=made.edits,
            processors=made.processors,
            chat=settings.chat,
        )
        return [{"id": one, "answer": found.texts[one], "p_yes": found.yes_probability[one]} for one in chunk]

    return ask


def _score(folder: EvaluationFolder, data: Data) -> "ChairScores | PopeScores":
    settings, rows = folder.settings, folder.done()
    if settings.task == "chair":
        return _chair(settings, data, rows)
    answers = {row["id"]: row["answer"] for row in rows}
    chance = {row["id"]: row["p_yes"] for row in rows if "p_yes" in row}
    return pope(
        answers,
        data.questions,
        yes_probability=chance or None,
        parser=settings.parser,  # pyright: ignore[reportArgumentType]
        seed=settings.seed,
        resamples=settings.resamples,
        settings=_recorded(settings, data),
    )


def _chair(settings: EvaluateSettings, data: Data, rows: list[Row]) -> "ChairScores":
    assert data.vocabulary is not None  # only questions from a file come without
    return chair(
        {row["image"]: row["caption"] for row in rows},
        data.objects,
        vocabulary=data.vocabulary,
        subset=settings.subset,
        seed=settings.seed,
        resamples=settings.resamples,
        settings=_recorded(settings, data),
    )


def _recorded(settings: EvaluateSettings, data: Data) -> dict[str, Any]:
    """What a result records of its run."""
    about = {"data": settings.source, "data_sha256": data.sha256}
    if settings.texts is not None:
        return {"model": "", "texts": settings.texts, **about}
    return {
        "model": settings.model,
        "prompt": data.prompt,
        "max_new_tokens": settings.longest,
        **settings.acts,
        **about,
    }


def _digest(path: str) -> str:
    if not os.path.isfile(path):
        raise FileError(f"cannot read {path}: there is no such file.")
    return sha256(path)


def show_numbers(folder: EvaluationFolder) -> None:
    """Print every number with its interval; of a comparison a row for each run."""
    if folder.settings.compares:
        from interp.cli.evaluation.comparison import show_comparison

        show_comparison(folder)
        return
    scores = folder.scores()
    rows = []
    for row in scores.summary().to_dict("records"):
        span = "" if row["low"] != row["low"] else f"{row['low']:.4f} to {row['high']:.4f}"
        note = "" if row["defined"] else "nothing to divide by"
        rows.append([row["part"], row["metric"], f"{row['value']:.4f}", span, note])
    columns = ["part", "metric", "value", "95% interval over images", ""]
    table(folder.settings.task.upper(), columns, rows, right=("value", "95% interval over images"))
