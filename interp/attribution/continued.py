"""A prompt and what the model answered as one batch, so that methods can explain every token of the answer."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.batch import Batch
from interp.errors import InputError, UnsupportedError
from interp.inputs import pad_id, tokenizer_of
from interp.lens import Lens
from interp.reads import Read


def continued(lens: Lens, batch: Batch, tokens: Int[Tensor, "batch new"]) -> tuple[Batch, Bool[Tensor, "batch pos"]]:
    """The batch with generated tokens behind each prompt, and the positions that predict them.

    The ids are taken as they are: nothing is written out and tokenised again. What a method with `target=` explains is
    what a position predicts, so the positions go from the prompt's last token to the answer's last but one. The words
    of the answer can be found: `whole.find("dog", occurrence=-1)` marks the token itself, the same rolled by one,
    `.roll(-1, 1)`, the position that predicts it.

    Args:
        lens: a decoder, with or without images.
        batch: prompts, as they were given to `lens.generate`.
        tokens: `lens.generate(batch).tokens`. A sample's first end or padding token and all behind it are left out.

    Returns:
        The whole texts, and a mask [batch, pos] to give as `target`. A sample whose answer is empty has no position.

    Raises:
        InputError: the prompts are padded on the right, tokens that do not fit, or no answer at all.
        UnsupportedError: an encoder-decoder, an input of the model that cannot be continued, or a prompt that would see
            its answer.
    """
    size, width = batch.mask.shape
    if "decoder_input_ids" in batch.inputs or "input_ids" not in batch.inputs:
        raise UnsupportedError(f"only prompts of a decoder can be continued; this batch holds {sorted(batch.inputs)}.")
    if batch.padding in ("right", "mixed"):
        raise InputError("prompts are continued behind their last token: lens.prepare(..., padding_side='left').")
    if tokens.ndim != 2 or len(tokens) != size or tokens.is_floating_point():
        raise InputError(f"tokens are ids [batch {size}, new], found {tokens.dtype} {tuple(tokens.shape)}.")
    tokens = tokens.to(batch.mask.device)
    ends = torch.tensor(_ends(lens), dtype=torch.long, device=tokens.device)
    ended = torch.isin(tokens, ends).long().cumsum(1) > 0
    count = int((~ended).sum(1).max()) if tokens.shape[1] else 0
    if count == 0:
        raise InputError("no sample has an answer: each begins with the token that ends it.")
    real, fill = ~ended[:, :count], pad_id(lens.model.config)
    new = tokens[:, :count].masked_fill(~real, fill)
    inputs = dict(batch.inputs)
    inputs.setdefault("attention_mask", batch.mask.long())
    for name, value in inputs.items():
        more = _more(name, value, new, real, (size, width))
        inputs[name] = value if more is None else torch.cat([value, more.to(value.dtype)], 1)
    mask = torch.cat([batch.mask, real], 1)
    predicts = torch.zeros_like(mask)
    predicts[:, width - 1 : -1] = real
    image = None if batch.image_mask is None else torch.cat([batch.image_mask, torch.zeros_like(real)], 1)
    whole = replace(batch, inputs=inputs, mask=mask, image_mask=image, texts=None, tokens=None, offsets=None)
    if "token_type_ids" in inputs:
        whole = _marked(lens, batch, whole)
    return _with_text(lens, batch, whole, new, real), predicts


def _marked(lens: Lens, batch: Batch, whole: Batch) -> Batch:
    """Marks of the parts of a text decide in some families who sees whom: the answer must change no prompt.

    The answer is marked as the prompt's last token is (Gemma 3), or with one, apart from its prompt (PaliGemma).
    """
    if _causal(lens, batch, whole):
        return whole
    marks = whole.inputs["token_type_ids"].clone()
    marks[:, batch.mask.shape[1] :] = 1
    whole = replace(whole, inputs={**whole.inputs, "token_type_ids": marks})
    if _causal(lens, batch, whole):
        return whole
    raise UnsupportedError(
        f"{lens.name} sees the answer from its prompt in one pass, which it does not while it answers: what it said "
        "cannot be explained in one pass."
    )


def _causal(lens: Lens, batch: Batch, whole: Batch) -> bool:
    """Whether the prompts' last positions are the same with the answers behind them."""
    end = torch.zeros_like(whole.mask)
    end[:, batch.mask.shape[1] - 1] = True
    alone = Read("resid_post", layers=(0,), positions="last")
    there = alone.but(positions=end)
    one, two = lens.run(batch, alone).values[alone, 0].float(), lens.run(whole, there).values[there, 0].float()
    return float((one - two).norm()) <= 1e-2 * float(one.norm())


def _ends(lens: Lens) -> list[int]:
    """Ids that end an answer, or stand behind its end."""
    config: Any = lens.model.config
    found: set[int] = set()
    for owner in (getattr(lens.model, "generation_config", None), config, config.get_text_config()):
        for name in ("eos_token_id", "pad_token_id"):
            value = getattr(owner, name, None)
            found.update(i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int))
    return sorted(found)


def _more(name: str, value: Any, new: Tensor, real: Tensor, shape: tuple[int, int]) -> Tensor | None:
    """What stands behind an input of the prompt; None for inputs that are not of its tokens."""
    if not isinstance(value, Tensor) or value.shape[:2] != shape or name.startswith(("pixel", "image")):
        return None
    if value.ndim == 2 and name in ("input_ids", "attention_mask"):
        return new if name == "input_ids" else real
    if value.ndim == 2 and name == "mm_token_type_ids":
        return torch.zeros_like(new)
    if value.ndim == 2 and name == "token_type_ids":
        return value[:, -1:].expand_as(new)
    raise UnsupportedError(f"the input {name} {tuple(value.shape)} of the prompts cannot be continued.")


def _with_text(lens: Lens, batch: Batch, whole: Batch, new: Tensor, real: Tensor) -> Batch:
    tokenizer = tokenizer_of(lens.processor)
    if tokenizer is None or batch.tokens is None:
        return whole
    names = [tuple(map(str, tokenizer.convert_ids_to_tokens(row.tolist()))) for row in new]
    whole = replace(whole, tokens=tuple(a + b for a, b in zip(batch.tokens, names, strict=True)))
    if batch.texts is None or batch.offsets is None:
        return whole
    texts, offsets = [], []
    for text, spans, row, keep in zip(batch.texts, batch.offsets, new, real, strict=True):
        ids = row[keep].tolist()
        # A token's characters are those by which it makes the text longer, the space in front left out.
        parts = [tokenizer.decode(ids[:n], clean_up_tokenization_spaces=False) for n in range(len(ids) + 1)]
        gap = " " if parts[-1] and not (text[-1:].isspace() or parts[-1][0].isspace()) else ""
        start = len(text) + len(gap)
        spaces = [len(b[len(a) :]) - len(b[len(a) :].lstrip()) for a, b in pairwise(parts)]
        added = [(start + len(a) + n, start + len(b)) for (a, b), n in zip(pairwise(parts), spaces, strict=True)]
        texts.append(text + gap + parts[-1])
        offsets.append(spans + tuple(added) + ((0, 0),) * (len(row) - len(ids)))
    return replace(whole, texts=tuple(texts), offsets=tuple(offsets))
