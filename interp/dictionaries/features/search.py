"""Where latents are active: one pass over a corpus, all latents together.

In every context each latent offers three windows: about its largest activation; about an active token drawn evenly
from the context's; and about a token drawn evenly, if it is active nowhere in that window. Of each kind the best are
kept as the contexts stream by (see `Running`): the largest activations; for active tokens the largest log(u) / w with
u drawn evenly from (0, 1) and w the active tokens of the context, which draws contexts in proportion to w without
replacement (Efraimidis and Spirakis 2006); for silent windows the largest u. What is drawn depends on the seed and the
context's number alone, not on batches.

Pictures are ranked by their strongest token, not by the mean over their image tokens as in the specification of Zhang
et al. 2024 (arXiv 2411.14982): a mean prefers what fills the picture.

What windows do not show: why a latent is active (a token far before the window may be the cause), and tokens that were
not used (special ones, the first of each context by default), whose activations are written as 0.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.data.corpora import Corpus
from interp.dictionaries.activations import ActivationStream, Contexts
from interp.dictionaries.activations.packing import Separator, Special, Tokens
from interp.dictionaries.base import Dictionary
from interp.dictionaries.features.common import Latents, check_weights, chosen, input_read, reading
from interp.dictionaries.features.contexts import GROUPS, FeatureContexts, Places
from interp.dictionaries.features.running import Running
from interp.dictionaries.features.texts import Text, write_texts
from interp.dictionaries.placing import encode_at, placed
from interp.errors import InputError, SettingsError
from interp.lens import Lens
from interp.reads import Read

if TYPE_CHECKING:
    from interp.dictionaries.lorsa.lorsa import Lorsa
    from interp.dictionaries.lorsa.placed import PlacedLorsa

_HELD = 2**25  # activations of latents that are held at a time, but for a context at least


def top_contexts(
    dictionary: Dictionary | Lorsa | PlacedLorsa,
    lens: Lens,
    corpus: Corpus,
    *,
    read: str | Read | None = None,
    latents: Latents | None = None,
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
) -> FeatureContexts:
    """The contexts that activate latents most, some that activate them at all, and some that do not.

    Args:
        dictionary: an SAE, a transcoder, or a Lorsa (`interp.dictionaries.lorsa.head_contexts` finds what fed heads,
            too).
        lens: the model.
        corpus: texts, or pictures with prompts.
        read: the site that the dictionary reads, where its metadata do not say it.
        latents: which; None for all. All latents of wide dictionaries take memory: latents x (k + sampled) windows.
        k: contexts with the largest activations, one window of each.
        sampled: contexts about active tokens drawn at random; those that are among the largest are left out.
        silent: windows without activation.
        window: tokens on each side of the middle one; contexts with pictures are kept whole.
        contexts: how many contexts to go through at most; None for the whole corpus, once.
        batch: contexts in a pass of the model.
        context: tokens of a context (see `ActivationStream` for this and the options that follow).
        packed: fill contexts with one document after the other.
        special: tokens around each context.
        separator: token behind each document of packed contexts.
        tokens: use `all`, `text` or `image` tokens.
        drop_first: leave out the first position of each context.
        seed: of what is drawn.

    Returns:
        Windows of tokens with the latent's activations in each; density, maximum and mean.

    Raises:
        SettingsError: nothing says where the dictionary reads, an option is out of range, the weights are for scaled
            activations or have no threshold yet, or the windows would not fit into memory.
        UnknownNameError: a site or latent does not exist.
        InputError: the site is not as wide as the dictionary's input, or the corpus holds no usable token.
    """
    options: dict[str, Any] = {"context": context, "packed": packed, "special": special, "separator": separator}
    options |= {"tokens": tokens, "drop_first": drop_first}
    counts = {"k": k, "sampled": sampled, "silent": silent, "window": window}
    at = placed(dictionary, lens, corpus, read=read)
    return searched(at, lens, corpus, read, latents, contexts=contexts, batch=batch, seed=seed, **counts, **options)[0]


def searched(
    dictionary: Dictionary,
    lens: Lens,
    corpus: Corpus,
    read: str | Read | None,
    latents: Latents | None,
    *,
    k: int,
    sampled: int,
    silent: int,
    window: int,
    contexts: int | None,
    batch: int,
    seed: int,
    **options: Any,
) -> tuple[FeatureContexts, list[Text], ActivationStream]:
    """What `top_contexts` returns, the contexts that its windows lie in as the model is given them, and their stream.

    The dictionary is one as from `interp.dictionaries.placing.placed`; options are those of the stream.
    """
    counts = {"k": k, "sampled": sampled, "silent": silent, "window": window}
    if k < 1 or min(sampled, silent, window) < 0 or (contexts is not None and contexts < 1):
        raise SettingsError(f"k is at least 1, sampled, silent and window at least 0; found {counts}, {contexts=}.")
    check_weights(dictionary)
    asked, site = chosen(dictionary, latents), input_read(dictionary, read)
    stream = ActivationStream(lens, corpus, site, batch=batch, **options)
    (name,) = stream.reads
    if stream.d_in[name] != dictionary.cfg.d_in:
        raise InputError(
            f"{name} of {lens.name} is {stream.d_in[name]} wide, the dictionary reads {dictionary.cfg.d_in}."
        )
    pictures = bool(next(iter(corpus.documents())).images)
    search = _Search(dictionary, asked, k, sampled, silent, None if pictures else window, seed)
    left = contexts
    with reading(dictionary):
        for found in stream:
            part = found if left is None or left >= len(found) else _first(found, left)
            search.take(part, part[name])
            left = None if left is None else left - len(part)
            if left == 0:
                break
    settings = {"model": lens.name, "read": name, "corpus": corpus.identity, **options, **counts, "seed": seed}
    settings |= {"contexts": search.seen, "d_sae": dictionary.cfg.d_sae}
    active, total = search.active.cpu(), search.total.cpu()
    groups = search.groups()
    used = sorted({int(n) for g in groups for n in g.context.unique()} - {-1})
    texts = [search.texts[n] for n in used]
    written = write_texts(lens, corpus, stream, site, texts, pictures=pictures)
    place = torch.full((search.seen + 1,), -1)
    place[torch.tensor(used, dtype=torch.long)] = torch.arange(len(used))  # the last one is for no context
    result = FeatureContexts(
        latents=asked,
        tokens=search.tokens,
        active=active,
        maximum=search.largest.cpu(),
        mean=(total / active.clamp_min(1)).float(),
        **{name: replace(g, context=place[g.context]) for name, g in zip(GROUPS, groups, strict=True)},
        **written,
        settings=settings,
    )
    return result, texts, stream


def _first(found: Contexts, count: int) -> Contexts:
    values = {name: value[:count] for name, value in found.values.items()}
    ids = None if found.ids is None else found.ids[:count]
    return Contexts(values, found.mask[:count], found.real[:count], ids, found.document[:count], found.number[:count])


class _Search:
    """What is known of the contexts so far."""

    def __init__(
        self, dictionary: Dictionary, latents: Tensor, k: int, sampled: int, silent: int, window: int | None, seed: int
    ) -> None:
        self.dictionary, self.latents, self.window, self.seed = dictionary, latents, window, seed
        self.device = dictionary.W_dec.device
        self.columns = None if len(latents) == dictionary.cfg.d_sae else latents.to(self.device)
        self.sampled = sampled
        size = len(latents)
        self.top = Running(size, k, keep_acts=True, device=self.device)
        # More than are wanted, for those that turn out to be among the largest are left out.
        self.drawn = Running(size, sampled + k if sampled else 0, keep_acts=True, device=self.device)
        self.silent = Running(size, silent, keep_acts=False, device=self.device)
        self.active = torch.zeros(size, dtype=torch.long, device=self.device)
        self.total = torch.zeros(size, dtype=torch.float64, device=self.device)
        self.largest = torch.zeros(size, device=self.device)
        self.tokens = self.seen = 0
        self.texts: dict[int, Text] = {}
        self._most = 4096

    def take(self, found: Contexts, values: Tensor) -> None:
        """Go through some contexts."""
        step = max(1, _HELD // (values.shape[1] * self.dictionary.cfg.d_sae))
        for first in range(0, len(found), step):
            part = slice(first, first + step)
            self._take(found.mask[part], found.real[part], found.number[part], values[part])
        numbers = found.number.tolist()
        for row, number in enumerate(numbers):
            length = int(found.real[row].sum())  # padding stands on the right
            ids = None if found.ids is None else found.ids[row, :length].cpu()
            place = self.seen - len(numbers) + row
            self.texts[place] = Text(ids, found.document[row, :length].cpu(), number, numbers[:row].count(number))
        if len(self.texts) > self._most:
            self._forget()

    def _take(self, mask: Tensor, real: Tensor, number: Tensor, values: Tensor) -> None:
        mask, real = mask.to(self.device), real.to(self.device)
        count, width = mask.shape
        rows = torch.arange(self.seen, self.seen + count, device=self.device)
        self.seen += count
        encoded = encode_at(self.dictionary, values.to(self.device), mask, real)
        found = (encoded if self.columns is None else encoded[:, self.columns]).float()
        self.tokens += len(found)
        context, column = mask.nonzero(as_tuple=True)
        place = torch.full(mask.shape, -1, device=self.device)
        place[mask] = torch.arange(len(found), device=self.device)

        def read(contexts: Tensor, columns: Tensor, latents: Tensor) -> Tensor:
            at = place[contexts, columns]
            return found[at.clamp_min(0), latents].masked_fill(at < 0, 0)

        # From here on active latents only: few of all.
        token, latent = found.nonzero(as_tuple=True)
        value, columns = found[token, latent], column[token]
        pairs = _Pairs(context[token] * len(self.latents) + latent, columns, (count, len(self.latents)), width)
        self.active += pairs.counts.sum(0)
        self.total.index_add_(0, latent, value.double())
        peak, where = pairs.largest(value.abs())
        best, which = peak.max(0)
        every = torch.arange(len(self.latents), device=self.device)
        signed = read(which, where[which, every], every)
        self.largest = torch.where(best > self.largest.abs(), signed, self.largest)

        order, lot = self._lots(number, width)
        ends = real.sum(1)[:, None]
        self.top.offer(peak, peak > 0, rows, where, self._bounds(where, ends), read)
        if self.drawn.n:
            _, centre = pairs.largest(order[context[token], columns])
            key = lot.log() / pairs.counts.clamp_min(1)
            self.drawn.offer(key, pairs.counts > 0, rows, centre, self._bounds(centre, ends), read)
        if self.silent.n:
            centre = (order * mask).argmax(1)[:, None].expand_as(peak)
            start, stop = self._bounds(centre, ends)
            near = (columns >= start[context[token], 0]) & (columns < stop[context[token], 0])
            quiet = ~pairs.any(near) & mask.any(1)[:, None]
            self.silent.offer(lot, quiet, rows, centre, (start, stop), read)

    def _lots(self, number: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Numbers in (0, 1) for each position, and for each latent, of each context; the same for the same context."""
        order, lot = [], []
        for n in number.tolist():
            random = torch.Generator().manual_seed((self.seed * 1_000_003 + n) % 2**63)
            # All latents, whichever were asked for, and positions last: their number depends on the padding.
            lot.append(torch.rand(self.dictionary.cfg.d_sae, generator=random, dtype=torch.float64)[self.latents])
            order.append(torch.rand(width, generator=random, dtype=torch.float64))
        both = (torch.stack(order), torch.stack(lot))
        tiny = torch.finfo(torch.float32).tiny
        return both[0].clamp_min(tiny).float().to(self.device), both[1].clamp_min(tiny).float().to(self.device)

    def _bounds(self, centre: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        if self.window is None:
            return torch.zeros_like(centre), ends.expand_as(centre)
        return (centre - self.window).clamp_min(0), torch.minimum(centre + self.window + 1, ends)

    def _forget(self) -> None:
        """Contexts that no window lies in any more."""
        used = {int(n) for r in (self.top, self.drawn, self.silent) for n in r.context.unique()}
        self.texts = {n: text for n, text in self.texts.items() if n in used}
        self._most = max(4096, 2 * len(self.texts))

    def groups(self) -> tuple[Places, Places, Places]:
        """The windows of each kind: those drawn without the largest, the strongest first."""
        top, drawn = self.top.places(), self.drawn.places()
        if self.sampled:
            among = (drawn.context[:, :, None] == top.context[:, None, :]).any(2) | (drawn.context < 0)
            wanted = (~among).long().argsort(dim=1, descending=True, stable=True)[:, : self.sampled]
            at = (drawn.centre - drawn.start).clamp_min(0)[..., None]
            size = drawn.acts.gather(2, at)[..., 0].abs().masked_fill(among, -1)
            wanted = wanted.gather(1, size.gather(1, wanted).argsort(dim=1, descending=True, stable=True))
            hidden = replace(drawn, context=drawn.context.masked_fill(among, -1))
            drawn = hidden.taken(wanted)
        return top, drawn, self.silent.places()


class _Pairs:
    """Active latents of some contexts, each of a pair of context and latent.

    Args:
        pair: number of the pair of each.
        column: where it is.
        shape: contexts and latents.
        width: columns of the contexts.
    """

    def __init__(self, pair: Tensor, column: Tensor, shape: tuple[int, int], width: int) -> None:
        self.pair, self.column, self.shape, self.width = pair, column, shape, width
        self.counts = torch.bincount(pair, minlength=shape[0] * shape[1]).view(shape)

    def largest(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """The largest key above 0 of each pair, and the first column that has it [contexts, latents]."""
        best = key.new_zeros(self.counts.numel()).scatter_reduce_(0, self.pair, key, "amax")
        held = key == best[self.pair]
        column = torch.full_like(self.counts.flatten(), self.width - 1)
        column.scatter_reduce_(0, self.pair[held], self.column[held], "amin")
        return best.view(self.shape), column.view(self.shape)

    def any(self, marked: Tensor) -> Tensor:
        """Which pairs have a marked one [contexts, latents]."""
        out = torch.zeros(self.counts.numel(), dtype=torch.bool, device=self.pair.device)
        out[self.pair[marked]] = True
        return out.view(self.shape)
