"""`FeatureContexts`: where latents are active, how often and how much, with the texts and pictures around."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.dictionaries.features.common import Latents
from interp.dictionaries.features.neighbours import row_of
from interp.errors import SettingsError, UnknownNameError, unknown
from interp.patches import Patches
from interp.results import Scores, jsonable, register
from interp.tokens import TokenScores

if TYPE_CHECKING:
    import pandas as pd

Group = Literal["top", "sampled", "silent"]
GROUPS: tuple[Group, ...] = ("top", "sampled", "silent")
KINDS = ("text", "special", "image")
_PATCHES = ("sample", "column", "image", "box", "row", "col")
_PLACES = ("context", "centre", "start", "length", "acts")


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Windows in contexts, n for each latent at most.

    Attributes:
        context: row of the context; -1 where there are fewer [latents, n].
        centre: column that the window is about [latents, n].
        start: first column of the window [latents, n].
        length: columns of the window [latents, n].
        acts: the latent in each of them [latents, n, width]; 0 beyond the window and at tokens that were not used.
    """

    context: Int[Tensor, "latents n"]
    centre: Int[Tensor, "latents n"]
    start: Int[Tensor, "latents n"]
    length: Int[Tensor, "latents n"]
    acts: Float[Tensor, "latents n width"]

    def rows(self, keep: Tensor) -> Places:
        """Those of some latents."""
        return replace(self, **{name: getattr(self, name)[keep] for name in _PLACES})

    def taken(self, which: Int[Tensor, "latents m"]) -> Places:
        """Of each latent the windows with these numbers, in this order."""
        plain = {name: getattr(self, name).gather(1, which) for name in _PLACES[:-1]}
        return replace(self, **plain, acts=self.acts.gather(1, which[..., None].expand(-1, -1, self.acts.shape[2])))


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One window with a latent's activations in it.

    Attributes:
        latent: which latent.
        group: `top`, `sampled` or `silent`.
        number: the context's number in the corpus.
        document: the document of the token in the middle; -1 for none.
        position: column of that token in its context.
        start: column of the window's first token.
        value: the activation at that token.
        tokens: texts of the window's tokens.
        kinds: `text`, `special` or `image` for each.
        activations: the latent at each token; 0 at those that were not used (special tokens, first positions).
        patches: which pixels the window's image tokens stand for.
        between: what is written between tokens: a blank where the model's tokens are words without spaces.
    """

    latent: int
    group: Group
    number: int
    document: int
    position: int
    start: int
    value: float
    tokens: tuple[str, ...]
    kinds: tuple[str, ...]
    activations: np.ndarray
    patches: Patches | None
    between: str = ""

    @property
    def peak(self) -> int:
        """Place of the middle token in the window."""
        return self.position - self.start

    @property
    def text(self) -> str:
        """The window's text, each stretch of image tokens written `[image]`."""
        out: list[str] = []
        for token, kind in zip(self.tokens, self.kinds, strict=True):
            if kind != "image":
                out.append(token)
            elif not out or out[-1] != "[image]":
                out.append("[image]")
        return self.between.join(out)

    def scores(self) -> TokenScores:
        """The window as scores of tokens, to be drawn, tabled and mapped to pixels."""
        kinds = np.array(self.kinds)
        spans = {"image": kinds == "image", "text": kinds != "image", "special": kinds == "special"}
        width = len(self.tokens)
        return TokenScores(
            scores=torch.from_numpy(self.activations.copy()).view(1, 1, width),
            targets=torch.tensor([[self.peak]]),
            source_mask=torch.ones(1, width, dtype=torch.bool),
            tokens=[list(self.tokens)],
            target_tokens=[[self.tokens[self.peak]]],
            name=f"latent {self.latent}",
            unit="activation",
            spans={name: torch.from_numpy(span)[None] for name, span in spans.items() if name != "image" or span.any()},
            patches=self.patches,
        )

    def image_map(self, image: int = 0) -> Float[Tensor, "height width"]:
        """The latent on the pixels of one picture; NaN where no image token looks.

        Raises:
            UnknownNameError: there is no such picture.
            InputError: the window holds no image tokens with places of their own.
        """
        return self.scores().image_map(image=image)


@register
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class FeatureContexts(Scores):
    """What `top_contexts` returns.

    Attributes:
        latents: which [latents].
        tokens: how many tokens were seen.
        active: in how many of them each latent is active [latents].
        maximum: its activation of the largest size [latents]; 0 for one that never is active, as its mean.
        mean: the mean of its activations where it is active [latents].
        top: windows about its largest activations, the largest first, of one context each.
        sampled: windows about active tokens drawn at random, each of another context, the strongest first.
        silent: windows in which it is not active.
        token: the contexts that windows lie in: place in `vocabulary` of each token, -1 behind the end [contexts, pos].
        kind: place in `KINDS` of each token [contexts, pos].
        document: the document of each token, -1 for none [contexts, pos].
        number: the number of each context in the corpus [contexts].
        vocabulary: texts of tokens.
        patches: which pixels image tokens stand for; `sample` is the row of the context.
        between: what is written between tokens: a blank where the tokenizer's tokens hold no spaces.
        settings: model, read, corpus and options.
    """

    latents: Int[Tensor, " latents"]
    tokens: int
    active: Int[Tensor, " latents"]
    maximum: Float[Tensor, " latents"]
    mean: Float[Tensor, " latents"]
    top: Places
    sampled: Places
    silent: Places
    token: Int[Tensor, "contexts pos"]
    kind: Int[Tensor, "contexts pos"]
    document: Int[Tensor, "contexts pos"]
    number: Int[Tensor, " contexts"]
    vocabulary: Sequence[str]
    patches: Patches | None
    between: str
    settings: Mapping[str, Any]

    def __repr__(self) -> str:
        """Sizes."""
        return f"FeatureContexts({len(self.latents)} latents, {self.tokens:,} tokens, {len(self.number)} contexts kept)"

    @property
    def density(self) -> Float[Tensor, " latents"]:
        """Share of tokens in which each latent is active."""
        return self.active.float() / self.tokens

    def _tensors(self) -> dict[str, Tensor]:
        plain = ("latents", "active", "maximum", "mean", "token", "kind", "document", "number")
        own = {name: getattr(self, name) for name in plain}
        own |= {f"{group}.{name}": getattr(getattr(self, group), name) for group in GROUPS for name in _PLACES}
        return own | {f"patches.{n}": getattr(self.patches, n) for n in _PATCHES if self.patches is not None}

    def _fields(self) -> dict[str, Any]:
        map_ = None if self.patches is None else {"kind": list(self.patches.kind), "sizes": self.patches.sizes}
        settings = jsonable(dict(self.settings), "settings")
        vocabulary = [text.encode("utf-8", "replace").decode() for text in self.vocabulary]
        return {
            "tokens": self.tokens,
            "vocabulary": vocabulary,
            "between": self.between,
            "settings": settings,
            "patches": jsonable(map_, "patches"),
        }

    @classmethod
    def _restore(cls, tensors: dict[str, Tensor], fields: dict[str, Any]) -> FeatureContexts:
        groups = {g: Places(*(tensors.pop(f"{g}.{name}") for name in _PLACES)) for g in GROUPS}
        if (found := fields["patches"]) is not None:
            sizes = tuple(tuple((w, h) for w, h in row) for row in found["sizes"])
            rows = {n: tensors.pop(f"patches.{n}") for n in _PATCHES}
            fields["patches"] = Patches(**rows, kind=tuple(found["kind"]), sizes=sizes)
        return cls(**tensors, **groups, **fields)

    def select(self, latents: Latents) -> FeatureContexts:
        """The same for some of the latents.

        Raises:
            UnknownNameError: one is not among them.
            SettingsError: there are none.
        """
        listed = [latents] if isinstance(latents, int) else [int(n) for n in latents]
        if not listed:
            raise SettingsError("no latent was named.")
        keep = torch.tensor([row_of(self.latents, n) for n in listed])
        plain = {name: getattr(self, name)[keep] for name in ("latents", "active", "maximum", "mean")}
        return replace(self, **plain, **{group: getattr(self, group).rows(keep) for group in GROUPS})

    def examples(self, latent: int, group: Group = "top") -> list[Example]:
        """The windows of one latent in a group; fewer than asked for where there were no more.

        Raises:
            UnknownNameError: there is no such latent here, or no such group.
        """
        if group not in GROUPS:
            raise unknown("group", group, GROUPS)
        row, places = row_of(self.latents, latent), getattr(self, group)
        found = (places.context[row] >= 0).nonzero()[:, 0].tolist()
        return [self._example(latent, group, places, row, n) for n in found]

    def example(self, latent: int, rank: int = 0, group: Group = "top") -> Example:
        """One of them.

        Raises:
            UnknownNameError: there are not so many.
        """
        found = self.examples(latent, group)
        if not 0 <= rank < len(found):
            raise UnknownNameError(f"latent {latent} has {len(found)} {group} contexts, so none of rank {rank}.")
        return found[rank]

    def _example(self, latent: int, group: Group, places: Places, row: int, n: int) -> Example:
        context, centre = int(places.context[row, n]), int(places.centre[row, n])
        start, length = int(places.start[row, n]), int(places.length[row, n])
        window = slice(start, start + length)
        acts = places.acts[row, n, :length].numpy() if places.acts.shape[-1] else np.zeros(length, dtype=np.float32)
        return Example(
            latent=latent,
            group=group,
            number=int(self.number[context]),
            document=int(self.document[context, centre]),
            position=centre,
            start=start,
            value=float(acts[centre - start]),
            tokens=tuple(str(self.vocabulary[i]) for i in self.token[context, window].tolist()),
            kinds=tuple(KINDS[i] for i in self.kind[context, window].tolist()),
            activations=acts,
            patches=self._patches(context),
            between=self.between,
        )

    def _patches(self, context: int) -> Patches | None:
        """Those of one context; windows in contexts with pictures are whole contexts."""
        mine = None if self.patches is None else self.patches.sample_rows(context)
        if mine is None or not len(mine):
            return None
        return replace(mine, sample=torch.zeros_like(mine.sample), sizes=(mine.sizes[context],))

    def frame(self) -> pd.DataFrame:
        """One row for each latent: latent, density, active, maximum, mean."""
        import pandas as pd

        columns = {name: getattr(self, name).numpy() for name in ("latents", "density", "active", "maximum", "mean")}
        return pd.DataFrame(columns).rename(columns={"latents": "latent"})

    def windows(self) -> pd.DataFrame:
        """One row for each window: latent, group, rank, context, document, position, value, text."""
        import pandas as pd

        names = ("latent", "group", "rank", "context", "document", "position", "value", "text")
        return pd.DataFrame(list(self._rows()), columns=list(names))

    def _rows(self) -> Iterator[tuple[Any, ...]]:
        for latent in self.latents.tolist():
            for group in GROUPS:
                for rank, e in enumerate(self.examples(latent, group)):
                    yield latent, group, rank, e.number, e.document, e.position, e.value, e.text
