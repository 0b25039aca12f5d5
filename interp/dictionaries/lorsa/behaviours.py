"""What heads of a Lorsa do, by score: induction, duplicate token, previous token, first token, local, successor.

Sources: Olsson et al. 2022 and Wang et al. 2023 for the first five (see `interp.heads.patterns`); Gould et al. 2023,
"Successor Heads: Recurring, Interpretable Attention Heads in the Wild" (arXiv 2312.09230), for the last. With zp the
z-pattern of a head at a token where it fires, whose size |zp| is made to sum to one, a score is the mean over the
firings that can show the behaviour at all of

    induction, duplicate, previous, first, local     the part of |zp| on the keys that `heads.patterns` names
    successor    the part of |zp| on words of an order (days, months, letters, ...) whose next word is among the k
                 tokens that the head promotes most directly there (suppresses, where the source gives less than 0)

Departures. Gould et al. read a head's whole OV matrix at the embeddings of words. An OV head of a Lorsa has one output
direction, so it can be the successor of few words; what counts is whether the sources that it does read are those
whose next word it writes. Attention alone does not count: a head may look at a token whose value is nothing.

What scores do not see: why a head fires. A head that fires twice may have any score; `counts` says how often it did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.batch import Batch
from interp.data import repeated_tokens
from interp.dictionaries.features.logits import logit_effects
from interp.dictionaries.lorsa.lorsa import Lorsa
from interp.dictionaries.lorsa.placed import PlacedLorsa
from interp.dictionaries.lorsa.reading import Fired, fired, z_parts
from interp.dictionaries.placing import placed
from interp.errors import InputError, SettingsError, UnsupportedError
from interp.heads.patterns import pattern_targets
from interp.inputs import tokenizer_of
from interp.lens import Lens
from interp.patches import picture_ids

if TYPE_CHECKING:
    import pandas as pd

ORDERS: tuple[tuple[str, ...], ...] = tuple(
    tuple(words.split())
    for words in (
        "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
        "January February March April May June July August September October November December",
        "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen",
        "first second third fourth fifth sixth seventh eighth ninth tenth",
        "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20",
        "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z",
    )
)
NAMES = {"first": "sink"}
"""What a label is called where it is not called by its score."""


@dataclass(frozen=True, slots=True, eq=False)
class Behaviours:
    """How much each OV head behaves in some ways; `behaviours["induction"]` are the scores of one kind.

    Attributes:
        scores: by kind, between 0 and 1 [n_ov]; NaN where the head never fired where it can show the behaviour.
        counts: by kind, at how many tokens it fired that can show it [n_ov].
    """

    scores: Mapping[str, Float[Tensor, " n_ov"]]
    counts: Mapping[str, Int[Tensor, " n_ov"]]

    def __getitem__(self, kind: str) -> Float[Tensor, " n_ov"]:
        """The scores of a kind."""
        return self.scores[kind]

    def labels(self, *, least: float = 0.5, firings: int = 5) -> list[tuple[str, ...]]:
        """What each head may be called, the highest score first.

        Args:
            least: the score from which on a head has a label: half of what it takes, on average.
            firings: how often it has to have fired where it can show the behaviour.

        Returns:
            For each head some of `induction duplicate previous sink successor`; `local` alone where none of them holds.
        """
        if not 0 < least <= 1 or firings < 1:
            raise SettingsError(f"least lies above 0 and at most at 1, firings is at least 1: {least}, {firings}.")
        passed = {
            kind: ((score >= least) & (self.counts[kind] >= firings)).tolist() for kind, score in self.scores.items()
        }
        out = []
        for head in range(len(next(iter(self.scores.values())))):
            mine = sorted((k for k in passed if passed[k][head]), key=lambda k: -float(self.scores[k][head]))
            named = [kind for kind in mine if kind != "local"] or mine
            out.append(tuple(NAMES.get(kind, kind) for kind in named))
        return out

    def frame(self, *, least: float = 0.5, firings: int = 5) -> pd.DataFrame:
        """A row for each head: head, labels, and for each kind its score and how often the head fired."""
        import pandas as pd

        columns: dict[str, Any] = {"head": range(len(next(iter(self.scores.values()))))}
        columns["labels"] = [", ".join(names) for names in self.labels(least=least, firings=firings)]
        for kind, score in self.scores.items():
            columns |= {kind: score.cpu().numpy(), f"{kind}_firings": self.counts[kind].cpu().numpy()}
        return pd.DataFrame(columns)


@torch.no_grad()
def behaviours(lorsa: Lorsa, x: Float[Tensor, "batch pos d_in"], batch: Batch, *, window: int = 4) -> Behaviours:
    """How much each OV head behaves like an induction, previous-token, duplicate-token, sink or local head.

    Args:
        lorsa: a causal Lorsa.
        x: what the attention reads on the batch.
        batch: the prompts, for `induction` and `duplicate` with repeated tokens.
        window: width of `local`.

    Returns:
        Scores and counts by kind (`induction previous duplicate first local`).

    Raises:
        InputError: the batch holds no tokens, or is not the one that x comes from.
    """
    if window < 1:
        raise SettingsError(f"window must be at least 1, got {window}.")
    if "input_ids" not in batch.inputs or batch.mask.shape != x.shape[:2]:
        raise InputError("behaviours are read on the tokens that x comes from: give their batch.")
    targets = {kind: (k.to(x.device), q.to(x.device)) for kind, (k, q) in pattern_targets(batch, window).items()}
    real = batch.mask.to(x.device)
    sums = {kind: torch.zeros(2, lorsa.cfg.n_ov, device=x.device) for kind in targets}
    for part, zp in z_parts(lorsa, x, fired(lorsa, x, real=real), real, None):
        size = _shares(zp)
        for kind, (keys, queries) in targets.items():
            _add(sums[kind], part, (size * keys[part.sample, part.query]).sum(1), queries[part.sample, part.query])
    return _scored(sums)


@torch.no_grad()
def head_behaviours(
    lorsa: Lorsa | PlacedLorsa,
    lens: Lens,
    *,
    rows: int = 32,
    length: int = 24,
    order_rows: int = 4,
    window: int = 4,
    orders: Sequence[Sequence[str]] = ORDERS,
    k: int = 10,
    batch: int = 16,
    seed: int = 0,
) -> Behaviours:
    """The same on prompts that are made here: repeated random tokens, and words of orders for `successor`.

    Args:
        lorsa: a causal Lorsa of a text model, or one at its layer.
        lens: the model.
        rows: how many rows of repeated tokens.
        length: how many random tokens are repeated; less where the Lorsa knows no sequences that long.
        order_rows: how many rows of each order, for `successor`: the first as it is, the others shuffled.
        window: width of `local`.
        orders: words that follow one another; those that are no single token are left out.
        k: among how many promoted tokens the next word has to be; upper and lower case count as one.
        batch: rows in a pass of the model.
        seed: of the tokens and the shuffling.

    Returns:
        Scores and counts by kind; `successor` is missing where the model has no plain way from the layer to its logits,
        or no order with two words that are single tokens.

    Raises:
        UnsupportedError: the layer looks both ways, or its tower reads no text.
        SettingsError: an option is out of range.
    """
    at: PlacedLorsa = placed(lorsa, lens)
    if min(rows, order_rows, k, batch) < 1 or length < 2:
        raise SettingsError(
            f"rows, order_rows, k, batch are at least 1, length 2: {rows=}, {order_rows=}, {k=}, {batch=}, {length=}."
        )
    if not at.cfg.causal or at.tower != lens.anatomy.main or "encoder" in lens.anatomy.towers:
        raise UnsupportedError(f"behaviours are those of a causal text layer, not of {at.read} of {lens.name}.")
    begin, allowed = _tokens(lens)
    length = min(length, (at.cfg.context - 1) // 2)
    ids = repeated_tokens(rows, length, allowed_ids=allowed, bos_id=begin, seed=seed)
    sums: dict[str, Tensor] = {}
    for part in ids.split(batch):
        made = lens.prepare(input_ids=part)
        found = behaviours(at.lorsa, _read(at, made), made, window=window)
        for kind, score in found.scores.items():
            n = found.counts[kind].to(score)
            added = torch.stack([score.nan_to_num() * n, n])
            sums[kind] = sums[kind] + added if kind in sums else added
    successor = _successor(at, orders, begin, order_rows, k, batch, seed)
    return _scored(sums if successor is None else sums | {"successor": successor})


def _tokens(lens: Lens) -> tuple[int | None, list[int]]:
    """What stands in front of a text, if anything, and the ids of plain tokens."""
    tokenizer: Any = tokenizer_of(lens.processor)
    special, size, begin = set(picture_ids(lens.model.config)), lens.vocabulary, None
    if tokenizer is not None:
        special |= set(tokenizer.all_special_ids)
        size = min(size, len(tokenizer))
        front = tokenizer("a")["input_ids"][0]
        begin = front if front == tokenizer.bos_token_id else None
    return begin, [i for i in range(size) if i not in special]


def _read(at: PlacedLorsa, batch: Batch) -> Tensor:
    return at.inputs(at.lens.run(batch, at.read)["resid_pre", at.layer])


def _shares(zp: Tensor) -> Tensor:
    size = zp.abs()
    return size / size.sum(1, keepdim=True).clamp_min(1e-30)


def _add(sums: Tensor, part: Fired, mass: Tensor, able: Tensor) -> None:
    sums[0].index_add_(0, part.head, mass * able)
    sums[1].index_add_(0, part.head, able.to(sums))


def _scored(sums: Mapping[str, Tensor]) -> Behaviours:
    return Behaviours({kind: s[0] / s[1] for kind, s in sums.items()}, {kind: s[1].long() for kind, s in sums.items()})


@dataclass(frozen=True, slots=True, eq=False)
class _Ordered:
    """Rows of words of orders.

    Attributes:
        ids: of the rows.
        word: which word each token is [row, pos]; -1 for none.
        after: what follows each word, without blanks, in small letters; None for the last of an order.
    """

    ids: list[list[int]]
    word: Int[Tensor, "row pos"]
    after: list[str | None]


def _ordered(
    lens: Lens, orders: Sequence[Sequence[str]], begin: int | None, rows: int, most: int, seed: int
) -> _Ordered:
    tokenizer: Any = tokenizer_of(lens.processor)
    front = [] if begin is None else [begin]
    ids: list[list[int]] = []
    words: list[list[int]] = []
    after: list[str | None] = []
    random = torch.Generator().manual_seed(seed)
    for order in orders:
        single = [_single(tokenizer, word) for word in order]
        places = []
        for n, token in enumerate(single):
            if token is not None:
                follows = n + 1 < len(order) and single[n + 1] is not None
                places.append((token, len(after)))
                after.append(order[n + 1].casefold() if follows else None)
        if len(places) < 2:
            continue
        for row in range(rows):
            chosen = range(len(places)) if row == 0 else torch.randperm(len(places), generator=random).tolist()
            taken = [places[n] for n in chosen][: most - len(front)]
            ids.append(front + [token for token, _ in taken])
            words.append([-1] * len(front) + [word for _, word in taken])
    wide = max(map(len, words), default=0)
    return _Ordered(ids, torch.tensor([row + [-1] * (wide - len(row)) for row in words]), after)


def _single(tokenizer: Any, word: str) -> int | None:
    """The token of a word inside a text, with a blank in front where there is such a token."""
    for text in (f" {word}", word):
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(found) == 1 and found[0] != tokenizer.unk_token_id:
            return found[0]
    return None


def _successor(
    at: PlacedLorsa, orders: Sequence[Sequence[str]], begin: int | None, rows: int, k: int, batch: int, seed: int
) -> Float[Tensor, "2 n_ov"] | None:
    """Sums of the parts of |zp| on words whose next one is promoted, and how many firings could show it."""
    if tokenizer_of(at.lens.processor) is None or at.lens.anatomy.unembed is None:
        return None
    made = _ordered(at.lens, orders, begin, rows, at.cfg.context, seed)
    if not any(made.after):
        return None
    sums = torch.zeros(2, at.cfg.n_ov, device=at.W_enc.device)
    hits = torch.zeros(2, at.cfg.n_ov, len(made.after), dtype=torch.bool, device=sums.device)
    known = torch.zeros(at.cfg.n_ov, dtype=torch.bool, device=sums.device)
    follows = torch.tensor([text is not None for text in made.after], device=sums.device)
    for start in range(0, len(made.ids), batch):
        inputs = at.lens.prepare(input_ids=made.ids[start : start + batch], padding_side="right")
        x, real = _read(at, inputs), inputs.mask.to(sums.device)
        where = fired(at.lorsa, x, real=real)
        word = made.word[start : start + batch, : x.shape[1]].to(sums.device)
        shown = (word >= 0) & follows[word.clamp_min(0)]
        able = (at.lorsa.seen(x, real) & shown[:, None, :]).any(-1)
        where = where.at(able[where.sample, where.query])
        heads = where.head.unique()
        heads = heads[~known[heads]]
        if len(heads):
            try:
                hits[:, heads] = _hits(at, heads.cpu(), made.after, k).to(hits.device)
            except UnsupportedError:  # the head of the model is no norm and projection
                return None
            known[heads] = True
        for part, zp in z_parts(at.lorsa, x, where, real, None):
            here = word[part.sample]
            up = hits[(zp < 0).long(), part.head[:, None], here.clamp_min(0)] & (here >= 0)
            _add(sums, part, (_shares(zp) * up).sum(1), able[part.sample, part.query])
    return sums


def _hits(
    at: PlacedLorsa, heads: Int[Tensor, " head"], after: Sequence[str | None], k: int
) -> Bool[Tensor, "2 head word"]:
    """Whether the next word of each word is among the tokens that heads promote, and that they suppress."""
    effects = logit_effects(at, at.lens, heads, k)  # type: ignore[arg-type]
    names = {i: text.strip().casefold() for i, text in effects.names.items()}
    out = torch.zeros(2, len(heads), len(after), dtype=torch.bool)
    for side, ids in enumerate((effects.promoted, effects.suppressed)):
        for row, some in enumerate(ids.tolist()):
            promoted = {names[i] for i in some}
            out[side, row] = torch.tensor([text is not None and text in promoted for text in after])
    return out
