"""Where gradients with respect to the input are taken: the vectors that enter the first layer."""

from __future__ import annotations

from typing import Literal

from interp.attribution.common import Stream, stream_of
from interp.attribution.targets import Question
from interp.batch import Batch
from interp.errors import SettingsError, UnsupportedError, unknown
from interp.lens import Lens
from interp.reads import Read

Where = Literal["embed", "resid_pre"]
SITES = ("embed", "resid_pre")


def embedded(
    lens: Lens, batch: Batch, asked: Question, site: str | None, tower: str | None
) -> tuple[Read, int, Stream]:
    """The read of the vectors that stand for the input, its layer (-1 outside the layers), and their stream.

    Args:
        lens: the model.
        batch: the batch.
        asked: what is explained.
        site: `embed`, what the embedding module returns; `resid_pre`, what enters the first layer; None for the first
            where all that the model reads is tokens of one stream, for the second elsewhere.
        tower: where the sources stand; None for the encoder of an encoder-decoder, and the main tower elsewhere.

    Raises:
        UnknownNameError: no such site or tower.
        SettingsError: `embed` where it is not all of the input.
        UnsupportedError: the tower's rows are not the batch's samples.
    """
    main = lens.anatomy.main
    double = main == "decoder" and "encoder" in lens.anatomy.towers
    name = lens.anatomy.tower(tower or ("encoder" if double else main))[0].name
    if tower == "cross":
        raise UnsupportedError("'cross' is an attention, not a stream: name the tower of the sources.")
    has_images = batch.image_mask is not None and bool(batch.image_mask.any())
    plain = name == main and not double and not has_images and "embed" not in lens.anatomy.refused
    if site is None:
        site = "embed" if plain and lens.anatomy.embed is not None else "resid_pre"
    if site not in SITES:
        raise unknown("site of the input", site, SITES)
    if site == "embed" and not plain:
        why = "images are written over it" if has_images else f"tower {name!r} reads more than one table of tokens"
        raise SettingsError(f"site='embed' is not the input of {lens.name} here ({why}); use site='resid_pre'.")
    stream = asked.stream if name == main else stream_of(lens, batch, name)
    if name != main and not double and not _one_picture_each(batch, len(stream.mask)):
        raise UnsupportedError(
            f"the {len(stream.mask)} rows of tower {name!r} are not the {len(batch)} samples: one picture (and one "
            "tile) for each sample is needed. The image tokens of the main tower can be had: leave tower out."
        )
    if site == "embed":
        return Read("embed"), -1, stream
    return Read("resid_pre", layers=(0,), tower=None if name == main else name), 0, stream


def _one_picture_each(batch: Batch, rows: int) -> bool:
    if rows != len(batch) or batch.image_mask is None:
        return False
    return bool(batch.image_mask.any(1).all())
