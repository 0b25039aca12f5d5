"""Scores of what a head's attention pattern looks like: previous token, duplicate token, induction, first token, local.

Source: Olsson et al. 2022, "In-context Learning and Induction Heads" (prefix-matching score); Wang et al. 2023,
arXiv 2211.00593, appendix (duplicate-token and previous-token heads). With A the pattern and t the tokens, each score
is a mean over the query positions i of a prompt that can show the behaviour at all:

    previous(i)  = A[i, i-1]                       first(i) = A[i, 0]          i > 0
    local(i)     = sum of A[i, j], 0 <= i-j < w                                i >= w
    duplicate(i) = sum of A[i, j], j < i, t_j = t_i                            there is such a j
    induction(i) = sum of A[i, j+1], j+1 < i, t_j = t_i                        there is such a j

The published prefix-matching score uses random tokens repeated once, where each j is unique; `data.repeated_tokens`
makes such prompts. On other text the same formula counts every earlier occurrence.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.batch import Batch
from interp.errors import InputError, SettingsError, unknown
from interp.heads.common import head_grid, head_scores, settings_of
from interp.lens import Lens
from interp.scores import HeadScores

KINDS = ("induction", "previous", "duplicate", "first", "local")


def patterns(lens: Lens, batch: Batch, *, score: str = "induction", window: int = 4, memory: int = 2**28) -> HeadScores:
    """Pattern scores of every head, each between 0 and 1.

    Args:
        lens: a causal text model whose patterns can be read.
        batch: prompts; for `induction` and `duplicate` with repeated tokens.
        score: which of `induction previous duplicate first local` ranks the heads; all are kept as extra columns.
        window: width of `local`, the query itself included.
        memory: bytes of patterns held at a time; the model is run once for each group of layers that fits.

    Returns:
        Scores [layer, head] of the chosen kind with `per_prompt`; the others in `extra` (kinds that no prompt can
        show are left out).

    Raises:
        InputError: no prompt can show the chosen behaviour (no repeated token, or too short).
        UnsupportedError: the model's patterns cannot be read.
    """
    if score not in KINDS:
        raise unknown("pattern score", score, KINDS)
    if window < 1:
        raise SettingsError(f"window must be at least 1, got {window}.")
    if "input_ids" not in batch.inputs or "decoder_input_ids" in batch.inputs:
        raise InputError("pattern scores need a batch of tokens of a text model.")
    targets = pattern_targets(batch, window)
    layers, counts, valid = head_grid(lens, site="pattern")
    per_kind = {k: torch.full((len(batch), *valid.shape), float("nan")) for k in KINDS}
    each = len(batch) * max(counts) * batch.mask.shape[1] ** 2 * 4
    group = max(1, memory // each)
    for at in range(0, len(layers), group):
        some = layers[at : at + group]
        trace = lens.run(batch, [f"pattern.{','.join(map(str, some))}"])
        for layer in some:
            pattern = trace["pattern", layer].float()
            for kind, (keys, queries) in targets.items():
                mass = torch.einsum("bhqk,bqk->bhq", pattern, keys.float())
                mean = (mass * queries[:, None]).sum(-1) / queries.sum(-1)[:, None]
                per_kind[kind][:, layer, : counts[layer]] = mean.cpu()
    columns: dict[str, Tensor] = {}
    for kind in KINDS:
        able = targets[kind][1].any(1).cpu()
        if bool(able.any()):
            columns[kind] = per_kind[kind][able].mean(0)
        elif kind == score:
            need = "a token that was there before" if kind in ("induction", "duplicate") else "enough tokens"
            raise InputError(
                f"no prompt can show {kind!r} attention: none has {need}. See interp.data.repeated_tokens."
            )
    able = targets[score][1].any(1).cpu()
    settings = settings_of(lens, batch, method="patterns", score=score, window=window, used=int(able.sum()))
    return head_scores(
        f"patterns.{score}", "attention", per_kind[score][able], valid, settings, lens.anatomy.main, extra=columns
    )


def pattern_targets(
    batch: Batch, window: int
) -> dict[str, tuple[Bool[Tensor, "batch query key"], Bool[Tensor, "batch query"]]]:
    """For each kind, which keys a query has to look at, and which queries count."""
    ids, mask = batch.inputs["input_ids"], batch.mask
    rank = mask.long().cumsum(1) - 1
    distance = rank[:, :, None] - rank[:, None, :]
    both = mask[:, :, None] & mask[:, None, :]
    same = (ids[:, :, None] == ids[:, None, :]) & both & (distance > 0)
    # Key j+1 follows an earlier copy of the query's token; the column before a real key is the token before it.
    after = torch.zeros_like(same)
    after[:, :, 1:] = same[:, :, :-1]
    after &= both & (distance > 0)
    later = mask & (rank > 0)
    keys = {
        "induction": after,
        "previous": both & (distance == 1),
        "duplicate": same,
        "first": both & (rank[:, None, :] == 0),
        "local": both & (distance >= 0) & (distance < window),
    }
    queries = {
        "induction": after.any(-1),
        "previous": later,
        "duplicate": same.any(-1),
        "first": later,
        "local": mask & (rank >= window),
    }
    return {k: (keys[k], queries[k]) for k in KINDS}


def prefix_matching(pattern: Float[Tensor, "head query key"], period: int) -> Float[Tensor, " head"]:
    """The published score on a sequence repeated after `period` tokens: mean of A[i, i - period + 1], i >= period."""
    return pattern.diagonal(1 - period, dim1=-2, dim2=-1)[..., 1:].mean(-1)
