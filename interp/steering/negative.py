"""The other prompt of contrastive decoding: carried on beside the first, one new token at a time.

Every contrast needs, for each text that is being generated, what the model would say next behind another prompt: with
the image distorted, left out, or hidden. That prompt is read once, when the branch is made. Each step then costs one
forward of the one token that was added, behind keys and values of the branch's own.

Nothing tells a logits processor how the rows of beam search were exchanged, so that the branch finds it out: a row goes
on from a row of the same sample that held the same text one step ago. Two such rows have the same keys and values.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.batch import Batch
from interp.edits import Edit
from interp.errors import InputError, UnsupportedError
from interp.lens import Lens
from interp.reads import Read


class NegativeBranch:
    """Logits behind another prompt, for the texts that a generation of `batch` has come to.

    Args:
        lens: the model.
        batch: what is generated from, padded on the left.
        other: the other prompt of each sample.
        edits: what acts on the other prompt, and on it alone.

    Raises:
        InputError: a batch is padded on the right, or without token ids.
        UnsupportedError: the model's state is more than keys and values of what it has read.
    """

    def __init__(self, lens: Lens, batch: Batch, other: Batch, edits: Sequence[Edit] = ()) -> None:
        refusal = _refusal(lens)
        if refusal is not None:
            raise UnsupportedError(f"{lens.name}: {refusal}, so that no second prompt can be carried on beside it.")
        if "input_ids" not in batch.inputs:
            raise InputError("contrastive decoding needs the prompts' token ids.")
        if any(one.padding in ("right", "mixed") for one in (batch, other)):
            raise InputError("generation needs left padding: lens.prepare(texts, images, padding_side='left').")
        self.lens, self.other = lens, _positioned(lens, other)
        self.prompt: Int[Tensor, "batch pos"] = batch.inputs["input_ids"]
        read = Read("logits", positions="last")
        trace = lens.run(self.other, read, edits, cache=True)
        self.first, self.prefix = trace[read, -1][:, -1], trace.cache
        self._cache: Any = None
        self._seen: Int[Tensor, "row all"] | None = None
        self._logits: Float[Tensor, "row vocab"] = self.first

    def logits(self, input_ids: Int[Tensor, "row all"]) -> Float[Tensor, "row vocab"]:
        """The next token's logits behind the other prompt and what was generated; in the order of the steps.

        Raises:
            InputError: the texts do not begin with the batch's prompts, or do not go on from those of the last step.
        """
        width, size = self.prompt.shape[1], len(self.prompt)
        if self._seen is not None and torch.equal(input_ids, self._seen):
            return self._logits
        if input_ids.shape[1] <= width:
            self._begin(input_ids, len(input_ids) // size)
        elif self._seen is None or input_ids.shape != (len(self._seen), self._seen.shape[1] + 1):
            raise InputError(
                "contrastive decoding goes along token by token from the prompt, and these texts of "
                f"{input_ids.shape[1] - width} new tokens do not go on from the last ones: plain, sampled and beam "
                "search do, assisted decoding does not."
            )
        else:
            self._step(input_ids)
        self._seen = input_ids.clone()
        return self._logits

    def _begin(self, input_ids: Tensor, copies: int) -> None:
        wanted = self.prompt.repeat_interleave(max(copies, 1), 0).to(input_ids.device)
        if not torch.equal(wanted, input_ids):
            raise InputError("these prompts are not those of the batch that the processor was made for: make another.")
        self._cache = copy.deepcopy(self.prefix.key_values)
        if copies > 1:
            self._cache.batch_repeat_interleave(copies)
        self._logits = self.first.repeat_interleave(copies, 0)

    def _step(self, input_ids: Tensor) -> None:
        assert self._seen is not None
        origin = _origin(input_ids[:, :-1], self._seen, len(self.prompt))
        if not torch.equal(origin, torch.arange(len(origin), device=origin.device)):
            self._cache.reorder_cache(origin)
        copies = len(input_ids) // len(self.prompt)
        new = input_ids.shape[1] - self.prompt.shape[1]
        mask = self.other.mask.repeat_interleave(copies, 0)
        inputs: dict[str, Any] = {
            "input_ids": input_ids[:, -1:].to(mask.device),
            "attention_mask": torch.cat([mask, mask.new_ones(len(mask), new)], 1).long(),
            "past_key_values": self._cache,
        }
        positions = self.prefix.position_ids
        if positions is not None:
            last = positions[..., -1:] + new
            inputs["position_ids"] = last if last.shape[-2] == 1 else last.repeat_interleave(copies, -2)
        step = Batch(inputs, torch.ones_like(inputs["input_ids"], dtype=torch.bool))
        read = Read("logits", positions="last")
        self._logits = self.lens.run(step, read)[read, -1][:, -1]


def _origin(before: Int[Tensor, "row all"], seen: Int[Tensor, "row all"], size: int) -> Int[Tensor, " row"]:
    """For each row a row of the same sample that held the same text."""
    copies = len(before) // size
    one, two = before.view(size, copies, 1, -1), seen.view(size, 1, copies, -1)
    same = (one == two).all(-1)
    if not bool(same.any(-1).all()):
        raise InputError("a text does not go on from any text of its sample in the last step: it was changed between.")
    kept = torch.eye(copies, dtype=torch.bool, device=same.device) & same  # a row that can stay stays
    found = torch.where(kept.any(-1), kept.long().argmax(-1), same.long().argmax(-1))
    return (found + torch.arange(size, device=found.device)[:, None] * copies).flatten()


def _positioned(lens: Lens, batch: Batch) -> Batch:
    """Text with position ids: models that number positions by the last image they saw would take those of another."""
    given = batch.inputs
    takes = "position_ids" in inspect.signature(lens.model.forward).parameters
    if not takes or "position_ids" in given or any(name.startswith("pixel") for name in given):
        return batch
    return replace(batch, inputs={**given, "position_ids": (batch.mask.long().cumsum(-1) - 1).clamp_min(0)})


def _refusal(lens: Lens) -> str | None:
    layers = lens.anatomy.towers[lens.anatomy.main].layers
    if getattr(lens.model.config, "is_encoder_decoder", False):
        return "an encoder-decoder generates from its encoder's output"
    if any("mixer" in layer.branches for layer in layers):
        return "recurrent layers carry a state that is not keys and values"
    if any("cross" in layer.attention for layer in layers):
        return "images enter its later layers"
    return None
