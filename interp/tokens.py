"""`TokenScores`: one number for each pair of a target position and a source token or image patch."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.errors import InputError, SettingsError, UnknownNameError
from interp.patches import Patches
from interp.results import Scores, checked, describe, jsonable, register

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_KINDS = ("image", "special", "text")
_PATCHES = ("sample", "column", "image", "box", "row", "col")
_BOX = ("left", "top", "right", "bottom")


@register
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class TokenScores(Scores):
    """How much each source token mattered for each target position.

    Numbers are kept on the CPU in float32, or float64 where they came so; they are NaN on padding and fillers. Columns
    are those of the padded stream, as in a `Trace`; `frame` and `top` count a sample's own tokens instead, as reads do,
    so that padding changes nothing in them.

    Attributes:
        scores: the scores [batch, target, source], in `unit`.
        targets: the column of each target position [batch, target]; -1 is a filler (samples with fewer targets).
        source_mask: the real columns of the source stream [batch, source].
        tokens: for each sample, the text of each source column.
        target_tokens: for each sample, the text of each target.
        name: the method, such as `rollout`.
        unit: what the scores are measured in; empty for a plain number.
        settings: what they were computed with: anything that json can hold.
        spans: columns by name, each [batch, source]: `image`, `text` (all others), `special` (a part of `text`).
        patches: which pixels each image token stands for.
        tower: the tower of the sources.
        target_tower: the tower of the targets; the sources' one when not given.
        target_mask: the real columns of the targets' stream [batch, pos]; the sources' when not given.
        caveat: what a reader has to know before believing the scores; empty when there is nothing.

    Raises:
        InputError: a tensor has the wrong shape or type, or the texts do not fit.
        NonFiniteError: NaN or infinity at a real pair; the message gives the first place.
        SettingsError: something in `settings` cannot be written as json.
    """

    scores: Float[Tensor, "batch target source"]
    targets: Int[Tensor, "batch target"]
    source_mask: Bool[Tensor, "batch source"]
    tokens: Sequence[Sequence[str]]
    target_tokens: Sequence[Sequence[str]]
    name: str
    unit: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    spans: Mapping[str, Bool[Tensor, "batch source"]] = field(default_factory=dict)
    patches: Patches | None = None
    tower: str = "text"
    target_tower: str | None = None
    target_mask: Bool[Tensor, "batch pos"] | None = None
    caveat: str = ""

    def __post_init__(self):
        if not self.name:
            raise InputError("scores need the name of the method that made them.")
        if self.scores.ndim != 3 or not self.scores.numel():
            found = describe(self.scores)
            raise InputError(f"scores are [batch, target, source] with at least one of each, found {found}.")
        sizes: dict[str, int] = dict(zip(("sample", "target", "source"), self.scores.shape, strict=True))
        size, count, width = self.scores.shape
        keep: dict[str, Any] = {"source_mask": _bools("source_mask", self.source_mask, (size, width))}
        there = keep["source_mask"] if self.target_mask is None else self.target_mask.detach().cpu()
        there = _bools("target_mask", there, (size, there.shape[-1]))
        targets = self.targets.detach().cpu()
        if targets.shape != (size, count) or targets.dtype not in (torch.int32, torch.int64):
            raise InputError(f"targets must be ints [batch {size}, target {count}], found {describe(targets)}.")
        real = targets >= 0
        wrong = real & ~_at(there, targets)
        if not real.any() or (targets >= there.shape[1]).any() or wrong.any():
            raise InputError("targets must be columns of real tokens (-1 for fillers), at least one of them.")
        keep |= {"targets": targets.long(), "target_mask": None if self.target_mask is None else there}
        keep["scores"] = checked("scores", self.scores, sizes, real[:, :, None] & keep["source_mask"][:, None])
        keep["tokens"] = _texts("tokens", self.tokens, (size, width))
        keep["target_tokens"] = _texts("target_tokens", self.target_tokens, (size, count))
        spans = {name: _bools(f"span {name!r}", span, (size, width)) for name, span in self.spans.items()}
        keep["spans"] = {name: span & keep["source_mask"] for name, span in spans.items()}
        keep["settings"] = jsonable(self.settings, "settings")
        if self.patches is not None:
            inside = (self.patches.sample < size) & (self.patches.column < width)
            if len(self.patches.sizes) != size or not inside.all():
                raise InputError(f"the patch map does not fit {size} samples of {width} columns: {self.patches}.")
        for key, value in keep.items():
            object.__setattr__(self, key, value)

    def __len__(self) -> int:
        """Number of samples."""
        return self.scores.shape[0]

    def _tensors(self) -> dict[str, Tensor]:
        own = {"scores": self.scores, "targets": self.targets, "source_mask": self.source_mask}
        own |= {} if self.target_mask is None else {"target_mask": self.target_mask}
        own |= {f"spans.{name}": span for name, span in self.spans.items()}
        return own | {f"patches.{n}": getattr(self.patches, n) for n in _PATCHES if self.patches is not None}

    def _fields(self) -> dict[str, Any]:
        map_ = None if self.patches is None else {"kind": list(self.patches.kind), "sizes": self.patches.sizes}
        plain = ("name", "unit", "tower", "target_tower", "caveat", "tokens", "target_tokens", "settings")
        return {**{n: getattr(self, n) for n in plain}, "spans": list(self.spans), "patches": jsonable(map_, "patches")}

    @classmethod
    def _restore(cls, tensors: dict[str, Tensor], fields: dict[str, Any]) -> TokenScores:
        fields["spans"] = {name: tensors.pop(f"spans.{name}") for name in fields["spans"]}
        if (found := fields["patches"]) is not None:
            sizes = tuple(tuple((w, h) for w, h in row) for row in found["sizes"])
            rows = {n: tensors.pop(f"patches.{n}") for n in _PATCHES}
            fields["patches"] = Patches(**rows, kind=tuple(found["kind"]), sizes=sizes)
        return cls(**tensors, **fields)

    def frame(self) -> pd.DataFrame:
        """A tidy pandas frame, one row for each sample, target and source, padding left out.

        Columns: `prompt`; `target` and `target_token`; `source`, `token` and its `kind` (`image`, `special` or
        `text`); `score`; and `rank` within the target (1 for the largest; equal scores in the order of sources).
        Targets and sources are counted in a sample's own tokens. With a patch map also `image`, `left`, `top`,
        `right` and `bottom` in pixels (missing for other tokens).
        """
        import pandas as pd

        valid = (self.targets >= 0)[:, :, None] & self.source_mask[:, None]
        sample, target, source = (x.numpy() for x in valid.nonzero(as_tuple=True))
        own, theirs = _own(self.source_mask), _own(self._target_mask())
        columns = self.targets[sample, target].numpy()
        score = self.scores[sample, target, source].numpy()
        frame = pd.DataFrame(
            {
                "prompt": sample,
                "target": theirs[sample, columns],
                "target_token": [self.target_tokens[b][t] for b, t in zip(sample, target, strict=True)],
                "source": own[sample, source],
                "token": [self.tokens[b][c] for b, c in zip(sample, source, strict=True)],
                "kind": self._kinds()[sample, source],
                "score": score,
            }
        )
        order = np.lexsort((source, -score, target, sample))
        frame["rank"] = 0
        starts = np.r_[0, np.flatnonzero(np.diff(sample) | np.diff(target)) + 1]
        first = np.repeat(starts, np.diff(np.r_[starts, len(sample)]))
        frame.loc[order, "rank"] = np.arange(len(order)) - first + 1
        if self.patches is not None:
            place = np.full(self.source_mask.shape, -1)
            place[self.patches.sample, self.patches.column] = np.arange(len(self.patches))
            found = place[sample, source]
            image, box = np.r_[self.patches.image, 0], np.r_[self.patches.box, np.full((1, 4), np.nan)]  # -1: none
            frame["image"] = pd.array(image[found], dtype="Int64")
            frame.loc[found < 0, "image"] = pd.NA
            for i, side in enumerate(_BOX):
                frame[side] = box[found, i]
        return frame

    def top(self, k: int = 10, prompt: int = 0, target: int = -1) -> pd.DataFrame:
        """The `k` sources with the largest scores (all where there are fewer), best first.

        Args:
            k: how many, at least 1.
            prompt: which sample.
            target: which of its targets, along the target axis; negative ones count from the sample's last.

        Returns:
            The columns of `frame` about the source, `rank` first.

        Raises:
            SettingsError: `k` is not a whole number of at least 1.
            UnknownNameError: there is no such sample or target.
        """
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise SettingsError(f"k is a whole number of at least 1, found {k!r}.")
        frame = self._one(prompt, target).frame().sort_values("rank", ignore_index=True).head(k)
        first = ["rank", "source", "token", "kind", "score"]
        return frame.loc[:, first + [c for c in ("image", *_BOX) if c in frame]]

    def image_map(self, prompt: int = 0, target: int = -1, image: int = 0) -> Float[Tensor, "height width"]:
        """The scores of one picture at pixel resolution.

        Each pixel has the score of the patch whose box holds its centre; where several do, of the smallest. Patches
        of the thumbnail count only where no tile lies; row breaks and tokens that look at the whole picture have no
        place of their own and are left out. Pixels that no patch holds are NaN.

        Raises:
            UnknownNameError: there is no such sample, target or image.
            InputError: there is no patch map, or no token of the picture has a place.
        """
        one = self._one(prompt, target)
        if one.patches is None:
            raise InputError(f"these {self.name} scores have no patch map: no image tokens stand among the sources.")
        sizes = one.patches.sizes[0]
        if not 0 <= image < len(sizes):
            raise UnknownNameError(f"image {image} does not exist: sample {prompt} has {len(sizes)}.")
        placed = [k in ("patch", "tile", "thumbnail") for k in one.patches.kind]
        rows = one.patches.where((one.patches.image == image) & torch.tensor(placed, dtype=torch.bool))
        if not len(rows):
            kinds = ", ".join(sorted(set(one.patches.kind)))
            raise InputError(f"no token of image {image} has a place of its own; their kinds: {kinds}.")
        width, height = sizes[image]
        canvas = torch.full((height, width), torch.nan, dtype=self.scores.dtype)
        # The pixels whose centres lie in a box; the largest are painted first.
        left, top, right, bottom = (rows.box - 0.5).ceil().long().clamp_min(0).unbind(1)
        area = (rows.box[:, 2] - rows.box[:, 0]) * (rows.box[:, 3] - rows.box[:, 1])
        thumbnail = np.array([k == "thumbnail" for k in rows.kind])
        values = one.scores[0, 0, rows.column]
        for i in np.lexsort((-area.numpy(), ~thumbnail)):
            canvas[top[i] : bottom[i], left[i] : right[i]] = values[i]
        return canvas

    def plot(
        self,
        prompt: int = 0,
        target: int = -1,
        picture: Any = None,
        *,
        image: int = 0,
        largest: float | None = None,
        title: str | None = None,
    ) -> go.Figure:
        """The prompt as coloured text, and a heat map over the picture where there are image tokens.

        Args:
            prompt: which sample.
            target: which of its targets, along the target axis; negative ones count from the sample's last.
            picture: what lies beneath the heat map: a PIL image or an array, of the size of the patch map.
            image: which image of the sample.
            largest: the score with the darkest colour in the text. None takes the largest one, special tokens and the
                sample's first token left aside: attention rests there without reading them, and all else would be pale.
            title: None writes the method, the model and the target.

        Raises:
            UnknownNameError: there is no such sample, target or image.
            InputError: the picture has another size than the patch map, or no patch has a place.
        """
        from interp.token_figures import token_figure

        one = self._one(prompt, target)
        has_map = one.patches is not None and bool((one.patches.image == image).any())
        grid = one.image_map(image=image).numpy() if has_map or picture is not None else None
        title = f"{self._title()} → {one.target_tokens[0][0]}" if title is None else title
        values = one.scores[0, 0].numpy()
        kinds = one._kinds()[0]
        return token_figure(
            one.tokens[0], values, kinds, title=title, unit=self.unit, largest=largest, grid=grid, picture=picture
        )

    def select(self, prompt: int) -> TokenScores:
        """One sample alone, without its padding and its fillers.

        Raises:
            UnknownNameError: there is no such sample.
            InputError: the sample has no target.
        """
        i = self._sample(prompt)
        keep, real = self.source_mask[i], self.targets[i] >= 0
        if not real.any():
            raise InputError(f"sample {i} has no target.")
        there = self._target_mask()[i]
        columns = keep.nonzero()[:, 0].tolist()
        return replace(
            self,
            scores=self.scores[i : i + 1, real][:, :, keep],
            targets=torch.from_numpy(_own(there[None]))[:, self.targets[i, real]],
            source_mask=keep[None, keep],
            tokens=[[self.tokens[i][c] for c in columns]],
            target_tokens=[[t for t, r in zip(self.target_tokens[i], real.tolist(), strict=True) if r]],
            spans={name: span[i : i + 1, keep] for name, span in self.spans.items()},
            patches=None if self.patches is None else self.patches.sample_alone(i, columns),
            target_mask=None if self.target_mask is None else there[None, there],
        )

    def normalised(self) -> TokenScores:
        """The same with every target's row divided by the sum of its sizes, so that shares of rows can be compared.

        Raises:
            InputError: a row is all zero.
        """
        total = self.scores.abs().nansum(-1, keepdim=True)
        empty = (total[..., 0] == 0) & (self.targets >= 0)
        if empty.any():
            row, target = empty.nonzero()[0].tolist()
            raise InputError(f"target {target} of sample {row} has no score other than zero: it has no shares.")
        return replace(self, scores=self.scores / total.masked_fill(total == 0, 1), unit="share")

    def __repr__(self) -> str:
        size, count, width = self.scores.shape
        many = f"{size} samples, {count} targets x {width} sources"
        note = f"; caveat: {self.caveat}" if self.caveat else ""
        return f"TokenScores({self._title()}: {many}{note})"

    def _repr_html_(self) -> str:
        from interp.palette import thumbnail
        from interp.token_figures import token_html

        sample = int((self.targets >= 0).any(1).nonzero()[0, 0])
        one = self._one(sample, -1)
        body = token_html(one.tokens[0], one.scores[0, 0].numpy(), one._kinds()[0])
        size, count, width = self.scores.shape
        target = html.escape(one.target_tokens[0][0])
        head = f"{size} samples, {count} targets &times; {width} sources; shown: sample {sample}, target {target}"
        note = f"<p><i>{html.escape(self.caveat)}</i></p>" if self.caveat else ""
        if one.patches is not None and any(k in ("patch", "tile") for k in one.patches.kind):
            grid = one.image_map(image=int(one.patches.image[0]))
            step = max(1, max(grid.shape) // 256)
            look = "height:160px;image-rendering:pixelated;border:1px solid #8888;max-width:none"
            body = f"<img alt='heat map over the picture' src='{thumbnail(grid[::step, ::step])}' style='{look}'>{body}"
        return f"<div><p><b>{html.escape(self._title())}</b><br>{head}</p>{note}{body}</div>"

    def _title(self) -> str:
        towers = dict.fromkeys([self.target_tower or self.tower, self.tower])
        where = [] if list(towers) == ["text"] else [" to ".join(towers)]
        model = self.settings.get("model")
        return " · ".join([self.name, *where, *([str(model)] if model else [])])

    def _target_mask(self) -> Tensor:
        return self.source_mask if self.target_mask is None else self.target_mask

    def _kinds(self) -> np.ndarray:
        kinds = np.full(self.source_mask.shape, "text", dtype=object)
        for name in reversed(_KINDS):
            if name in self.spans:
                kinds[self.spans[name].numpy()] = name
        return kinds

    def _sample(self, prompt: int) -> int:
        if not -len(self) <= prompt < len(self):
            raise UnknownNameError(f"sample {prompt} does not exist: there are {len(self)} (0 to {len(self) - 1}).")
        return prompt % len(self)

    def _one(self, prompt: int, target: int) -> TokenScores:
        """One sample and one target."""
        one = self.select(prompt)
        count = one.scores.shape[1]
        if not -count <= target < count:
            raise UnknownNameError(
                f"target {target} does not exist: sample {prompt} has {count} targets (0 to {count - 1})."
            )
        at = slice(target % count, target % count + 1)
        texts = [one.target_tokens[0][at]]
        return replace(one, scores=one.scores[:, at], targets=one.targets[:, at], target_tokens=texts)


def _bools(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    kept = tensor.detach().cpu()
    if kept.dtype != torch.bool or tuple(kept.shape) != shape:
        raise InputError(f"{name} must be bools of shape {list(shape)}, found {describe(kept)}.")
    if name.endswith("mask") and not kept.any(1).all():
        raise InputError(f"sample {int((~kept.any(1)).nonzero()[0])} is empty: its {name} is all False.")
    return kept.clone()


def _texts(name: str, rows: Sequence[Sequence[str]], shape: tuple[int, int]) -> list[list[str]]:
    kept = [list(row) for row in rows]
    if [len(row) for row in kept] != [shape[1]] * shape[0] or not all(isinstance(t, str) for r in kept for t in r):
        found = [len(row) for row in kept]
        raise InputError(f"{name} must be {shape[0]} rows of {shape[1]} texts, found rows of {found}.")
    return kept


def _at(mask: Tensor, columns: Tensor) -> Tensor:
    return mask.gather(1, columns.clamp(0, mask.shape[1] - 1).long())


def _own(mask: Tensor) -> np.ndarray:
    """The number of each real column among its sample's real ones."""
    return (mask.long().cumsum(1) - 1).numpy()
