"""Both ends of the main tower: the token embedding that feeds it and the way from its stream to the logits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from interp.engine.anatomy import Tower, Unembedding
from interp.engine.norms import fit_norm
from interp.engine.parts import norm_input
from interp.engine.streams import Stream
from interp.engine.trail import Argument, Norm, Replay, Scale, replay, trail
from interp.engine.watch import Value, Watch, outputs_of, reaches


def find_embedding(
    model: nn.Module,
    watch: Watch,
    main: Tower,
    stacks: Mapping[str, list[Stream]],
    counts: Counter,
    tokens: Value | None,
    refused: dict,
) -> tuple[nn.Module, str] | None:
    """The token embedding that feeds the main tower."""
    try:
        weight = model.get_input_embeddings().weight  # type: ignore[operator]
    except (NotImplementedError, AttributeError):
        weight = None
    start = stacks[main.container][0].start
    fed = [
        c
        for c in watch.calls
        if weight is not None
        and getattr(c.module, "weight", None) is weight
        and () in c.outputs
        and reaches(start, c.outputs[()])
    ]
    # Some models name another tower's embedding; then it is what the token ids go into.
    fed = fed or [
        c
        for c in watch.calls
        if isinstance(c.module, nn.Embedding)
        and tokens is not None
        and any(tokens is v for v in c.inputs.values())
        and () in c.outputs
        and reaches(start, c.outputs[()])
    ]
    if not fed:
        refused["embed"] = "no token embedding module feeds the main tower"
        return None
    if counts[id(fed[-1].module)] > 1:
        refused["embed"] = "one module embeds the tokens of two towers; read resid_pre of layer 0 instead"
        return None
    return fed[-1].module, fed[-1].name


def find_unembedding(
    model: nn.Module, watch: Watch, out: Any, end: Value, counts: Counter, refused: dict[str, str]
) -> Unembedding | None:
    """The way from the last stream to the logits, or None; `refused` gets the reason when there are no logits."""
    logits = outputs_of(out).get(("logits",))
    try:
        head = model.get_output_embeddings()  # type: ignore[operator]
    except (NotImplementedError, AttributeError):
        head = None
    if logits is None:
        refused["logits"] = f"{type(model).__name__} returns no logits (no language-model head)"
        return None
    if head is None or counts[id(head)] != 1:
        return None
    call = next(c for c in watch.calls if c.module is head)
    given = next(iter(call.inputs.values()))
    steps = trail(given, lambda v: v is end, layer=None, adds=False)
    produced = call.outputs.get(())
    after = None if produced is None else _elementwise(watch.value(logits), produced)
    if steps is None or after is None:
        return None
    norms = tuple(s.call.module for s in steps if isinstance(s, Norm))
    fitted = tuple(fit_norm(s.call.module, norm_input(s)) for s in steps if isinstance(s, Norm))
    scales = tuple(s.factor for s in steps if isinstance(s, Scale))
    return Unembedding(norms, fitted, scales, head, call.name, after)


def _elementwise(value: Value, goal: Value) -> tuple[Replay, ...] | None:
    """The functions of one tensor and constants that lead from `goal` to `value`."""
    chain: list[Replay] = []
    while value is not goal:
        inputs = [v for v in value.inputs if v is goal or replay(v, None) is None]
        if len(inputs) != 1 or value.func is None or value.tensor.shape != inputs[0].tensor.shape:
            return None
        before = inputs[0]

        def link(tree: Any, before: Value = before) -> Any:
            if isinstance(tree, Value):
                return Replay(None, (Argument("logits"),), {}) if tree is before else replay(tree, None)
            if isinstance(tree, (list, tuple)) and type(tree) in (list, tuple):
                return type(tree)(link(t) for t in tree)
            return tree

        if value.op not in ("getitem", "__getitem__"):
            chain.append(Replay(value.func, link(value.args), dict(value.kwargs)))
        value = before
    return tuple(reversed(chain))
