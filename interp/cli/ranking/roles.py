"""What the strongest heads of a direct effect do: raise the answer or lower the wrong one, and where they look."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from interp.errors import UnsupportedError
from interp.heads import direct_effect
from interp.heads.common import token_ids

if TYPE_CHECKING:
    import pandas as pd

    from interp.cli.ranking.batches import Chunk
    from interp.lens import Lens
    from interp.scores import HeadScores


def roles(lens: "Lens", scores: "HeadScores", chunks: Sequence["Chunk"], k: int = 12) -> "pd.DataFrame | None":
    """For the k strongest heads, the two halves of their effect and the attention of the last position.

    Columns: `layer`, `head`, `score`, `on_answer` and `on_wrong` (logits; score is their difference), and the mean
    share of attention on the columns that hold the answer's token (`at_answer`), the wrong one's (`at_wrong`) and on
    the first token (`at_first`).

    Returns:
        None where there are no wrong answers, the scores are shares, or the model's patterns cannot be read.
    """
    if any(c.answers is None or c.wrong is None for c in chunks) or scores.settings.get("normalize"):
        return None
    frame = scores.top(k, by="abs").reindex(columns=["layer", "head", "score"])
    pairs = [(int(r["layer"]), int(r["head"])) for r in frame.to_dict("records")]
    reads = [f"pattern.{layer}@last" for layer in sorted({layer for layer, _ in pairs})]
    total = sum(len(c.batch) for c in chunks)
    found = torch.zeros(len(pairs), 4, dtype=torch.float64)
    for chunk in chunks:
        assert chunk.answers is not None
        assert chunk.wrong is not None
        alone = direct_effect(lens, chunk.batch, answers=chunk.answers)
        try:
            trace = lens.run(chunk.batch, reads)
        except UnsupportedError:
            return None
        ids, mask = chunk.batch.inputs["input_ids"], chunk.batch.mask
        targets = [token_ids(lens, words, len(chunk.batch)) for words in (chunk.answers, chunk.wrong)]
        first = torch.zeros_like(mask).scatter_(1, mask.int().argmax(1, keepdim=True), True)
        places = [*((ids == target[:, None]) & mask for target in targets), first]
        for i, (layer, head) in enumerate(pairs):
            found[i, 0] += float(alone.scores[layer, head]) * len(chunk.batch)
            row = trace[f"pattern.{layer}@last", layer][:, head, 0].float()
            for j, place in enumerate(places, 1):
                found[i, j] += float((row * place).sum())
    values = (found / total).T.tolist()
    frame = frame.assign(on_answer=values[0], on_wrong=[a - s for a, s in zip(values[0], frame["score"], strict=True)])
    return frame.assign(at_answer=values[1], at_wrong=values[2], at_first=values[3])


def mover(frame: "pd.DataFrame") -> tuple[int, int] | None:
    """The head that raises the answer most among those that look at the answer's token above all, if any."""
    looks = frame["at_answer"] > frame[["at_wrong", "at_first"]].max(axis=1)
    able = frame.loc[looks & (frame["on_answer"] > 0) & (frame["score"] > 0)].to_dict("records")
    best = max(able, key=lambda row: row["on_answer"], default=None)
    return None if best is None else (int(best["layer"]), int(best["head"]))
