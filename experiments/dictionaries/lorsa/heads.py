"""What the heads of trained Lorsas do, as rows of tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

import interp
from experiments.records import Row
from interp.data.corpora import Corpus
from interp.dictionaries import logit_effects, lorsa

LEAST, FIRINGS = 0.5, 20
KINDS = ("induction", "previous", "duplicate", "first")
REPEATED = (
    "The old miller Quimby sold flour to Zanthe near the river. Every autumn the old miller Quimby sold flour to "
    "Zanthe near the river."
)


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


def shown_rows(at: lorsa.PlacedLorsa, lens: interp.Lens, heads: Sequence[int], most: int = 8) -> list[Row]:
    """Where heads fire most in the second half of a repeated text, and the token that fed them most there."""
    batch = lens.prepare(REPEATED)
    tokenizer: Any = lens.processor
    tokens = [tokenizer.decode(i) for i in batch.inputs["input_ids"][0].tolist()]
    x = at.inputs(lens.run(batch, at.read)["resid_pre", at.layer])
    fired = lorsa.fired(at.lorsa, x)
    mine = torch.isin(fired.head, torch.tensor(list(heads))) & (fired.query >= len(tokens) // 2)
    where = fired.at(mine)
    where = where.at(where.value.argsort(descending=True)[:most])
    rows = []
    given = lorsa.z_patterns(at.lorsa, x, where)
    for n, zp in enumerate(given):
        source = int(zp.abs().argmax())
        t = int(where.query[n])
        rows.append(
            {
                "head": int(where.head[n]),
                "fires at": _quoted(tokens, t),
                "fed by": _quoted(tokens, source),
                "share of its latent": f"{float(zp[source] / zp.sum()):.0%}",
                "induction": "yes" if source > 0 and tokens[source - 1] == tokens[t] and source <= t else "no",
            }
        )
    return rows or [{"head": "none fires"}]


def _quoted(tokens: Sequence[str], place: int) -> str:
    """A token with the two before it."""
    before, token = "".join(tokens[max(place - 2, 0) : place]), tokens[place]
    blank = token[: len(token) - len(token.lstrip())]
    return f"{before}{blank}**{token.strip()}**".strip().replace("|", "\\|")
