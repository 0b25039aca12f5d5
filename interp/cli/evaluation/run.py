"""Carry out a run of `interp evaluate`: get the texts that are missing, score them, write tables and the page."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import typer

from interp.cli.console import load, progress, table
from interp.cli.evaluation.data import Data, load_data, png
from interp.cli.evaluation.folder import EvaluationFolder
from interp.cli.evaluation.intervention import Maker, first_prompts, intervention
from interp.cli.evaluation.page import examples, write_page
from interp.cli.evaluation.settings import EvaluateSettings
from interp.errors import FileError
from interp.evaluation import (
    ChairScores,
    PopeScores,
    answer_questions,
    caption_images,
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
    content = {"data": data.sha256}
    if settings.texts is not None:
        content["texts"] = _digest(settings.texts)
    elif data.images is not None:
        content["images"] = data.images.digest()
    given = None if settings.texts is None else given_rows(settings, data)
    folder = EvaluationFolder.open(out, settings, content, overwrite=overwrite)
    if folder.record["complete"]:
        typer.echo(f"{settings.task}: complete in {folder.path} with the same settings; not computed again.")
        return folder
    if data.questions:
        write_questions(folder.path / "questions.jsonl", data.questions)
    if given is None:
        _ask(folder, data)
    else:
        folder.texts.unlink(missing_ok=True)
        folder.append(given)
    scores = _score(folder, data)
    scores.save(folder.path / "scores")
    write_parquet(folder.path / "results.parquet", scores.frame())
    write_parquet(folder.path / "numbers.parquet", scores.summary())
    if data.images is not None:
        for number, one in enumerate(examples(scores, settings.examples)):
            write_bytes(folder.path / "examples" / f"{number}.png", png(data.images[one]))
    from interp.report import Provenance

    folder.note(provenance=asdict(Provenance.here({}, seed=settings.seed)))
    write_page(folder)
    folder.note(complete=True)
    return folder


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


def _ask(folder: EvaluationFolder, data: Data) -> None:
    """Get from the model what is not in the folder yet, batch by batch."""
    settings = folder.settings
    key = "image" if settings.task == "chair" else "id"
    done = {row[key] for row in folder.done()}
    images = data.images
    assert images is not None  # the settings see to it
    wanted = list(images) if settings.task == "chair" else [question.id for question in data.questions]
    todo = [one for one in wanted if one not in done]
    if done:
        typer.echo(f"{settings.task}: {len(done)} of {len(wanted)} are in {folder.path} already.")
    if not todo:
        return
    typer.echo(f"loading {settings.model} ...")
    lens = load(settings.model, device=settings.device, dtype=settings.dtype)
    device = str(next(lens.model.parameters()).device)
    dtype = str(lens.dtype).removeprefix("torch.")
    folder.note(model={"device": device, "dtype": dtype, "class": type(lens.model).__name__})
    probe = partial(first_prompts, lens, data.prompt, images, data.questions, settings.chat)
    acting = intervention(lens, settings, probe)
    ask = (_captioner if settings.task == "chair" else _answerer)(lens, settings, data, acting)
    start, size = time.perf_counter(), settings.batch_size
    with progress() as bar:
        task = bar.add_task(settings.task, total=len(wanted), completed=len(done))
        for at in range(0, len(todo), size):
            chunk = todo[at : at + size]
            folder.append(ask(chunk))
            bar.advance(task, len(chunk))
    seconds = folder.record.get("seconds", 0.0) + time.perf_counter() - start
    folder.note(seconds=round(seconds, 2))
    typer.echo(f"{settings.task}: {len(todo)} {'images' if settings.task == 'chair' else 'questions'}, {seconds:.1f} s")


def _captioner(
    lens: "Lens", settings: EvaluateSettings, data: Data, acting: Maker | None
) -> Callable[[list[str]], list[Row]]:
    images: Mapping[str, Any] = data.images or {}

    def ask(chunk: list[str]) -> list[Row]:
        found = caption_images(
            lens,
            {one: images[one] for one in chunk},
            prompt=data.prompt,
            max_new_tokens=settings.longest,
            batch_size=settings.batch_size,
            edits=() if acting is None else acting(chunk),
            chat=settings.chat,
        )
        return [{"image": one, "caption": text} for one, text in found.items()]

    return ask


def _answerer(
    lens: "Lens", settings: EvaluateSettings, data: Data, acting: Maker | None
) -> Callable[[list[str]], list[Row]]:
    images: Mapping[str, Any] = data.images or {}
    questions = {question.id: question for question in data.questions}

    def ask(chunk: list[str]) -> list[Row]:
        found = answer_questions(
            lens,
            [questions[one] for one in chunk],
            images,
            prompt=data.prompt,
            max_new_tokens=settings.longest,
            batch_size=settings.batch_size,
            edits=() if acting is None else acting(chunk),
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
    """Print every number with its interval."""
    scores = folder.scores()
    rows = []
    for row in scores.summary().to_dict("records"):
        span = "" if row["low"] != row["low"] else f"{row['low']:.4f} to {row['high']:.4f}"
        note = "" if row["defined"] else "nothing to divide by"
        rows.append([row["part"], row["metric"], f"{row['value']:.4f}", span, note])
    columns = ["part", "metric", "value", "95% interval over images", ""]
    table(folder.settings.task.upper(), columns, rows, right=("value", "95% interval over images"))
