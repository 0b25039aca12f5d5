"""Entering a run at a layer: earlier layers are skipped, earlier positions come from the key/value cache."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from interp.engine.anatomy import Anatomy, Layer
from interp.errors import InputError, UnsupportedError


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """What a full run leaves for later runs that enter behind it.

    Attributes:
        key_values: the key/value cache of every layer.
        position_ids: the position ids that the tower was given [..., batch, pos], if it was given any.
        encoder_outputs: the encoder's output, for encoder-decoders.
    """

    key_values: Any = None
    position_ids: Tensor | None = None
    encoder_outputs: Any = None


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """Where a run begins.

    Attributes:
        layer: the first layer that is computed.
        resid: the residual stream that enters it [batch, pos, d_model], for the columns from `start` on.
        start: the first column that is computed; earlier ones come from `prefix`.
        prefix: the cache of a full run of the same batch (`lens.run(..., cache=True).cache`); needed if `start > 0`.
        tower: which tower; None for the main one.
    """

    layer: int
    resid: Float[Tensor, "batch pos d_model"]
    start: int = 0
    prefix: Prefix | None = None
    tower: str | None = None


def check_entry(entry: Entry, anatomy: Anatomy, width: int | None, has_images: bool) -> None:
    """Refuse an entry that the model cannot make.

    Raises:
        UnsupportedError: the tower's layers hand on more than the stream, or need state of skipped layers.
        InputError: the residual stream does not fit, or the prefix is missing.
    """
    tower, _ = anatomy.tower(entry.tower)
    first = tower.layer(entry.layer)
    blocked = [x.index for x in tower.layers[: first.index] if not x.skippable]
    if blocked:
        raise UnsupportedError(
            f"a run cannot enter tower {tower.name!r} above layer {blocked[0]}: its output holds more than the stream, "
            "which later layers need."
        )
    if entry.start:
        if tower.name != anatomy.main:
            raise UnsupportedError(f"tower {tower.name!r} attends in both directions: start must be 0.")
        if any("mixer" in x.branches for x in tower.layers):
            raise UnsupportedError("recurrent layers carry a state, not a key/value cache: start must be 0.")
        if entry.prefix is None or entry.prefix.key_values is None:
            raise InputError("entering at start > 0 needs the prefix of a full run: lens.run(batch, cache=True).cache.")
        if has_images and any(x.adjusted for x in tower.layers[first.index + 1 :]):
            raise UnsupportedError("image features are injected into later layers of this model: start must be 0.")
    if entry.resid.ndim != 3 - tower.packed or entry.resid.shape[-1] != tower.d_model:
        raise InputError(f"entry.resid is {tuple(entry.resid.shape)}; [batch, pos, {tower.d_model}] is needed.")
    if width is not None and tower.name == anatomy.main and entry.resid.shape[1] != width - entry.start:
        raise InputError(
            f"entry.resid holds {entry.resid.shape[1]} positions; from column {entry.start} on the batch has "
            f"{width - entry.start}."
        )


def fork(cache: Any, only: int | None = None) -> Any:
    """A key/value cache on the same tensors: it grows (and is cropped) on its own, since a cache makes new tensors.

    Args:
        cache: the cache.
        only: the one layer of it that will change, where just one will.
    """
    new = copy.copy(cache)
    if hasattr(cache, "is_updated"):
        new.self_attention_cache = fork(cache.self_attention_cache, only)
        new.cross_attention_cache = fork(cache.cross_attention_cache, only)
        new.is_updated = dict(cache.is_updated)
    else:
        new.layers = [copy.copy(x) if only in (None, i) else x for i, x in enumerate(cache.layers)]
    return new


def cropped(prefix: Prefix, start: int) -> Any:
    """The key/value cache with its first `start` columns only, which may grow without changing the prefix."""
    cache = fork(prefix.key_values)
    spare = cache.get_seq_length() - start
    if spare > 0:
        cache.crop(-spare)
    return cache


@contextmanager
def entered(entry: Entry | None, anatomy: Anatomy) -> Iterator[None]:
    """While open, forward calls skip the layers below the entry and begin with its stream."""
    if entry is None:
        yield
        return
    tower, _ = anatomy.tower(entry.tower)
    first = tower.layer(entry.layer)
    with ExitStack() as stack:
        for layer in tower.layers[: first.index]:
            stack.callback(handing_on(layer))
        key = first.in_key

        def begin(module: nn.Module, args: tuple, kwargs: dict) -> Any:
            if isinstance(key, int) and key < len(args):
                stream = entry.resid.to(args[key])
                return (*args[:key], stream, *args[key + 1 :]), kwargs
            name = "hidden_states" if isinstance(key, int) else key
            return args, {**kwargs, name: entry.resid.to(kwargs[name])}

        stack.callback(first.module.register_forward_pre_hook(begin, with_kwargs=True).remove)
        yield


def handing_on(layer: Layer, see: Callable[[tuple, dict], None] | None = None) -> Callable[[], None]:
    """Make a layer hand its input on; returns the function that undoes it. `see` gets what the layer is called with."""
    module, key = layer.module, layer.in_key
    own = module.__dict__.get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        if see is not None:
            see(args, kwargs)
        stream = args[key] if isinstance(key, int) and key < len(args) else None
        if stream is None:
            stream = kwargs["hidden_states" if isinstance(key, int) else key]
        if layer.out_form is None:
            return stream
        out: list[Any] = [None] * layer.out_form
        out[layer.out_path[0]] = stream
        return tuple(out)

    module.forward = forward

    def undo() -> None:
        if own is None:
            del module.forward
        else:
            module.forward = own

    return undo
