"""The same prompts without what their images say: the other side of every comparison "with and without the image".

    drop                    the image is cut out of the text, which closes up: what stands behind it moves forward
    drop_keep_positions     cut out, but every token that stays keeps its position (all three where M-RoPE has three)
    mask                    nothing is moved, but no token outside the image may look at it, in any layer
    zero, mean, noise       other pixels: none (the mean colour of the normalisation), the picture's own mean colour,
                            or standard normal numbers in the units that the model gets

What is cut out or hidden are the image tokens and what only frames them: everything that stands between the tokens of
one picture (row breaks, names of tiles), and special tokens directly beside them that are named after images
("<|vision_start|>", "</img>"). Ordinary words and line ends that a processor puts around an image stay.

Where every layer sees the whole text, `mask` and `drop_keep_positions` are the same function, up to rounding. They
differ where a layer sees a window of columns: cut out columns take no room in it. With `drop`, a part of any difference
comes from the moved positions alone. Pixels that are zero in every channel are what processors pad with: they stay zero
and do not count for `mean`. A processor that hands tiles over one by one gets the mean colour of each tile.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.batch import Batch
from interp.edits import Edit, mask_attention
from interp.errors import InputError, UnsupportedError, unknown
from interp.inputs import pad_id, tokenizer_of
from interp.lens import Lens
from interp.patches import picture_ids
from interp.reads import Read

Mode = Literal["drop", "drop_keep_positions", "mask", "zero", "mean", "noise"]
MODES: tuple[str, ...] = get_args(Mode)
_OF_IMAGES = ("pixel", "image", "aspect_ratio", "cross_attention_mask", "num_crops", "batch_num")
_FRAME = re.compile(r"image|img|vision|media|tile|row_\d+_col", re.IGNORECASE)


@dataclass(frozen=True, slots=True, eq=False)
class WithoutImage:
    """Prompts without their images.

    Attributes:
        batch: what to run.
        edits: the edits to run it with, each of one layer.
        origin: for each column of `batch` the column of the original batch that it is [batch, pos].
        settings: what a result records: the mode, and what was taken away.
    """

    batch: Batch
    edits: tuple[Edit, ...]
    origin: Int[Tensor, "batch pos"]
    settings: Mapping[str, Any]

    def columns(self, marked: Bool[Tensor, "batch original"]) -> Bool[Tensor, "batch pos"]:
        """The columns of `batch` that the marked columns of the original batch became.

        A marked column that was cut out is the nearest column before it that was not.

        Raises:
            InputError: nothing stands before it, or two marked columns become one.
        """
        real = self.batch.mask
        found = torch.zeros_like(real)
        # Real columns are in the order of the original, so that counting says which one it is.
        origin = self.origin.masked_fill(~real, marked.shape[1])
        nth = torch.argsort((~real).to(torch.int8), dim=1, stable=True)
        row, column = marked.nonzero(as_tuple=True)
        before = (origin[row] <= column[:, None]).sum(1) - 1
        if bool((before < 0).any()):
            i = int(row[before < 0][0])
            raise InputError(f"sample {i}: nothing but the image stands before a position that is compared.")
        found[row, nth[row, before]] = True
        if int(found.sum()) != int(marked.sum()):
            raise InputError("positions inside an image cannot be compared with a run in which it is cut out.")
        return found


def without_image(lens: Lens, batch: Batch, mode: Mode = "drop", *, seed: int = 0) -> WithoutImage:
    """The same prompts without their images.

    Args:
        lens: a vision-language model.
        batch: prompts with images; a prompt that has none stays as it is.
        mode: how the images are taken away; `drop_keep_positions` needs one run, to see the positions.
        seed: for `noise`; every picture of a size gets the same noise, whatever it is batched with.

    Raises:
        UnknownNameError: there is no such mode.
        UnsupportedError: the model takes no images, or cannot do without them in this way.
        InputError: the batch holds no images, or a prompt is nothing but its image.
    """
    if mode not in MODES:
        raise unknown("way to leave images out", mode, MODES)
    _check_images(lens, batch)
    if mode in ("zero", "mean", "noise"):
        settings = {"without": mode} | ({"seed": seed} if mode == "noise" else {})
        columns = torch.arange(batch.mask.shape[1], device=batch.mask.device).expand_as(batch.mask)
        return WithoutImage(_repainted(lens, batch, mode, seed), (), columns, settings)
    if "decoder_input_ids" in batch.inputs:
        raise UnsupportedError(
            f"without={mode!r}: {lens.name} reads its image in the encoder; use 'zero', 'mean' or 'noise'."
        )
    gone = image_columns(lens, batch)
    keep = batch.mask & ~gone
    if not bool(keep.any(1).all()):
        raise InputError(f"sample {int((~keep.any(1)).nonzero()[0])} is nothing but its image: no text is left.")
    settings = {"without": mode, "image_tokens": int(_image_tokens(lens, batch).sum())}
    settings["frames"] = _frames(lens, batch, gone)
    if mode == "mask":
        columns = torch.arange(batch.mask.shape[1], device=batch.mask.device).expand_as(batch.mask)
        return WithoutImage(batch, _hidden(lens, batch, gone, keep), columns, settings)
    positions = _positions(lens, batch) if mode == "drop_keep_positions" else None
    cut, columns = _cut(lens, batch, keep, positions)
    return WithoutImage(cut, (), columns, settings)


def image_columns(lens: Lens, batch: Batch) -> Bool[Tensor, "batch pos"]:
    """The image tokens of a batch and what only frames them (see the module).

    Raises:
        InputError: no image tokens stand in the text.
    """
    gone = _image_tokens(lens, batch)
    if batch.patches is not None:
        map_ = batch.patches
        for i in range(len(batch)):
            mine = map_.sample_rows(i)
            for image in mine.image.unique().tolist():
                columns = mine.column[mine.image == image]
                gone[i, int(columns.min()) : int(columns.max()) + 1] = True
    tokenizer, ids = tokenizer_of(lens.processor), batch.inputs.get("input_ids")
    if tokenizer is None or not isinstance(ids, Tensor):
        return gone
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    frame = [i for i in sorted(special) if _FRAME.search(str(tokenizer.convert_ids_to_tokens(i)))]
    frames = torch.isin(ids, torch.tensor(frame, dtype=ids.dtype, device=ids.device)) & batch.mask
    while True:
        beside = torch.zeros_like(gone)
        beside[:, 1:] |= gone[:, :-1]
        beside[:, :-1] |= gone[:, 1:]
        more = beside & frames & ~gone
        if not bool(more.any()):
            return gone
        gone = gone | more


def _image_tokens(lens: Lens, batch: Batch) -> Bool[Tensor, "batch pos"]:
    found = batch.image_mask
    if found is None and "cross_attention_mask" in batch.inputs:
        # Where images are seen through cross-attention, the image token is a word that carries nothing.
        ids = batch.inputs["input_ids"]
        found = torch.isin(ids, torch.tensor(picture_ids(lens.model.config), device=ids.device))
    if found is None or not bool((found & batch.mask).any()):
        raise InputError("no image tokens stand in the text of this batch: use 'zero', 'mean' or 'noise'.")
    return found & batch.mask


def _check_images(lens: Lens, batch: Batch) -> None:
    if any(name.startswith("pixel_values_videos") for name in batch.inputs):
        raise UnsupportedError("videos cannot be left out yet, only images.")
    if "pixel_values" in batch.inputs and ("input_ids" in batch.inputs or "decoder_input_ids" in batch.inputs):
        return
    if "pixel_values" in batch.inputs:
        raise UnsupportedError(f"{lens.name} reads nothing but images: without them nothing is left to run.")
    takes = bool(picture_ids(lens.model.config)) or hasattr(lens.model.config, "vision_config")
    if not takes:
        raise UnsupportedError(
            f"{lens.name} takes no images, so there is nothing to compare with: this needs a vision-language model."
        )
    raise InputError("the batch holds no images: give them to lens.prepare(texts, images).")


def _frames(lens: Lens, batch: Batch, gone: Tensor) -> list[str]:
    """What is taken away beside image tokens, each text once."""
    tokenizer = tokenizer_of(lens.processor)
    ids = batch.inputs["input_ids"][gone & ~_image_tokens(lens, batch)].unique().tolist()
    return [] if tokenizer is None else sorted(map(str, tokenizer.convert_ids_to_tokens(ids)))


def _hidden(lens: Lens, batch: Batch, gone: Tensor, keep: Tensor) -> tuple[Edit, ...]:
    """Edits that hide columns from all others in every layer."""
    if "cross_attention_mask" in batch.inputs:
        raise UnsupportedError(
            f"without='mask': images reach {lens.name} through cross-attention, whose queries would be left with "
            "nothing to look at; use 'drop'."
        )
    able = lens.layers_with("scores")
    layers = lens.anatomy.towers[lens.anatomy.main].layers
    for layer in layers:
        if layer.index not in able or "mixer" in layer.branches:
            raise UnsupportedError(
                f"without='mask': layer {layer.index} of {lens.name} moves information between positions in a way that "
                "no mask can stop; use 'drop'."
            )
    return tuple(e for x in layers for e in mask_attention(queries=keep, keys=gone, layers=x.index))


def _positions(lens: Lens, batch: Batch) -> Tensor:
    """The position ids that the model's layers get for the whole text, [..., batch, pos]."""
    cache = lens.run(batch, Read("resid_pre", layers=(0,), positions="last"), cache=True).cache
    if cache.position_ids is None:
        raise UnsupportedError(
            f"without='drop_keep_positions': {lens.name} takes no position ids, so tokens cannot keep theirs; use "
            "'drop' or 'mask'."
        )
    return cache.position_ids


def _cut(lens: Lens, batch: Batch, keep: Tensor, positions: Tensor | None) -> tuple[Batch, Tensor]:
    """The batch without some columns, and the column that each one was.

    Rows that keep less than others are padded on the left.
    """
    shape, width = keep.shape, int(keep.sum(1).max())
    order = torch.argsort(keep.to(torch.int8), dim=1, stable=True)[:, -width:]
    mask = keep.gather(1, order)
    inputs: dict[str, Any] = {}
    for name, value in batch.inputs.items():
        if name.startswith(_OF_IMAGES) or name == "position_ids":
            continue
        by_token = isinstance(value, Tensor) and value.ndim == 2 and value.shape == shape
        inputs[name] = value.gather(1, order) if by_token else value
    fill = getattr(tokenizer_of(lens.processor), "pad_token_id", None)
    fill = pad_id(lens.model.config) if fill is None else fill
    inputs["input_ids"] = inputs["input_ids"].masked_fill(~mask, fill)
    inputs["attention_mask"] = mask.long()
    if positions is not None:
        wide = positions.expand(*positions.shape[:-2], *shape)
        inputs["position_ids"] = wide.gather(-1, order.expand(*positions.shape[:-2], *order.shape))
    nothing = dict.fromkeys(("texts", "tokens", "offsets", "image_mask", "patches"))
    return replace(batch, inputs=inputs, mask=mask, **nothing), order


def _repainted(lens: Lens, batch: Batch, mode: str, seed: int) -> Batch:
    """The batch with other pixels."""
    pixels, grid = batch.inputs["pixel_values"], batch.inputs.get("image_grid_thw")
    if isinstance(grid, Tensor) and pixels.ndim == 2 and pixels.shape[1] % 3 == 0:
        # Packed pictures are rows of patches, each patch with its channels in front.
        pictures = [x.reshape(len(x), 3, -1, 1) for x in pixels.split(grid.prod(1).tolist())]
    elif pixels.ndim >= 4 and pixels.shape[-3] == 3:
        pictures = pixels.split(1)
    else:
        raise UnsupportedError(f"without={mode!r}: {lens.name} gets its pixels as {tuple(pixels.shape)}; use 'drop'.")
    painted = [_picture(x, mode, seed).reshape(-1, *pixels.shape[1:]) for x in pictures]
    return replace(batch, inputs={**batch.inputs, "pixel_values": torch.cat(painted)})


def _picture(picture: Tensor, mode: str, seed: int) -> Tensor:
    """Other pixels for one picture [..., channel, height, width]; tiles that are padding stay zero."""
    real = (picture != 0).any(-3, keepdim=True)
    if mode == "zero":
        # Some families take a picture of zeros for padding and leave it out; the smallest number is not zero to them.
        new = torch.full_like(picture, torch.finfo(picture.dtype).tiny)
    elif mode == "noise":
        random = torch.Generator().manual_seed(seed)
        new = torch.randn(picture.shape, generator=random).to(picture)
    else:
        others = [d for d in range(picture.ndim) if d != picture.ndim - 3]
        mean = (picture.float() * real).sum(others, keepdim=True) / real.sum().clamp_min(1)
        new = mean.to(picture).expand_as(picture)
    tiles = real.flatten(-3).any(-1)[..., None, None, None]
    return new.masked_fill(~tiles, 0.0)
