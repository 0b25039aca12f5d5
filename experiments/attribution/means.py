"""The mean over a sample's targets."""

from __future__ import annotations

from dataclasses import replace

from interp.tokens import TokenScores


def mean_target(scores: TokenScores) -> TokenScores:
    """The mean over a sample's targets, as if it were of its first token."""
    first = scores.source_mask.long().argmax(1, keepdim=True)
    texts = [[row[int(i)]] for row, i in zip(scores.tokens, first, strict=True)]
    mean = scores.scores.nanmean(1, keepdim=True)
    return replace(scores, scores=mean, targets=first, target_tokens=texts, target_mask=None, target_tower=None)
