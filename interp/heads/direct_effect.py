"""Direct logit attribution of heads.

Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Wang et al. 2023 (arXiv 2211.00593),
section 3.1. A head's contribution to the last residual stream, carried through the final norm with its scale frozen at
the full stream's, times the difference of two unembedding columns:

    effect(l, h) = (W_U[:, answer] - W_U[:, wrong]) . LN_frozen(result(l, h))

Summed over all heads, MLPs, biases and the embedding it is the logit difference itself. What is counted as a head's
contribution includes the family's post-norms, multipliers and LayerScale, which the original formula does not know.
Soft-capping of the logits (Gemma 2) is not linear: there the effect is on the logits before the cap.
"""

from __future__ import annotations

import torch

from interp.batch import Batch
from interp.errors import UnsupportedError
from interp.heads.common import Answers, head_grid, head_scores, settings_of, token_ids
from interp.lens import Lens
from interp.scores import HeadScores


def direct_effect(
    lens: Lens, batch: Batch, *, answers: Answers, wrong: Answers | None = None, normalize: bool = False
) -> HeadScores:
    """Each head's direct effect on the logit (difference) at the last position.

    Args:
        lens: a model whose head is a final norm and a projection.
        batch: prompts.
        answers: for each prompt the right next token, as a string of one token or an id.
        wrong: for each prompt a wrong one; the effect is then on the difference.
        normalize: whether to give shares of the whole logit difference (of the part that is linear in the stream).

    Returns:
        Scores [layer, head] in logits, the mean over prompts, with `per_prompt`.

    Raises:
        UnsupportedError: the head, or the final norm, is of another form.
        InputError: answers that are not one token, or not one for each prompt.
    """
    good = token_ids(lens, answers, len(batch))
    bad = None if wrong is None else token_ids(lens, wrong, len(batch), "wrong")
    layers, _, valid = head_grid(lens, site="result")
    last = len(lens.anatomy.towers[lens.anatomy.main].layers) - 1
    trace = lens.run(batch, [f"result.{','.join(map(str, layers))}@last", f"resid_post.{last}@last"])
    stream = trace[f"resid_post.{last}@last", last][:, 0]
    head = lens.anatomy.unembed
    if head is None:
        raise UnsupportedError(f"{lens.name}: its head is not a final norm and one projection, so nothing is direct.")
    direction = head.direction(good) if bad is None else head.direction(good) - head.direction(bad)
    per_prompt = torch.zeros(len(batch), *valid.shape)
    for layer in layers:
        parts = trace["result", layer][:, 0]
        effect = head.linear(parts, stream) @ direction[..., None]
        per_prompt[:, layer, : parts.shape[1]] = effect[..., 0].cpu()
    unit = "logits"
    if normalize:
        whole = (head.linear(stream[:, None], stream)[:, 0] * direction).sum(-1).cpu()
        per_prompt, unit = per_prompt / whole[:, None, None], "share of the logit difference"
    settings = settings_of(lens, batch, method="direct_effect", answers=good.tolist(), normalize=normalize)
    settings["wrong"] = None if bad is None else bad.tolist()
    return head_scores("direct_effect", unit, per_prompt, valid, settings, lens.anatomy.main)
