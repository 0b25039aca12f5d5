"""The page of a run: what was asked, each prompt by every method side by side, and how far the methods agree."""

import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.cli.attribution.agreement import agreement
from interp.cli.attribution.folder import AttributionFolder, label, shown, targets_of
from interp.cli.attribution.texts import QUESTIONS, SIGNED, TITLES, explanation, target_text
from interp.cli.pictures import picture_of
from interp.figures import ranked_bars
from interp.files import write_parquet
from interp.palette import DIVERGING, SEQUENTIAL
from interp.report import (
    Figure,
    KeyValues,
    Panel,
    Panels,
    Prompts,
    Provenance,
    Scale,
    Section,
    Table,
    Text,
    overlay,
    write_report,
)
from interp.token_figures import QUIET, chips_of, colours, inks, text_range

if TYPE_CHECKING:
    import pandas as pd

    from interp.tokens import TokenScores

Found = dict[str, "TokenScores"]
MOST_TARGETS, MOST_CHIPS, MOST_ROWS, BEST = 8, 400, 200, 5
LONGEST = 600  # letters of a prompt that are written out beside its coloured text


def write_page(folder: AttributionFolder) -> Path:
    """Write `agreement.parquet` and `report.html` from what the folder holds.

    Raises:
        FileError: a result is missing or damaged.
    """
    drawn: list[Section] = []
    first: Found = {}
    rows: list[dict[str, Any]] = []
    caveats: dict[str, list[tuple[int, str]]] = {}
    for i, found in folder.results():
        first = first or found
        rows += _strongest(i, found) if len(rows) < MOST_ROWS else []
        for method, scores in found.items():
            if scores.caveat:
                caveats.setdefault(method, []).append((i, scores.caveat))
        if i < folder.settings.examples:
            drawn.append(_prompt(folder, i, found))
    frame = agreement(folder)
    write_parquet(folder.path / "agreement.parquet", frame)
    sections = [_summary(folder, first, rows), *drawn]
    if len(frame):
        sections.append(_agreement(frame))
    sections.append(_reading(first, caveats, len(folder.prompts)))
    sections.append(Section("All prompts", [Prompts([_text(p) for p in folder.prompts])]))
    source = Provenance(**{**folder.record.get("provenance", {}), "settings": _settings(folder)})
    names = ", ".join(TITLES[m].lower() for m in folder.complete)
    title = f"What mattered to {folder.settings.model}"
    return write_report(folder.path, title=title, subtitle=f"By {names}", sections=sections, provenance=source)


def _settings(folder: AttributionFolder) -> dict[str, Any]:
    seconds = {m: row["seconds"] for m, row in folder.record["methods"].items()}
    return {**folder.record["settings"], **folder.record.get("model", {}), "seconds": seconds}


def _text(prompt: Any) -> str:
    answer = f" → {prompt.answer.strip()}" if prompt.answer else ""
    wrong = f" (not {prompt.wrong.strip()})" if prompt.wrong else ""
    image = f"[{prompt.image.name}] " if prompt.image else ""
    return f"{image}{prompt.text}{answer}{wrong}"


def _summary(folder: AttributionFolder, first: Found, rows: list[dict[str, Any]]) -> Section:
    import pandas as pd

    about = []
    for method, scores in first.items():
        asks = "the answer" if folder.settings.answering(method) else "the position alone"
        seconds = folder.record["methods"][method]["seconds"]
        about.append(
            {
                "method": TITLES[method],
                "question": QUESTIONS[method],
                "explains": asks,
                "sign": "yes" if method in SIGNED else "no",
                "unit": scores.unit or "none",
                "seconds": seconds,
            }
        )
    settings, count = folder.settings, len(folder.prompts)
    return Section(
        "Summary",
        [
            Text(
                f"{count} prompt{'s' if count > 1 else ''}. {target_text(settings.target, settings.span)}\n\n"
                "The methods answer different questions and need not agree. A map is no proof of what the model used: "
                "where it matters, compare with blank-out, which measures an effect."
            ),
            Table(pd.DataFrame(about), "The methods; seconds are for all prompts together."),
            Table(
                pd.DataFrame(rows),
                f"The {BEST} tokens with the largest scores for each target (· is a space), special tokens left out"
                f"{' (the first prompts; all are in tokens.parquet)' if len(rows) >= MOST_ROWS else ''}. Image tokens "
                "are called by the row and column of their patch.",
                MOST_ROWS,
            ),
        ],
    )


def _strongest(i: int, found: Found) -> list[dict[str, Any]]:
    rows = []
    for t in range(targets_of(found)):
        for method, scores in found.items():
            tokens = ", ".join(f"{name} {value:.2g}" for name, value in best(scores, t, BEST))
            rows.append({"prompt": i + 1, "explained": label(found, t), "method": TITLES[method], "tokens": tokens})
    return rows


def best(scores: "TokenScores", target: int, k: int) -> list[tuple[str, float]]:
    """The k sources of one prompt's target with the largest scores, by name; zeros and special tokens are left out."""
    values = scores.scores[0, target].numpy()
    kinds = kinds_of(scores)
    order = [c for c in np.argsort(-values, kind="stable") if kinds[c] != "special" and values[c] != 0]
    return [(_source(scores, int(c), str(kinds[c])), float(values[c])) for c in order[:k]]


def _source(scores: "TokenScores", column: int, kind: str) -> str:
    """A source by name: a text token in quotes with its spaces visible, a patch by row and column."""
    if kind != "image":
        return f"'{shown(scores.tokens[0][column])}'"
    patches = scores.patches
    if patches is not None:
        at = (patches.column == column).nonzero()
        if len(at) and int(patches.row[at[0, 0]]) >= 0:
            n = int(at[0, 0])
            return f"patch {int(patches.row[n])},{int(patches.col[n])}"
    return f"image token {column}"


def _prompt(folder: AttributionFolder, i: int, found: Found) -> Section:
    count = targets_of(found)
    prompt = folder.prompts[i]
    about = {"Text": shortened(prompt.text, LONGEST), "Image": prompt.image.name if prompt.image else None}
    about |= {name.title(): shown(text) for name in ("answer", "wrong") if (text := getattr(prompt, name))}
    blocks: list[Any] = [KeyValues({name: value for name, value in about.items() if value})]
    for t in range(min(count, MOST_TARGETS)):
        items = [_panel(folder, i, method, scores, t) for method, scores in found.items()]
        blocks.append(Panels(items, f"Explained: {label(found, t)}"))
    if count > MOST_TARGETS:
        blocks.append(Text(f"The first {MOST_TARGETS} of {count} targets are drawn; all are in tokens.parquet."))
    name = " ".join((prompt.text or prompt.image.name).split())  # pyright: ignore
    return Section(f"Prompt {i + 1}: {shortened(name, 60)}", blocks)


def shortened(text: str, most: int) -> str:
    """A text of at most so many letters."""
    return text if len(text) <= most else text[: most - 3] + "..."


def _panel(folder: AttributionFolder, i: int, method: str, scores: "TokenScores", target: int) -> Panel:
    values = scores.scores[0, target].double().numpy()
    kinds = kinds_of(scores)
    png, png_scale = b"", None
    picture = picture_of(folder.path / "pictures", i, scores)
    if has_map(scores):
        png, png_scale = overlay(scores.image_map(target=target).numpy(), picture, signed=method in SIGNED)
    chips, scale = [], None
    if values[kinds != "image"].any():
        chips, scale = _chips(list(scores.tokens[0]), values, kinds, method in SIGNED)
    unit = f" ({scores.unit})" if scores.unit else ""
    return Panel(f"{TITLES[method]}{unit}", chips, scale, png, png_scale, scores.caveat)


def kinds_of(scores: "TokenScores") -> np.ndarray:
    """The kind of each source of one prompt: `image`, `special` or `text`."""
    kinds = np.full(scores.scores.shape[-1], "text", dtype=object)
    for name in ("special", "image"):
        if name in scores.spans:
            kinds[scores.spans[name][0].numpy()] = name
    return kinds


def has_map(scores: "TokenScores") -> bool:
    """Whether some token has a place in the prompt's first picture."""
    patches = scores.patches
    if patches is None:
        return False
    rows = zip(patches.kind, patches.image.tolist(), strict=True)
    return any(kind in ("patch", "tile", "thumbnail") and image == 0 for kind, image in rows)


def _chips(
    tokens: list[str], values: np.ndarray, kinds: np.ndarray, signed: bool
) -> tuple[list[tuple[str, str, str, str]], Scale]:
    """Coloured text, and what its colours mean; see `TokenScores.plot` for their range."""
    low, high, _ = text_range(values, kinds, None)  # pyright: ignore[reportArgumentType]
    low = -high if signed else low
    found = []
    for chip in list(chips_of(tokens, values, kinds))[:MOST_CHIPS]:  # pyright: ignore[reportArgumentType]
        back = QUIET if chip.score is None else colours(np.array([chip.score]), low, high, signed)[0]
        number = "" if chip.score is None else f" = {chip.score:.4g}"
        found.append((html.unescape(chip.text), html.unescape(chip.hover) + number, back, inks([back])[0]))
    if len(kinds) and len(found) == MOST_CHIPS:
        found.append(("...", "more in tokens.parquet", QUIET, inks([QUIET])[0]))
    written = values[kinds != "image"]
    ends = f"{'≤ ' if written.min() < low else ''}{low:.2g}", f"{'≥ ' if written.max() > high else ''}{high:.2g}"
    return found, Scale(DIVERGING if signed else SEQUENTIAL, *ends)


def _agreement(frame: "pd.DataFrame") -> Section:
    names = [f"{TITLES[r['method']]} and {TITLES[r['other']].lower()}" for r in frame.to_dict("records")]
    several = bool(frame["low"].notna().all())
    low, high = (frame[name].to_numpy() if several else None for name in ("low", "high"))
    bars = ranked_bars(names, frame["sizes"].to_numpy(), low=low, high=high, unit="Spearman")
    named = frame.replace({"method": TITLES, "other": TITLES}).rename(columns=lambda name: name.replace("_", " "))
    named = named.drop(columns=[c for c in ("low", "high", "signed") if bool(frame[c].isna().all())])
    return Section(
        "Do the methods agree?",
        [
            Text(
                "Spearman's rank correlation of the sizes of two methods' scores over the tokens of a prompt (1: the "
                "same order; 0: no relation), the mean over targets, then over prompts. Special tokens, and those "
                "behind the target, do not count; a method that says nothing of text (relative attention) is compared "
                "over image tokens. Low agreement means that at most one of the two can be right about what the model "
                "used; high agreement does not mean that either is: two can share a mistake."
            ),
            Figure(bars, "With 95% bootstrap intervals over prompts." if several else ""),
            Table(
                named,
                "Each pair of methods. sizes: correlation of sizes, with its interval low to high, and where it would "
                "lie by chance. signed: of the scores themselves, where both have a sign.",
            ),
        ],
    )


def _reading(first: Found, caveats: dict[str, list[tuple[int, str]]], total: int) -> Section:
    blocks: list[Any] = []
    for method, scores in first.items():
        told = ""
        if method in caveats:
            some = caveats[method]
            told = f"\n\nIn {len(some)} of {total} prompts, the first of them prompt {some[0][0] + 1}: {some[0][1]}"
        blocks.append(Text(f"{TITLES[method].upper()}. {explanation(method, scores.settings)}{told}"))
    return Section("How to read each method", blocks)
