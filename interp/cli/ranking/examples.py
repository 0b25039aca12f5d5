"""What is shown beside the scores: one attention pattern of the strongest head, and the model's own answers."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from interp.cli.ranking.evidence import leading
from interp.errors import UnsupportedError

if TYPE_CHECKING:
    import pandas as pd

    from interp.cli.ranking.batches import Chunk
    from interp.lens import Lens
    from interp.scores import HeadScores

LONGEST = 96


def strongest(method: str, scores: "HeadScores") -> tuple[int, int]:
    """The head that an example is shown of: the first of the ranking; of direct effects the most positive one."""
    first = scores.top(1, by="score" if method == "direct_effect" else leading(method, scores)).iloc[0]
    return int(first["layer"]), int(first["head"])


def example(
    lens: "Lens", scores: "HeadScores", chunks: Sequence["Chunk"], head: tuple[int, int], role: str
) -> dict[str, Any] | None:
    """The pattern of one head on the first input of at most 96 tokens; None where it cannot be shown.

    Args:
        lens: the model.
        scores: the result that the head was found with.
        chunks: the inputs.
        head: layer and head.
        role: what the head is, for the caption.
    """
    from interp.inputs import tokenizer_of

    index = scores.settings.get("prompt_index", [0])[0]
    chunk = next(c for c in reversed(chunks) if c.first <= index)
    row = index - chunk.first
    if int(chunk.batch.lengths[row]) > LONGEST or not chunk.batch.repeatable:
        return None
    one = chunk.batch[row]
    try:
        pattern = lens.run(one, [f"pattern.{head[0]}/{head[1]}"])["pattern", head[0]][0, 0].float().cpu()
    except UnsupportedError:
        return None
    ids = one.inputs["input_ids"][0].tolist()
    tokenizer = tokenizer_of(lens.processor)
    tokens = [str(i) if tokenizer is None else tokenizer.decode([i]) for i in ids]
    rounded = [[round(value, 5) for value in line] for line in pattern.tolist()]
    found = {"layer": head[0], "head": head[1], "role": role, "prompt": index}
    return {**found, "tokens": tokens, "pattern": rounded}


def answers_of(lens: "Lens", chunks: Sequence["Chunk"], done: Callable[[], None]) -> "pd.DataFrame":
    """What the model answers: a row for each prompt, with the answer's probability, rank and logit difference."""
    import pandas as pd
    import torch

    from interp.heads.common import token_ids
    from interp.inputs import tokenizer_of

    tokenizer = tokenizer_of(lens.processor)
    rows: list[dict[str, Any]] = []
    for chunk in chunks:
        if chunk.answers is None:
            continue
        good = token_ids(lens, chunk.answers, len(chunk.batch)).cpu()
        bad = None if chunk.wrong is None else token_ids(lens, chunk.wrong, len(chunk.batch), "wrong").cpu()
        with torch.no_grad():
            logits = lens.run(chunk.batch, ["logits@last"]).logits[:, -1].float().cpu()
        probability = logits.softmax(-1)
        for i in range(len(chunk.batch)):
            best = int(logits[i].argmax())
            row = {
                "prompt": chunk.first + i,
                "answer": chunk.answers[i],
                "p_answer": float(probability[i, good[i]]),
                "rank": int((logits[i] > logits[i, good[i]]).sum()) + 1,
            }
            if bad is not None and chunk.wrong is not None:
                row |= {"wrong": chunk.wrong[i], "p_wrong": float(probability[i, bad[i]])}
                row["logit_difference"] = float(logits[i, good[i]] - logits[i, bad[i]])
            row |= {"top_token": tokenizer.decode([best]) if tokenizer else str(best)}
            rows.append(row | {"p_top": float(probability[i, best])})
        done()
    return pd.DataFrame(rows)
