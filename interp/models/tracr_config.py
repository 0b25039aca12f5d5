"""The configuration of a program compiled by tracr."""

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig


class TracrConfig(PretrainedConfig):
    """The shape of a compiled program and the names of what it computes.

    `residual_labels` has one name per residual dimension (`"tokens:a"`, `"indices:0"`, ...). Token ids below
    `input_vocab_size` can be fed in; the others are symbols that the program only ever answers with. `vocab_size`
    counts both: the logits' last axis is the tokenizer's vocabulary.
    """

    model_type = "interp_tracr"

    def __init__(
        self,
        vocab_size: int = 5,
        input_vocab_size: int = 5,
        hidden_size: int = 8,
        num_hidden_layers: int = 1,
        num_attention_heads: int = 1,
        head_dim: int = 8,
        intermediate_size: int = 8,
        max_position_embeddings: int = 6,
        residual_labels: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.input_vocab_size = input_vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.head_dim = head_dim
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.residual_labels = list(residual_labels)
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)
