"""Feature absorption: first letters that a dictionary's letter latents miss because other latents say them too.

Source: Chanin et al. 2024, "A is for Absorption: Studying Feature Splitting and Absorption in Sparse Autoencoders"
(arXiv 2409.14507), as in SAEBench (Karvonen et al. 2025, arXiv 2503.09532). Words of one token stand in a prompt that
asks for their first letter, and the activation at the word is read. For each letter

    p        the direction of a logistic regression on activations: this letter or another one
    splits   the latents that stand for the letter: of those that are active more with it, ranked by an L1 probe, the
             first, and each further one as long as it raises the F1 of a probe on them by `rise`
    c_j      f_j <W_dec_j, p>, what latent j writes along p; total = sum of all c_j

and over the held-out words with the letter, which the probe on activations finds,

    full       the share in which no split is active, and the other latent with the largest c_j has a decoder row with a
               cosine to p of at least 0.025 and at least 0.4 of the total
    fraction   the mean of A / (A + M): M what the splits write, A what up to three others with a cosine of at least 0.1
               write, if that is at least 0.4 of the total, else 0

Departures. Probes are fitted by L-BFGS, not in 50 epochs of Adam; splits are chosen on the training words, so that no
held-out word helps to choose; the L1 probe sees the `candidates` latents with the largest difference of means; all
probes weigh a letter and the others alike, so that one of few words is found at all. The examples in front of the word
are `shots` of the same words, set apart; a comma, not a line end, divides them, so that the word keeps its space.

What to know. Letters that the model itself does not know at this site (an F1 of the probe below `least_f1`) say nothing
and are left out; compare dictionaries on the same letters. See `single_token_words` for the words that are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.dictionaries.base import Dictionary
from interp.dictionaries.evaluation.applied import site_of
from interp.dictionaries.evaluation.letters import LETTERS, single_token_words
from interp.dictionaries.evaluation.logistic import Probe, f1, fit, fit_sparse, split
from interp.dictionaries.evaluation.placed import at_places, columns_of, difference
from interp.errors import InputError, SettingsError
from interp.lens import Lens

if TYPE_CHECKING:
    import pandas as pd
    from scipy.sparse import csr_array

FULL_COSINE, FULL_SHARE = 0.025, 0.4
PART_COSINE, PART_SHARE, PART_LATENTS = 0.1, 0.4, 3
SILENT = 1e-8
FEWEST = 5  # words with a letter among the training words, and among the held-out ones


def feature_absorption(
    dictionary: Dictionary,
    lens: Lens,
    *,
    read: str | None = None,
    words: Mapping[str, int] | None = None,
    template: str = "{word} has the first letter:",
    shots: int = 2,
    held_out: float = 0.2,
    k: int = 10,
    rise: float = 0.03,
    l1: float = 0.01,
    candidates: int = 100,
    least_f1: float = 0.6,
    batch: int = 64,
    seed: int = 0,
) -> pd.DataFrame:
    """How often first letters are absorbed, letter by letter.

    Args:
        dictionary: an SAE.
        lens: the model that it is for.
        read: what it reads; None for what its metadata says.
        words: words of one token with its id; None for 4,000 of `single_token_words`.
        template: the prompt, with {word}.
        shots: how many words with their answers stand in front.
        held_out: share of the words with each letter that is scored on.
        k: most latents that can stand for a letter.
        rise: by how much a further one has to raise F1.
        l1: weight of the penalty of the probe that ranks latents.
        candidates: how many latents it sees.
        least_f1: letters whose probe on activations has a lower F1 are left out.
        batch: prompts in one run.
        seed: of the split and of everything that is drawn.

    Returns:
        A frame with a row for each letter: `letter`, `words`, `probe_f1` (held out), `kept`, `latents` (its splits),
        `sparse_f1` (of a probe on them, held out), `found` (held-out words that the probe on activations finds),
        `full`, `fraction`, `absorbed` (the fully absorbed words with the latent that absorbs each). Letters that are
        not kept, for too few words or too low an F1, have NaN.

    Raises:
        SettingsError: a transcoder, a template without {word}, or an option out of its range.
        InputError: no words, fewer than shots need, or words that are not one token in the prompt.
    """
    if dictionary.transcodes:
        raise SettingsError("absorption compares decoder rows with a probe of what is read: it is for SAEs only.")
    if template.count("{word}") != 1:
        raise SettingsError(f"the template holds {{word}} once, found {template!r}.")
    if shots < 0 or k < 1 or candidates < k or not 0 < held_out < 1:
        found = f"{shots}, {k}, {candidates}, {held_out}"
        raise SettingsError(f"shots >= 0, k >= 1, candidates >= k, 0 < held_out < 1: found {found}.")
    site = site_of(dictionary, read, read)[0]
    known = dict(single_token_words(lens, most=4000, seed=seed) if words is None else words)
    strange = [word for word in known if not word or word[0].lower() not in LETTERS]
    if strange or len(known) <= shots:
        raise InputError(
            f"words begin with a letter a to z, and are more than the {shots} shots: {strange[:5] or known}."
        )
    random = np.random.default_rng(seed)
    shown = random.choice(sorted(known), shots, replace=False).tolist()
    rest = [word for word in known if word not in shown]
    prompts, places = _prompts(template, shown, rest)
    x, latents, tokens = at_places(dictionary, lens, prompts, places, read=site, batch=batch)
    # A tokenizer may merge a word with what stands beside it.
    fits = np.array([tokens[i] == [known[word]] for i, word in enumerate(rest)])
    if fits.mean() < 0.5:
        i = int((~fits).argmax())
        raise InputError(
            f"{(~fits).sum()} of {len(rest)} words are not their one token in the prompt, such as {rest[i]!r} in "
            f"{prompts[i]!r}: the template should have what their tokens have in front (a space)."
        )
    kept = [word for word, fine in zip(rest, fits, strict=True) if fine]
    decoder = dictionary.kind.decoder(dictionary).detach().double().cpu().numpy()
    options = {"held_out": held_out, "k": k, "rise": rise, "l1": l1, "candidates": candidates, "least_f1": least_f1}
    return absorption(kept, x[fits], latents[np.flatnonzero(fits)], decoder, random=random, **options)


def absorption(
    words: list[str],
    x: np.ndarray,
    latents: csr_array,
    decoder: np.ndarray,
    *,
    random: np.random.Generator,
    held_out: float,
    k: int,
    rise: float,
    l1: float,
    candidates: int,
    least_f1: float,
) -> pd.DataFrame:
    """The same from activations [word, d], latents [word, d_sae] and decoder rows [d_sae, d] that are there already."""
    import pandas as pd

    first = np.array([word[0].lower() for word in words])
    test = split(first, held_out, random)
    rows = []
    for letter in sorted(set(first)):
        y = first == letter
        row: dict[str, Any] = {"letter": letter, "words": int(y.sum()), "probe_f1": np.nan, "kept": False}
        row |= {"latents": [], "sparse_f1": np.nan, "found": 0, "full": np.nan, "fraction": np.nan, "absorbed": []}
        rows.append(row)
        if min((y & ~test).sum(), (y & test).sum(), (~y & ~test).sum(), (~y & test).sum()) < FEWEST:
            continue
        probe = fit(x[~test], y[~test], balanced=True)
        said = probe(x) > 0
        row["probe_f1"] = f1(said[test], y[test])
        if row["probe_f1"] < least_f1:
            continue
        splits = letter_latents(latents[np.flatnonzero(~test)], y[~test], k=k, rise=rise, l1=l1, candidates=candidates)
        if not splits:
            continue  # no latent is active more with the letter than without
        own = columns_of(latents, splits)
        sparse = fit(own[~test], y[~test], balanced=True)
        found = np.flatnonzero(test & y & said)
        full, fraction = _absorbed(latents[found], splits, decoder, probe)
        row |= {"kept": True, "latents": splits, "sparse_f1": f1(sparse(own[test]) > 0, y[test]), "found": len(found)}
        row |= {"full": float((full >= 0).mean()), "fraction": float(fraction.mean())} if len(found) else {}
        row["absorbed"] = [(words[i], int(j)) for i, j in zip(found, full, strict=True) if j >= 0]
    return pd.DataFrame(rows)


def letter_latents(latents: csr_array, y: np.ndarray, *, k: int, rise: float, l1: float, candidates: int) -> list[int]:
    """The latents that stand for a class, the first one first (`splits` in the module's text)."""
    gap = difference(latents, y)
    best = np.argsort(-gap, kind="stable")[:candidates]
    best = best[gap[best] > 0]
    if not len(best):
        return []
    weight = fit_sparse(columns_of(latents, best), y, l1=l1, balanced=True).weight
    # A scale-free order: what a probe adds per standard deviation of the latent.
    strength = np.abs(weight) * columns_of(latents, best).std(0)
    order = best[np.argsort(-strength, kind="stable")][:k]
    scores = []
    for count in range(1, len(order) + 1):
        own = columns_of(latents, order[:count])
        scores.append(f1(fit(own, y, balanced=True)(own) > 0, y))
        if count > 1 and scores[-1] - scores[-2] < rise:
            return order[: count - 1].tolist()
    return order.tolist()


def _absorbed(
    latents: csr_array, splits: list[int], decoder: np.ndarray, probe: Probe
) -> tuple[np.ndarray, np.ndarray]:
    """For each row the latent that absorbs it in full (-1 for none), and the absorbed fraction."""
    along = probe.weight / np.linalg.norm(probe.weight)
    write = decoder @ along
    cosine = write / np.maximum(np.linalg.norm(decoder, axis=1), 1e-12)
    full, fraction = np.full(len(latents.indptr) - 1, -1), np.zeros(len(latents.indptr) - 1)
    for i, (start, end) in enumerate(pairwise(latents.indptr)):
        place, value = latents.indices[start:end], latents.data[start:end].astype(np.float64)
        part = value * write[place]
        total, own = part.sum(), np.isin(place, splits)
        if total <= 0 or own.all():
            continue
        others, theirs = place[~own], part[~own]
        top = int(theirs.argmax())
        silent = not (np.abs(value[own]) >= SILENT).any()
        if silent and cosine[others[top]] >= FULL_COSINE and theirs[top] >= FULL_SHARE * total:
            full[i] = others[top]
        able = theirs[(cosine[others] >= PART_COSINE) & (theirs > 0)]
        absorbed = np.sort(able)[-PART_LATENTS:].sum()
        if absorbed >= PART_SHARE * total:
            fraction[i] = absorbed / (absorbed + max(part[own].sum(), 0.0))
    return full, fraction


def _prompts(template: str, shown: list[str], words: list[str]) -> tuple[list[str], list[tuple[int, int]]]:
    """Prompts, and where in each its word stands."""
    head, tail = template.split("{word}")
    front = "".join(f"{head}{word}{tail} {word[0].upper()}, " for word in shown) + head
    prompts = [f"{front}{word}{tail}" for word in words]
    return prompts, [(len(front), len(front) + len(word)) for word in words]
