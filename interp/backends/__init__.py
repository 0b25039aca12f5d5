"""Models of other libraries as transformers models, which is what a lens runs.

A HookedTransformer, a TransformerBridge (TransformerLens) and an nnsight model are known by the module that their class
comes from, so that no other library is imported before one of its models is given. Each becomes a transformers model on
the same parameters; the model that was given is not changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from interp.errors import InputError, UnsupportedError

BACKENDS = ("transformers", "HookedTransformer", "TransformerBridge", "nnsight")


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """What `interp.wrap` makes of the model that it was given.

    Attributes:
        model: the transformers model to run.
        processor: its tokenizer or processor, if there is one.
        backend: one of `BACKENDS`.
    """

    model: nn.Module
    processor: Any
    backend: str


def given(model: Any, processor: Any = None) -> Given:
    """A transformers model from a model of any back end.

    Raises:
        InputError: it is no model of a back end.
        UnsupportedError: the back end does not do what the model asks for; the message names it.
    """
    homes = {cls.__name__: cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    if homes.get("HookedTransformer") == "transformer_lens":
        from interp.backends.hooked import as_transformers

        return Given(as_transformers(model), model.tokenizer if processor is None else processor, "HookedTransformer")
    if homes.get("TransformerBridge") == "transformer_lens":
        from interp.backends.bridge import unbridged

        own = getattr(model, "processor", None) or model.tokenizer
        return Given(unbridged(model), own if processor is None else processor, "TransformerBridge")
    if "transformer_lens" in homes.values():
        raise UnsupportedError(
            f"a {type(model).__name__} is refused: of TransformerLens's models, HookedTransformer and "
            "TransformerBridge are taken. Wrap the transformers model that it was made from."
        )
    if homes.get("Envoy") == "nnsight":
        from interp.backends.envoys import inside

        found, own = inside(model)
        return Given(found, own if processor is None else processor, "nnsight")
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise InputError(
            "wrap takes a transformers PreTrainedModel, a HookedTransformer, a TransformerBridge or an nnsight model, "
            f"got {type(model).__name__}."
        )
    return Given(model, processor, "transformers")
