"""A small random model built like one whose weights are elsewhere, so that its parts can be found without them.

It is of the same class and depth. Where the model is large, widths are cut down to two heads of the same size; whether
every module is there under the same name and of the same class is checked.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from interp.engine.probe import text_config
from interp.errors import UnsupportedError

SMALL = 50_000_000
LARGEST = 500_000_000
_INNER = (
    "intermediate_size ffn_dim n_inner ffn_hidden_size moe_intermediate_size shared_expert_intermediate_size "
    "word_embed_proj_dim"
).split()


def twin_of(module: Any) -> nn.Module:
    """A random model of the same class and depth, narrower where the model has more than 50 million parameters.

    Args:
        module: a transformers model, on any device (`meta` too); nothing but its structure is looked at.

    Raises:
        UnsupportedError: it has more than a text tower, or no small model with the same modules could be made.
    """
    name, config = type(module).__name__, copy.deepcopy(module.config)
    if text_config(config) is not config or getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(f"a remote {name} is refused: models with one tower of text alone are read remotely.")
    try:
        if _size(module) > SMALL:
            _narrow(config)
        with torch.device("meta"):
            outline = type(module)(config)
        wanted, found = _modules(module), _modules(outline)
        if wanted != found:
            other = sorted(dict(wanted.items() ^ found.items()))
            raise ValueError(f"{len(other)} of its modules are others, {other[0]!r} among them")
        if _size(outline) > LARGEST:
            raise ValueError(f"it has {_size(outline):,} parameters, more than {LARGEST:,}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return type(module)(config).float().eval()
    except Exception as error:
        raise UnsupportedError(
            f"a remote {name} is refused: its parts are found on a small random model made from its configuration, "
            f"which did not work out: {error}. Trace it with nnsight."
        ) from error


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _modules(module: nn.Module) -> dict[str, type]:
    return {name: type(m) for name, m in module.named_modules()}


def _narrow(config: Any) -> None:
    """Two heads, of one key/value head where they share, and a stream and MLP as wide as that asks for."""
    heads, shared = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    width = 2 * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    config.num_attention_heads, config.hidden_size = 2, width
    if shared is not None:
        config.num_key_value_heads = 2 if shared == heads else 1
    for name in _INNER:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, min(getattr(config, name), width))
