"""Blank-out: what happens to the answer when one token, or one image patch, is taken away.

Source: Zeiler and Fergus 2014, "Visualizing and Understanding Convolutional Networks" (arXiv 1311.2901), section 4.2,
for pictures; Li, Monroe, Jurafsky 2016, "Understanding Neural Networks through Representation Erasure" (arXiv
1612.08220), and, as `blank-out`, Abnar and Zuidema 2020 (arXiv 2005.00928), section 5, for text. With y the answer's
number,

    score(j) = y(all) - y(without j)

so that a token that speaks for the answer has a positive score. What "without" means is chosen:

    replace   the token becomes the tokenizer's mask token, else its unknown, else its padding token
    mask      no other position may attend to the token, in any layer (its own position still does)
    drop      the prompt without the token; the positions close up behind it

and for patches and image tokens: `mask` as above; `mean`, the pixels become the picture's mean colour; `blur`, they
become those of the picture under a Gaussian (`sigma` pixels, half the box's longer side by default). Columns of a
vision tower that have no pixels of their own (class token, registers) are always masked.

What to know: under `mask`, and in a decoder, a target's own token has its score from its own position alone, so `mask`
gives it exactly zero; under `drop` the position to read from would be gone, and it is set to zero. Every mode makes an
input that the model did not see in training, each in another way: compare two.

Departures. Abnar and Zuidema replace by the unknown token and take the probability; both can be had (`token="[UNK]"`,
`measure="probability"`). Zeiler and Fergus slide a grey square; here a box is exactly what one token stands for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.attribution.common import (
    Stream,
    chosen_layers,
    fused_patterns,
    settings_of,
    stream_of,
    token_scores,
    token_text,
)
from interp.attribution.targets import MEASURES, Answers, Measure, Question, one_token, question
from interp.batch import Batch
from interp.edits import Edit, splice
from interp.errors import InputError, SettingsError, UnsupportedError, unknown
from interp.inputs import pad_id, tokenizer_of
from interp.lens import Lens
from interp.reads import Positions, Read
from interp.tokens import TokenScores

MODES = ("replace", "mask", "drop")
IMAGE_MODES = ("mask", "mean", "blur")
_BY_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "position_ids", "inputs_embeds")


@dataclass(frozen=True, slots=True, eq=False)
class _Wave:
    """One run: every sample `copies` times, one source of each row blanked.

    Attributes:
        batch: the rows.
        columns: the column blanked in each row [rows].
        copies: how often the batch stands in the rows.
        valid: rows that are wanted; the others are fillers [rows].
    """

    batch: Batch
    columns: Int[Tensor, " rows"]
    copies: int
    valid: Bool[Tensor, " rows"]


def blank_out(
    lens: Lens,
    batch: Batch,
    *,
    target: Positions | None = None,
    answers: Answers | None = None,
    wrong: Answers | None = None,
    mode: Literal["replace", "mask", "drop"] = "replace",
    image: Literal["mask", "mean", "blur"] = "mask",
    token: str | int | None = None,
    sigma: float | None = None,
    measure: Measure = "logit",
    tower: str | None = None,
    batch_size: int = 32,
) -> TokenScores:
    """The answer's number less the one without each source token. One forward pass for each token of each sample.

    All targets of a sample share them. The answers are those of the whole prompt, also where None chooses them.

    Args:
        lens: a model with logits.
        batch: prompts.
        target: positions as in a read, whose logits are explained; None for the last one (a classifier's logits belong
            to the whole input).
        answers: for each sample a text of one token or an id (a class for a classifier), or one for each target; None
            for the largest logit.
        wrong: the same; their number is subtracted.
        mode: what is done to text tokens.
        image: what is done to patches and image tokens.
        token: for `replace`, which token: its text or id; None takes the tokenizer's mask, unknown or padding token.
        sigma: for `blur`, in pixels of the picture that the model gets.
        measure: `logit`, `probability` or `logprob`.
        tower: where the sources stand: None for the main tower, or the encoder of an encoder-decoder.
        batch_size: how many rows a run may have; at least one for each sample.

    Returns:
        Scores [batch, target, source] with their sign, in units of the measure; a decoder's future tokens have exactly
        zero (zero within rounding in models whose layers have no patterns).

    Raises:
        UnknownNameError: a mode, measure, tower, position or class does not exist.
        SettingsError: options that contradict each other or lie outside their range.
        InputError: a position outside a sample, answers that do not fit, a token that is none, or `drop` or `mask`
            where nothing would be left.
        UnsupportedError: no logits; a mode that the tower cannot do.
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
    asked = question(lens, batch, target, answers, wrong, measure=measure)
    main = lens.anatomy.main
    double = main == "decoder" and "encoder" in lens.anatomy.towers
    name = lens.anatomy.tower(tower or ("encoder" if double else main))[0].name
    if name not in (("encoder", "decoder") if double else (main,)) or tower == "cross":
        allowed = "'encoder' and 'decoder'" if double else repr(main)
        raise UnsupportedError(f"blank_out has its sources in {allowed} of {lens.name}, not in {tower!r}.")
    sources = asked.stream if name == main else stream_of(lens, batch, name)
    last = not asked.pooled and (target is None or (isinstance(target, str) and target == "last"))
    read = Read("logits", positions="last") if last else Read("logits")
    pixels = sources.spans.get("image", torch.zeros_like(sources.mask))
    without = torch.zeros(*asked.chosen.index.shape, sources.mask.shape[1])
    settings: dict[str, Any] = {"tower": tower}
    for kind, columns in (("text", sources.mask & ~pixels), ("image", pixels)):
        if not bool(columns.any()):
            continue
        how = image if kind == "image" else "mask" if name == "vision" else mode
        settings[kind] = how
        blank = _Blank(lens, batch, asked, sources, name, how, token, sigma)
        settings |= blank.settings
        for wave in _waves(batch, columns, batch_size):
            rows, edits, places = blank.of(wave)
            values = asked.values(lens.run(rows, read, edits).logits, copies=wave.copies, columns=places).cpu()
            sample = torch.arange(len(batch)).repeat(wave.copies)[wave.valid]
            without[sample, :, wave.columns[wave.valid]] = values[wave.valid]
    scores = asked.value[:, :, None] - without
    if mode == "drop" and name == main:
        own = torch.nn.functional.one_hot(asked.chosen.index, sources.mask.shape[1]).bool()
        scores = scores.masked_fill(own & (not asked.pooled), 0)
    if name == main and not asked.pooled:
        later = torch.arange(sources.mask.shape[1]) > asked.chosen.index[:, :, None]
        if bool((later & sources.mask[:, None]).any()) and _causal(lens, batch):
            scores = scores.masked_fill(later, 0)
    settings = settings_of(lens, batch, "blank_out", **settings) | asked.settings(lens)
    of = None if sources is asked.stream else asked.stream
    return token_scores("blank_out", scores, asked.chosen, sources, settings, of=of, unit=MEASURES[measure])


def _causal(lens: Lens, batch: Batch) -> bool:
    """Whether no head of any layer looks ahead in this batch: then later tokens change nothing but the rounding."""
    try:
        layers = chosen_layers(lens, None, None)
    except UnsupportedError:
        return False
    return not any(bool(p.triu(1).any()) for _, p in fused_patterns(lens, batch, layers, fusion="max"))


def _waves(batch: Batch, columns: Bool[Tensor, "batch pos"], batch_size: int) -> Iterator[_Wave]:
    """Runs that blank every marked column of every sample once."""
    counts = columns.sum(1)
    most = int(counts.max())
    order = torch.argsort((~columns).to(torch.int8), dim=1, stable=True)[:, :most]
    valid = torch.arange(most) < counts[:, None]
    # Fillers blank their sample's first real token once more; nobody looks at them.
    order = torch.where(valid, order, order[:, :1])
    plain = replace(batch, patches=None)
    together = max(1, batch_size // len(batch)) if plain.repeatable else 1
    for first in range(0, most, together):
        some = slice(first, first + together)
        copies = order[:, some].shape[1]
        rows = plain.repeat(copies) if copies > 1 else plain
        yield _Wave(rows, order[:, some].T.reshape(-1), copies, valid[:, some].T.reshape(-1))


@dataclass(eq=False)
class _Blank:
    """How one kind of source is taken away; checked when it is made."""

    lens: Lens
    batch: Batch
    asked: Question
    sources: Stream
    tower: str
    how: str
    token: str | int | None
    sigma: float | None

    def __post_init__(self) -> None:
        """Refuse what cannot be done, before anything is run."""
        self.settings: dict[str, Any] = {}
        self.key = "decoder_input_ids" if self.tower == "decoder" else "input_ids"
        if self.how in ("replace", "drop"):
            ids = self.batch.inputs.get(self.key)
            if not isinstance(ids, Tensor) or ids.shape != self.sources.mask.shape:
                raise UnsupportedError(
                    f"mode={self.how!r}: tower {self.tower!r} of {self.lens.name} reads no tokens; use mode='mask'."
                )
        if self.how == "replace":
            self.fill = _fill(self.lens, self.token, self.settings)
        elif self.how == "drop":
            few = self.sources.mask.sum(1) < 2
            if bool(few.any()):
                raise InputError(f"sample {int(few.nonzero()[0])} is one token: nothing would be left without it.")
        elif self.how == "mask":
            chosen_layers(self.lens, None, self.tower)
            if self.tower == "encoder" and bool((self.sources.mask.sum(1) < 2).any()):
                raise InputError(
                    "a sample's encoder reads one token: masked, it leaves the decoder nothing to attend to."
                )
        else:
            self.boxes = _pixel_boxes(self.lens, self.batch, self.sources, self.how)
            if self.how == "blur":
                # One width for all patches of a picture, which are of one size.
                longer = (self.boxes[..., 2:] - self.boxes[..., :2]).nan_to_num(0).amax().item()
                self.sigma = self.settings["sigma"] = longer / 2 if self.sigma is None else self.sigma

    def of(self, wave: _Wave) -> tuple[Batch, list[Edit], Tensor | None]:
        """The rows to run, the edits, and the targets' columns where they moved."""
        if self.how == "mask":
            return wave.batch, self._masked(wave), None
        if self.how == "drop":
            return self._dropped(wave)
        value = wave.batch.inputs["pixel_values" if self.how in ("mean", "blur") else self.key]
        columns = wave.columns.to(value.device)
        if self.how == "replace":
            new = value.scatter(1, columns[:, None], self.fill)
            return replace(wave.batch, inputs={**wave.batch.inputs, self.key: new}), [], None
        new = self._smeared(value, wave)
        return replace(wave.batch, inputs={**wave.batch.inputs, "pixel_values": new}), [], None

    def _masked(self, wave: _Wave) -> list[Edit]:
        columns = wave.columns

        def hide(scores: Tensor) -> Tensor:
            at = columns.to(scores.device)[:, None, None]
            query, key = (torch.arange(n, device=scores.device) for n in scores.shape[2:])
            hidden = (key == at) & (query[:, None] != at)
            return scores.masked_fill(hidden[:, None], -torch.inf)

        def hide_from_all(scores: Tensor) -> Tensor:
            hidden = torch.arange(scores.shape[-1], device=scores.device) == columns.to(scores.device)[:, None]
            return scores.masked_fill(hidden[:, None, None], -torch.inf)

        layers = chosen_layers(self.lens, None, self.tower)
        edits = splice(hide, site="scores", layers=layers, tower=self.tower)
        return edits + (splice(hide_from_all, site="scores", tower="cross") if self.tower == "encoder" else [])

    def _dropped(self, wave: _Wave) -> tuple[Batch, list[Edit], Tensor | None]:
        width = self.sources.mask.shape[1]
        column = torch.arange(width - 1)
        keep = column + (column >= wave.columns[:, None])
        inputs, rows = dict(wave.batch.inputs), len(wave.columns)
        names = tuple(f"decoder_{n}" for n in _BY_TOKEN) if self.tower == "decoder" else _BY_TOKEN

        def rest(x: Tensor) -> Tensor:
            index = keep.to(x.device).reshape(*keep.shape, *[1] * (x.ndim - 2))
            return x.gather(1, index.expand(*keep.shape, *x.shape[2:]))

        for name in names:
            if isinstance(value := inputs.get(name), Tensor):
                if value.shape[:2] != (rows, width):
                    raise UnsupportedError(
                        f"mode='drop': {name} {tuple(value.shape)} has not one entry for each token."
                    )
                inputs[name] = rest(value)
        changes: dict[str, Any] = {"inputs": inputs, "texts": None, "tokens": None, "offsets": None}
        if self.tower == "encoder":
            mask = wave.batch.source_mask
            return replace(wave.batch, **changes, source_mask=None if mask is None else rest(mask)), [], None
        image = wave.batch.image_mask
        changes |= {"mask": rest(wave.batch.mask), "image_mask": None if image is None else rest(image)}
        targets = self.asked.chosen.index.repeat(wave.copies, 1)
        moved = targets - (targets >= wave.columns[:, None]).long()
        return replace(wave.batch, **changes), [], None if self.asked.pooled else moved.clamp_min(0)

    def _smeared(self, pixels: Tensor, wave: _Wave) -> Tensor:
        sample = torch.arange(len(self.batch)).repeat(wave.copies)
        boxes = self.boxes[sample, wave.columns].to(pixels.device)
        height, width = pixels.shape[-2:]
        x = torch.arange(width, device=pixels.device) + 0.5
        y = torch.arange(height, device=pixels.device) + 0.5
        left, top, right, bottom = boxes[:, :, None].unbind(1)
        inside = ((y > top) & (y < bottom))[:, :, None] & ((x > left) & (x < right))[:, None]
        if self.how == "mean":
            other = pixels.float().mean((-2, -1), keepdim=True).to(pixels)
        else:
            assert self.sigma is not None
            other = blurred(pixels, self.sigma)
        return torch.where(inside[:, None], other, pixels)


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
