"""How sources are taken away from what a model reads: what blank-out and the deletion curves share.

Any set of columns can be taken away in one run; the module's options are those of
[`blank_out`][interp.attribution.blank_out.blank_out], where they are explained.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.attribution.common import Stream, chosen_layers, fused_patterns, token_text
from interp.attribution.targets import Question, one_token
from interp.batch import Batch, padding_side
from interp.edits import Edit, splice
from interp.errors import InputError, SettingsError, UnsupportedError, unknown
from interp.inputs import pad_id, tokenizer_of
from interp.lens import Lens

Mode = Literal["replace", "mask", "drop"]
ImageMode = Literal["mask", "mean", "blur"]
MODES = ("replace", "mask", "drop")
IMAGE_MODES = ("mask", "mean", "blur")
_BY_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "position_ids", "inputs_embeds")


def check_modes(mode: str, image: str, token: str | int | None, sigma: float | None, batch_size: int) -> None:
    """Whether the options make sense, before anything is run.

    Raises:
        UnknownNameError: a mode does not exist.
        SettingsError: options that contradict each other or lie outside their range.
    """
    for kind, asked_mode, known in (("mode", mode, MODES), ("image mode", image, IMAGE_MODES)):
        if asked_mode not in known:
            raise unknown(kind, asked_mode, known)
    if token is not None and mode != "replace":
        raise SettingsError(f"token is for mode='replace', not for {mode!r}.")
    if sigma is not None and (image != "blur" or not sigma > 0):
        raise SettingsError(f"sigma={sigma!r} is for image='blur', and above zero.")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise SettingsError(f"batch_size is a whole number of at least 1, found {batch_size!r}.")


def source_tower(lens: Lens, tower: str | None, method: str) -> str:
    """The tower whose positions can be taken away: None for an encoder-decoder's encoder, or the main tower.

    Raises:
        UnknownNameError: there is no such tower.
        UnsupportedError: it is neither the main tower nor an encoder-decoder's encoder.
    """
    main = lens.anatomy.main
    double = main == "decoder" and "encoder" in lens.anatomy.towers
    name = lens.anatomy.tower(tower or ("encoder" if double else main))[0].name
    if name not in (("encoder", "decoder") if double else (main,)) or tower == "cross":
        allowed = "'encoder' and 'decoder'" if double else repr(main)
        raise UnsupportedError(f"{method} has its sources in {allowed} of {lens.name}, not in {tower!r}.")
    return name


def causal(lens: Lens, batch: Batch) -> bool:
    """Whether no head of any layer looks ahead in this batch: then later tokens change nothing but the rounding."""
    try:
        layers = chosen_layers(lens, None, None)
    except UnsupportedError:
        return False
    return not any(bool(p.triu(1).any()) for _, p in fused_patterns(lens, batch, layers, fusion="max"))


def waves(batch: Batch, count: int, batch_size: int) -> Iterator[tuple[Batch, slice]]:
    """Runs in which every sample stands `count` times in all: the rows of each, and which of the `count` they are."""
    plain = replace(batch, patches=None)
    together = max(1, batch_size // len(batch)) if plain.repeatable else 1
    for first in range(0, count, together):
        some = slice(first, min(first + together, count))
        copies = some.stop - first
        yield plain.repeat(copies) if copies > 1 else plain, some


class Blanked(NamedTuple):
    """What to run.

    Attributes:
        batch: the rows.
        edits: the edits of the run.
        columns: the targets' columns [rows, target], where they moved.
    """

    batch: Batch
    edits: list[Edit]
    columns: Int[Tensor, "rows target"] | None


@dataclass(eq=False)
class Blanks:
    """How sources are taken away; checked when it is made.

    Attributes:
        lens: the model.
        batch: the batch.
        asked: what is explained.
        sources: the stream of the sources, of a tower that `source_tower` allows.
        mode: what is done to text tokens.
        image: what is done to patches and image tokens.
        token: for `replace`, which token.
        sigma: for `blur`, in pixels.
        kinds: the columns [batch, pos] of `text` and of `image`; what cannot be done to them is refused.
        settings: what a result records.
    """

    lens: Lens
    batch: Batch
    asked: Question
    sources: Stream
    mode: Mode
    image: ImageMode
    token: str | int | None
    sigma: float | None
    kinds: dict[str, Bool[Tensor, "batch pos"]]
    settings: dict[str, Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what cannot be done, before anything is run."""
        tower = self.sources.tower
        self.kinds = {kind: columns for kind, columns in self.kinds.items() if bool(columns.any())}
        text = "mask" if tower == "vision" else self.mode
        self.how = {kind: self.image if kind == "image" else text for kind in self.kinds}
        self.settings |= self.how
        self.key = "decoder_input_ids" if tower == "decoder" else "input_ids"
        self._smear: Tensor | None = None
        hows = set(self.how.values())
        if hows & {"replace", "drop"}:
            ids = self.batch.inputs.get(self.key)
            if not isinstance(ids, Tensor) or ids.shape != self.sources.mask.shape:
                raise UnsupportedError(
                    f"mode={self.mode!r}: tower {tower!r} of {self.lens.name} reads no tokens; use mode='mask'."
                )
        if "replace" in hows:
            self.fill = _fill(self.lens, self.token, self.settings)
        if "mask" in hows:
            chosen_layers(self.lens, None, tower)
        if hows & {"mean", "blur"}:
            self.boxes = _pixel_boxes(self.lens, self.batch, self.sources, self.image)
            if self.image == "blur":
                # One width for all patches of a picture, which are of one size.
                longer = (self.boxes[..., 2:] - self.boxes[..., :2]).nan_to_num(0).amax().item()
                self.sigma = self.settings["sigma"] = longer / 2 if self.sigma is None else self.sigma

    def of(self, rows: Batch, gone: Bool[Tensor, "rows pos"]) -> Blanked:
        """What to run for rows that hold the batch once or several times, each without its own columns.

        Args:
            rows: the batch, repeated.
            gone: the columns to take away; those of no kind are left.
        """
        copies = len(rows) // len(self.batch)
        parts: dict[str, Tensor] = {}
        for kind, columns in self.kinds.items():
            how = self.how[kind]
            part = gone & columns.repeat(copies, 1)
            parts[how] = parts[how] | part if how in parts else part
        inputs = dict(rows.inputs)
        if "replace" in parts:
            ids = inputs[self.key]
            inputs[self.key] = ids.masked_fill(parts["replace"].to(ids.device), self.fill)
        for how in ("mean", "blur"):
            if how in parts:
                inputs["pixel_values"] = self._smeared(inputs["pixel_values"], parts[how], copies)
        rows, hidden, moved = replace(rows, inputs=inputs), parts.get("mask"), None
        if "drop" in parts and bool(parts["drop"].any()):
            rows, order = self._dropped(rows, parts["drop"])
            hidden = None if hidden is None else hidden.gather(1, order)
            if self.sources.tower == self.lens.anatomy.main and not self.asked.pooled:
                targets = self.asked.chosen.index.repeat(copies, 1)
                moved = (order[:, None] == targets[:, :, None]).int().argmax(-1)
        return Blanked(rows, [] if hidden is None or not bool(hidden.any()) else self._masked(hidden), moved)

    def _masked(self, hidden: Tensor) -> list[Edit]:
        def hide(scores: Tensor) -> Tensor:
            query, key = (torch.arange(n, device=scores.device) for n in scores.shape[2:])
            gone = hidden.to(scores.device)[:, None] & (query[:, None] != key)
            return scores.masked_fill(gone[:, None], -torch.inf)

        def hide_from_all(scores: Tensor) -> Tensor:
            return scores.masked_fill(hidden.to(scores.device)[:, None, None], -torch.inf)

        tower = self.sources.tower
        layers = chosen_layers(self.lens, None, tower)
        edits = splice(hide, site="scores", layers=layers, tower=tower)
        return edits + (splice(hide_from_all, site="scores", tower="cross") if tower == "encoder" else [])

    def _dropped(self, rows: Batch, gone: Tensor) -> tuple[Batch, Tensor]:
        """Rows without some of their columns, and the columns that stay, in order.

        Rows that lose more than others are filled up with padding, on the side where padding stands already.
        """
        tower, count, width = self.sources.tower, len(gone), gone.shape[1]
        least = int(gone.sum(1).min())
        left = padding_side(self.sources.mask) == "left"
        order = torch.argsort((~gone if left else gone).to(torch.int8), dim=1, stable=True)
        order = order[:, least:] if left else order[:, : width - least]
        filled = gone.gather(1, order)

        def rest(x: Tensor) -> Tensor:
            index = order.to(x.device).reshape(*order.shape, *[1] * (x.ndim - 2))
            return x.gather(1, index.expand(*order.shape, *x.shape[2:]))

        def real(mask: Tensor) -> Tensor:
            return rest(mask) & ~filled.to(mask.device)

        inputs = dict(rows.inputs)
        for name in (f"decoder_{n}" for n in _BY_TOKEN) if tower == "decoder" else _BY_TOKEN:
            if isinstance(value := inputs.get(name), Tensor):
                if value.shape[:2] != (count, width):
                    raise UnsupportedError(
                        f"mode='drop': {name} {tuple(value.shape)} has not one entry for each token."
                    )
                inputs[name] = rest(value)
        changes: dict[str, Any] = {"inputs": inputs, "texts": None, "tokens": None, "offsets": None}
        if bool(filled.any()):
            ids = inputs[self.key]
            inputs[self.key] = ids.masked_fill(filled.to(ids.device), pad_id(self.lens.model.config))
            name = self.key.replace("input_ids", "attention_mask")
            mask = inputs[name] if isinstance(inputs.get(name), Tensor) else rest(self._real(rows)).long()
            inputs[name] = mask.masked_fill(filled.to(mask.device), 0)
        if tower == "encoder":
            return replace(rows, **changes, source_mask=real(self._real(rows))), order
        image = rows.image_mask
        changes |= {"mask": real(rows.mask), "image_mask": None if image is None else real(image)}
        return replace(rows, **changes), order

    def _real(self, rows: Batch) -> Tensor:
        if self.sources.tower != "encoder":
            return rows.mask
        if rows.source_mask is not None:
            return rows.source_mask
        return torch.ones_like(rows.inputs[self.key], dtype=torch.bool)

    def _smeared(self, pixels: Tensor, gone: Tensor, copies: int) -> Tensor:
        if self._smear is None:
            plain = pixels[: len(self.batch)]
            if self.image == "mean":
                self._smear = plain.float().mean((-2, -1), keepdim=True).to(plain).expand_as(plain)
            else:
                assert self.sigma is not None
                self._smear = blurred(plain, self.sigma)
        used = gone.any(0)
        boxes = self.boxes[:, used].repeat(copies, 1, 1).to(pixels.device)
        height, width = pixels.shape[-2:]
        x = torch.arange(width, device=pixels.device) + 0.5
        y = torch.arange(height, device=pixels.device) + 0.5
        left, top, right, bottom = boxes[..., None].unbind(2)
        mine = gone[:, used, None].to(pixels.device)
        # A pixel goes if its row and its column lie in the box of any of the columns.
        tall = (mine & (y > top) & (y < bottom)).float()
        inside = tall.mT @ ((x > left) & (x < right)).float() > 0
        return torch.where(inside[:, None], self._smear.repeat(copies, 1, 1, 1), pixels)


def _fill(lens: Lens, token: str | int | None, settings: dict[str, Any]) -> int:
    """The id that replaces tokens; noted in `settings`."""
    tokenizer = tokenizer_of(lens.processor)
    if token is None:
        found = [getattr(tokenizer, f"{n}_token_id", None) for n in ("mask", "unk", "pad")]
        fill = next((i for i in found if i is not None), None)
        fill = pad_id(lens.model.config) if fill is None else fill
    elif isinstance(token, str):
        fill = one_token(lens, token, "token")
    else:
        table: Any = lens.model.get_input_embeddings()  # type: ignore[operator]
        top = table.weight.shape[0]
        if isinstance(token, bool) or not 0 <= token < top:
            raise InputError(f"token is {token}; the vocabulary has {top} (0 to {top - 1}).")
        fill = token
    settings["token"], settings["token_id"] = token_text(tokenizer, fill), fill
    return fill


def _pixel_boxes(lens: Lens, batch: Batch, sources: Stream, how: str) -> Float[Tensor, "batch pos 4"]:
    """Left, top, right, bottom of each image column in pixels of the picture that the model gets; NaN elsewhere.

    Raises:
        UnsupportedError: a picture is not one row of `pixel_values`, or its tokens are not its patches.
    """
    pixels, patches = batch.inputs.get("pixel_values"), sources.patches
    if not isinstance(pixels, Tensor) or pixels.ndim != 4 or len(pixels) != len(batch) or patches is None:
        found = "no patch map" if patches is None else "pixels that are not one picture for each sample"
        raise UnsupportedError(f"image={how!r}: {lens.name} has {found} here; use image='mask'.")
    if set(patches.kind) != {"patch"} or any(len(s) != 1 for s in patches.sizes):
        kinds = ", ".join(sorted(set(patches.kind)))
        raise UnsupportedError(
            f"image={how!r} is for one picture of patches for each sample, found {kinds}; use 'mask'."
        )
    boxes = torch.full((*sources.mask.shape, 4), torch.nan)
    if sources.tower == "vision":
        boxes[patches.sample, patches.column] = patches.box.float()
        return boxes
    # The patch map is of the picture that was given; the tokens' grid covers what the model was given of it.
    height, width = pixels.shape[-2:]
    for i in range(len(batch)):
        mine = patches.sample_rows(i)
        high, wide = height / (int(mine.row.max()) + 1), width / (int(mine.col.max()) + 1)
        box = torch.stack([mine.col * wide, mine.row * high, (mine.col + 1) * wide, (mine.row + 1) * high], 1)
        boxes[i, mine.column] = box.float()
    return boxes


def blurred(pixels: Float[Tensor, "n channel height width"], sigma: float) -> Float[Tensor, "n channel height width"]:
    """Pictures under a Gaussian of `sigma` pixels, cut at four sigma; what lies outside repeats the edge."""
    reach = max(1, round(4 * sigma))
    x = torch.arange(-reach, reach + 1, device=pixels.device, dtype=torch.float32)
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    size, channels, height, width = pixels.shape
    flat = pixels.float().reshape(size * channels, 1, height, width)
    flat = torch.nn.functional.pad(flat, (reach,) * 4, mode="replicate")
    flat = torch.nn.functional.conv2d(flat, kernel[None, None, None])
    flat = torch.nn.functional.conv2d(flat, kernel[None, None, :, None])
    return flat.reshape(pixels.shape).to(pixels)
