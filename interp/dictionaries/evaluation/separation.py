"""Latents that tell entities a model knows from those it does not: separation scores.

Source: Ferrando et al. 2025, "Do I Know This Entity? Knowledge Awareness and Hallucinations in Language Models" (arXiv
2411.14257). At the last token of an entity's name, with f the share of entities in which a latent is active (above
`threshold`), for each type of entity (movies, songs, players, cities)

    s_known = f(known) - f(unknown)        s_unknown = -s_known

and a latent's score is the smallest over the types, so that only what separates all of them counts.

Beyond the paper: the best of thousands of latents is good on the entities it was chosen by. Scores are given on two
halves, one to choose on (`s_known`) and one that was held out (`s_known_held`); a permutation test shuffles known and
unknown within each type and takes the largest score of all latents, so that p is right for the best of them. And the
baseline that a latent has to beat: the difference of the means of the activations, as a direction with a threshold
halfway between (`kind` is `direction`).

What to know. Known and unknown entities differ in frequency, length and language. A latent may separate those: match
them, and see whether scores stay. What is known is the caller's to say (the paper: two or more attributes that the
model answers right, against none).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.dictionaries.base import Dictionary
from interp.dictionaries.evaluation.applied import site_of
from interp.dictionaries.evaluation.logistic import split
from interp.dictionaries.evaluation.placed import at_places
from interp.errors import InputError, SettingsError
from interp.lens import Lens

if TYPE_CHECKING:
    import pandas as pd
    from scipy.sparse import csr_array


def separation_scores(
    dictionary: Dictionary,
    lens: Lens,
    prompts: Sequence[str],
    entities: Sequence[str],
    known: Sequence[bool],
    types: Sequence[str],
    *,
    read: str | None = None,
    threshold: float = 1e-6,
    held_out: float = 0.5,
    permutations: int = 200,
    density: Any = None,
    most_dense: float = 0.02,
    batch: int = 16,
    seed: int = 0,
) -> pd.DataFrame:
    """How well each latent tells known from unknown entities, in every type.

    Args:
        dictionary: an SAE or a transcoder.
        lens: the model that it is for.
        prompts: texts that name an entity.
        entities: the name in each prompt; where it stands there several times the last one counts.
        known: whether the model knows the entity.
        types: the kind of each entity.
        read: what the dictionary reads; None for what its metadata says.
        threshold: a latent above it is active; take 0 for activations in bfloat16.
        held_out: share of each type's known and unknown entities that latents are not chosen on.
        permutations: how many shuffles make the null; 0 for none.
        density: share of the tokens of general text in which each latent is active [d_sae], such as
            `evaluate(...).density`; latents above `most_dense` are then left out.
        most_dense: see there; the paper's 2%.
        batch: prompts in one run.
        seed: of the split and the shuffles.

    Returns:
        A frame with a row for each latent, those first that separate best on the half they are chosen on: `kind`
        (`latent`, or `direction` for the baseline, which stands first), `latent` (-1 for the baseline), `s_known`,
        `s_unknown` (on that half), `s_known_held`, `s_unknown_held`, `p_known`, `p_unknown` (against the best latent of
        shuffled labels; NaN without), and `held: TYPE`, each type's held-out f(known) - f(unknown).

    Raises:
        InputError: lists of different lengths, a prompt without its entity, or a type with fewer than two known or
            unknown entities.
        SettingsError: an option is out of its range.
    """
    sizes = {len(prompts), len(entities), len(known), len(types)}
    if len(sizes) > 1 or not len(prompts):
        raise InputError(f"prompts, entities, known and types are of one length, found {sorted(sizes)}.")
    if not 0 < held_out < 1 or permutations < 0:
        raise SettingsError(f"0 < held_out < 1 and permutations >= 0, found {held_out} and {permutations}.")
    places = []
    for i, (prompt, entity) in enumerate(zip(prompts, entities, strict=True)):
        start = prompt.rfind(entity) if entity else -1
        if start < 0:
            raise InputError(f"prompt {i} does not hold its entity {entity!r}: {prompt[:80]!r}.")
        places.append((start, start + len(entity)))
    site = site_of(dictionary, read, read)[0]
    x, latents, _ = at_places(dictionary, lens, prompts, places, read=site, batch=batch)
    found = separations(
        x, latents, np.asarray(known, dtype=bool), np.asarray(types), threshold, held_out, permutations, seed
    )
    if density is None:
        return found
    dense, count = np.asarray(density, dtype=np.float64), dictionary.cfg.d_sae
    if dense.shape != (count,):
        raise InputError(f"density is [{count}], one number for each latent; found {list(dense.shape)}.")
    number = found["latent"].to_numpy()
    kept = np.flatnonzero((number < 0) | (dense[number] <= most_dense))
    return found.iloc[kept].reset_index(drop=True)


def separations(
    x: np.ndarray,
    latents: csr_array,
    known: np.ndarray,
    types: np.ndarray,
    threshold: float,
    held_out: float,
    permutations: int,
    seed: int,
) -> pd.DataFrame:
    """The same from activations [entity, d] and latents [entity, d_sae] that are there already."""
    import pandas as pd

    names = sorted(set(types.tolist()))
    for name in names:
        few = min((known & (types == name)).sum(), (~known & (types == name)).sum())
        if few < 2:
            raise InputError(f"type {name!r} needs two known and two unknown entities at least, found {few}.")
    random = np.random.default_rng(seed)
    held = split(np.array([f"{t} {k}" for t, k in zip(types, known, strict=True)]), held_out, random)
    active = latents.copy()
    active.data = (active.data > threshold).astype(np.float32)
    chosen, later = (_by_type(active, known, types, names, part) for part in (~held, held))
    shuffled = np.array([_shuffled(known, types, names, ~held, random) for _ in range(permutations)])
    null = _null(active, shuffled, types, names, ~held) if permutations else np.empty((2, 0))
    direction = _direction(x, known, ~held)[:, None]
    base = [_by_type(direction, known, types, names, part) for part in (~held, held)]
    frames = []
    for kind, (a, b), tested in (("direction", base, False), ("latent", (chosen, later), True)):
        scores = {"s_known": a.min(0), "s_unknown": (-a).min(0), "s_known_held": b.min(0)}
        scores["s_unknown_held"] = (-b).min(0)
        for name, best in (("known", null[0]), ("unknown", null[1])):
            least = (1 + (best[None] >= scores[f"s_{name}"][:, None] - 1e-9).sum(1)) / (1 + permutations)
            scores[f"p_{name}"] = least if tested and permutations else np.full(a.shape[1], np.nan)
        scores |= {f"held: {name}": b[i] for i, name in enumerate(names)}
        number = np.arange(a.shape[1]) if tested else np.array([-1])
        frame = pd.DataFrame({"kind": kind, "latent": number, **scores})
        best_of = frame[["s_known", "s_unknown"]].max(axis=1)
        frames.append(frame.iloc[np.argsort(-best_of.to_numpy(), kind="stable")])
    return pd.concat(frames, ignore_index=True)


def _weights(known: np.ndarray, types: np.ndarray, names: list[str], part: np.ndarray) -> np.ndarray:
    """What turns rows of activity into f(known) - f(unknown) [type, row]."""
    out = np.zeros((len(names), len(known)), dtype=np.float32)
    for i, name in enumerate(names):
        yes, no = (part & (types == name) & which for which in (known, ~known))
        out[i, yes], out[i, no] = 1 / yes.sum(), -1 / no.sum()
    return out


def _by_type(active: Any, known: np.ndarray, types: np.ndarray, names: list[str], part: np.ndarray) -> np.ndarray:
    """f(known) - f(unknown) [type, column] on a part of the rows."""
    return np.asarray(_weights(known, types, names, part) @ active)


def _shuffled(
    known: np.ndarray, types: np.ndarray, names: list[str], part: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    out = known.copy()
    for name in names:
        rows = np.flatnonzero(part & (types == name))
        out[rows] = known[random.permutation(rows)]
    return out


def _null(active: Any, shuffled: np.ndarray, types: np.ndarray, names: list[str], part: np.ndarray) -> np.ndarray:
    """The largest s_known and s_unknown of all latents, for each shuffle [2, permutation]."""
    out = np.empty((2, len(shuffled)))
    for i, known in enumerate(shuffled):
        found = _by_type(active, known, types, names, part)
        out[:, i] = found.min(0).max(), (-found).min(0).max()
    return out


def _direction(x: np.ndarray, known: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Whether each row lies on the known side of the difference of means, halfway between them [row]."""
    yes, no = x[part & known].mean(0), x[part & ~known].mean(0)
    return ((x - (yes + no) / 2) @ (yes - no) > 0).astype(np.float32)
