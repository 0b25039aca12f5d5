"""A sentence encoder whose logits are similarities: a classifier with one class for each of some sentences."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

import interp


class SimilarityEncoder(PreTrainedModel):
    """Mean-pooled BERT; `logits` [batch, n] are the cosines with n stored embeddings."""

    config_class = BertConfig
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.register_buffer("stored", torch.zeros(1, config.hidden_size))
        self.post_init()

    def embedding(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Unit vectors [batch, d_model]."""
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        wide = mask[:, :, None].to(states)
        return torch.nn.functional.normalize((states * wide).sum(1) / wide.sum(1), dim=-1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SequenceClassifierOutput:
        """The cosines."""
        return SequenceClassifierOutput(logits=self.embedding(input_ids, attention_mask) @ self.stored.T)  # type: ignore[arg-type]


def similarity_lens(texts: list[str]) -> interp.Lens:
    """MiniLM, with one class for each text: its similarity to it."""
    found = interp.load("minilm-l6", device="cpu")
    model = SimilarityEncoder(found.model.config).eval()
    weights = {k: v for k, v in found.model.state_dict().items() if not k.startswith("pooler.")}
    model.bert.load_state_dict(weights)
    with torch.no_grad():
        rows = found.prepare(texts)
        model.stored = model.embedding(rows.inputs["input_ids"], rows.inputs["attention_mask"])
    return interp.wrap(model, found.processor, name="minilm-l6")
