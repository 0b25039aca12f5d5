"""Recovery rates at the last token, by which representation injection chooses its layers.

A question after an object, "is there a dog in the image ?", is asked about a scene (clean) and about the same scene
without the object. In the second run what one layer's attention (or MLP) writes at the last token is replaced by what
it writes in the first. With P the mean of p(yes) over the questions,

    RR = (P_patched - P_removed) / (P_clean - P_removed)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

import interp
from experiments.records import Row
from experiments.steering.scored import RESAMPLES, batches, interval
from interp.data import scenes
from interp.evaluation import image_prompt, recovery_rates
from interp.evaluation.intervals import draws
from interp.evaluation.recovery import SITES


@dataclass(frozen=True, slots=True, eq=False)
class Recovery:
    """p(yes) of every question: of the scene [question], without its object, and patched [site, layer, question]."""

    clean: np.ndarray
    removed: np.ndarray
    patched: np.ndarray

    @property
    def rates(self) -> np.ndarray:
        """RR, a ratio of means [site, layer]."""
        return ratio(self.clean, self.removed, self.patched, np.ones((1, len(self.clean))))[0]

    def rows(self, seed: int = 0) -> list[Row]:
        """A row for each layer, with intervals over questions."""
        drawn = np.concatenate(list(draws([np.arange(len(self.clean))], RESAMPLES, seed)))
        found = ratio(self.clean, self.removed, self.patched, drawn)
        return [
            {"layer": layer}
            | {name: interval(self.rates[i : i + 1, layer], found[:, i, layer]) for i, name in enumerate(SITES)}
            for layer in range(self.patched.shape[1])
        ]


def ratio(clean: np.ndarray, removed: np.ndarray, patched: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """RR for each row of weights [draw, question]: [draw, site, layer]."""
    over = weights @ (clean - removed)
    return np.moveaxis((patched - removed) @ weights.T, -1, 0) / over[:, None, None]


def recovery(lens: interp.Lens, drawn: Sequence[scenes.Scene]) -> Recovery:
    """Ask after the first object of each scene, and patch every layer of both sites."""
    names = [scene.names[0] for scene in drawn]
    texts = [image_prompt(lens, scenes.existence(name)) for name in names]
    clean = batches(lens, list(zip(texts, drawn, strict=True)))
    without = [scene.without(name) for scene, name in zip(drawn, names, strict=True)]
    removed = batches(lens, list(zip(texts, without, strict=True)))
    found = recovery_rates(lens, zip(clean, removed, strict=True))
    return Recovery(found.clean.numpy(), found.without.numpy(), found.patched.numpy())
