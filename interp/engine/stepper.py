"""Layers called one at a time, on rows that are copies of a batch's samples.

A run goes through the model once, with one number of rows. A stepper calls single layers instead: each with a stream
of its own, with as many rows as the caller has by then, behind the keys and values of a run that was made before. What
else a layer is given (masks, rotary angles, the encoder's output) is noted from the model's own forward call, in which
every layer is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.batch import Batch
from interp.edits import Edit
from interp.engine.anatomy import Anatomy, Layer, stream_of
from interp.engine.attention import AttentionCall, Handler, tapped
from interp.engine.entry import Entry, Prefix, cropped, fork, handing_on
from interp.engine.hooks import attached
from interp.engine.plan import make_plan
from interp.engine.recorder import Recorder, Stop
from interp.engine.run import alone, enter_inputs, evaluating, parameters_of, plain_attention
from interp.engine.shared import SharedPrefix, Unfit
from interp.errors import InputError, UnsupportedError
from interp.reads import Read

_PROBES = 5, 7
"""Two numbers of rows: the axis of an argument that follows them is its row axis."""

Arguments = tuple[tuple, dict[str, Any]]
Keys = tuple[Tensor, Tensor]


class Stepper:
    """The main tower's layers, to be called one at a time. Made by `Lens.stepper`.

    Attributes:
        batch: the samples.
        prefix: keys and values of a full run of the batch, or None.
        joins: whether keys before the rows' own have to be copied for each of them.
        numbers: each layer's number in the key/value cache; None where its modules do not agree on one.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, batch: Batch, prefix: Prefix | None = None) -> None:
        self.model, self.anatomy, self.batch, self.prefix = model, anatomy, batch, prefix
        self.layers = anatomy.towers[anatomy.main].layers
        blocked = [x.index for x in self.layers if not x.skippable]
        if blocked:
            raise UnsupportedError(
                f"the layers of tower {anatomy.main!r} cannot be called alone: the output of layer {blocked[0]} holds "
                "more than the stream."
            )
        if any(n.startswith("cross_attention") for n in batch.inputs):
            raise UnsupportedError("this model's layers look at images through cross-attention: they need a whole run.")
        self.joins = False
        self.numbers = [_number(x) for x in self.layers]
        self._known: dict[int, list[dict[tuple, int]]] = {}

    def rows(self, samples: Int[Tensor, " row"], start: int = 0) -> Rows:
        """Rows that are copies of samples, for the columns from `start` on.

        Args:
            samples: which sample each row is a copy of.
            start: the first column; earlier ones come from the prefix.

        Raises:
            InputError: `start` needs a prefix, or is no column.
            UnsupportedError: the layers carry a state, or the prefix does not say whose keys are whose.
        """
        if not 0 <= start < self.batch.mask.shape[1]:
            raise InputError(f"start {start} is no column of a batch that has {self.batch.mask.shape[1]}.")
        return Rows(self, samples, start, self._noted(samples, start))

    def axes(self, start: int) -> list[dict[tuple, int]]:
        """For each layer, the row axis of every tensor that it is given."""
        if start not in self._known:
            # The most padded samples first: for rows without any padding a model may do without a mask.
            padded = self.batch.mask.sum(1).argsort()
            every = padded[torch.arange(max(_PROBES), device=padded.device) % len(padded)]
            one, two = (self._noted(every[:n], start) for n in _PROBES)
            self._known[start] = [_axes(a, b) for a, b in zip(one, two, strict=True)]
        return self._known[start]

    def _noted(self, samples: Tensor, start: int) -> list[Arguments]:
        """What the model gives each layer for these rows."""
        tower = self.anatomy.towers[self.anatomy.main]
        width = self.batch.mask.shape[1] - start
        noted: list[Arguments] = []

        def note(layer: Layer) -> Callable[[tuple, dict], None]:
            def see(args: tuple, kwargs: dict) -> None:
                noted.append((args, kwargs))
                if layer.index == len(self.layers) - 1:
                    raise Stop

            return see

        inputs = dict(self.batch.inputs)
        resid = torch.empty(len(self.batch), width, tower.d_model, device="meta")
        offset = enter_inputs(inputs, Entry(0, resid, start, self.prefix), self.anatomy, self.batch, positions=True)
        assert offset == start
        if start and "position_ids" not in inputs and any(hasattr(m, "rope_deltas") for m in self.model.modules()):
            # Such a model would add what it remembers of the last image; a text has none.
            ids = (self.batch.mask.long().cumsum(-1) - 1).clamp_min(0)
            inputs["position_ids"] = ids[:, start:]
        keys = inputs.get("past_key_values")
        if keys is None and self.prefix is not None and getattr(self.prefix.key_values, "is_updated", None):
            keys = inputs["past_key_values"] = cropped(self.prefix, start)  # spares the keys of the encoder's output
        inputs = {name: _rows_of(name, value, samples, len(self.batch)) for name, value in inputs.items()}
        if "use_cache" in parameters_of(self.model) and (keys is not None or plain_attention(self.anatomy)):
            inputs["use_cache"] = keys is not None
        with ExitStack() as stack:
            stack.enter_context(alone(self.model))
            stack.enter_context(evaluating(self.model))
            stack.enter_context(torch.no_grad())
            for layer in self.layers:
                stack.callback(handing_on(layer, note(layer)))
            with suppress(Stop):
                self.model(**inputs)
        if len(noted) != len(self.layers):
            raise UnsupportedError(f"{len(noted)} of {len(self.layers)} layers are called once each in a forward pass.")
        return noted


class Rows:
    """Some rows of a stepper, behind one column. Made by `Stepper.rows`."""

    def __init__(self, stepper: Stepper, samples: Tensor, start: int, noted: list[Arguments]) -> None:
        self.stepper, self.samples, self.start, self._noted = stepper, samples, start, noted

    def step(
        self,
        layer: int,
        stream: Float[Tensor, "row pos d_model"],
        edits: Sequence[Edit] = (),
        *,
        keys: Keys | None = None,
    ) -> Float[Tensor, "row pos d_model"]:
        """One layer.

        Args:
            layer: its index.
            stream: what enters it, for the first rows, as many as there are, and the columns from `start` on.
            edits: changes inside the layer, at all positions; a change finds its rows in the order of the stream.
            keys: the rows' own keys and values before `start`, where they are not those of the prefix.

        Returns:
            What leaves it.
        """
        own = self.stepper.layers[layer]
        shared = None if edits or keys is not None else self._shared(own, stream)
        if shared is not None:
            try:
                return self._call(own, stream, None, shared.attend, None, joined=False)
            except Unfit:
                self.stepper.joins = True
        recorder = self._recorder((), edits) if edits else None
        out = self._call(own, stream, recorder, None, keys)
        if recorder is not None:
            recorder.finish()
        return out

    def read(
        self, layer: int, stream: Float[Tensor, "row pos d_model"], site: str, edits: Sequence[Edit] = ()
    ) -> Tensor:
        """What a site of a layer holds, at all positions; what follows it in the layer is not computed.

        Args:
            layer: its index.
            stream: what enters it, as in `step`.
            site: the site's name.
            edits: changes inside the layer, up to the site.
        """
        wanted = Read(site, layers=(layer,))
        recorder = self._recorder((wanted,), edits)
        recorder.stop = True
        with suppress(Stop):
            self._call(self.stepper.layers[layer], stream, recorder, None, None)
        return recorder.finish()[0][wanted, layer]

    def keys(self, layer: int, stream: Float[Tensor, "row pos d_model"]) -> Keys | None:
        """The keys and values [row, kv_head, pos, d] of a layer, those of the prefix in front; None if out of reach.

        The layer stops before its attention: what follows is not computed.
        """
        own, found = self.stepper.layers[layer], []

        def see(call: AttentionCall, delegate: Callable[[AttentionCall], tuple]) -> tuple:
            found.append((call.key, call.value))
            raise Stop

        if "attn" not in own.attention or self.stepper.numbers[layer] is None or self.stepper.prefix is None:
            return None
        with suppress(Stop):
            self._call(own, stream, None, see, None)
        fits = len(found) == 1 and found[0][0].shape[2] == self.start + stream.shape[1]
        return found[0] if fits else None

    def _call(
        self,
        own: Layer,
        stream: Tensor,
        recorder: Recorder | None,
        attend: Handler | None,
        keys: Keys | None,
        *,
        joined: bool = True,
    ) -> Tensor:
        args, kwargs = self._given(own, len(stream), joined, keys)
        key = own.in_key if not isinstance(own.in_key, int) or own.in_key < len(args) else "hidden_states"
        if isinstance(key, int):
            args = (*args[:key], stream, *args[key + 1 :])
        else:
            kwargs[key] = stream
        with ExitStack() as stack:
            stack.enter_context(alone(self.stepper.model))
            stack.enter_context(evaluating(own.module))
            stack.enter_context(torch.no_grad())
            if attend is not None:
                stack.enter_context(tapped({own.attention["attn"].module: attend}))
            if recorder is not None:
                stack.enter_context(attached(recorder))
            return stream_of(own.module(*args, **kwargs), own.out_path).to(stream.device)

    def _recorder(self, reads: Sequence[Read], edits: Sequence[Edit]) -> Recorder:
        anatomy, batch = self.stepper.anatomy, self.stepper.batch
        return Recorder(make_plan(anatomy, reads, edits), anatomy, batch, offset=self.start)

    def _shared(self, layer: Layer, stream: Tensor) -> SharedPrefix | None:
        """The keys and values before the rows' own, where it pays not to copy them for each row."""
        part, prefix = layer.attention.get("attn"), self.stepper.prefix
        if part is None or not self.start or self.stepper.joins or prefix is None or "pattern" in part.refused:
            return None
        number = self.stepper.numbers[layer.index]
        held = getattr(prefix.key_values, "self_attention_cache", prefix.key_values).layers
        if number is None or number >= len(held) or not held[number].is_initialized:
            return None
        keys, values = (x[:, :, : self.start] for x in (held[number].keys, held[number].values))
        found = SharedPrefix(keys, values, self.samples[: len(stream)].to(keys.device))
        return found if found.pays(part.n_heads, stream.shape[1]) else None

    def _given(self, layer: Layer, count: int, joined: bool, keys: Keys | None) -> Arguments:
        """The layer's arguments for the first rows; `joined` says whether keys before their own are among them."""
        args, kwargs = self._noted[layer.index]
        # Which axis the rows are is asked only where fewer are wanted: it takes two more forward calls.
        axes = {} if count == len(self.samples) else self.stepper.axes(self.start)[layer.index]
        cache: list[Any] = []

        def some(path: tuple, value: Any) -> Any:
            if hasattr(value, "get_seq_length"):
                if not cache:
                    cache.append(self._cache(value, layer, count, joined, keys))
                return cache[0]
            axis = axes.get(path)
            return value if axis is None or not isinstance(value, Tensor) else value.narrow(axis, 0, count)

        return _mapped(args, some, (0,)), _mapped(kwargs, some, (1,))

    def _cache(self, cache: Any, layer: Layer, count: int, joined: bool, keys: Keys | None) -> Any:
        """A copy of the key/value cache in which this layer's keys are those of the rows."""
        number = self.stepper.numbers[layer.index]
        cache = fork(cache, number)
        if number is None:
            if cache.get_seq_length():
                raise UnsupportedError(f"{layer.name} does not say which keys of the cache are its own.")
            return cache
        main = getattr(cache, "self_attention_cache", cache)
        for part in dict.fromkeys((main, getattr(cache, "cross_attention_cache", main))):
            if number < len(part.layers) and part.layers[number].is_initialized:
                own = part.layers[number]
                if part is main and keys is not None:
                    own.keys, own.values = keys
                    continue
                pieces = (own.keys, own.values)
                if part is main and not joined:
                    pieces = tuple(x[:, :, :0] for x in pieces)
                own.keys, own.values = (self._copies(x, count) for x in pieces)
        return cache

    def _copies(self, value: Tensor, count: int) -> Tensor:
        if len(value) == 1:
            return value.expand(count, *value.shape[1:])
        return value.index_select(0, self.samples[:count].to(value.device))


def _number(layer: Layer) -> int | None:
    """The layer's number in the key/value cache, if its modules agree on one."""
    found = {getattr(m, "layer_idx", None) for m in layer.module.modules()} - {None}
    return found.pop() if len(found) == 1 else None


def _rows_of(name: str, value: Any, samples: Tensor, size: int) -> Any:
    """A model input for rows that are copies of samples."""
    if name == "encoder_outputs":
        return type(value)(last_hidden_state=_rows_of("", value.last_hidden_state, samples, size))
    if not isinstance(value, Tensor) or value.ndim < 2:
        return value
    axis = 1 if name == "position_ids" and value.ndim == 3 else 0
    if value.shape[axis] != size:
        if value.shape[axis] == 1:
            return value
        raise UnsupportedError(f"{name} {tuple(value.shape)} is packed over samples: its rows cannot be told apart.")
    return value.index_select(axis, samples.to(value.device))


def _mapped(value: Any, function: Callable[[tuple, Any], Any], path: tuple) -> Any:
    """A nest of tuples, lists and dicts with a function applied to its leaves."""
    if isinstance(value, dict):
        return {k: _mapped(v, function, (*path, k)) for k, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_mapped(v, function, (*path, i)) for i, v in enumerate(value))
    return function(path, value)


def _axes(one: Arguments, two: Arguments) -> dict[tuple, int]:
    """The axis of each tensor that has as many entries as there are rows."""
    shapes: dict[tuple, tuple[int, ...]] = {}
    found: dict[tuple, int] = {}

    def keep(path: tuple, value: Any) -> None:
        if isinstance(value, Tensor):
            shapes[path] = tuple(value.shape)

    def compare(path: tuple, value: Any) -> None:
        if isinstance(value, Tensor) and path in shapes:
            differ = [i for i, (a, b) in enumerate(zip(shapes[path], value.shape, strict=True)) if a != b]
            if len(differ) > 1 or any((shapes[path][i], value.shape[i]) != _PROBES for i in differ):
                raise UnsupportedError(f"an argument of a layer mixes its rows: {shapes[path]}, {tuple(value.shape)}.")
            if differ:
                found[path] = differ[0]

    for place in (0, 1):
        _mapped(one[place], keep, (place,))
    for place in (0, 1):
        _mapped(two[place], compare, (place,))
    return found
