"""How much a few latents know of a label: k-sparse probing.

Sources: Gurnee et al. 2023, "Finding Neurons in a Haystack: Case Studies with Sparse Probing" (arXiv 2305.01610);
Karvonen et al. 2025, "SAEBench" (arXiv 2503.09532). Of texts with labels, latents pooled over a text's tokens, the k
latents with the largest |mean of the positive - mean of the negative texts| are taken, and a logistic regression is
fitted on them; both on the training texts alone. Its accuracy is that on the held-out ones.

Beside it: the same regression on all activations of the model (`dense`), which bounds what there is to find; the share
of the commoner class, which an empty probe reaches; and a null: latents chosen and probes fitted anew on shuffled
labels.

Departures from SAEBench. Texts, not tasks, are the caller's; classes are as large as they come, so compare with
`majority`; columns are brought to one scale before the penalised fit; L-BFGS, not scikit-learn.

What to know. An accuracy that one latent reaches shows that the label is aligned with a latent; one that many reach
together is no more than the model has anyway. The null's spread is that of one held-out set of this size: differences
within it mean nothing. Labels that hang together with length or topic are found as those.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.dictionaries.base import Dictionary
from interp.dictionaries.evaluation.applied import site_of
from interp.dictionaries.evaluation.logistic import fit, split
from interp.dictionaries.evaluation.pooled import Pool, pooled
from interp.errors import InputError, SettingsError
from interp.lens import Lens

if TYPE_CHECKING:
    import pandas as pd


def sparse_probing(
    dictionary: Dictionary,
    lens: Lens,
    texts: Sequence[str],
    labels: Sequence[Hashable],
    *,
    read: str | None = None,
    k: Sequence[int] = (1, 2, 5),
    pool: Pool = "max",
    held_out: float = 0.2,
    shuffles: int = 20,
    l2: float = 1.0,
    batch: int = 8,
    context: int = 256,
    special: str = "tokenizer",
    drop_first: bool = True,
    seed: int = 0,
) -> pd.DataFrame:
    """Accuracy of probes on the k best latents, against a dense probe and shuffled labels.

    Args:
        dictionary: an SAE or a transcoder.
        lens: the model that it is for.
        texts: what is labelled.
        labels: one for each text; with more than two classes each is set against the rest, with two the later one (in
            the order of their names) against the other.
        read: what the dictionary reads; None for what its metadata says.
        k: numbers of latents.
        pool: over the tokens of a text: `max`, `mean`, or the `last` one. The dense probe has the mean for `max`.
        held_out: share of each class that is scored on.
        shuffles: how often labels are shuffled for the null.
        l2: weight of the probes' penalty (sum of losses + l2/2 |w|^2).
        batch: texts in one run.
        context: tokens of a run; longer texts are cut, and pooled together again.
        special: tokens around each text (see `Packing`).
        drop_first: leave out the first position.
        seed: of the split and the shuffles.

    Returns:
        A frame with a row for each class and probe: `label`, `probe` (`latents` or `dense`), `k`, `accuracy` (held
        out), `train_accuracy`, `majority`, `null` and `null_high` (mean and 95th percentile with shuffled labels; NaN
        for `shuffles=0`), `latents` (their numbers, best first), `texts` (held out).

    Raises:
        InputError: texts and labels do not fit, there is one class, or one with fewer than two texts, or a text has no
            token to use.
        SettingsError: an option is out of its range.
    """
    if len(texts) != len(labels):
        raise InputError(f"{len(texts)} texts were given with {len(labels)} labels.")
    wrong = [n for n in k if not 1 <= n <= dictionary.cfg.d_sae]
    if wrong or not k:
        raise SettingsError(f"k are numbers of latents from 1 to {dictionary.cfg.d_sae}, found {list(k)}.")
    if not 0 < held_out < 1 or shuffles < 0 or l2 < 0:
        raise SettingsError(f"0 < held_out < 1, shuffles >= 0, l2 >= 0: found {held_out}, {shuffles}, {l2}.")
    names = sorted(set(labels), key=str)
    class_of = np.array([names.index(label) for label in labels])
    small = [str(name) for i, name in enumerate(names) if (class_of == i).sum() < 2]
    if len(names) < 2 or small:
        raise InputError(f"labels are of two or more classes of two or more texts each; too small: {small or names}.")
    site = site_of(dictionary, read, read)[0]
    options = {"batch": batch, "context": context, "special": special, "drop_first": drop_first}
    found = pooled(dictionary, lens, texts, read=site, pool=pool, **options)
    latents, dense = found.latents.double().numpy(), found.dense.double().numpy()
    random = np.random.default_rng(seed)
    test = split(class_of, held_out, random)
    orders = [random.permutation(len(texts)) for _ in range(shuffles)]
    rows = []
    for i in [1] if len(names) == 2 else range(len(names)):
        y = class_of == i
        for count in (*k, None):
            rows.append({"label": names[i]} | _probed(latents, dense, y, test, count, orders, l2))
    import pandas as pd

    return pd.DataFrame(rows)


def best_latents(latents: np.ndarray, y: np.ndarray, k: int) -> np.ndarray:
    """The k columns with the largest difference of means between the classes, best first."""
    gap = np.abs(latents[y].mean(0) - latents[~y].mean(0))
    return np.argsort(-gap, kind="stable")[:k]


def _probed(
    latents: np.ndarray,
    dense: np.ndarray,
    y: np.ndarray,
    test: np.ndarray,
    k: int | None,
    orders: Sequence[np.ndarray],
    l2: float,
) -> dict[str, Any]:
    def accuracy(labels: np.ndarray) -> tuple[float, float, list[int]]:
        columns = None if k is None else best_latents(latents[~test], labels[~test], k)
        x = dense if columns is None else latents[:, columns]
        right = (fit(x[~test], labels[~test], l2=l2)(x) > 0) == labels
        return float(right[test].mean()), float(right[~test].mean()), [] if columns is None else columns.tolist()

    held, train, chosen = accuracy(y)
    # A shuffle that leaves one class only in a part has nothing to fit.
    null = [accuracy(y[order])[0] for order in orders if 0 < y[order][~test].sum() < (~test).sum()]
    share = float(y[test].mean())
    return {
        "probe": "dense" if k is None else "latents",
        "k": dense.shape[1] if k is None else k,
        "accuracy": held,
        "train_accuracy": train,
        "majority": max(share, 1 - share),
        "null": float(np.mean(null)) if null else np.nan,
        "null_high": float(np.quantile(null, 0.95)) if null else np.nan,
        "latents": chosen,
        "texts": int(test.sum()),
    }
