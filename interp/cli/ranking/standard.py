"""The standard report of a model: prompts made for its kind, every method that fits, one folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.cli.ranking.folder import RunFolder
from interp.cli.ranking.run import run_heads
from interp.cli.ranking.settings import CONCEPTUAL, METHODS, VISUAL, HeadsSettings
from interp.errors import InputError, UnsupportedError
from interp.files import replacing, write_text

if TYPE_CHECKING:
    from interp.lens import Lens

TEXT, IMAGES = 16, 24  # prompts of a language model, and of a vision-language model
ABLATED = 4  # prompts that every head is removed on, one head at a time


def standard_report(
    lens: "Lens", model: str, out: Path, *, prompts: int | None = None, seed: int = 0, overwrite: bool = False
) -> RunFolder:
    """Make the inputs for a model's kind, and rank its heads on them.

    Language models: indirect objects ("Mary and John ... John gave a drink to"), with first names as keywords.
    Vision-language models: questions after the colour of the background of drawn scenes, with colours as keywords.
    Answers and keywords are used where the tokenizer has them as one token.

    Args:
        lens: the model.
        model: the name that it was loaded by.
        out: a folder: `out/inputs` gets the prompts, `out/heads` the run.
        prompts: how many.
        seed: of the prompts and of every random choice.
        overwrite: replace the run that is there.

    Raises:
        UnsupportedError: the model is neither.
        FileError, SettingsError: the folder holds something else, or a run with other inputs.
    """
    from interp.inputs import placeholder, tokenizer_of

    if tokenizer_of(lens.processor) is None or lens.anatomy.unembed is None:
        raise UnsupportedError(
            f"the standard report is for models that read text and predict tokens, which {lens.name} does not: name "
            "methods and prompts with `interp heads`."
        )
    visual = placeholder(lens.processor) is not None
    inputs = out / "inputs"
    (_scenes if visual else _names)(lens, inputs, prompts or (IMAGES if visual else TEXT), seed)
    answered = '"answer"' in (inputs / "prompts.jsonl").read_text(encoding="utf-8")
    words = inputs / "keywords.txt"
    left = {
        *(() if visual else VISUAL),
        *(() if answered else ("direct_effect",)),
        *(() if words.is_file() else CONCEPTUAL),
    }
    settings = HeadsSettings(
        model=model,
        methods=tuple(m for m in METHODS if m not in left),
        prompts=str(inputs / "prompts.jsonl"),
        keywords=str(words) if words.is_file() else None,
        patterns_on="repeated",
        repeat_length=16,
        ablation_prompts=ABLATED,
        seed=seed,
    )
    return run_heads(settings, out / "heads", overwrite=overwrite, lens=lens)


def _names(lens: "Lens", folder: Path, n: int, seed: int) -> None:
    from interp.data import indirect_objects
    from interp.data.prompts import NAMES

    rows = [{"text": p.text, "answer": p.answer, "wrong": p.wrong} for p in indirect_objects(n, seed=seed)]
    _write(lens, folder, rows, NAMES)


def _scenes(lens: "Lens", folder: Path, n: int, seed: int) -> None:
    from interp.data import scenes

    colours, rows = list(scenes.COLOURS), []
    for one in scenes.scenes("test", n, seed=seed):
        name = f"{one.id}.png"
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / name) as temporary:
            one.image.save(temporary, "PNG")
        asked = scenes.colour(one)
        wrong = colours[(colours.index(asked.answer) + 1) % len(colours)]
        rows.append({"text": asked.text, "image": name, "answer": asked.answer, "wrong": wrong})
    _write(lens, folder, rows, colours)


def _write(lens: "Lens", folder: Path, rows: list[dict[str, Any]], keywords: Sequence[str]) -> None:
    """Prompt and keyword file; answers only where all of them are one token, keywords where one is."""
    from interp.heads import keyword_tokens
    from interp.heads.common import token_ids

    try:
        for name in ("answer", "wrong"):
            token_ids(lens, [row[name] for row in rows], len(rows), name)
    except InputError:
        rows = [{key: value for key, value in row.items() if key not in ("answer", "wrong")} for row in rows]
    write_text(folder / "prompts.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    try:
        keyword_tokens(lens, keywords)
    except InputError:
        return
    write_text(folder / "keywords.txt", "\n".join(keywords) + "\n")
