"""How far concept scores depend on the prompts: bootstrap intervals of `pursuit`.

A concept score is a ratio of variances of all prompts together, so no scores of single prompts can be resampled. Here
each resample draws whole prompts, and the mean that is taken away, the variance and its share in the span of the
keywords are computed anew. With z_i the output of a head for prompt i, W its part of the output projection, Q an
orthonormal basis of the keywords' rows, and w_i how often a resample of n prompts holds prompt i,

    score = (sum w_i |z_i W Q|^2 - |sum w_i z_i W Q|^2 / n) / (the same without Q)

without the second terms where the scores are not centred. What it does not see: the keywords are taken as given, and
the heads as chosen; intervals of the strongest of many heads are not widened for the choice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from interp.bootstrap import check_options, ends
from interp.edits import Heads
from interp.errors import InputError
from interp.heads.chosen import chosen_heads
from interp.heads.concepts import atoms_of, span_basis
from interp.heads.moments import Data, HeadReader, batches_of, head_weight, heads_by_layer
from interp.heads.resampled import shares
from interp.lens import Lens
from interp.reads import Read
from interp.scores import HeadScores

if TYPE_CHECKING:
    import pandas as pd
else:
    pd = Any


def pursuit_interval(
    lens: Lens,
    data: Data,
    scores: HeadScores,
    heads: Heads,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Bootstrap intervals over prompts of some heads' concept scores, by percentiles.

    Args:
        lens: the model.
        data: the prompts that the scores were computed on.
        scores: what `pursuit` returned.
        heads: (layer, head) pairs, or a frame such as `scores.top(20)`. Of each one vector of d_head numbers is kept
            for each prompt.
        confidence: between 0 and 1.
        resamples: how often the prompts are drawn anew.
        seed: seed of the draws.
        batch_size: how many prompts make a batch.

    Returns:
        A frame with a row for each head: `layer`, `head`, `score`, `low`, `high`.

    Raises:
        InputError: the scores are not of `pursuit`, the prompts are others than those of the scores, or a single one.
        EditError, UnknownNameError: heads of another model, or that do not exist.
        SettingsError: an option lies outside its range.
    """
    import pandas

    check_options(confidence, resamples, seed)
    if scores.settings.get("method") != "pursuit":
        raise InputError(f"intervals here are of concept scores from `pursuit`, found scores of {scores.name}.")
    asked = scores.settings
    atoms = atoms_of(lens, asked["apply_final_norm"])
    basis = span_basis(atoms[list(asked["ids"])])[0].double().cpu()
    by_layer, _ = heads_by_layer(lens, heads)
    reader = HeadReader(lens, by_layer, Read.of(f"z@{asked['positions']}").positions, asked["frozen_scale"])
    kept: dict[int, list[Tensor]] = {layer: [] for layer in by_layer}
    for batch in batches_of(lens, data, batch_size):
        for layer, part in reader(batch).items():
            kept[layer].append(part)
    outputs = {layer: torch.cat(parts) for layer, parts in kept.items()}
    count = len(next(iter(outputs.values())))
    if count != asked["prompts"]:
        raise InputError(f"the scores are of {asked['prompts']} prompts, but {count} were given.")
    if count < 2:
        raise InputError("an interval over prompts needs at least two prompts, found one.")
    rows = []
    for layer, head in chosen_heads(lens, heads)[0]:
        written = outputs[layer][:, by_layer[layer].index(head)] @ head_weight(lens, layer)[head].cpu().double()
        share = _shares(written.numpy(), (written @ basis).numpy(), asked["center"], resamples, seed)
        low, high = ends(share, confidence)
        score = float(scores.scores[layer, head])
        rows.append({"layer": layer, "head": head, "score": score, "low": float(low), "high": float(high)})
    return pandas.DataFrame(rows)


def _shares(written: np.ndarray, inside: np.ndarray, center: bool, resamples: int, seed: int) -> np.ndarray:
    """The score in every resample; 0 where nothing is left to explain."""
    found = []
    for weights in shares(len(written), resamples, seed):
        part, whole = (weights @ np.square(x).sum(1) for x in (inside, written))
        if center:
            part, whole = (v - np.square(weights @ x).sum(1) for v, x in ((part, inside), (whole, written)))
        found.append(np.divide(part, whole, out=np.zeros_like(part), where=whole > 0))
    return np.concatenate(found).clip(0.0, 1.0)
