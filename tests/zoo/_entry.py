"""The record of one zoo family and the constants every tiny model shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ._tokenizer import BYTE_OFFSET, VOCAB
from ._weights import redraw

Kind = Literal["decoder", "encoder", "vision", "dual", "encoder-decoder", "lvlm", "ssm"]

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA: dict[str, Any] = TEXT | {"num_key_value_heads": 2}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


class Build(Protocol):
    """A model factory; the weights do not depend on ``attn_implementation``."""

    def __call__(self, *, attn_implementation: str | None = None) -> PreTrainedModel: ...


Inputs = Callable[[int, int, int], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Entry:
    """One family: its name, its kind, and how its tiny model, inputs and processor are made.

    ``sdpa`` is False where asking for sdpa is an error; ``interface`` is False where no attention of the model goes
    through ``ALL_ATTENTION_FUNCTIONS``, so that a registered attention function is never called.
    """

    name: str
    kind: Kind
    build: Build
    inputs: Inputs
    processor: Callable[[], Any]
    sdpa: bool = True
    interface: bool = True


def builder(class_name: str, config: Callable[[], PreTrainedConfig]) -> Build:
    """A factory of ``transformers.<class_name>`` from ``config`` with redrawn weights."""

    def build(*, attn_implementation: str | None = None) -> PreTrainedModel:
        cls = getattr(transformers, class_name)
        kwargs = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = cls._from_config(config(), dtype=torch.float32, **kwargs)
        redraw(model)
        return model.eval()

    return build


def text_ids(batch: int, length: int, seed: int) -> Tensor:
    """Random ids of plain byte tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(BYTE_OFFSET, VOCAB, (batch, length), generator=generator)


def text_inputs(batch: int, length: int, seed: int) -> dict[str, Tensor]:
    """``input_ids`` and an all-ones ``attention_mask``."""
    ids = text_ids(batch, length, seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
