"""Where heads of a Lorsa fire, and which tokens fed them there.

    given[s] = A^g(i)[t, s] v_i[s]      for head i at the token t in the middle of a window, over its whole context

Over s it sums to the pre-activation of head i at t, which is its latent where it fires (see `reading.z_patterns`).
Windows are found in one pass over the corpus (see `interp.dictionaries.features.search`); the model then runs once more
on the contexts that were kept, and patterns are made for their middle tokens alone. What feeds a head may stand far
before the window, so the whole context is kept with it.

What it does not say: which part of the stream at a source made its value, and why the query looked there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.data.corpora import Corpus
from interp.dictionaries.activations import ActivationStream
from interp.dictionaries.activations.packing import Context, Place, Separator, Special, Tokens
from interp.dictionaries.features.common import Latents, reading
from interp.dictionaries.features.contexts import KINDS, Example, FeatureContexts, Group, Places
from interp.dictionaries.features.search import searched
from interp.dictionaries.features.texts import Text
from interp.dictionaries.lorsa.lorsa import Lorsa
from interp.dictionaries.lorsa.placed import PlacedLorsa
from interp.dictionaries.lorsa.reading import Fired, z_patterns
from interp.dictionaries.placing import placed
from interp.errors import SettingsError
from interp.lens import Lens
from interp.results import register

FED: tuple[Group, ...] = ("top", "sampled")  # in silent windows a head does not fire
_MOST_BYTES = 2 * 2**30


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A token that fed a head.

    Attributes:
        position: its column in the context.
        token: its text.
        kind: `text`, `special` or `image`.
        given: what it gave to the head.
        share: the same, of the latent.
    """

    position: int
    token: str
    kind: str
    given: float
    share: float


@dataclass(frozen=True, slots=True, eq=False)
class HeadExample(Example):
    """A window about a token where a head fires, and what every token of the context gave to it there.

    Attributes:
        given: what each token of the context gave [pos]; the numbers sum to `value`.
        context_tokens: texts of the context's tokens.
        context_kinds: `text`, `special` or `image` for each.
    """

    given: np.ndarray = None  # type: ignore[assignment]
    context_tokens: tuple[str, ...] = ()
    context_kinds: tuple[str, ...] = ()

    def sources(self, count: int = 5) -> list[Source]:
        """The tokens that gave most, by size."""
        order = np.argsort(-np.abs(self.given), kind="stable")[:count]
        return [
            Source(n, self.context_tokens[n], self.context_kinds[n], float(self.given[n]), float(self.given[n]) / total)
            for n in order.tolist()
            if self.given[n] and (total := self.value or 1.0)
        ]

    def source_map(self, image: int = 0) -> Float[Tensor, "height width"]:
        """What the pixels of one picture gave; NaN where no image token looks.

        Raises:
            UnknownNameError, InputError: see `Example.image_map`.
        """
        whole = slice(self.start, self.start + len(self.tokens))
        return replace(self, activations=self.given[whole].astype(np.float32)).image_map(image)


@register
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class HeadContexts(FeatureContexts):
    """What `head_contexts` returns: `FeatureContexts` whose examples know what fed the head.

    Attributes:
        given: by group (`top`, `sampled`), what each token of the context gave to the head at the middle token of each
            window [latents, n, pos].
    """

    given: Mapping[str, Float[Tensor, "latents n pos"]]

    def __repr__(self) -> str:
        """Sizes."""
        return f"HeadContexts({len(self.latents)} heads, {self.tokens:,} tokens, {len(self.number)} contexts kept)"

    def select(self, latents: Latents) -> HeadContexts:
        """The same for some of the heads.

        Raises:
            UnknownNameError: one is not among them.
            SettingsError: there are none.
        """
        listed = [latents] if isinstance(latents, int) else [int(n) for n in latents]
        found = FeatureContexts.select(self, listed)
        rows = torch.tensor([self.latents.tolist().index(n) for n in listed])
        return replace(found, given={group: value[rows] for group, value in self.given.items()})  # type: ignore[return-value]

    def _tensors(self) -> dict[str, Tensor]:
        return FeatureContexts._tensors(self) | {f"given.{group}": value for group, value in self.given.items()}

    @classmethod
    def _restore(cls, tensors: dict[str, Tensor], fields: dict[str, Any]) -> HeadContexts:
        given = {group: tensors.pop(f"given.{group}") for group in FED}
        return super(HeadContexts, cls)._restore(tensors, fields | {"given": given})  # type: ignore[return-value]

    def _example(self, latent: int, group: Group, places: Places, row: int, n: int) -> Example:
        plain = FeatureContexts._example(self, latent, group, places, row, n)
        context = int(places.context[row, n])
        there = (self.token[context] >= 0).nonzero()[:, 0]
        given = self.given[group][row, n].numpy() if group in self.given else np.zeros(0, dtype=np.float32)
        tokens = tuple(str(self.vocabulary[i]) for i in self.token[context, there].tolist())
        kinds = tuple(KINDS[i] for i in self.kind[context, there].tolist())
        own = {f.name: getattr(plain, f.name) for f in fields(Example)}
        return HeadExample(**own, given=given[: len(tokens)], context_tokens=tokens, context_kinds=kinds)


def head_contexts(
    lorsa: Lorsa | PlacedLorsa,
    lens: Lens,
    corpus: Corpus,
    *,
    heads: Latents | None = None,
    most: int | None = None,
    k: int = 10,
    sampled: int = 10,
    silent: int = 10,
    window: int = 16,
    contexts: int | None = None,
    batch: int = 8,
    context: int = 256,
    packed: bool = True,
    special: Special = "tokenizer",
    separator: Separator = "eos",
    tokens: Tokens = "all",
    drop_first: bool = True,
    seed: int = 0,
) -> HeadContexts:
    """The tokens at which heads fire most, with the tokens that fed them.

    Args:
        lorsa: a Lorsa, or one at its layer.
        lens: the model.
        corpus: texts, or pictures with prompts.
        heads: which; None for all.
        most: keep the heads that write the longest vector at their peak, so many; None for all that were asked for.
        k: contexts in which a head fires most, one window of each.
        sampled: contexts about tokens drawn at random from those where it fires.
        silent: windows in which it does not fire.
        window: tokens on each side of the middle one; contexts with pictures are kept whole.
        contexts: how many contexts to go through at most; None for the whole corpus, once.
        batch: contexts in a pass of the model.
        context: tokens of a context, at most those that the Lorsa was made for (see `ActivationStream` for this and
            the options that follow).
        packed: fill contexts with one document after the other.
        special: tokens around each context.
        separator: token behind each document of packed contexts.
        tokens: use `all`, `text` or `image` tokens.
        drop_first: leave out the first position of each context.
        seed: of what is drawn.

    Returns:
        Windows as from `top_contexts`, and for those in which the head fires what each token of the context gave.

    Raises:
        SettingsError: an option is out of range, or what is kept would not fit into memory.
        UnknownNameError: a head does not exist.
        InputError: contexts are longer than the Lorsa knows, or the corpus holds no usable token.
        UnsupportedError: see `PlacedLorsa`.
    """
    at: PlacedLorsa = placed(lorsa, lens, corpus)
    counts = {"k": k, "sampled": sampled, "silent": silent, "window": window}
    options: dict[str, Any] = {"context": context, "packed": packed, "special": special, "separator": separator}
    options |= {"tokens": tokens, "drop_first": drop_first}
    if k < 1 or min(sampled, silent, window) < 0 or any(n is not None and n < 1 for n in (contexts, most)):
        raise SettingsError(
            f"k, contexts and most are at least 1, the others at least 0; found {counts}, {contexts=}, {most=}."
        )
    more: dict[str, Any] = {"contexts": contexts, "batch": batch, "seed": seed}
    found, texts, stream = searched(at, lens, corpus, None, heads, **counts, **more, **options)  # type: ignore[arg-type]
    if most is not None:
        found = found.select(strongest(at, found, most))
    width, count = found.token.shape[1], found.top.context.shape[1] + found.sampled.context.shape[1]
    if len(found.latents) * count * width * 4 > _MOST_BYTES:
        raise SettingsError(
            f"{len(found.latents)} heads with {count} contexts of {width} tokens each would take "
            f"{len(found.latents) * count * width * 4 / 2**30:.1f} GiB: choose some heads=, or most=."
        )
    with reading(at):  # type: ignore[arg-type]
        given = _given(at, corpus, stream, found, texts)
    own = {f.name: getattr(found, f.name) for f in fields(FeatureContexts)}
    return HeadContexts(**own, given=given)


def strongest(at: PlacedLorsa, found: FeatureContexts, count: int) -> list[int]:
    """The heads whose largest latent writes the longest vector, of those that fire at all; any, if none does."""
    rows = at.W_dec.detach()[found.latents.to(at.W_dec.device)]
    written = found.maximum.abs() * rows.norm(dim=1).cpu()
    order = written.argsort(descending=True, stable=True)[:count]
    return found.latents[order[written[order] > 0] if bool((written > 0).any()) else order].tolist()


def _given(
    at: PlacedLorsa, corpus: Corpus, stream: ActivationStream, found: FeatureContexts, texts: Sequence[Text]
) -> dict[str, Tensor]:
    """The z-patterns of the middle tokens, for which the model runs on their contexts again."""
    pictures = bool(next(iter(corpus.documents())).images)
    given = {g: torch.zeros(*getattr(found, g).context.shape, found.token.shape[1]) for g in FED}
    wanted: dict[int, list[tuple[Group, int, int]]] = {}
    for group in FED:
        context = getattr(found, group).context
        for row, n in (context >= 0).nonzero().tolist():
            wanted.setdefault(int(context[row, n]), []).append((group, row, n))
    for some in _batches(sorted(wanted), texts, stream.batch):
        chunk = [_context(texts[n], corpus, pictures) for n in dict.fromkeys(some.values())]
        contexts = stream._contexts_of(chunk, stream._prepare(chunk))
        x, real = at.inputs(contexts[at.read]), contexts.real.to(at.W_enc.device)
        for row, place in _rows(some, texts, contexts.number.tolist()):
            slots = wanted[place]
            where = Fired(
                torch.zeros(len(slots), dtype=torch.long, device=x.device),
                torch.tensor([int(getattr(found, g).centre[i, n]) for g, i, n in slots], device=x.device),
                torch.tensor([int(found.latents[i]) for _, i, _ in slots], device=x.device),
                torch.zeros(len(slots), device=x.device),
            )
            rows = z_patterns(at.lorsa, x[row : row + 1], where, real=real[row : row + 1]).float().cpu()
            for (group, i, n), values in zip(slots, rows, strict=True):
                length = min(len(values), given[group].shape[2])
                given[group][i, n, :length] = values[:length]
    return given


def _batches(places: Sequence[int], texts: Sequence[Text], size: int) -> list[dict[int, int]]:
    """Contexts (by their place among `texts`) in batches, each with the place of the one that stands for its number."""
    out: list[dict[int, int]] = []
    first: dict[int, int] = {}
    for place in places:
        number = texts[place].number
        if number in first and out and first[number] in out[-1].values():
            out[-1][place] = first[number]
            continue
        first[number] = place
        if not out or len(set(out[-1].values())) == size:
            out.append({})
        out[-1][place] = place
    return out


def _context(text: Text, corpus: Corpus, pictures: bool) -> Context:
    if text.ids is not None and not pictures:
        return Context(text.number, text.ids.tolist(), text.document.tolist(), None, Place())
    return Context(text.number, None, [], corpus.document(int(text.document.max())), Place())


def _rows(some: Mapping[int, int], texts: Sequence[Text], numbers: list[int]) -> list[tuple[int, int]]:
    """The row of each context in a batch, and its place among `texts`."""
    return [(numbers.index(texts[place].number) + texts[place].ordinal, place) for place in some]
