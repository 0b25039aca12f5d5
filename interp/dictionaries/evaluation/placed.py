"""Activations and latents of one token in each of many prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from interp.batch import Batch
from interp.dictionaries.activations.stream import resolve
from interp.dictionaries.base import Dictionary
from interp.dictionaries.evaluation.applied import in_use, pieces
from interp.errors import InputError, SettingsError
from interp.lens import Lens

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Place = tuple[int, int]


def at_places(
    dictionary: Dictionary, lens: Lens, prompts: Sequence[str], places: Sequence[Place], *, read: str, batch: int
) -> tuple[np.ndarray, csr_array, list[list[int]]]:
    """Activations and latents of the last token of a part of each prompt.

    Args:
        dictionary: whose latents.
        lens: the model.
        prompts: texts.
        places: for each prompt the (start, end) characters of the part.
        read: what the dictionary reads.
        batch: prompts in one run.

    Returns:
        Activations [prompt, d_in] in float64, latents [prompt, d_sae] in float32, and the tokens of each part.

    Raises:
        InputError: the site has another width than the dictionary, a part has no token, or there are no offsets.
        SettingsError: the read is no single site.
    """
    from scipy.sparse import csr_array, vstack

    (site, *more), _ = resolve(lens, read)
    if more:
        raise SettingsError(f"{read} is no single site: name one layer, such as 'resid_post.10'.")
    dense, sparse, tokens = [], [], []
    with in_use(dictionary):
        for start in range(0, len(prompts), batch):
            chunk = slice(start, start + batch)
            made = lens.prepare(list(prompts[chunk]), padding_side="right")
            columns = _columns(made, places[chunk], start)
            ids = made.inputs["input_ids"]
            tokens += [ids[i, cs].tolist() for i, cs in enumerate(columns)]
            where = torch.zeros_like(made.mask)
            where[range(len(columns)), [cs[-1] for cs in columns]] = True
            (value,) = lens.run(made, site.but(positions=where)).values.values()
            x = value.flatten(2)[:, 0]
            if x.shape[-1] != dictionary.cfg.d_in:
                raise InputError(f"{site} is {x.shape[-1]} wide, but the dictionary has d_in={dictionary.cfg.d_in}.")
            dense.append(x.double().cpu().numpy())
            for _, latents, _ in pieces(dictionary, x.to(dictionary.W_dec.device)):
                sparse.append(csr_array(latents.float().cpu().numpy()))
    return np.concatenate(dense), csr_array(vstack(sparse)), tokens


def _columns(batch: Batch, places: Sequence[Place], first: int) -> list[list[int]]:
    if batch.offsets is None:
        raise InputError("the tokens of a part of a prompt are found by offsets, which need a fast tokenizer.")
    real, found = batch.mask.tolist(), []
    for i, (low, high) in enumerate(places):
        spans = batch.offsets[i]
        mine = [c for c, (a, b) in enumerate(spans) if real[i][c] and a < high and b > low and b > a]
        if not mine:
            raise InputError(f"prompt {first + i} has no token at characters {low} to {high}.")
        found.append(mine)
    return found


def difference(latents: csr_array, y: np.ndarray) -> np.ndarray:
    """Mean of the positive minus mean of the negative rows, for each column."""
    return (y / y.sum() - ~y / (~y).sum()) @ latents


def columns_of(latents: csr_array, columns: Sequence[int] | np.ndarray) -> np.ndarray:
    """Some columns, dense, float64 [row, column]."""
    return latents[:, np.asarray(columns)].toarray().astype(np.float64)
