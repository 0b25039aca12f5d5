"""What everything here asks of a dictionary first: where it reads and writes, which latents are meant, its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Int
from torch import Tensor

from interp.dictionaries.base import Dictionary
from interp.errors import SettingsError, UnknownNameError
from interp.reads import Read

Latents = int | Sequence[int] | Int[Tensor, " latents"]

_IN, _OUT = ("read", "hook_name"), ("target", "hook_name_out")


def input_read(dictionary: Dictionary, read: str | Read | None) -> Read:
    """Where a dictionary reads: what was given, or what its metadata say.

    Raises:
        SettingsError: neither says it.
    """
    return _read(dictionary, read, _IN, "read")


def output_read(dictionary: Dictionary, read: str | Read | None, target: str | Read | None) -> Read:
    """Where a dictionary writes: the target of a transcoder, or where an SAE reads.

    Raises:
        SettingsError: an SAE was given a target, or nothing says where.
    """
    if dictionary.transcodes:
        return _read(dictionary, target, _OUT, "target")
    if target is not None:
        raise SettingsError("an SAE writes where it reads: target is for transcoders.")
    return input_read(dictionary, read)


def _read(dictionary: Dictionary, given: str | Read | None, names: tuple[str, str], option: str) -> Read:
    metadata = dictionary.metadata
    found = given if given is not None else next((metadata[n] for n in names if n in metadata), None)
    if found is None:
        raise SettingsError(
            f"nothing says which site this dictionary is for: give {option}='resid_post.10' (its metadata have no "
            f"{' or '.join(map(repr, names))})."
        )
    read = Read.of(found)
    if read.row.per_layer and (read.layers is None or len(read.layers) != 1):
        raise SettingsError(f"{option}={str(read)!r} must name one layer, as in '{read.site}.10'.")
    return read


def chosen(dictionary: Dictionary, latents: Latents | None) -> Int[Tensor, " latents"]:
    """Latents as a tensor of their numbers, on the CPU; None for all.

    Raises:
        SettingsError: there are none, or one is named twice.
        UnknownNameError: one does not exist.
    """
    size = dictionary.cfg.d_sae
    if latents is None:
        return torch.arange(size)
    listed = [latents] if isinstance(latents, int) else [int(n) for n in latents]
    if not listed or len(set(listed)) != len(listed):
        raise SettingsError(f"latents are one or more numbers, each once; found {listed}.")
    for n in listed:
        if not 0 <= n < size:
            raise UnknownNameError(f"latent {n} does not exist: the dictionary has {size} (0 to {size - 1}).")
    return torch.tensor(listed)


def check_weights(dictionary: Dictionary) -> None:
    """Refuse weights whose latents are not those of single tokens as the model makes them.

    Raises:
        SettingsError: the weights are for scaled activations, or a batch kind has no threshold yet.
    """
    if dictionary.cfg.normalize_activations == "expected_average_only_in":
        raise SettingsError(
            "these weights are for scaled activations: give fold_activation_scale(dictionary, scale), or what "
            "dictionaries.load reads."
        )
    threshold = getattr(dictionary, "topk_threshold", None)
    if threshold is not None and not threshold > 0:
        raise SettingsError(
            "this dictionary has no threshold yet, so that latents of a token depend on the others of its batch: train "
            "it first."
        )


@contextmanager
def reading(dictionary: Dictionary) -> Iterator[None]:
    """The dictionary in evaluation mode, without gradients."""
    training = dictionary.training
    dictionary.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        dictionary.train(training)


def latent_rows(dictionary: Dictionary, latents: Int[Tensor, " latents"]) -> Tensor:
    """The rows that latents multiply [latents, d_out], in float32 or wider."""
    rows = dictionary.kind.decoder(dictionary).detach()[latents.to(dictionary.W_dec.device)]
    return rows.to(torch.promote_types(rows.dtype, torch.float32))
