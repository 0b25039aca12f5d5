"""From prompts, images or ready tensors to a `Batch`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor, nn

from interp.batch import Batch
from interp.engine.probe import longest, text_config, vocabulary
from interp.errors import InputError, MissingPackageError, unknown
from interp.grids import image_token_ids, patches_of


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor, the tokenizer itself, or None."""
    if processor is None:
        return None
    inner = getattr(processor, "tokenizer", None)
    if inner is not None:
        return inner
    return processor if hasattr(processor, "convert_ids_to_tokens") else None


def batch_of(tensors: Mapping[str, Any], config: Any, *, takes: set[str] | None = None, side: str = "right") -> Batch:
    """A batch from the model's own input tensors.

    Args:
        tensors: inputs by name; ids may be lists of different lengths.
        config: the model's configuration.
        takes: names that the model's forward takes; None to trust the caller.
        side: padding side for lists of ids.

    Raises:
        InputError: an unknown input, ragged masks, ids outside the vocabulary, prompts that are empty or too long.
    """
    inputs: dict[str, Any] = {k: v for k, v in tensors.items() if v is not None}
    if takes is not None and "kwargs" not in takes:
        strange = [k for k in inputs if k not in takes]
        if strange:
            raise unknown("input", strange[0], sorted(takes), where="the model's forward")
    elif takes is not None:
        known = takes | {"input_ids", "attention_mask", "position_ids", "inputs_embeds", "mm_token_type_ids"}
        strange = [k for k in inputs if k not in known and not k.startswith(("pixel", "image", "video"))]
        if strange:
            raise unknown("input", strange[0], sorted(known - {"kwargs", "args"}), where="the model's forward")
    for name in ("input_ids", "decoder_input_ids"):
        value = inputs.get(name)
        if value is not None and not isinstance(value, Tensor):
            ids, mask = pad_ids(value, pad_id(config), side)
            inputs[name] = ids
            inputs.setdefault("attention_mask" if name == "input_ids" else "decoder_attention_mask", mask.long())
    seq2seq = bool(getattr(config, "is_encoder_decoder", False)) and "decoder_input_ids" in inputs
    main = inputs.get("decoder_input_ids") if seq2seq else inputs.get("input_ids")
    key = "decoder_attention_mask" if seq2seq else "attention_mask"
    for name in ("input_ids", "decoder_input_ids"):
        if name in inputs:
            check_ids(name, inputs[name], config)
    if main is None:
        embeds = inputs.get("inputs_embeds")
        first = next((v for v in inputs.values() if isinstance(v, Tensor)), None)
        if embeds is not None:
            main = embeds[..., 0]
        elif first is not None:
            main = first.new_ones(first.shape[0], 1)
        else:
            raise InputError(f"no tensor among the inputs: {sorted(inputs)}.")
    mask = inputs.get(key)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        if mask.shape != main.shape:
            raise InputError(f"{key} {tuple(mask.shape)} does not fit the tokens {tuple(main.shape)}.")
        real = mask.bool()
        if not bool(real.any(1).all()):
            raise InputError(f"sample {int((~real.any(1)).nonzero()[0])} is empty: its {key} is all zero.")
    else:
        real = torch.ones(main.shape[:2], dtype=torch.bool, device=main.device)
    source = None
    if seq2seq and "input_ids" in inputs:
        given = inputs.get("attention_mask")
        source = torch.ones_like(inputs["input_ids"], dtype=torch.bool) if given is None else given.bool()
    ids = image_token_ids(config)
    image = None
    if "input_ids" in inputs and ids and any(n.startswith("pixel") for n in inputs):
        image = torch.isin(inputs["input_ids"], torch.tensor(ids, device=inputs["input_ids"].device))
    return Batch(inputs, real, source, image_mask=image)


def check_ids(name: str, ids: Tensor, config: Any) -> None:
    """Refuse ids that are no [batch, pos] tensor of the vocabulary, or more positions than the model has."""
    if ids.ndim != 2 or ids.shape[1] == 0 or ids.shape[0] == 0:
        raise InputError(f"{name} must be [batch, pos] with at least one token, got {tuple(ids.shape)}.")
    if ids.is_floating_point():
        raise InputError(f"{name} must be integers, got {ids.dtype}.")
    top = _ids(config)
    bad = (ids < 0) | (ids >= top)
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        raise InputError(
            f"{name}[{row}, {column}] is {int(ids[row, column])}; the vocabulary has {top} (0 to {top - 1})."
        )
    limit = longest(config)
    if limit is not None and ids.shape[1] > limit:
        raise InputError(f"{name} holds {ids.shape[1]} positions, but the model can take {limit}: shorten the prompts.")


def _ids(config: Any) -> int:
    """How many ids there are."""
    return getattr(text_config(config), "vocab_size", None) or vocabulary(config)


def pad_id(config: Any) -> int:
    """An id of the vocabulary to fill padding with; the mask hides it."""
    size = _ids(config)
    for owner in (config, text_config(config)):
        for name in ("pad_token_id", "eos_token_id"):
            value = getattr(owner, name, None)
            value = value[0] if isinstance(value, list) else value
            if isinstance(value, int) and 0 <= value < size:
                return value
    return 0


def pad_ids(rows: Sequence[Sequence[int]], fill: int, side: str) -> tuple[Tensor, Tensor]:
    """Lists of ids as one tensor [batch, pos] and its mask.

    Raises:
        InputError: there are no rows, or an empty one.
    """
    if len(rows) == 0:
        raise InputError("no prompts were given.")
    for i, row in enumerate(rows):
        if len(row) == 0:
            raise InputError(f"prompt {i} has no tokens.")
    width = max(len(r) for r in rows)
    ids = torch.full((len(rows), width), fill, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, where] = torch.tensor(list(row), dtype=torch.long)
        mask[i, where] = True
    return ids, mask


def _texts(texts: Any) -> list[str]:
    rows = [texts] if isinstance(texts, str) else list(texts)
    if not rows:
        raise InputError("no prompts were given.")
    for i, t in enumerate(rows):
        if not isinstance(t, str):
            raise InputError(f"prompt {i} is a {type(t).__name__}; prompts are strings.")
        if not t.strip():
            raise InputError(f"prompt {i} is empty.")
    return rows


def prepare_texts(model: nn.Module, processor: Any, texts: Any, targets: Any, side: str, special: bool) -> Batch:
    """A batch from prompts; see `Lens.prepare`."""
    rows = _texts(texts)
    tokenizer = tokenizer_of(processor)
    if tokenizer is None:
        raise InputError("prompts need a tokenizer: interp.wrap(model, processor), or prepare(input_ids=...).")
    config: Any = model.config
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else pad_id(config)
    encoded = tokenizer(rows, add_special_tokens=special, return_offsets_mapping=bool(tokenizer.is_fast))
    ids, mask = pad_ids(encoded["input_ids"], fill, side)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long()}
    if not getattr(config, "is_encoder_decoder", False):
        if targets is not None:
            raise InputError("targets are for encoder-decoders; this model reads its prompt only.")
        batch = batch_of(inputs, config)
        return _with_text(batch, tokenizer, rows, encoded.get("offset_mapping"), side)
    if targets is None:
        start = getattr(config, "decoder_start_token_id", None)
        start = pad_id(config) if start is None else start
        inputs["decoder_input_ids"] = torch.full((len(rows), 1), start)
    else:
        wanted = _texts(targets)
        if len(wanted) != len(rows):
            raise InputError(f"{len(wanted)} targets for {len(rows)} prompts.")
        decoder, decoder_mask = pad_ids(tokenizer(wanted)["input_ids"], fill, "right")
        inputs |= {"decoder_input_ids": decoder, "decoder_attention_mask": decoder_mask.long()}
    return _with_text(batch_of(inputs, config), tokenizer, None, None, "right", inputs["decoder_input_ids"])


def _with_text(
    batch: Batch, tokenizer: Any, rows: list[str] | None, offsets: Any, side: str, ids: Tensor | None = None
) -> Batch:
    columns: Tensor = batch.inputs["input_ids"] if ids is None else ids
    tokens = tuple(tuple(map(str, tokenizer.convert_ids_to_tokens(row.tolist()))) for row in columns)
    spans = None
    if offsets is not None:
        width = columns.shape[1]
        spans = tuple(
            tuple(map(tuple, row)) + ((0, 0),) * (width - len(row))
            if side == "right"
            else ((0, 0),) * (width - len(row)) + tuple(map(tuple, row))
            for row in offsets
        )
    return replace(batch, texts=None if rows is None else tuple(rows), tokens=tokens, offsets=spans)


def prepare_images(model: nn.Module, processor: Any, texts: Any, images: Any, side: str) -> Batch:
    """A batch from images, with prompts or alone; see `Lens.prepare`."""
    config: Any = model.config
    if getattr(model, "main_input_name", "input_ids") != "pixel_values" and not hasattr(config, "vision_config"):
        raise InputError(f"{type(model).__name__} takes no images; leave images out.")
    if processor is None:
        raise InputError(
            "images need the model's processor: interp.wrap(model, processor), or prepare(pixel_values=...)."
        )
    if texts is None:
        inner = getattr(processor, "image_processor", processor)
        flat = [x for row in _nested(images, None) for x in row]
        return batch_of(dict(inner(images=flat, return_tensors="pt")), config)
    rows = _texts(texts)
    nested = _nested(images, len(rows))
    _check_placeholders(processor, rows, nested)
    tokenizer = tokenizer_of(processor)
    if tokenizer.pad_token_id is None:
        raise InputError("the processor's tokenizer has no padding token; set tokenizer.pad_token first.")
    before, tokenizer.padding_side = tokenizer.padding_side, side
    try:
        given: Any = nested if any(nested) else None
        encoded = dict(processor(images=given, text=rows, return_tensors="pt", padding=True))
    except ImportError as error:
        raise MissingPackageError(f"the processor of {type(model).__name__} needs a package: {error}") from error
    finally:
        tokenizer.padding_side = before
    takes = set(inspect.signature(model.forward).parameters)
    inputs = {k: v for k, v in encoded.items() if isinstance(v, Tensor) and (k in takes or "kwargs" in takes)}
    inputs.pop("labels", None)
    batch = batch_of(inputs, config)
    plain = tokenizer(rows, return_offsets_mapping=True) if tokenizer.is_fast else None
    offsets = None
    if plain is not None:
        offsets = [
            aligned_offsets(i, o, inputs["input_ids"][n][batch.mask[n]].tolist())
            for n, (i, o) in enumerate(zip(plain["input_ids"], plain["offset_mapping"], strict=True))
        ]
    batch = _with_text(batch, tokenizer, rows, offsets, side)
    sizes = tuple(tuple(_size(x) for x in row) for row in nested)
    return replace(batch, patches=patches_of(config, processor, batch, sizes))


def aligned_offsets(ids: Sequence[int], offsets: Sequence[tuple[int, int]], expanded: Sequence[int]) -> list[tuple]:
    """Character spans of a tokenised prompt after the processor replaced placeholders by image tokens.

    Tokens that the processor put in get an empty span.
    """
    out: list[tuple] = [(0, 0)] * len(expanded)
    for a, b, n in SequenceMatcher(None, list(ids), list(expanded), autojunk=False).get_matching_blocks():
        for i in range(n):
            out[b + i] = tuple(offsets[a + i])
    return out


def _size(image: Any) -> tuple[int, int]:
    if hasattr(image, "size") and isinstance(image.size, tuple):
        return image.size
    shape = tuple(image.shape)
    return (shape[-1], shape[-2]) if shape[0] in (1, 3, 4) and shape[-1] not in (1, 3, 4) else (shape[1], shape[0])


def _nested(images: Any, rows: int | None) -> list[list[Any]]:
    """Images as one list for each prompt."""
    if not isinstance(images, (list, tuple)):
        images = [images]
    if len(images) == 0:
        raise InputError("images is an empty list.")
    nested = [list(x) if isinstance(x, (list, tuple)) else ([] if x is None else [x]) for x in images]
    if rows is not None and len(nested) != rows:
        raise InputError(f"images for {len(nested)} prompts were given, but there are {rows} prompts.")
    for i, row in enumerate(nested):
        for image in row:
            if not hasattr(image, "size") and not hasattr(image, "shape"):
                raise InputError(f"an image of prompt {i} is a {type(image).__name__}; give PIL images or arrays.")
    return nested


def placeholder(processor: Any) -> str | None:
    """What stands for an image in a prompt of this processor."""
    for name in ("boi_token", "image_token", "fake_image_token"):
        token = getattr(processor, name, None)
        token = getattr(token, "content", token)
        if isinstance(token, str) and not (name == "boi_token" and "start" not in token):
            return token
    return None


def _check_placeholders(processor: Any, rows: list[str], nested: list[list[Any]]) -> None:
    token = placeholder(processor)
    if token is None or "PaliGemma" in type(processor).__name__:
        return  # PaliGemma puts the image tokens in front by itself
    for i, (text, row) in enumerate(zip(rows, nested, strict=True)):
        count = text.count(token)
        if count != len(row):
            raise InputError(
                f"prompt {i} holds the image placeholder {token!r} {count} times, but has {len(row)} images: "
                f"{text[:80]!r}"
            )
