"""What tells dictionaries of single tokens from those of whole sequences, for all that reads or scores them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxtyping import Bool, Float
from torch import Tensor

from interp.errors import SettingsError
from interp.reads import Read

if TYPE_CHECKING:
    from interp.data.corpora import Corpus
    from interp.dictionaries.base import Dictionary
    from interp.dictionaries.lorsa.lorsa import Lorsa
    from interp.dictionaries.lorsa.placed import PlacedLorsa
    from interp.lens import Lens


def placed(
    dictionary: Dictionary | Lorsa | PlacedLorsa,
    lens: Lens,
    corpus: Corpus | None = None,
    *,
    read: str | Read | None = None,
    target: str | Read | None = None,
) -> Any:
    """The dictionary as it is, or a Lorsa at its layer.

    Args:
        dictionary: an SAE, a transcoder or a Lorsa.
        lens: the model.
        corpus: what a layer of a tower of images is measured on.
        read: the site that it reads, for a Lorsa whose metadata do not say its layer.
        target: the site that it reconstructs.

    Raises:
        SettingsError: a Lorsa was given another site than the stream that enters a layer, or another target.
        UnsupportedError, InputError: see `PlacedLorsa`.
    """
    if not dictionary.sequences:
        return dictionary
    from interp.dictionaries.lorsa.placed import PlacedLorsa

    options: dict[str, Any] = {}
    if read is not None:
        given = Read.of(read)
        if given.site != "resid_pre" or given.layers is None or len(given.layers) != 1:
            raise SettingsError(f"a Lorsa reads the stream that enters its layer, resid_pre.LAYER, not {given}.")
        options = {"layer": given.layers[0], "tower": given.tower}
    found: Any = dictionary
    if not isinstance(dictionary, PlacedLorsa):
        found = PlacedLorsa(dictionary, lens, corpus=corpus, **options)  # type: ignore[arg-type]
    elif options and options["layer"] not in (found.layer, found.layer - lens.anatomy.depth[found.tower]):
        raise SettingsError(f"this Lorsa reads {found.read}, not {read}.")
    if target is not None and Read.of(target) != Read.of(found.target):
        raise SettingsError(f"this Lorsa stands for {found.target}, not for {target}.")
    return found


def encode_at(
    dictionary: Dictionary | PlacedLorsa,
    values: Float[Tensor, "batch pos d_in"],
    where: Bool[Tensor, "batch pos"],
    real: Bool[Tensor, "batch pos"],
) -> Float[Tensor, "token d_sae"]:
    """The latents of some tokens of contexts, on the dictionary's device.

    Args:
        dictionary: as from `placed`.
        values: the site that it reads, in whole contexts.
        where: the tokens whose latents are wanted.
        real: everything that is no padding.
    """
    if dictionary.sequences:
        return dictionary.encode_contexts(values, where, real)  # type: ignore[union-attr]
    return dictionary.encode(values[where.to(values.device)].to(dictionary.W_dec))  # type: ignore[union-attr]
