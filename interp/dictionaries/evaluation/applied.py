"""A dictionary applied to activations of any number of tokens: in pieces, as it is used, on its own device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.dictionaries.activations import Contexts
from interp.dictionaries.base import Dictionary
from interp.dictionaries.placing import encode_at
from interp.errors import SettingsError

_CELLS = 2**25  # latents held at a time


@contextmanager
def in_use(dictionary: Dictionary) -> Iterator[None]:
    """While open, the dictionary is in evaluation mode and no graph is kept.

    Raises:
        SettingsError: it is made for scaled activations.
    """
    if dictionary.cfg.normalize_activations == "expected_average_only_in":
        raise SettingsError(
            "this dictionary is for scaled activations: fold its scale in first, fold_activation_scale(sae, scale)."
        )
    training = dictionary.training
    dictionary.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        dictionary.train(training)


def pieces(
    dictionary: Dictionary, x: Float[Tensor, "token d_in"]
) -> Iterator[tuple[slice, Float[Tensor, "token d_sae"], Float[Tensor, "token d_in"]]]:
    """Latents of some tokens at a time: which, their latents, and their activations in the dictionary's dtype."""
    weight = dictionary.W_dec
    count = max(1, _CELLS // dictionary.cfg.d_sae)
    for start in range(0, len(x), count):
        where = slice(start, min(start + count, len(x)))
        rows = x[where].to(weight)
        yield where, dictionary.encode(rows), rows


def reconstructions(
    dictionary: Dictionary, contexts: Contexts, source: str, where: Bool[Tensor, "batch pos"]
) -> Iterator[tuple[slice, Float[Tensor, "token d_sae"], Float[Tensor, "token d_out"]]]:
    """Some tokens of contexts at a time: which, their latents, and the reconstructions.

    Args:
        dictionary: as from `interp.dictionaries.placing.placed`.
        contexts: whole contexts.
        source: the read that the dictionary is given.
        where: the tokens; they are counted context by context.
    """
    if not dictionary.sequences:
        for part, latents, x in pieces(dictionary, contexts[source][where].to(dictionary.W_dec.device)):
            yield part, latents, dictionary.decode(latents, x)
        return
    done, count = 0, max(1, _CELLS // (where.shape[1] * dictionary.cfg.d_sae))
    for start in range(0, len(where), count):
        some = slice(start, start + count)
        latents = encode_at(dictionary, contexts[source][some], where[some], contexts.real[some])
        yield slice(done, done + len(latents)), latents, dictionary.decode(latents)
        done += len(latents)


def site_of(dictionary: Dictionary, read: str | None, target: str | None) -> tuple[str, str]:
    """The names of what a dictionary reads and of what it reconstructs, from its metadata where they are not given.

    Metadata are those of `interp.dictionaries.train` (`read`, `target`) or of SAELens (`hook_name`, `hook_name_out`).

    Raises:
        SettingsError: they are known nowhere, or do not fit its kind.
    """
    held = dictionary.metadata
    read = read or held.get("read") or held.get("hook_name")
    if target is None and dictionary.transcodes:
        target = held.get("target") or held.get("hook_name_out")
    if read is None:
        raise SettingsError("what the dictionary reads is neither given nor in its metadata: read='resid_post.10'.")
    if dictionary.transcodes and target is None:
        raise SettingsError("what the transcoder stands for is neither given nor in its metadata: target='mlp_out.8'.")
    return str(read), str(target or read)
