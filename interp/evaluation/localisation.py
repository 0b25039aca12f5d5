"""Does a map of scores lie on the object? Pointing accuracy and overlap with exact masks.

Source: Zhang et al. 2016, "Top-down Neural Attention by Excitation Backprop" (arXiv 1608.00507), the pointing game;
Zhou et al. 2016, "Learning Deep Features for Discriminative Localization" (arXiv 1512.04150), thresholded maps; Otsu
1979, "A threshold selection method from gray-level histograms", for the threshold. With v the scores of a picture's
pixels (each has the score of its patch) and M the object's pixels,

    pointing = the share of the largest pixels that lie in M
    iou      = |{v >= t} and M| / |{v >= t} or M|,     t = otsu | a share of the range of v | as many pixels as M has

and without a threshold: the largest IoU that any threshold gives, the area under the ROC curve, and the average
precision, over the pixels of a picture.

Departures. The pointing game counts a hit within 15 pixels of the object; here masks are exact and nothing is added.
The pixels of one patch have one score: a patch that lies half in the object is half a hit, which is what a random pixel
among the largest would give on average. Otsu's threshold is exact, without a histogram.

What to know. Chance is not zero: a random pixel hits with the object's share of the picture (`chance`, `area`), which
is also the IoU of the whole picture, the least that `best_iou` can be, and the average precision of a random map;
chance is 0.5 for `auroc`. A patch is as fine as a map can be: against an object smaller than a patch no map has a large
IoU. Where the object lies says what a faithful map might show, not what the model used: see the deletion curves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import InputError, SettingsError, unknown
from interp.evaluation.compared import by_name
from interp.evaluation.intervals import auroc, check_options
from interp.evaluation.measured import Measured
from interp.results import checked, describe, jsonable, register
from interp.tokens import TokenScores

if TYPE_CHECKING:
    import pandas as pd

Threshold = Literal["otsu", "area"] | float


@register
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Localisation(Measured):
    """How well maps lie on objects. Made by `pointing` and `iou`.

    Each of the maps is a part, each of its numbers the mean over images.

    Attributes:
        kind: `pointing` or `iou`.
        names: the names of the maps.
        metrics: the names of the numbers.
        values: the numbers of each image [map, metric, image].
        settings: what they were computed with: anything that json can hold, with `seed` and `resamples`.

    Raises:
        InputError: shapes that do not fit together.
        NonFiniteError: NaN or infinity among the numbers.
        SettingsError: something in `settings` cannot be written as json.
    """

    kind: str
    names: tuple[str, ...]
    metrics: tuple[str, ...]
    values: Float[Tensor, "map metric image"]
    settings: Mapping[str, Any] = field(default_factory=dict)

    _along: ClassVar[dict[str, int]] = {"values": 2}
    _ragged: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.values.ndim != 3 or not self.values.numel():
            raise InputError(f"values are [map, metric, image] with at least one of each: {describe(self.values)}.")
        sizes = {"map": len(self.names), "metric": len(self.metrics), "image": self.values.shape[2]}
        keep: dict[str, Any] = {"values": checked("values", self.values, sizes)}
        keep |= {"names": tuple(self.names), "metrics": tuple(self.metrics)}
        keep["settings"] = jsonable(self.settings, "settings")
        for key, value in keep.items():
            object.__setattr__(self, key, value)

    def __len__(self) -> int:
        """Number of images."""
        return self.values.shape[2]

    def frame(self) -> pd.DataFrame:
        """A tidy pandas frame, one row for each map and image: `map`, `sample`, and a column for each number."""
        import pandas as pd

        name, sample = (x.ravel() for x in np.indices((len(self.names), len(self))))
        columns = {m: self.values[:, i].numpy().ravel() for i, m in enumerate(self.metrics)}
        return pd.DataFrame({"map": np.array(self.names, dtype=object)[name], "sample": sample, **columns})

    def _groups(self) -> list[np.ndarray]:
        return [np.arange(len(self))]

    def _compute(self, weights: np.ndarray) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
        means = np.einsum("di,nmi->nmd", weights, self.values.double().numpy()) / weights.sum(1)
        always = np.ones(len(weights), dtype=bool)
        return {
            (name, metric): (means[i, j], always)
            for i, name in enumerate(self.names)
            for j, metric in enumerate(self.metrics)
        }

    def _title(self) -> str:
        model = self.settings.get("model")
        return " · ".join([self.kind, *([str(model)] if model else []), f"{len(self)} images"])

    def _tensors(self) -> dict[str, Tensor]:
        return {"values": self.values}

    def _fields(self) -> dict[str, Any]:
        plain = {"kind": self.kind, "names": list(self.names), "metrics": list(self.metrics)}
        return plain | {"settings": self.settings}

    @classmethod
    def _restore(cls, tensors: dict[str, Tensor], fields: dict[str, Any]) -> Localisation:
        fields["names"], fields["metrics"] = tuple(fields["names"]), tuple(fields["metrics"])
        return cls(**tensors, **fields)


def pointing(
    scores: TokenScores | Mapping[str, TokenScores],
    masks: Sequence[Any] | Tensor,
    *,
    target: int = -1,
    image: int = 0,
    seed: int = 0,
    resamples: int = 1000,
) -> Localisation:
    """How often the largest score lies in the object.

    Args:
        scores: scores with image tokens or patches; or several by name.
        masks: for each sample where its object is, bools [height, width] of the size of `TokenScores.image_map`.
        target: which of a sample's targets, along the target axis; negative ones count from the sample's last.
        image: which image of each sample.
        seed: seed of the bootstrap over images.
        resamples: how often the images are drawn anew for an interval.

    Returns:
        `pointing`, `chance` (the object's share of the pixels that have a score) and `gain`, their difference.

    Raises:
        InputError: no patch map, scores of different batches, masks of another number or size, or a mask that is
            empty or full where the picture has scores.
        UnknownNameError: there is no such target or image.
        SettingsError: an option lies outside its range.
    """
    rows: list[list[tuple[float, ...]]] = []
    named = _checked(scores, seed, resamples)
    for one in named.values():
        rows.append([])
        for value, inside in _pictures(one, masks, target, image):
            hit, chance = float(inside[value == value.max()].mean()), float(inside.mean())
            rows[-1].append((hit, chance, hit - chance))
    settings = _settings("pointing", named, target=target, image=image, seed=seed, resamples=resamples)
    values = torch.tensor(rows, dtype=torch.float64).mT
    return Localisation("pointing", tuple(named), ("pointing", "chance", "gain"), values, settings)


def iou(
    scores: TokenScores | Mapping[str, TokenScores],
    masks: Sequence[Any] | Tensor,
    *,
    threshold: Threshold = "otsu",
    target: int = -1,
    image: int = 0,
    seed: int = 0,
    resamples: int = 1000,
) -> Localisation:
    """How well the largest scores and the object cover each other.

    Args:
        scores: scores with image tokens or patches; or several by name.
        masks: for each sample where its object is, bools [height, width] of the size of `TokenScores.image_map`.
        threshold: `otsu`, between the two classes that lie furthest apart; `area`, the highest that keeps as many
            pixels as the object has, or more where scores are equal; or the share, 0 to 1, of the way from the smallest
            to the largest score.
        target: which of a sample's targets, along the target axis; negative ones count from the sample's last.
        image: which image of each sample.
        seed: seed of the bootstrap over images.
        resamples: how often the images are drawn anew for an interval.

    Returns:
        `iou`; `kept`, the share of the pixels above the threshold; `area`, the object's share; `best_iou`, `auroc` and
        `average_precision`, which need no threshold.

    Raises:
        InputError: no patch map, scores of different batches, masks of another number or size, or a mask that is
            empty or full where the picture has scores.
        UnknownNameError: there is no such threshold, target or image.
        SettingsError: a share outside 0 to 1, or another option outside its range.
    """
    if isinstance(threshold, str) and threshold not in ("otsu", "area"):
        raise unknown("threshold", threshold, ("otsu", "area"))
    if not isinstance(threshold, str) and (isinstance(threshold, bool) or not 0 <= threshold <= 1):
        raise SettingsError(f"threshold is 'otsu', 'area' or a share from 0 to 1, found {threshold!r}.")
    named = _checked(scores, seed, resamples)
    rows = [[_overlap(*pair, threshold) for pair in _pictures(one, masks, target, image)] for one in named.values()]
    settings = _settings("iou", named, threshold=threshold, target=target, image=image, seed=seed, resamples=resamples)
    metrics = ("iou", "kept", "area", "best_iou", "auroc", "average_precision")
    return Localisation("iou", tuple(named), metrics, torch.tensor(rows, dtype=torch.float64).mT, settings)


def otsu(values: np.ndarray, counts: np.ndarray | None = None) -> float:
    """The value from which on numbers belong to the upper of two classes: those whose means lie furthest apart.

    Largest is (share of the one) (share of the other) (difference of their means)^2, which leaves the least variance
    within the classes. The first of equal thresholds; the value itself where there is only one.

    Args:
        values: numbers [n].
        counts: how often each stands there [n]; None for once.
    """
    level, back = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True)
    weight = np.bincount(back.ravel(), weights=None if counts is None else counts).astype(np.float64)
    if len(level) == 1:
        return float(level[0])
    below = weight.cumsum()[:-1]
    above = weight.sum() - below
    total = (weight * (level - level.mean())).cumsum()  # centred: small differences of large numbers stay exact
    lower, upper = total[:-1] / below, (total[-1] - total[:-1]) / above
    return float(level[1:][np.argmax(below * above * (upper - lower) ** 2)])


def _overlap(value: np.ndarray, inside: np.ndarray, threshold: Threshold) -> tuple[float, ...]:
    """The numbers of one picture, from its pixels' scores and whether they lie in the object."""
    level, back = np.unique(value, return_inverse=True)
    kept = np.bincount(back)[::-1].cumsum()  # pixels from each score on, the largest score first
    hits = np.bincount(back, weights=inside)[::-1].cumsum()
    overlap = hits / (kept + inside.sum() - hits)
    if threshold == "otsu":
        place = int((level >= otsu(level, np.bincount(back))).sum()) - 1
    elif threshold == "area":
        place = int(np.searchsorted(kept, inside.sum()))
    else:
        assert not isinstance(threshold, str)
        place = int((level - level[0] >= threshold * (level[-1] - level[0])).sum()) - 1
    precision = hits / kept
    average = float((np.diff(hits, prepend=0) * precision).sum() / inside.sum())
    area = float(auroc(value, inside, np.ones((1, len(value))))[0][0])
    share = float(kept[place] / len(value))
    return float(overlap[place]), share, float(inside.mean()), float(overlap.max()), area, average


def _pictures(
    scores: TokenScores, masks: Sequence[Any] | Tensor, target: int, image: int
) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """For each sample the pixels that have a score, and whether they lie in the object."""
    if len(masks) != len(scores):
        raise InputError(f"{len(masks)} masks were given for {len(scores)} samples.")
    for i, given in enumerate(masks):
        mask = given.detach().cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
        grid = scores.image_map(i, target, image).numpy()
        if mask.dtype != np.bool_ or mask.shape != grid.shape:
            raise InputError(
                f"mask {i} is {mask.dtype} {list(mask.shape)}; the picture of sample {i} needs bools "
                f"{list(grid.shape)} [height, width]."
            )
        known = ~np.isnan(grid)
        inside = mask[known]
        if not inside.any() or inside.all():
            which = "none" if not inside.any() else "all"
            raise InputError(f"mask {i} marks {which} of the pixels that have a score: there is nothing to find.")
        yield grid[known].astype(np.float64), inside


def _checked(scores: TokenScores | Mapping[str, TokenScores], seed: int, resamples: int) -> dict[str, TokenScores]:
    check_options(0.95, resamples, seed)
    return by_name(scores)


def _settings(method: str, named: Mapping[str, TokenScores], **own: Any) -> dict[str, Any]:
    model = next(iter(named.values())).settings.get("model")
    base = {"method": method} | ({} if model is None else {"model": model})
    return base | own | {"scores": {name: one.settings for name, one in named.items()}}
