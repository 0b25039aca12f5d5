"""Pairs of batches, clean and corrupt, checked: positions have to correspond, and something has to differ."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from interp.attribution.common import token_text
from interp.batch import Batch
from interp.edits import Edit, flatten
from interp.errors import InputError, SettingsError
from interp.inputs import tokenizer_of
from interp.lens import Lens
from interp.tracing.grid import Group

Edits = Iterable[Edit | Iterable[Edit]]


def batches_of(clean: Batch | Sequence[Batch], corrupt: Batch | Sequence[Batch]) -> list[tuple[Batch, Batch]]:
    """The pairs of batches.

    Raises:
        InputError: they differ in number, length or padding, or in where images stand.
    """
    sides = [[x] if isinstance(x, Batch) else list(x) for x in (clean, corrupt)]
    if len(sides[0]) != len(sides[1]) or not sides[0]:
        raise InputError(f"{len(sides[0])} clean and {len(sides[1])} corrupt batches were given: pairs are needed.")
    pairs = list(zip(*sides, strict=True))
    for number, pair in enumerate(pairs):
        for side, batch in zip(("clean", "corrupt"), pair, strict=True):
            if not isinstance(batch, Batch):
                raise InputError(f"{side} batch {number} is a {type(batch).__name__}, not a Batch from lens.prepare.")
        one, two = pair
        if len(one) != len(two):
            raise InputError(f"batch {number} has {len(one)} clean and {len(two)} corrupt prompts.")
        if not torch.equal(one.lengths, two.lengths):
            row = int((one.lengths != two.lengths).nonzero()[0])
            raise InputError(
                f"prompt {row} of batch {number} has {int(one.lengths[row])} clean and {int(two.lengths[row])} corrupt "
                "tokens: positions must correspond. Choose a corruption with as many tokens."
            )
        if one.mask.shape != two.mask.shape or not torch.equal(one.mask, two.mask):
            raise InputError(
                f"the clean and the corrupt prompts of batch {number} are padded differently: prepare alike."
            )
        images = [None if b.image_mask is None else b.image_mask for b in pair]
        if images[0] is not None and images[1] is not None and not torch.equal(*images):  # type: ignore[arg-type]
            raise InputError(f"image tokens stand at other columns in the corrupt prompts of batch {number}.")
    return pairs


def check_differ(pairs: Sequence[tuple[Batch, Batch]]) -> None:
    """Refuse a corruption that leaves a prompt as it is.

    Raises:
        InputError: names the prompt.
    """
    for number, (one, two) in enumerate(pairs):
        same = torch.ones(len(one), dtype=torch.bool)
        for name, value in one.inputs.items():
            other = two.inputs.get(name)
            if not isinstance(value, Tensor) or not isinstance(other, Tensor):
                continue
            if value.shape == other.shape and value.ndim and value.shape[0] == len(one):
                same &= (value == other).flatten(1).all(1).cpu() if value.ndim > 1 else (value == other).cpu()
            elif value.shape != other.shape or not torch.equal(value, other):
                same[:] = False
        if bool(same.any()):
            raise InputError(
                f"prompt {int(same.nonzero()[0])} of batch {number} is the same in the clean and the corrupt batch: "
                "the corruption changes nothing."
            )


def embedding_edits(edits: Edits, name: str) -> list[Edit]:
    """Edits of one of the runs.

    Raises:
        SettingsError: an edit of something else than `embed` or the stream that enters the first layer.
    """
    found = flatten(edits)
    wrong = [e for e in found if e.read.site != "embed" and (e.read.site, e.read.layers) != ("resid_pre", (0,))]
    if wrong:
        raise SettingsError(
            f"{name}_edits change 'embed' or 'resid_pre' of layer 0, since layers are entered later on; got "
            f"{wrong[0]!r}."
        )
    return found


def tokens_of(lens: Lens, batches: Sequence[Batch], groups: Sequence[Group]) -> tuple[str, ...]:
    """The token at each position of the clean prompts, where it is the same in every prompt that has it."""
    tokenizer = tokenizer_of(lens.processor)
    held: list[list[int]] = []
    for batch in batches:
        ids = batch.inputs.get("decoder_input_ids", batch.inputs.get("input_ids"))
        if tokenizer is None or ids is None or ids.shape != batch.mask.shape:
            return ()
        held += [row[mask].tolist() for row, mask in zip(ids, batch.mask, strict=True)]
    out: list[str] = []
    for group in groups:
        position: Any = group.positions
        found = {row[position] for row in held if position < len(row)}
        out.append(token_text(tokenizer, found.pop()) if len(found) == 1 else "")
    return tuple(out)
