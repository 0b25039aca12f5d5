"""`wrap` and `load`: from a model, or from its name, to a lens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from interp.backends import given
from interp.lens import Lens

if TYPE_CHECKING:
    from interp.backends.remote import Remote


@overload
def wrap(
    model: Any,
    processor: Any = None,
    *,
    name: str | None = None,
    sample: Mapping[str, Any] | None = None,
    remote: Literal[False] = False,
) -> Lens: ...
@overload
def wrap(
    model: Any,
    processor: Any = None,
    *,
    name: str | None = None,
    sample: Mapping[str, Any] | None = None,
    remote: Literal[True] | str,
) -> Remote: ...
def wrap(
    model: Any,
    processor: Any = None,
    *,
    name: str | None = None,
    sample: Mapping[str, Any] | None = None,
    remote: bool | str = False,
) -> Lens | Remote:
    """Put a model under the lens; nothing in it is changed.

    Args:
        model: a transformers `PreTrainedModel`; a TransformerLens `HookedTransformer` or `TransformerBridge`; an
            nnsight `TransformersModel`, `LanguageModel`, `VisionLanguageModel`, or `NNsight` around such a model.
        processor: its tokenizer or processor, for `prepare` and decoded texts; that of the other library's model if
            left out.
        name: what it is called in results.
        sample: inputs of one forward pass on which to find its parts; made from the configuration if left out.
        remote: for an nnsight model, as in its `trace`: True reads it on NDIF, where its weights are and stay, and
            gives a [`Remote`][interp.backends.remote.Remote]; `"local"` is nnsight's simulation of that; another
            string is a host.

    Raises:
        InputError: it is no model of these kinds.
        UnsupportedError: the back end does not do what the model asks for; the message names it.
        AnatomyError: its parts were not found, or failed their proof.
    """
    if remote:
        from interp.backends.remote import Remote, hosted
        from interp.backends.twin import twin_of

        module, own = hosted(model)
        name = name or getattr(model, "repo_id", None) or type(module).__name__
        return Remote(
            model, Lens(twin_of(module), own if processor is None else processor, name=name, sample=sample), remote
        )
    found = given(model, processor)
    return Lens(found.model, found.processor, name=name, sample=sample, backend=found.backend)


def load(
    name: str,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Lens:
    """Load a model and wrap it.

    Args:
        name: a packaged model (`interp models`), a local folder, or a hub id.
        dtype: the parameters' dtype; None for the model's own (float32 for packaged models on a CPU).
        device: where to put it; None for the GPU where there is one.
        attn_implementation: `sdpa`, `eager`, `flash_attention_2`, ...; None for the model's default.
        trust_remote_code: whether code from the hub may run.
        revision: which revision on the hub.

    Raises:
        UnknownNameError: no such model.
        MissingPackageError: the package that holds it is not installed.
        FileError: its files are damaged, or the hub cannot be reached.
    """
    from interp import models

    model, processor = models.load(
        name,
        dtype=dtype,
        device=device,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        revision=revision,
    )
    return wrap(model, processor, name=name)
