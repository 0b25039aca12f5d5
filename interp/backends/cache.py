"""A trace as TransformerLens's `ActivationCache`, which its own functions accept.

The cache holds what was read, under TransformerLens's names. What those functions ask of a model (sizes, W_O, W_U,
tokens) they get from a stand-in made of the lens's anatomy. As in a HookedTransformer with folded norms, the gain of
the final norm is multiplied into W_U, so that `logit_attrs` is the direct effect also where the norm has a gain; the
scale of the final norm is in the cache where the last layer's `resid_post` was read. The scales of the norms inside the
layers are not: `apply_ln` before another layer than the last is refused by TransformerLens itself.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.engine.anatomy import Anatomy, projection_matrix
from interp.engine.norms import FittedNorm
from interp.errors import InputError, MissingPackageError, SettingsError, UnsupportedError
from interp.reads import Read
from interp.sites import to_transformer_lens
from interp.trace import Trace


def activation_cache(trace: Trace, anatomy: Anatomy, config: Any, tokenizer: Any = None) -> Any:
    """A `transformer_lens.ActivationCache` of what was read.

    Args:
        trace: whole reads of the main tower: all positions, all heads, not reduced. Logits are left out.
        anatomy: of the lens that made it.
        config: of its model.
        tokenizer: for tokens given as strings.

    Raises:
        MissingPackageError: TransformerLens is not installed.
        SettingsError: a read is of some positions or heads only, or reduced.
        UnsupportedError: TransformerLens has no hook for a site, or the read is of another tower.
        InputError: nothing but logits was read.
    """
    try:
        from transformer_lens import ActivationCache
    except ImportError as error:
        raise MissingPackageError(
            "TransformerLens is not installed: pip install 'interp[transformer-lens]'."
        ) from error
    found: dict[str, Tensor] = {}
    for (read, layer), value in trace.values.items():
        if read.site != "logits":
            _check_whole(read, trace.main)
            found[to_transformer_lens(read.site, layer if read.row.per_layer else None)] = value
    if not found:
        raise InputError("the trace holds nothing for a cache: read sites such as 'resid_post' and 'z'.")
    stand_in = StandIn(anatomy, config, tokenizer)
    last = found.get(f"blocks.{len(stand_in.blocks) - 1}.hook_resid_post")
    if last is not None and stand_in.norm is not None:
        found["ln_final.hook_scale"] = 1 / stand_in.norm.scale(last)
    embed, start = found.get("hook_embed"), found.get("blocks.0.hook_resid_pre")
    if embed is not None and start is not None and not torch.equal(embed, start):
        found["hook_pos_embed"] = start - embed
    return ActivationCache(found, stand_in)


def _check_whole(read: Read, main: str) -> None:
    if read.tower not in (None, main):
        raise UnsupportedError(f"{read} is not of the tower {main!r}: a TransformerLens cache holds one tower.")
    whole = isinstance(read.positions, str) and read.positions == "all"
    if not whole or read.heads is not None or read.reduce is not None:
        raise SettingsError(
            f"{read} holds a part of its site; a TransformerLens cache holds all of it: read {read.site!r}."
        )


class StandIn:
    """What TransformerLens's functions on a cache ask of a model.

    Attributes:
        cfg: sizes under TransformerLens's names.
        blocks: layers with `attn.W_O`, `attn.b_O`, `mlp.W_out` and `mlp.b_out`.
        norm: the final norm, or None.
        tokenizer: for tokens given as strings.
    """

    def __init__(self, anatomy: Anatomy, config: Any, tokenizer: Any = None) -> None:
        tower = anatomy.towers[anatomy.main]
        self.anatomy, self.tokenizer = anatomy, tokenizer
        self.norm = _final_norm(anatomy)
        weight = next(p for layer in tower.layers for p in layer.module.parameters())
        parts = [layer.attention["attn"] for layer in tower.layers if "attn" in layer.attention]
        downs = [layer.down_proj for layer in tower.layers if layer.down_proj is not None]
        self.cfg = SimpleNamespace(
            n_layers=len(tower.layers),
            d_model=tower.d_model,
            n_heads=parts[0].n_heads if parts else 0,
            d_head=parts[0].d_head if parts else 0,
            d_mlp=projection_matrix(downs[0], "the MLP's last projection").shape[0] if downs else None,
            d_vocab=getattr(config, "vocab_size", None),
            n_ctx=getattr(config, "max_position_embeddings", None) or 2**31,
            attn_only=not any("mlp" in layer.branches for layer in tower.layers),
            parallel_attn_mlp=any(layer.parallel for layer in tower.layers),
            normalization_type=None if self.norm is None else "LNPre" if self.norm.center else "RMSPre",
            device=weight.device,
            dtype=weight.dtype,
        )
        self.blocks = [SimpleNamespace(attn=_Heads(layer), mlp=_Neurons(layer)) for layer in tower.layers]

    def ln_final(self, stream: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """The final norm without its gain."""
        if self.norm is None:
            return stream
        stream = stream - stream.mean(-1, keepdim=True) if self.norm.center else stream
        return stream * self.norm.scale(stream)

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding, the final norm's gain multiplied in."""
        head = self._head()
        size = projection_matrix(head.module, head.name).shape[1]
        return self._columns(torch.arange(size)).T

    def tokens_to_residual_directions(self, tokens: Any) -> Float[Tensor, "... d_model"]:
        """The columns of W_U of tokens: an id, a string of one token, or a tensor of ids."""
        ids = self.to_single_token(tokens) if isinstance(tokens, str) else tokens
        ids = torch.as_tensor(ids, dtype=torch.long)
        columns = self._columns(ids.reshape(-1))
        return columns[0] if ids.numel() == 1 else columns.unflatten(0, ids.shape)

    def to_single_token(self, text: str) -> int:
        """The id of a string that is one token.

        Raises:
            InputError: it is not, or there is no tokenizer.
        """
        ids = self._tokenizer()(text, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise InputError(f"{text!r} is {len(ids)} tokens, not one.")
        return ids[0]

    def to_tokens(self, text: Any) -> Tensor:
        """Ids [batch, pos] of a text; a tensor of ids is handed back."""
        if isinstance(text, Tensor):
            return text if text.ndim == 2 else text[None]
        return torch.tensor(self._tokenizer()([text] if isinstance(text, str) else text).input_ids)

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """The sum of the biases that were added to the stream before a layer."""
        total = torch.zeros(self.cfg.d_model, device=self.cfg.device)
        for block in self.blocks[:layer]:
            total = total + block.attn.b_O + (block.mlp.b_out if include_mlp_biases else 0.0)
        return total + self.blocks[layer].attn.b_O if mlp_input else total

    def _head(self) -> Any:
        if self.anatomy.unembed is None:
            raise UnsupportedError("the model's head is not a final norm and one projection.")
        return self.anatomy.unembed

    def _columns(self, ids: Tensor) -> Float[Tensor, "n d_model"]:
        found = self._head().direction(ids.to(self.cfg.device))
        return found if self.norm is None else found * self.norm.gain.to(found)

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise InputError("the lens has no tokenizer: give token ids.")
        return self.tokenizer


class _Heads:
    """W_O and b_O of a layer."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        return self._plain().weight().detach()

    @property
    def b_O(self) -> Tensor | float:
        bias = self._plain().bias()
        return 0.0 if bias is None else bias.detach()

    def _plain(self) -> Any:
        part = self._layer.attention.get("attn")
        if part is None or "result" in part.refused or part.chain:
            raise UnsupportedError(
                f"{self._layer.name}: heads are not added to the stream as z W_O alone; read `result` for the cache."
            )
        return part


class _Neurons:
    """W_out and b_out of a layer's MLP."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        return projection_matrix(self._plain(), f"{self._layer.name}'s last projection").detach()

    @property
    def b_out(self) -> Tensor | float:
        bias = getattr(self._plain(), "bias", None)
        return 0.0 if bias is None else bias.detach()

    def _plain(self) -> Any:
        down, parts = self._layer.down_proj, self._layer.branches.get("mlp", ())
        added = parts[0].module if len(parts) == 1 and not parts[0].scales else None
        # What is added is the projection's output, or comes from a module around it or without parameters (dropout).
        known = added is not None and (next(added.parameters(), None) is None or down in list(added.modules()))
        if down is None or not known:
            raise UnsupportedError(f"{self._layer.name}: no single projection ends its MLP and is added as it is.")
        return down


def _final_norm(anatomy: Anatomy) -> FittedNorm | None:
    head = anatomy.unembed
    if head is None or not head.norm_modules:
        return None
    if len(head.fitted) != 1 or head.fitted[0] is None:
        raise UnsupportedError(f"the final norm before {head.name} is neither LayerNorm nor RMSNorm.")
    return head.fitted[0]
