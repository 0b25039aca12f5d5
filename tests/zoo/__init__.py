"""Tiny random models of many transformers families, with matching inputs and processors."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from . import _decoders, _encoders, _lvlms
from ._entry import Entry

__all__ = ["ZOO", "Entry", "build", "inputs", "processor"]

ZOO: dict[str, Entry] = {entry.name: entry for entry in [*_decoders.ENTRIES, *_encoders.ENTRIES, *_lvlms.ENTRIES]}


def build(name: str, *, attn_implementation: str | None = None) -> PreTrainedModel:
    """The tiny model of family ``name``: float32, eval mode, the same weights for every attention implementation."""
    return ZOO[name].build(attn_implementation=attn_implementation)


def inputs(name: str, *, batch: int = 2, length: int = 10, seed: int = 0) -> dict[str, Tensor]:
    """Keyword arguments for ``model(**inputs)``: unpadded rows without special tokens other than image ones."""
    return ZOO[name].inputs(batch, length, seed)


def processor(name: str) -> Any:
    """The family's tokenizer, image processor or processor, built locally."""
    return ZOO[name].processor()
