"""The transformers model inside an nnsight model."""

from __future__ import annotations

from typing import Any

from torch import nn

from interp.errors import InputError, UnsupportedError


def inside(model: Any) -> tuple[nn.Module, Any]:
    """The module that an nnsight model wraps, with its weights, and its processor or tokenizer.

    nnsight loads the weights when they are first needed; if it has not yet, it does now.

    Raises:
        InputError: what it wraps is no transformers model.
        UnsupportedError: the model runs elsewhere (vLLM), or has edits of its own that would not be run here.
    """
    if any("vllm" in cls.__module__ for cls in type(model).__mro__):
        raise UnsupportedError(f"an nnsight {type(model).__name__} is refused: vLLM's workers are out of reach.")
    check_unedited(model)
    if hasattr(model, "dispatch"):
        model.dispatch()
    module = model._module
    if not hasattr(module, "config"):
        raise InputError(f"the nnsight model wraps a {type(module).__name__}, which is no transformers model.")
    return module, getattr(model, "processor", None) or getattr(model, "tokenizer", None)


def check_unedited(model: Any) -> None:
    """Refuse a model with edits of its own."""
    edited = [envoy.path for envoy in _envoys(model) if envoy._edits]
    if edited:
        raise UnsupportedError(
            f"the nnsight model has edits of its own ({edited[0]}), which interp would not run: clear_edits() first."
        )


def _envoys(envoy: Any) -> list[Any]:
    return [envoy, *(inner for child in envoy._children for inner in _envoys(child))]
