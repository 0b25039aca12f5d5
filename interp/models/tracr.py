"""Programs compiled to weights by tracr, as an ordinary transformers model.

Lindner et al. 2023, "Tracr: Compiled Transformers as a Laboratory for Interpretability". No norms, a ReLU MLP,
attention in both directions, softmax scaled by the square root of the key size. `config.residual_labels` names what
each dimension of the residual stream holds, which is the ground truth that a method can be checked against.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import ModelOutput

from interp.errors import InputError
from interp.models.tracr_config import TracrConfig


@dataclass
class TracrOutput(ModelOutput):
    """What a compiled program returns; `logits` are over the tokenizer's vocabulary, and mean nothing at `bos`."""

    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def eager_attention_forward(
    module: nn.Module,
    query: Float[Tensor, "batch head query d_head"],
    key: Float[Tensor, "batch head key d_head"],
    value: Float[Tensor, "batch head key d_head"],
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch query head d_head"], Float[Tensor, "batch head query key"]]:
    """Plain softmax attention: the mixed values, and the probabilities they were mixed with."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    pattern = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    mixed = nn.functional.dropout(pattern, p=dropout, training=module.training) @ value
    return mixed.transpose(1, 2).contiguous(), pattern


class TracrAttention(nn.Module):
    """Attention in both directions, with biases."""

    def __init__(self, config: TracrConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = 1
        self.scaling = config.head_dim**-0.5
        self.is_causal = False
        width = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width)
        self.k_proj = nn.Linear(config.hidden_size, width)
        self.v_proj = nn.Linear(config.hidden_size, width)
        self.o_proj = nn.Linear(width, config.hidden_size)

    def forward(
        self, hidden_states: Float[Tensor, "batch pos d_model"], attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Float[Tensor, "batch pos d_model"], Tensor | None]:
        """What attention adds to the residual stream, and the pattern where the implementation gives one."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            project(hidden_states).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "eager", eager_attention_forward
        )
        mixed, pattern = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(mixed.reshape(*hidden_states.shape[:-1], -1)), pattern


class TracrMLP(nn.Module):
    """Two linear maps with a ReLU between them."""

    def __init__(self, config: TracrConfig) -> None:
        super().__init__()
        self.fc_in = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act_fn = nn.ReLU()
        self.fc_out = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What the MLP adds to the residual stream."""
        return self.fc_out(self.act_fn(self.fc_in(hidden_states)))


class TracrLayer(nn.Module):
    """One layer: attention and MLP, each added to the residual stream."""

    def __init__(self, config: TracrConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = TracrAttention(config, layer_idx)
        self.mlp = TracrMLP(config)

    def forward(
        self, hidden_states: Float[Tensor, "batch pos d_model"], attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Float[Tensor, "batch pos d_model"], Tensor | None]:
        """The residual stream after this layer, and the attention pattern where there is one."""
        added, pattern = self.self_attn(hidden_states, attention_mask, **kwargs)
        hidden_states = hidden_states + added
        return hidden_states + self.mlp(hidden_states), pattern


class TracrModel(PreTrainedModel):
    """A compiled program: token and position embeddings, layers, and an unembedding that reads the answer off them."""

    config_class = TracrConfig
    config: TracrConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules = ["TracrLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: TracrConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.input_vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(TracrLayer(config, index) for index in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding; it has a row for every id that can be fed in."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding."""
        self.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        """The unembedding: each row picks out the residual dimension of one output symbol."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the unembedding."""
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "#batch pos"] | None = None,
        inputs_embeds: Float[Tensor, "batch pos d_model"] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> TracrOutput | tuple:
        """Run the program on padded tokens that begin with `bos`.

        Positions are counted over attended tokens, so padding on either side changes nothing. `attentions` are given
        by the eager implementation only. `hidden_states` holds the embedding and the stream after every layer.

        Raises:
            InputError: not exactly one of `input_ids` and `inputs_embeds`; more positions than the program was
                compiled for; or an id of a symbol that can only be an answer.
        """
        hidden = self._embed(input_ids, attention_mask, position_ids, inputs_embeds)
        mask = create_bidirectional_mask(self.config, hidden, attention_mask)
        hidden_states, attentions = [hidden], []
        for layer in self.layers:
            hidden, pattern = layer(hidden, mask, **kwargs)
            hidden_states.append(hidden)
            attentions.append(pattern)
        want_hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        want_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        output = TracrOutput(
            logits=self.lm_head(hidden),
            last_hidden_state=hidden,
            hidden_states=tuple(hidden_states) if want_hidden else None,
            attentions=tuple(attentions) if want_attentions else None,
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _embed(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> Tensor:
        if input_ids is not None and inputs_embeds is None:
            self._check_ids(input_ids)
            inputs_embeds = self.embed_tokens(input_ids)
        elif input_ids is not None or inputs_embeds is None:
            raise InputError("A tracr program takes either input_ids or inputs_embeds, and not both.")
        assert inputs_embeds is not None
        length, limit = inputs_embeds.shape[1], self.config.max_position_embeddings
        if position_ids is None:
            if attention_mask is not None and attention_mask.ndim == 2:
                position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
            else:
                position_ids = torch.arange(length, device=inputs_embeds.device)[None]
        if int(position_ids.max()) >= limit:
            raise InputError(
                f"{int(position_ids.max()) + 1} positions were given, but this program was compiled for {limit} at "
                f"most (bos and {limit - 1} tokens)."
            )
        return inputs_embeds + self.embed_positions(position_ids)

    def _check_ids(self, input_ids: Tensor) -> None:
        highest, limit = int(input_ids.max()), self.config.input_vocab_size
        if highest >= limit:
            raise InputError(
                f"Token id {highest} cannot be fed to this program: ids 0 to {limit - 1} are its inputs "
                f"(ids up to {self.config.vocab_size - 1} are symbols that it answers with)."
            )


AutoConfig.register(TracrConfig.model_type, TracrConfig, exist_ok=True)
AutoModel.register(TracrConfig, TracrModel, exist_ok=True)
