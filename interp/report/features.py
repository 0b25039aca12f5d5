"""The page of a dictionary's latents: each with its numbers, the tokens it writes, and the contexts it is active in."""

import html
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.errors import SettingsError
from interp.palette import DIVERGING, SEQUENTIAL
from interp.report.blocks import KeyValues, Panel, Panels, Provenance, Scale, Section, Table, Text
from interp.report.heatmap import overlay
from interp.report.page import write_report
from interp.token_figures import QUIET, chips_of, colours, inks

if TYPE_CHECKING:
    from PIL.Image import Image

    from interp.data.corpora import Corpus
    from interp.dictionaries.features import Example, ExplanationScores, FeatureContexts, LogitEffects, Neighbours

MOST = 300  # tokens of a context that are written
COVER = 0.65  # what is under the strongest patches should be seen
PLACED = ("patch", "tile", "thumbnail")
PLAIN = "#f3f5f7"  # behind tokens without activation


def write_feature_page(
    folder: str | os.PathLike[str],
    contexts: "FeatureContexts",
    *,
    effects: "LogitEffects | None" = None,
    neighbours: "Neighbours | None" = None,
    explanations: Mapping[int, str] | None = None,
    scores: Sequence["ExplanationScores"] = (),
    corpus: "Corpus | None" = None,
    examples: int = 8,
    title: str = "",
    provenance: Provenance | None = None,
) -> Path:
    """Write `report.html`: an index of latents, and for each its numbers, tokens, neighbours and contexts.

    Args:
        folder: made when it is missing; an older `report.html` in it is replaced.
        contexts: from `top_contexts`; `select` chooses some of its latents.
        effects: from `logit_effects`.
        neighbours: from `neighbours`.
        explanations: from `explain`.
        scores: from `detection_score` and `fuzzing_score`.
        corpus: the corpus of the contexts, for its pictures; without it patches are drawn on a light ground.
        examples: contexts of each latent with the largest activations; of those drawn at random, half as many.
        title: plain text; empty for the model and the site.
        provenance: None for that of this process.

    Returns:
        The path of the page.

    Raises:
        SettingsError: examples is below 1, or the corpus is another one than that of the contexts.
        FileError: the page cannot be written, or a picture cannot be read.
    """
    settings = dict(contexts.settings)
    sections = feature_sections(
        contexts,
        effects=effects,
        neighbours=neighbours,
        explanations=explanations,
        scores=scores,
        corpus=corpus,
        examples=examples,
    )
    count = len(contexts.latents)
    return write_report(
        folder,
        title=title or f"Latents at {settings['read']} of {settings['model']}",
        subtitle=f"{count} latent{'s' if count > 1 else ''} of {settings['d_sae']:,}, on {contexts.tokens:,} tokens",
        sections=sections,
        provenance=provenance or Provenance.here(settings, seed=settings.get("seed")),
    )


def feature_sections(
    contexts: "FeatureContexts",
    *,
    effects: "LogitEffects | None" = None,
    neighbours: "Neighbours | None" = None,
    explanations: Mapping[int, str] | None = None,
    scores: Sequence["ExplanationScores"] = (),
    corpus: "Corpus | None" = None,
    examples: int = 8,
) -> list[Section]:
    """The sections of `write_feature_page`, with the same arguments."""
    if examples < 1:
        raise SettingsError(f"examples is at least 1, found {examples}.")
    if corpus is not None and corpus.identity != contexts.settings["corpus"]:
        raise SettingsError("this corpus is not the one that the contexts come from.")
    page = Page(contexts, effects, neighbours, explanations or {}, tuple(scores), corpus, examples)
    return [page.index(), *(page.latent(n) for n in contexts.latents.tolist()), page.reading()]


class Page:
    """Makes the sections; a page of another kind of latents overrides what differs."""

    noun = "Latent"

    def __init__(
        self,
        contexts: "FeatureContexts",
        effects: "LogitEffects | None",
        neighbours: "Neighbours | None",
        explanations: Mapping[int, str],
        scores: tuple["ExplanationScores", ...],
        corpus: "Corpus | None",
        examples: int,
    ) -> None:
        self.contexts, self.effects, self.neighbours = contexts, effects, neighbours
        self.explanations, self.scores, self.corpus, self.examples = explanations, scores, corpus, examples
        self.place = {n: i for i, n in enumerate(contexts.latents.tolist())}
        self.scored = {(s.kind, n): (s.accuracy[i], i) for s in scores for i, n in enumerate(s.latents)}

    def index(self) -> Section:
        """All latents in one table."""
        frame: Any = self.contexts.frame()[["latent", "density", "maximum", "mean"]]
        columns: dict[str, list[Any]] = self.columns()
        if self.effects is not None:
            columns["writes towards"] = [
                " ".join(repr(token) for token, _ in self.effects.of(n)[0][:4]) for n in self.place
            ]
        for s in self.scores:
            columns[s.kind] = [
                self.scored[s.kind, n][0].value if (s.kind, n) in self.scored else float("nan") for n in self.place
            ]
        if self.explanations:
            columns["explanation"] = [self.explanations.get(n, "") for n in self.place]
        text = f"Density is the share of tokens in which a {self.noun.lower()} is active; mean is over these alone."
        frame = frame.rename(columns={"latent": self.noun.lower()})
        blocks: list[Any] = [Table(frame.assign(**columns), text, max_rows=2000)]
        blocks += [Text(_summary(s)) for s in self.scores]
        return Section("Index", blocks)

    def columns(self) -> dict[str, list[Any]]:
        """Further columns of the index."""
        return {}

    def latent(self, latent: int) -> Section:
        """One latent."""
        blocks: list[Any] = [KeyValues(dict(self.numbers(latent)))]
        if self.effects is not None:
            blocks.append(self._tokens(latent))
        top = self.contexts.examples(latent, "top")[: self.examples]
        drawn = self.contexts.examples(latent, "sampled")[: (self.examples + 1) // 2]
        largest = self.largest([*top, *drawn])
        if not top:
            blocks.append(Text("It was active in no token that was seen."))
        for caption, some in (
            ("Contexts with its largest activations", top),
            ("Contexts about active tokens that were drawn at random, the strongest first", drawn),
        ):
            blocks += _panels([self.panel(e, largest) for e in some], caption)
        return Section(f"{self.noun} {latent}", blocks)

    def numbers(self, latent: int) -> Iterator[tuple[str, Any]]:
        """What is said of one latent, by name."""
        i = self.place[latent]
        if latent in self.explanations:
            yield "Explanation", self.explanations[latent]
        for s in self.scores:
            if (s.kind, latent) in self.scored:
                found, at = self.scored[s.kind, latent]
                base = f"; by another latent's explanation {s.baseline[at].value:.2f}" if s.baseline else ""
                yield f"Score by {s.kind}", f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f}){base}"
        active = int(self.contexts.active[i])
        yield "Density", f"{float(self.contexts.density[i]):.3g} ({active:,} of {self.contexts.tokens:,} tokens)"
        yield "Maximum", f"{float(self.contexts.maximum[i]):.4g}"
        yield "Mean where active", f"{float(self.contexts.mean[i]):.4g}"
        if self.neighbours is not None:
            near = ", ".join(f"{n} ({cosine:.2f})" for n, cosine in self.neighbours.of(latent))
            yield f"Nearest by {self.neighbours.by}", near

    def _tokens(self, latent: int) -> Table:
        import pandas as pd

        assert self.effects is not None
        up, down = self.effects.of(latent)
        rows = [(repr(a), x, repr(b), y) for (a, x), (b, y) in zip(up, down, strict=True)]
        frame = pd.DataFrame(rows, columns=["promotes", "effect", "suppresses", "effect "])
        behind = self.effects.layers_behind
        seen = f"; {behind} layer{'s' if behind > 1 else ''} behind the site not seen" if behind else ""
        return Table(frame, f"Direct effect on the logits ({self.effects.unit}{seen})")

    def largest(self, examples: Sequence["Example"]) -> float:
        """The number with the strongest colour in the examples of a latent."""
        top = [e for e in examples if e.group == "top"]
        return max((float(np.abs(e.activations).max()) for e in top), default=0.0) or 1.0

    def panel(self, example: "Example", largest: float) -> Panel:
        """One context."""
        title = f"{example.value:.3g} at {self.at(example)}"
        png, png_scale = self._picture(example, largest)
        written = np.array([kind != "image" for kind in example.kinds])
        chips, scale = _chips(example, largest) if bool(written.any()) else ([], None)
        scale = scale if bool(example.activations[written].any()) else None
        return Panel(title, chips, scale, png, png_scale, self.where(example))

    def where(self, example: "Example") -> str:
        """Which context and token it is."""
        where = [f"context {example.number}", f"token {example.position}"]
        return ", ".join([*where, *([f"document {example.document}"] if example.document >= 0 else [])])

    def at(self, example: "Example") -> str:
        """The middle token by name: its text, or its patch."""
        if example.kinds[example.peak] != "image":
            return repr(example.tokens[example.peak])
        patches = example.patches
        at = [] if patches is None else (patches.column == example.peak).nonzero()[:, 0].tolist()
        if patches is None or not at or int(patches.row[at[0]]) < 0:
            return "an image token"
        return f"patch {int(patches.row[at[0]])},{int(patches.col[at[0]])}"

    def _picture(self, example: "Example", largest: float) -> tuple[bytes, Scale | None]:
        patches = example.patches
        if patches is None or not any(k in PLACED for k in patches.kind):
            return b"", None
        at = (patches.column == example.peak).nonzero()[:, 0].tolist()
        image = int(patches.image[at[0]]) if at else 0
        if not any(k in PLACED and n == image for k, n in zip(patches.kind, patches.image.tolist(), strict=True)):
            return b"", None
        grid = example.image_map(image).numpy()
        signed = bool((example.activations < 0).any())
        return overlay(grid, self.ground(example, image, grid), signed=signed, largest=largest, cover=COVER)

    def ground(self, example: "Example", image: int, grid: np.ndarray) -> "Image | None":
        """The picture under a map, if it is there in the map's size."""
        if self.corpus is None or example.document < 0:
            return None
        pictures = self.corpus.document(example.document).images
        picture = pictures[image] if image < len(pictures) else None
        # Where a tower's map is of the processed picture, the picture as it was given does not lie under it.
        return picture if picture is not None and picture.size == (grid.shape[1], grid.shape[0]) else None

    def reading(self) -> Section:
        """What the numbers mean."""
        parts = [
            "A coloured token is one in which the latent is active; the darker, the more. Colours of one latent have "
            "the same scale everywhere. Special tokens (and the first of each context, unless asked for) were not "
            "used, and are shown without activation.",
            "The largest activations are the few most extreme of many: look at those drawn at random, too, before "
            "believing that a latent stands for one thing.",
        ]
        if self.effects is not None:
            parts.append(self.effects.caveat)
        if self.explanations:
            parts.append(
                "Explanations were written by a chat model from the strongest contexts. Scores are balanced accuracies "
                "of a chat model that sees the explanation and other contexts: 0.5 is chance."
            )
        return Section("How to read this", [Text("\n\n".join(parts))])


def _panels(items: list[Panel], caption: str) -> Iterator[Panels]:
    """Pictures side by side, texts one below the other."""
    if any(item.png for item in items):
        yield Panels(items, caption)
        return
    for n, item in enumerate(items):
        yield Panels([item if n == 0 else replace(item, scale=None)], caption if n == 0 else "")


def _chips(example: "Example", largest: float) -> tuple[list[tuple[str, str, str, str]], Scale]:
    signed = bool((example.activations < 0).any())
    low = -largest if signed else 0.0
    found = []
    start = max(0, example.peak - MOST // 2) if len(example.tokens) > MOST else 0
    kept = slice(start, start + MOST)
    for chip in chips_of(example.tokens[kept], example.activations[kept], example.kinds[kept]):
        back = QUIET
        if chip.score is not None:
            back = colours(np.array([chip.score]), low, largest, signed)[0] if chip.score else PLAIN
        number = "" if chip.score is None else f" = {chip.score:.4g}"
        found.append((html.unescape(chip.text), html.unescape(chip.hover) + number, back, inks([back])[0]))
    return found, Scale(DIVERGING if signed else SEQUENTIAL, f"{low:.2g}", f"{largest:.2g}")


def _summary(scores: "ExplanationScores") -> str:
    mean = scores.mean
    text = f"{scores.kind.capitalize()}: mean {mean.value:.3f}"
    text += f" ({mean.low:.3f} to {mean.high:.3f} over latents)" if mean.low == mean.low else ""
    if scores.mean_baseline is not None and scores.gain is not None:
        gain = scores.gain
        text += f"; by explanations of other latents {scores.mean_baseline.value:.3f}; gain {gain.value:.3f} "
        text += f"({gain.low:.3f} to {gain.high:.3f})"
    return text + f". Answers that were missing: {sum(scores.unanswered)}."
