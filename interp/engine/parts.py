"""The attention module and the projections of a layer: how a branch is made, head by head."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from interp.engine.anatomy import AttentionPart
from interp.engine.attention import AttentionCall
from interp.engine.fields import unknown_fields
from interp.engine.norms import FittedNorm, fit_norm
from interp.engine.proof import TOLERANCE, pattern_error
from interp.engine.shards import shards_of
from interp.engine.streams import Stream, branch_ancestors
from interp.engine.trail import Add, Norm, Replay, Scale, Step, split_sum, trail
from interp.engine.watch import Call, Value
from interp.errors import UnsupportedError

Inside = Callable[[Call], bool]
"""Whether a call counts as one of the layer's own modules."""


def _projection(value: Value, inside: Inside) -> Call | None:
    for call, path in value.made_by:
        weight = getattr(call.module, "weight", None)
        matrix = isinstance(weight, Tensor) and weight.ndim == 2
        # A quantised module of torch has a method in the place of its weight.
        if path == () and inside(call) and (matrix or (callable(weight) and hasattr(call.module, "in_features"))):
            return call
    return None


def attention_part(kind: str, sources: list[Value], stream: Stream, inside: Inside) -> AttentionPart | None:
    """The attention module behind the terms of a branch, and its way out to the stream; None if there is none."""
    stop = stream.values()
    for source in sources:
        inner = [v for v in branch_ancestors(source, stop) if v.attention is not None]
        calls = [v.attention for v in inner if v.attention is not None]
        if not calls:
            continue
        call = calls[0]
        projection, steps = _way_to_projection(source, stream, inside)
        refused: dict[str, str] = {}
        chain: list[FittedNorm | Replay] = []
        if projection is None:
            refused["z"] = refused["result"] = "the output projection was not found between attention and the stream"
        for step in steps:
            if isinstance(step, Scale):
                chain.append(step.factor)
            elif isinstance(step, Norm):
                fitted = fit_norm(step.call.module, norm_input(step))
                if fitted is None:
                    refused["result"] = f"{step.call.name} behind the output projection is no LayerNorm or RMSNorm"
                    break
                chain.append(fitted)
        chain.extend(s.factor for s in _own_scales(source, stream, inside))
        no_pattern = _no_pattern(calls)
        if no_pattern is not None:
            refused["scores"] = refused["pattern"] = no_pattern
        n_heads, d_value = call.query.shape[1], call.value.shape[-1]
        shards = shards_of(None if projection is None else projection.module)
        count = 1 if shards is None else shards.count
        if projection is not None:
            width = projection.inputs[0].tensor.shape[-1] if 0 in projection.inputs else -1
            if width != n_heads * d_value:
                refused["z"] = refused["result"] = (
                    f"{projection.name} takes {width} numbers, not {n_heads} heads of {d_value}"
                )
        return AttentionPart(
            call.module,
            next((n for n in [_name_of(call, stream)] if n), "?"),
            n_heads * count,
            call.key.shape[1] * count,
            call.query.shape[-1],
            d_value,
            None if projection is None else projection.module,
            "?" if projection is None else projection.name,
            tuple(chain),
            kind == "cross",
            refused,
            shards,
        )
    return None


def _no_pattern(calls: list[AttentionCall]) -> str | None:
    """Why the recomputed probabilities of an attention module cannot be trusted, or None."""
    strange = unknown_fields(calls[0].module.config)
    if strange:
        return (
            f"its configuration sets {strange}, which the recomputed attention does not know; once somebody has "
            "looked, the field belongs into interp.engine.fields"
        )
    try:
        error = max(pattern_error(c) for c in calls)
    except UnsupportedError as refusal:
        return str(refusal)
    allowed = TOLERANCE.get(calls[0].query.dtype, 1e-4)
    if not error <= allowed:
        return f"recomputed probabilities times values miss the kernel's output by {error:.1e} (allowed {allowed:.0e})"
    return None


def _way_to_projection(source: Value, stream: Stream, inside: Inside) -> tuple[Call | None, list[Step]]:
    """The projection at the root of a branch's term, and the steps from its output to the term."""
    met: list[Call] = []

    def goal(value: Value) -> bool:
        found = _projection(value, inside)
        if found is not None:
            met.append(found)
        return found is not None

    steps = trail(source, goal, layer=stream.call, adds=False)
    return (None, []) if steps is None else (met[-1], steps)


def _own_scales(source: Value, stream: Stream, inside: Inside) -> list[Scale]:
    """The constants between a term's module and the stream."""
    for step in stream.steps:
        if isinstance(step, Add):
            for value, scales in split_sum(step.branch, inside, stream.call):
                if value is source:
                    return scales
    return []


def norm_input(step: Norm) -> Tensor:
    """What a norm on the way was given."""
    return next(v.tensor for k, v in step.call.inputs.items() if k in (0, "hidden_states"))


def _name_of(call: AttentionCall, stream: Stream) -> str:
    caller = call.caller
    while caller is not None and caller.module is not call.module:
        caller = caller.parent
    return caller.name if caller is not None else stream.call.name


def down_projection(sources: list[Value], stream: Stream, inside: Inside) -> nn.Module | None:
    """The last projection of an MLP that sees every token, or None."""
    if len(sources) != 1:
        return None
    call, _ = _way_to_projection(sources[0], stream, inside)
    if call is None or 0 not in call.inputs:
        return None
    # Experts that are picked by a router see only some of the tokens.
    if call.inputs[0].tensor.shape[:-1].numel() != stream.start.tensor.shape[:-1].numel():
        return None
    return call.module
