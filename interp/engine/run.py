"""One forward pass (or one generation) under a plan."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from interp.batch import Batch
from interp.edits import Edit
from interp.engine.anatomy import Anatomy
from interp.engine.chosen import gather_positions
from interp.engine.entry import Entry, Prefix, check_entry, cropped, entered
from interp.engine.hooks import attached
from interp.engine.placed import device_of as device_of
from interp.engine.plan import Plan, heads_of, layers_of, make_plan, plan_for
from interp.engine.recorder import Recorder, Stop, check_no_nan, reduce_part
from interp.engine.shards import spread
from interp.errors import InputError, SettingsError, UnsupportedError
from interp.reads import Read
from interp.trace import Trace

Metric = Callable[[Tensor], Tensor]
_IMAGE_INPUTS = ("pixel", "image", "aspect_ratio", "cross_attention_mask")


def parameters_of(module: nn.Module) -> set[str]:
    """Names that a module's forward takes."""
    return set(inspect.signature(module.forward).parameters)


def run(
    model: nn.Module,
    anatomy: Anatomy,
    batch: Batch,
    reads: Sequence[Read],
    edits: Sequence[Edit] = (),
    *,
    gradients: Sequence[Read] = (),
    metric: Metric | None = None,
    entry: Entry | None = None,
    cache: bool = False,
    whole: bool = False,
    to: torch.device | str | None = None,
) -> Trace:
    """Carry out one forward pass; see `Lens.run`. With `whole` it does not stop early."""
    if bool(gradients) != (metric is not None):
        raise SettingsError("gradients need a metric, and a metric is there for gradients: give both or neither.")
    if gradients and spread(model):
        raise UnsupportedError("gradients are refused in a tensor-parallel model: a process has some of the weights.")
    plan = plan_for(anatomy, reads, edits, gradients)
    recorder = Recorder(plan, anatomy, batch, to=to)
    takes = parameters_of(model)
    inputs = dict(batch.inputs)
    wants_logits = bool(plan.logits) or metric is not None
    recorder.stop = bool(plan.work) and not (wants_logits or cache or whole)
    recorder.with_graph = bool(gradients)
    if not plan.work and not wants_logits and not cache:
        raise SettingsError("nothing to do: give reads (or gradients, or cache=True).")
    if entry is not None:
        recorder.offset = enter_inputs(inputs, entry, anatomy, batch, recorder.plan)
    last_only = bool(plan.logits) and all(r.positions == "last" for r in plan.logits) and metric is None
    few = last_only and batch.padding in (None, "left") if wants_logits else cache
    if few and "logits_to_keep" in takes:
        inputs["logits_to_keep"] = 1
    key_values = inputs.get("past_key_values")
    if cache and not takes & {"past_key_values", "kwargs"}:
        raise UnsupportedError(
            f"{type(model).__name__} keeps no keys and values: its forward takes no past_key_values (it takes "
            f"{', '.join(sorted(takes))}). Run it without cache=True."
        )
    if cache:
        from transformers import DynamicCache, EncoderDecoderCache

        key_values = DynamicCache()
        if "encoder" in anatomy.towers and anatomy.main == "decoder":
            key_values = EncoderDecoderCache(key_values, DynamicCache())
        inputs["past_key_values"] = key_values
    if "use_cache" in takes and "use_cache" not in inputs and (key_values is not None or plain_attention(anatomy)):
        inputs["use_cache"] = key_values is not None
    out: Any = None
    with ExitStack() as stack:
        stack.enter_context(alone(model))
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.enable_grad() if gradients else torch.no_grad())
        if gradients:
            stack.enter_context(frozen(model))
        stack.enter_context(entered(entry, anatomy))
        stack.enter_context(attached(recorder))
        seen = stack.enter_context(positions_seen(model, anatomy)) if cache else {}
        with suppress(Stop):
            out = model(**inputs)
        found: dict[tuple[Read, int], Tensor] = {}
        value: Tensor | None = None
        if metric is not None:
            value, found = _backward(recorder, gradients, metric, out.logits, anatomy)
    values, valid = recorder.finish()
    for read in plan.logits:
        values[read, -1] = _logits(recorder, read, out.logits, "logits_to_keep" in inputs)
    prefix = (
        Prefix(key_values, seen.get("position_ids"), getattr(out, "encoder_last_hidden_state", None)) if cache else None
    )
    masks = {**dict.fromkeys(anatomy.towers), **recorder.masks, anatomy.main: batch.mask}
    return Trace(
        values, found, valid, masks, anatomy.main, anatomy.depth, prefix, None if value is None else value.detach()
    )


def plain_attention(anatomy: Anatomy) -> bool:
    """Whether every layer goes through transformers' attention table; elsewhere the cache decides which code runs."""
    layers = anatomy.towers[anatomy.main].layers
    return all(layer.attention for layer in layers if "mixer" not in layer.branches)


def enter_inputs(
    inputs: dict[str, Any],
    entry: Entry,
    anatomy: Anatomy,
    batch: Batch,
    plan: Plan | None = None,
    *,
    positions: bool = False,
) -> int:
    """Change a model's inputs into those of a run that is entered; returns the first column that is computed.

    With `positions`, images are left out even where later layers look at them, and position ids come from the prefix.
    """
    width = batch.mask.shape[1]
    has_images = batch.image_mask is not None and any(n.startswith(_IMAGE_INPUTS) for n in inputs)
    check_entry(entry, anatomy, width if anatomy.main in ("text", "decoder") else None, has_images and not positions)
    tower, _ = anatomy.tower(entry.tower)
    first = tower.layer(entry.layer).index
    below = sorted(i for t, _, i, s in (plan.work if plan else ()) if t == tower.name and i < first)
    if below:
        raise InputError(f"layer {below[0]} lies below layer {entry.layer}, where this run is entered.")
    if tower.name != anatomy.main:
        return 0
    if entry.prefix is not None and entry.prefix.encoder_outputs is not None:
        from transformers.modeling_outputs import BaseModelOutput

        inputs["encoder_outputs"] = BaseModelOutput(last_hidden_state=entry.prefix.encoder_outputs)
        for name in ("input_ids", "input_features"):
            inputs.pop(name, None)
    crossed = any("cross" in x.attention for x in tower.layers) and not getattr(
        anatomy.towers.get("encoder"), "layers", None
    )
    adjusted = any(x.adjusted for x in tower.layers[first + 1 :]) and not positions
    if has_images and not crossed and not adjusted:
        if entry.prefix is None or entry.prefix.position_ids is None:
            raise InputError("entering a model with images needs the prefix of a full run (its position ids).")
        for name in [n for n in inputs if n.startswith(_IMAGE_INPUTS)]:
            del inputs[name]
        inputs["position_ids"] = entry.prefix.position_ids
    if entry.start == 0:
        return 0
    if crossed:
        raise UnsupportedError("this model's cross-attention layers keep their keys apart: entry.start must be 0.")
    assert entry.prefix is not None
    for name, value in list(inputs.items()):
        if (
            isinstance(value, Tensor)
            and name != "attention_mask"
            and value.shape[-1:] == (width,)
            and value.ndim in (2, 3)
        ):
            inputs[name] = value[..., entry.start :]
    if "position_ids" not in inputs and entry.prefix.position_ids is not None:
        inputs["position_ids"] = entry.prefix.position_ids[..., entry.start :]
    inputs["past_key_values"] = cropped(entry.prefix, entry.start)
    return entry.start


@contextmanager
def positions_seen(model: nn.Module, anatomy: Anatomy) -> Iterator[dict[str, Tensor]]:
    """Note the position ids that the model hands to the main tower's layers."""
    seen: dict[str, Tensor] = {}
    layer = anatomy.towers[anatomy.main].layers[0].module

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        value = kwargs.get("position_ids")
        if isinstance(value, Tensor):
            seen["position_ids"] = value

    container = model.get_submodule(anatomy.towers[anatomy.main].container.rpartition(".")[0])
    handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in (layer, container)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


_ALONE: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()


def alone(model: nn.Module) -> RLock:
    """The lock of a model: its hooks serve whatever runs it, so that one thread runs it at a time."""
    return _ALONE.setdefault(model, RLock())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the time of a run (dropout would make it a different function)."""
    training: list[nn.Module] = []
    todo: list[nn.Module | None] = [model]
    for m in todo:  # it grows on the way: what `model.modules()` does, at a fraction of its price
        if m is not None:
            todo.extend(m._modules.values())
            if m.training:
                training.append(m)
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for parameters for the time of a run, which saves the memory of their graph."""
    owned: list[tuple[dict[str, Any], str]] = [(m._parameters, n) for m in model.modules() for n in m._parameters]
    active = [(held, name) for held, name in owned if held[name] is not None and held[name].requires_grad]
    for held, name in active:
        held[name].requires_grad_(False)
    try:
        yield
    finally:
        for held, name in active:  # by name: a parameter that is brought in and put away is another tensor by now
            held[name].requires_grad_(True)


def _backward(
    recorder: Recorder, gradients: Sequence[Read], metric: Metric, logits: Tensor, anatomy: Anatomy
) -> tuple[Tensor, dict[tuple[Read, int], Tensor]]:
    value = metric(logits)
    if not isinstance(value, Tensor) or not value.requires_grad:
        raise SettingsError("the metric must return a tensor that depends on the logits it is given.")
    if value.ndim > 1:
        raise SettingsError(
            f"the metric must return one number or one for each sample [batch], got {tuple(value.shape)}."
        )
    places = list(recorder.probes)
    # Samples do not influence each other, so the gradient of the sum is each sample's own gradient.
    grads = torch.autograd.grad(value.sum(), [recorder.probes[p] for p in places], allow_unused=True)
    by_place = dict(zip(places, grads, strict=True))
    out: dict[tuple[Read, int], Tensor] = {}
    recorder.with_graph = False
    for read in gradients:
        tower, kind = anatomy.tower(read.tower)
        for index in layers_of(anatomy, read):
            place = (tower.name, kind, index, read.site) if read.row.per_layer else ("model", "model", -1, read.site)
            grad = by_place[place]
            grad = torch.zeros_like(recorder.probes[place]) if grad is None else grad
            part, chosen = recorder.take(place, read.positions, heads_of(anatomy, read, index), grad)
            axis = read.row.position_axis
            assert axis is not None
            keep = chosen.valid if chosen is not None and not chosen.uniform else None
            out[read, index] = reduce_part(part, read, axis, keep).detach()
            check_no_nan(out[read, index], read, index)
    return value, out


def _logits(recorder: Recorder, read: Read, logits: Tensor, kept_last: bool) -> Tensor:
    if kept_last:
        part = reduce_part(logits[:, -1:], read, 1, None)
    else:
        chosen = recorder.selection(read.positions, "model", logits.shape[0], logits.shape[1], logits.device)
        part = logits if chosen is None else gather_positions(logits, chosen, 1)
        part = recorder.reduced(read, ("model", "model", -1, "logits"), part, chosen)
    part = part.detach()
    # A NaN of the stream fills its whole row, one of the unembedding its whole column: one of each is enough.
    if bool(part[..., 0].sum().isnan()) or bool(part.reshape(-1, part.shape[-1])[-1].sum().isnan()):
        check_no_nan(part, read, -1)
    return part if recorder.to is None else part.to(recorder.to)


@contextmanager
def stepping(model: nn.Module, recorder: Recorder, prompt: int, start: int = 0) -> Iterator[None]:
    """Count the forward calls of a generation and where in the sequence each begins, the first at `start`."""

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        recorder.step += 1
        recorder.offset = start if recorder.step == 1 else prompt + recorder.step - 2

    handle = model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def generate(
    model: nn.Module,
    anatomy: Anatomy,
    batch: Batch,
    reads: Sequence[Read],
    edits: Sequence[Edit],
    options: Mapping[str, Any],
    prefix: Prefix | None = None,
    to: torch.device | str | None = None,
) -> tuple[Tensor, Trace]:
    """Generate under a plan; see `Lens.generate`."""
    inputs, start = dict(batch.inputs), 0
    if prefix is not None:
        start = batch.mask.shape[1] - 1
        inputs = {n: v for n, v in inputs.items() if not n.startswith(_IMAGE_INPUTS)}
        inputs["past_key_values"] = cropped(prefix, start)
    plan = make_plan(anatomy, reads, edits)
    beams = options.get("num_beams", 1)
    recorder = Recorder(plan, anatomy, batch, generating=True, to=to, copies=beams)
    if any(r.site == "logits" for r in reads):
        raise SettingsError("generation does not keep logits; run the finished text once and read them there.")
    if beams > 1:
        _check_beams(recorder, reads, prefix)
    with ExitStack() as stack:
        stack.enter_context(alone(model))
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        watched = stack.enter_context(ExitStack())

        def watch() -> None:
            watched.enter_context(stepping(model, recorder, batch.mask.shape[1], start))
            watched.enter_context(attached(recorder))

        watch()
        if plan.work and options.get("logits_processor"):
            options = {**options, "logits_processor": _aside(options["logits_processor"], watched, watch)}
        tokens = model.generate(**inputs, **options)  # type: ignore[operator]
    values, valid = recorder.finish()
    masks = {**dict.fromkeys(anatomy.towers), **recorder.masks}
    return tokens, Trace(values, {}, valid, masks, anatomy.main, anatomy.depth)


def _aside(processors: Sequence[Any], watched: ExitStack, watch: Callable[[], None]) -> Any:
    """Logits processors for whose time the plan is taken off the model: they may run it themselves."""
    from transformers import LogitsProcessor, LogitsProcessorList

    class Aside(LogitsProcessor):
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            watched.close()
            try:
                return self.inner(input_ids, scores)
            finally:
                watch()

    return LogitsProcessorList([Aside(one) for one in processors])


def _check_beams(recorder: Recorder, reads: Sequence[Read], prefix: Prefix | None) -> None:
    """Refuse what has no meaning where every sample is several beams."""
    if reads:
        raise SettingsError("reads follow one text, not several beams: read the finished text with lens.run.")
    if prefix is not None:
        raise SettingsError("a prefix holds one row for each sample: leave out prefix, or num_beams.")
    main = recorder.anatomy.main
    other = sorted({tower for tower, *_ in recorder.plan.work if tower not in ("model", main)})
    if other:
        raise UnsupportedError(f"edits of tower {other[0]!r} do not go with beams: its rows are not the samples.")
