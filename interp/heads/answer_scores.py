"""`AnswerScores`: one number for each token of an answer, by token, by word and by sentence."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.errors import InputError, UnknownNameError, unknown
from interp.results import Scores, checked, describe, jsonable, register

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

How = Literal["first", "mean", "max"]
_WORD = re.compile(r"[^\W_]+(?:[-'\u2019][^\W_]+)*")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\s*\n\s*")


@register
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class AnswerScores(Scores):
    """A number for each token that a model answered.

    Numbers are kept on the CPU in float32, or float64 where they came so; they are NaN behind a sample's last token.
    Words are letters and digits, with hyphens and apostrophes inside; sentences end at a full stop, a question or
    exclamation mark with white space behind it, or at a line end. Characters are counted in `texts`.

    Attributes:
        scores: the scores [batch, token], in `unit`.
        spans: the characters `text[start:end]` of each token [batch, token, 2].
        tokens: for each sample, its tokens; as many as it has.
        texts: the answer of each sample.
        name: the method, such as `token_divergence`.
        unit: what the scores are measured in; empty for a plain number.
        settings: what they were computed with: anything that json can hold.
        heads: the number of each head [batch, token, layer, head] that the scores were made from, or None. NaN where no
            head exists.

    Raises:
        InputError: a tensor has the wrong shape or type, or the texts do not fit.
        NonFiniteError: NaN or infinity at a real token; the message gives the first place.
        SettingsError: something in `settings` cannot be written as json.
    """

    scores: Float[Tensor, "batch token"]
    spans: Int[Tensor, "batch token 2"]
    tokens: Sequence[Sequence[str]]
    texts: Sequence[str]
    name: str
    unit: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    heads: Float[Tensor, "batch token layer head"] | None = None

    def __post_init__(self):
        if not self.name:
            raise InputError("scores need the name of the method that made them.")
        if self.scores.ndim != 2 or not self.scores.numel():
            raise InputError(f"scores are [batch, token] with at least one, found {describe(self.scores)}.")
        size, width = self.scores.shape
        tokens = [list(row) for row in self.tokens]
        counts = [len(row) for row in tokens]
        if len(counts) != size or len(self.texts) != size or max(counts) > width:
            raise InputError(f"tokens and texts of {size} samples of up to {width} tokens are needed, found {counts}.")
        spans = self.spans.detach().cpu().long()
        if spans.shape != (size, width, 2):
            raise InputError(f"spans are [batch {size}, token {width}, 2], found {describe(spans)}.")
        keep: dict[str, Any] = {"tokens": tokens, "texts": list(self.texts), "spans": spans}
        real = torch.arange(width) < torch.tensor(counts)[:, None]
        keep["scores"] = checked("scores", self.scores, {"sample": size, "token": width}, real)
        if self.heads is not None:
            exists = ~self.heads.detach().cpu().isnan().flatten(0, 1).all(0)
            sizes: dict[str, int] = {"sample": size, "token": width, "layer": exists.shape[0], "head": exists.shape[1]}
            keep["heads"] = checked("heads", self.heads, sizes, real[:, :, None, None] & exists)
        keep["settings"] = jsonable(self.settings, "settings")
        for key, value in keep.items():
            object.__setattr__(self, key, value)

    def __len__(self) -> int:
        """Number of samples."""
        return self.scores.shape[0]

    @property
    def valid(self) -> Bool[Tensor, "batch token"]:
        """Which tokens are real."""
        return torch.arange(self.scores.shape[1]) < torch.tensor([len(row) for row in self.tokens])[:, None]

    def _tensors(self) -> dict[str, Tensor]:
        own = {"scores": self.scores, "spans": self.spans}
        return own | ({} if self.heads is None else {"heads": self.heads})

    def _fields(self) -> dict[str, Any]:
        return {n: getattr(self, n) for n in ("name", "unit", "tokens", "texts", "settings")}

    @classmethod
    def _restore(cls, tensors: dict[str, Tensor], fields: dict[str, Any]) -> AnswerScores:
        return cls(**tensors, **fields)

    def frame(self) -> pd.DataFrame:
        """A tidy pandas frame, one row for each token.

        Columns: `prompt`; `token` (its number in the answer) and `text`; `start` and `end`, its characters in the
        answer; `word` and `sentence`, the numbers of those it belongs to (-1 where it is in no word); `score`.
        """
        import pandas as pd

        rows = []
        for i, row in enumerate(self.tokens):
            words, sentences = _words(self.texts[i]), _sentences(self.texts[i])
            for t, text in enumerate(row):
                start, end = self.spans[i, t].tolist()
                held = [w for w, (a, b) in enumerate(words) if start < b and end > a]
                # The last character: a token may begin with the blank behind a full stop.
                sentence = sum(a < end for a, _ in sentences) - 1 if end > start else max(0, len(sentences) - 1)
                rows.append((i, t, text, start, end, held[0] if held else -1, sentence))
        columns = ["prompt", "token", "text", "start", "end", "word", "sentence"]
        frame = pd.DataFrame(rows, columns=columns)
        frame["score"] = self.scores[self.valid].numpy()
        return frame

    def words(self, how: How = "first") -> pd.DataFrame:
        """One row for each word: `prompt`, `word`, `text`, `start`, `end`, `sentence`, `token` (its first), `score`.

        Args:
            how: the score of a word of several tokens: that of the first (the step at which the word is decided), the
                mean, or the largest.

        Raises:
            UnknownNameError: another `how`.
        """
        if how not in ("first", "mean", "max"):
            raise unknown("way to score a word", how, ("first", "mean", "max"))
        return self._grouped(
            self.frame().query("word >= 0"), "word", _words, how, {"sentence": "first", "token": "first"}
        )

    def sentences(self) -> pd.DataFrame:
        """One row for each sentence: `prompt`, `sentence`, `text`, `start`, `end`, `token` (its first), `score`.

        A sentence's score is the mean over its tokens.
        """
        return self._grouped(self.frame(), "sentence", _sentences, "mean", {"token": "first"})

    def _grouped(self, frame: pd.DataFrame, key: str, spans: Any, how: str, more: dict[str, str]) -> pd.DataFrame:
        found = frame.groupby(["prompt", key], as_index=False).agg({**more, "score": how})
        places = [spans(text) for text in self.texts]
        both = [places[i][n] for i, n in zip(found["prompt"], found[key], strict=True)]
        found.insert(2, "text", [self.texts[i][a:b] for i, (a, b) in zip(found["prompt"], both, strict=True)])
        found.insert(3, "start", [a for a, _ in both])
        found.insert(4, "end", [b for _, b in both])
        return found

    def plot(self, prompt: int = 0, *, largest: float | None = None, title: str | None = None) -> go.Figure:
        """An answer as coloured text.

        Args:
            prompt: which sample.
            largest: the score with the darkest colour; None takes the largest one, the first token left aside.
            title: None writes the method and the model.

        Raises:
            UnknownNameError: there is no such sample.
            InputError: the sample has no answer.
        """
        from interp.token_figures import token_figure

        tokens, values = self._row(prompt)
        kinds = ["text"] * len(tokens)
        title = self._title() if title is None else title
        return token_figure(tokens, values, kinds, title=title, unit=self.unit, largest=largest)

    def _row(self, prompt: int) -> tuple[Sequence[str], np.ndarray]:
        if not -len(self) <= prompt < len(self):
            raise UnknownNameError(f"sample {prompt} does not exist: there are {len(self)} (0 to {len(self) - 1}).")
        tokens = self.tokens[prompt]
        if not tokens:
            raise InputError(f"sample {prompt} has an empty answer.")
        return tokens, self.scores[prompt, : len(tokens)].numpy()

    def __repr__(self) -> str:
        count = sum(len(row) for row in self.tokens)
        return f"AnswerScores({self._title()}: {len(self)} answers, {count} tokens)"

    def _repr_html_(self) -> str:
        from interp.token_figures import token_html

        sample = next(i for i, row in enumerate(self.tokens) if row)
        tokens, values = self._row(sample)
        body = token_html(tokens, values, ["text"] * len(tokens))
        head = f"{len(self)} answers; shown: sample {sample}{', in ' + html.escape(self.unit) if self.unit else ''}"
        return f"<div><p><b>{html.escape(self._title())}</b><br>{head}</p>{body}</div>"

    def _title(self) -> str:
        model = self.settings.get("model")
        return " · ".join([self.name, *([str(model)] if model else [])])


def answer_spans(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """An answer as text, as `lens.generate` gives it, and the characters of each of its tokens in it.

    A token's characters are those by which it makes the text longer. Without a tokenizer the text is the ids.
    """
    if tokenizer is None:
        texts = [" ".join(map(str, ids[:n])) for n in range(len(ids) + 1)]
    else:
        texts = [tokenizer.decode(ids[:n], skip_special_tokens=True) for n in range(len(ids) + 1)]
    ends = np.maximum.accumulate([len(t) for t in texts]).clip(max=len(texts[-1])).tolist()
    return texts[-1], list(pairwise(ends))


def _words(text: str) -> list[tuple[int, int]]:
    return [m.span() for m in _WORD.finditer(text)]


def _sentences(text: str) -> list[tuple[int, int]]:
    """Where each sentence begins and ends; white space between them belongs to none."""
    gaps = [m.span() for m in _SENTENCE_END.finditer(text)]
    starts, ends = [0, *(b for _, b in gaps)], [*(a for a, _ in gaps), len(text)]
    return [(a, b) for a, b in zip(starts, ends, strict=True) if b > a]
