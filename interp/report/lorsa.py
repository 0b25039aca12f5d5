"""The page of a Lorsa's heads: each with its numbers, what it writes, and where it fires with what fed it there."""

import html
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.errors import SettingsError
from interp.figures import show_token
from interp.palette import DIVERGING, SEQUENTIAL
from interp.report.blocks import Panel, Provenance, Scale, Section, Text
from interp.report.features import COVER, PLACED, PLAIN, Page
from interp.report.heatmap import overlay
from interp.report.page import write_report
from interp.token_figures import QUIET, colours, inks

if TYPE_CHECKING:
    from interp.data.corpora import Corpus
    from interp.dictionaries.features import Example, ExplanationScores, LogitEffects, Neighbours
    from interp.dictionaries.lorsa import Behaviours, HeadContexts, HeadExample, HeadRelations

QUERY = "#6a3d9a"  # where the head fires: no colour of the scales
SHOWN = 0.01  # of the latent; what gave less is not coloured
FAR = 0.05  # of the latent; tokens outside the window that gave so much are shown, too
PALE = 0.1  # of the latent; a patch that gave less has never the strongest colour
NEAR = 2  # with so many tokens around them
MARK, GAP = "\N{BLACK RIGHT-POINTING SMALL TRIANGLE}", "\N{HORIZONTAL ELLIPSIS}"
BACK = 12  # tokens in front of the query that are always shown


def write_lorsa_page(
    folder: str | os.PathLike[str],
    contexts: "HeadContexts",
    *,
    effects: "LogitEffects | None" = None,
    neighbours: "Neighbours | None" = None,
    behaviours: "Behaviours | None" = None,
    relations: "HeadRelations | None" = None,
    explanations: Mapping[int, str] | None = None,
    scores: Sequence["ExplanationScores"] = (),
    corpus: "Corpus | None" = None,
    examples: int = 8,
    title: str = "",
    provenance: Provenance | None = None,
) -> Path:
    """Write `report.html`: an index of heads, and for each its numbers, tokens, behaviour and contexts.

    Args:
        folder: made when it is missing; an older `report.html` in it is replaced.
        contexts: from `head_contexts`; `select` chooses some of its heads.
        effects: from `logit_effects`.
        neighbours: from `neighbours`.
        behaviours: from `head_behaviours`.
        relations: from `head_relations`.
        explanations: from `explain`.
        scores: from `detection_score` and `fuzzing_score`.
        corpus: the corpus of the contexts, for its pictures; without it patches are drawn on a light ground.
        examples: contexts of each head in which it fires most; of those drawn at random, half as many.
        title: plain text; empty for the model and the layer.
        provenance: None for that of this process.

    Returns:
        The path of the page.

    Raises:
        SettingsError: examples is below 1, or the corpus is another one than that of the contexts.
        FileError: the page cannot be written, or a picture cannot be read.
    """
    settings = dict(contexts.settings)
    if examples < 1:
        raise SettingsError(f"examples is at least 1, found {examples}.")
    if corpus is not None and corpus.identity != settings["corpus"]:
        raise SettingsError("this corpus is not the one that the contexts come from.")
    page = _HeadPage(contexts, effects, neighbours, explanations or {}, tuple(scores), corpus, examples)
    page.behaviours, page.relations = behaviours, relations
    page.labels = [] if behaviours is None else behaviours.labels()
    heads, count = contexts.latents.tolist(), settings["d_sae"]
    return write_report(
        folder,
        title=title or f"Lorsa heads at {settings['read']} of {settings['model']}",
        subtitle=f"{len(heads)} head{'s' if len(heads) > 1 else ''} of {count:,}, on {contexts.tokens:,} tokens",
        sections=[page.index(), *(page.latent(n) for n in heads), page.reading()],
        provenance=provenance or Provenance.here(settings, seed=settings.get("seed")),
    )


class _HeadPage(Page):
    noun = "Head"
    behaviours: "Behaviours | None" = None
    relations: "HeadRelations | None" = None
    labels: Sequence[tuple[str, ...]] = ()

    def columns(self) -> dict[str, list[Any]]:
        """Labels, and the layer's heads that each draws on."""
        found: dict[str, list[Any]] = {}
        if self.behaviours is not None:
            found["labels"] = [", ".join(self.labels[n]) for n in self.place]
        if self.relations is not None:
            found["layer's heads"] = [_drawn(self.relations, n, 2) for n in self.place]
        return found

    def numbers(self, latent: int) -> Iterator[tuple[str, Any]]:
        """Those of any latent; what it does; whose work it does."""
        yield from super().numbers(latent)
        if self.behaviours is not None:
            kinds = [
                f"{kind} {float(score[latent]):.2f} (of {int(self.behaviours.counts[kind][latent]):,})"
                for kind, score in self.behaviours.scores.items()
                if not bool(score[latent].isnan())
            ]
            yield "Labels", ", ".join(self.labels[latent]) or "none"
            yield "Behaviour", ", ".join(kinds) or "it did not fire on the prompts that show it"
        if self.relations is not None:
            yield "Draws on the layer's heads", _drawn(self.relations, latent, 4) or "it did not fire"

    def largest(self, examples: Sequence["Example"]) -> float:
        """The largest share of a latent that a token gave; negative where some gave a good part against it."""
        parts = [e.given / e.value for e in _heads(examples) if e.value]
        largest = max((float(np.abs(p).max()) for p in parts), default=0.0) or 1.0
        return -largest if any(float(p.min()) < -FAR for p in parts) else largest

    def panel(self, example: "Example", largest: float) -> Panel:
        """The head's z-pattern at one token."""
        (found,) = _heads([example])
        png, png_scale = self._pattern(found, largest)
        texts = any(kind != "image" for kind in found.context_kinds)
        fed = ", ".join(
            f"{self._name(found, s.position)} {_percent(s.share)}" for s in found.sources(3) if abs(s.share) >= FAR
        )
        title = f"{found.value:.3g} at {self.at(found)}" + (f", fed by {fed}" if fed else "")
        chips = _chips(found, largest) if texts else []
        return Panel(title, chips, _scale(largest) if chips else None, png, png_scale, self.where(found))

    def _name(self, example: "HeadExample", position: int) -> str:
        """A token of the context by name: its text, or its patch."""
        if position == example.position:
            return "itself"
        if example.context_kinds[position] != "image":
            return repr(example.context_tokens[position])
        row = _row_of(example, position)
        return "an image token" if row is None else f"patch {row[0]},{row[1]}"

    def _pattern(self, example: "HeadExample", largest: float) -> tuple[bytes, Scale | None]:
        """What each patch gave, over the picture that gave most, with a frame about the patch where the head fires."""
        patches = example.patches
        if patches is None or not any(kind in PLACED for kind in patches.kind):
            return b"", None
        columns, images = patches.column.tolist(), patches.image.tolist()
        placed = [n for n, kind in enumerate(patches.kind) if kind in PLACED]
        gave: dict[int, float] = {}
        for n in placed:
            gave[images[n]] = gave.get(images[n], 0.0) + abs(float(example.given[columns[n]]))
        image = max(gave, key=lambda i: gave[i])
        grid = example.source_map(image).numpy() / (example.value or 1.0)
        # Patches share what a head takes from a picture: single ones would be pale on the scale of the text.
        strong = max(float(np.abs(np.nan_to_num(grid)).max()), PALE)
        ground = self.ground(example, image, grid)
        png, scale = overlay(grid, ground, signed=largest < 0, largest=strong, cover=COVER)
        scale = Scale(scale.colours, *_ends(-strong if largest < 0 else strong))
        boxes = [patches.box[n].tolist() for n in placed if columns[n] == example.position and images[n] == image]
        return (_framed(png, boxes[0], grid.shape) if boxes else png), scale

    def reading(self) -> Section:
        """What the numbers mean."""
        parts = [
            f"A context shows one token at which the head fires, violet and marked {MARK}, and what every other token "
            "gave to it there (its z-pattern, the pattern times the value of each source): the darker, the more. "
            "Colours are shares of the latent; in the texts of one head they have the same scale. Tokens that gave "
            f"less than {SHOWN:.0%} are not coloured; stretches that gave little are left out ({GAP}). On pictures the "
            "frame is the patch at which the head fires.",
            "Where a head fires most are the few most extreme of many tokens: look at those drawn at random, too.",
        ]
        if self.behaviours is not None:
            parts.append(
                "Behaviour is the part of the z-pattern on the tokens that each kind names, averaged over the tokens "
                "where the head fires and could show it (how many stands in brackets): on repeated random tokens, and "
                "for successor on words of orders such as the days of the week, where the next word has to be among "
                "those that the head promotes most. A head has a label from 0.5 on, if it fired at least five times."
            )
        if self.relations is not None:
            parts.append(
                "What a head draws on: of all that the layer's own heads write along its direction where it fires, the "
                "part of each. "
                f"Of the Lorsa heads that fired, {self.relations.several():.0%} draw on several: no single head of the "
                "layer has half of it."
            )
        parts += [self.effects.caveat] if self.effects is not None else []
        if self.explanations:
            parts.append(
                "Explanations were written by a chat model from the strongest contexts. Scores are balanced accuracies "
                "of a chat model that sees the explanation and other contexts: 0.5 is chance."
            )
        return Section("How to read this", [Text("\n\n".join(parts))])


def _heads(examples: Sequence["Example"]) -> "list[HeadExample]":
    return list(examples)  # type: ignore[arg-type]


def _drawn(relations: "HeadRelations", head: int, count: int) -> str:
    layer = relations.settings["layer"]
    return ", ".join(f"{layer}.{h} {_percent(share)}" for h, share in relations.of(head, count))


def _percent(share: float) -> str:
    return f"{share:.0%}".replace("-", "\N{MINUS SIGN}" if round(share, 2) else "")


def _row_of(example: "HeadExample", position: int) -> tuple[int, int] | None:
    patches = example.patches
    at = [] if patches is None else (patches.column == position).nonzero()[:, 0].tolist()
    if patches is None or not at or int(patches.row[at[0]]) < 0:
        return None
    return int(patches.row[at[0]]), int(patches.col[at[0]])


def _shown(example: "HeadExample") -> list[int]:
    """Which tokens of the context are written: those about the query, pictures, and those that gave a good part."""
    share = np.abs(example.given) / (abs(example.value) or 1.0)
    about = max(example.start, example.position - BACK)
    keep = set(range(about, example.start + len(example.tokens)))
    keep |= {n for n, kind in enumerate(example.context_kinds) if kind == "image"}  # one piece of text for all
    for n in np.flatnonzero(share >= FAR).tolist():
        keep |= set(range(max(n - NEAR, 0), min(n + NEAR + 1, len(share))))
    return sorted(keep)


def _chips(example: "HeadExample", largest: float) -> list[tuple[str, str, str, str]]:
    out: list[tuple[str, str, str, str]] = []
    before = -1
    runs = groupby(_shown(example), lambda n: example.context_kinds[n] == "image" and n != example.position)
    for image, run in runs:
        places = list(run)
        if places[0] != before + 1:
            out.append(_quiet(GAP, "tokens that gave little"))
        before = places[-1]
        if image:
            gave = float(example.given[places].sum()) / (example.value or 1.0)
            text = f"[{len(places)} image token{'s' if len(places) > 1 else ''}: {_percent(gave)}]"
            out.append(_quiet(text, f"what they gave together: {gave:.0%}"))
            continue
        for last, n in zip([places[0] - 1, *places], places, strict=False):
            if n != last + 1:
                out.append(_quiet(GAP, "tokens that gave little"))
            out.append(_chip(example, n, largest))
    return out


def _chip(example: "HeadExample", n: int, largest: float) -> tuple[str, str, str, str]:
    gave = float(example.given[n])
    share = gave / (example.value or 1.0)
    text = html.unescape(show_token(example.context_tokens[n])) if example.context_kinds[n] != "image" else "[patch]"
    if n == example.position:
        hover = f"{n}: {text}, where the head fires; it gave itself {gave:.4g} ({share:.0%})"
        return f"{MARK}{text}", hover, QUERY, "#ffffff"
    back = PLAIN
    if abs(share) >= SHOWN:
        back = colours(np.array([share]), min(largest, 0.0), abs(largest), largest < 0)[0]
    return text, f"{n}: {text} gave {gave:.4g} ({share:.0%})", back, inks([back])[0]


def _quiet(text: str, hover: str) -> tuple[str, str, str, str]:
    return text, hover, QUIET, inks([QUIET])[0]


def _ends(largest: float) -> tuple[str, str]:
    return _percent(min(largest, 0.0)), f"{abs(largest):.0%} of the latent"


def _scale(largest: float) -> Scale:
    return Scale(DIVERGING if largest < 0 else SEQUENTIAL, *_ends(largest))


def _framed(png: bytes, box: Sequence[float], shape: tuple[int, ...]) -> bytes:
    """The picture with a frame about a box in pixels of the map."""
    from PIL import Image, ImageDraw

    made = Image.open(io.BytesIO(png)).convert("RGB")
    x, y = made.width / shape[1], made.height / shape[0]
    left, top, right, bottom = box
    draw = ImageDraw.Draw(made)
    draw.rectangle((left * x, top * y, right * x - 1, bottom * y - 1), outline=QUERY, width=max(2, made.width // 96))
    buffer = io.BytesIO()
    made.quantize(128, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
