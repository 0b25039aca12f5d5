"""What the heads of trained Lorsas do, as rows of tables."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import interp
from experiments.records import Row
from interp.data.corpora import Corpus
from interp.dictionaries import logit_effects, lorsa

LEAST, FIRINGS = 0.5, 20
KINDS = ("induction", "previous", "duplicate", "first")


def found(done: lorsa.Behaviours, kind: str) -> torch.Tensor:
    """Which heads show a behaviour: a score of at least a half over enough firings."""
    return (done[kind].nan_to_num() >= LEAST) & (done.counts[kind] >= FIRINGS)


def behaviour_rows(
    placed: Mapping[tuple[str, int], lorsa.PlacedLorsa], lens: interp.Lens, text: Corpus, *, contexts: int, context: int
) -> list[Row]:
    """How many heads show each behaviour, and the share of heads that draw on several of the layer's heads."""
    rows: list[Row] = []
    for (start, seed), at in placed.items():
        done = lorsa.head_behaviours(at, lens)
        whose = lorsa.head_relations(at, lens, text, contexts=contexts, context=context)
        row: Row = {"start": start, "seed": seed, "heads that fire": int((whose.active > 0).sum())}
        row |= {{"first": "sink"}.get(kind, kind): int(found(done, kind).sum()) for kind in KINDS}
        row |= {f"several heads make {mass:.0%}": f"{whose.several(mass):.0%}" for mass in (0.5, 0.8)}
        rows.append(row)
    return rows


def induction_rows(
    at: lorsa.PlacedLorsa, lens: interp.Lens, text: Corpus, *, contexts: int, context: int, most: int = 6
) -> tuple[list[Row], list[int]]:
    """The heads with the highest induction scores, of those that fire often on repeated tokens; and their numbers."""
    done = lorsa.head_behaviours(at, lens)
    whose = lorsa.head_relations(at, lens, text, contexts=contexts, context=context)
    score = done["induction"].nan_to_num().masked_fill(done.counts["induction"] < FIRINGS, -1)
    heads = [h for h in score.topk(min(most, len(score))).indices.tolist() if score[h] > 0]
    if not heads:
        return [{"head": "none fires often enough"}], []
    effects = logit_effects(at, lens, heads, 4)  # type: ignore[arg-type]
    rows = []
    for n, head in enumerate(heads):
        main = ", ".join(f"{at.layer}.{h} ({share:.0%})" for h, share in whose.of(head, 2))
        words = " ".join(repr(effects.names[i]) for i in effects.promoted[n].tolist())
        row: Row = {"head": head, "QK of": f"{at.layer}.{head // at.cfg.group}", "induction": float(score[head])}
        row |= {"firings": int(done.counts["induction"][head]), "draws on": main or "silent in the text"}
        rows.append({**row, "promotes": words.replace("|", "\\|")})
    return rows, heads


@dataclass(frozen=True, slots=True, eq=False)
class Twice:
    """All firings on texts that stand there twice, but for those at the first token.

    Attributes:
        ids: the texts, twice [text, 2 * pos].
        where: the firings, `n` in all.
        source: the token that gave most to each [n].
        share: which share of the latent [n].
        rule: whether that token stands behind an earlier copy of the token at which the head fires [n].
    """

    ids: Int[Tensor, "text pos"]
    where: lorsa.Fired
    source: Int[Tensor, " n"]
    share: Float[Tensor, " n"]
    rule: Bool[Tensor, " n"]

    @property
    def second(self) -> Bool[Tensor, " n"]:
        """Which fire where the text stands there for the second time."""
        return self.where.query >= self.ids.shape[1] // 2


def twice(at: lorsa.PlacedLorsa, lens: interp.Lens, once: Int[Tensor, "text pos"], *, batch: int = 16) -> Twice:
    """Repeat each text, and see where heads fire and what feeds them there."""
    ids, parts = torch.cat([once, once], 1), []
    for start in range(0, len(ids), batch):
        mine = ids[start : start + batch]
        x = at.inputs(lens.run(lens.prepare(input_ids=mine), at.read)["resid_pre", at.layer])
        fired = lorsa.fired(at.lorsa, x)
        fired = fired.at(fired.query > 0)
        given = lorsa.z_patterns(at.lorsa, x, fired)
        source = given.abs().argmax(1)
        share = given.gather(1, source[:, None])[:, 0] / given.sum(1)
        rule = (source > 0) & (mine[fired.sample, source - 1] == mine[fired.sample, fired.query])
        parts.append((fired.sample + start, fired.query, fired.head, fired.value, source, share, rule))
    sample, query, head, value, source, share, rule = map(torch.cat, zip(*parts, strict=True))
    return Twice(ids, lorsa.Fired(sample, query, head, value), source, share, rule)


def repeated_rows(seen: Twice, done: lorsa.Behaviours, heads: Sequence[int]) -> list[Row]:
    """How often induction heads fire where a text stands for the second time, whether by the rule, and at which words.

    Args:
        seen: from `twice`.
        done: says which heads are induction heads.
        heads: some of them, which get a row each.
    """
    induction = found(done, "induction")
    groups = {f"all {int(induction.sum())} induction heads": induction, "all other heads": ~induction}
    groups |= {str(head): torch.arange(len(induction)) == head for head in heads}
    half = seen.ids.shape[1] // 2
    rows = []
    for name, mine in groups.items():
        row: Row = {"head": name}
        here = mine[seen.where.head]
        parts = {"first": (here & ~seen.second, half - 1), "second": (here & seen.second, half)}
        for time, (some, tokens) in parts.items():
            places = seen.where.sample[some] * 2 * half + seen.where.query[some]
            row[f"fires at, {time} time"] = f"{len(places.unique()) / (tokens * len(seen.ids)):.1%}"
        for time, (some, _) in parts.items():
            row[f"by induction, {time} time"] = f"{seen.rule[some].double().mean():.0%}" if bool(some.any()) else "-"
        each = [_variety(seen, parts["second"][0] & (seen.where.head == h)) for h in mine.nonzero()[:, 0].tolist()]
        pairs = [pair for pair in each if pair is not None]
        for column, n in (("different words", 0), ("at random", 1)):
            row[column] = f"{sum(pair[n] for pair in pairs) / len(pairs):.0%}" if pairs else "-"
        rows.append(row)
    return rows


def _variety(seen: Twice, some: Bool[Tensor, " n"], draws: int = 8) -> tuple[float, float] | None:
    """How many different words feed a head, of its firings; and if its places were drawn at random."""
    count = int(some.sum())
    if count < FIRINGS:
        return None
    random = torch.Generator().manual_seed(0)
    words = seen.ids[seen.where.sample[some], seen.source[some]]
    drawn = seen.ids.flatten()[torch.randint(seen.ids.numel(), (draws, count), generator=random)]
    return len(words.unique()) / count, sum(len(row.unique()) for row in drawn) / draws / count


def shown_rows(seen: Twice, lens: interp.Lens, heads: Sequence[int]) -> list[Row]:
    """Where each of some heads fires most in a text that stands there for the second time, and what fed it there."""
    tokenizer: Any = lens.processor
    rows: list[Row] = []
    for head in heads:
        mine = (seen.second & (seen.where.head == head)).nonzero()[:, 0]
        if not len(mine):
            rows.append({"head": head, "fires at": "-", "fed by": "-", "share of its latent": "-", "induction": "-"})
            continue
        n = int(mine[seen.where.value[mine].argmax()])
        tokens = [tokenizer.decode([i]) for i in seen.ids[seen.where.sample[n]].tolist()]
        row: Row = {"head": head, "fires at": _quoted(tokens, int(seen.where.query[n]))}
        row |= {"fed by": _quoted(tokens, int(seen.source[n])), "share of its latent": f"{float(seen.share[n]):.0%}"}
        rows.append({**row, "induction": "yes" if seen.rule[n] else "no"})
    return rows


def _quoted(tokens: Sequence[str], place: int) -> str:
    """A token with the two before it, as a cell of a table."""
    parts = "".join(tokens[max(place - 2, 0) : place]), tokens[place]
    before, token = (re.sub(r"([\\`*_<>|\[\]])", r"\\\1", part.replace("\n", "\\n")) for part in parts)
    blank = token[: len(token) - len(token.lstrip())]
    return f"{before}{blank}**{token.strip() or '␣'}**".strip()
