"""The residual stream through one layer call, and what its branches are made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from interp.engine.attention import AttentionCall
from interp.engine.trail import Add, Step, trail
from interp.engine.watch import Call, Value, reaches


@dataclass(eq=False, slots=True)
class Stream:
    """One layer call whose way along the residual stream was found."""

    call: Call
    in_key: Any
    out_path: tuple
    start: Value
    end: Value
    steps: list[Step]

    def values(self) -> set[int]:
        """Ids of the values of the stream itself."""
        return {id(self.start), *(id(s.result) for s in self.steps)}

    def arguments(self) -> dict[Any, Tensor]:
        """The layer call's tensor arguments."""
        return {k: v.tensor for k, v in self.call.inputs.items()}


def find_stream(call: Call) -> Stream | None:
    """The residual path through a layer call, or None if there is no sum on any path from an input to an output."""
    starts = sorted(call.inputs.items(), key=lambda kv: (kv[0] != 0, kv[0] != "hidden_states", str(kv[0])))
    for path, end in call.outputs.items():
        for key, start in starts:
            if start.tensor.shape != end.tensor.shape or not start.tensor.is_floating_point():
                continue
            steps = trail(end, lambda v, s=start: v is s, layer=call)
            if steps is not None and any(isinstance(s, Add) for s in steps):
                return Stream(call, key, path, start, end, steps)
    return None


def attention_calls(stream: Stream) -> list[AttentionCall]:
    """The attention calls made inside a layer call."""
    stop = stream.values()
    seen: list[AttentionCall] = []
    for step in stream.steps:
        if isinstance(step, Add):
            for v in branch_ancestors(step.branch, stop):
                if v.attention is not None and v.attention not in seen:
                    seen.append(v.attention)
    return seen


def branch_ancestors(value: Value, stream: set[int]) -> list[Value]:
    """Ancestors of a branch, not going back past the stream."""
    out: list[Value] = []
    seen = set(stream)
    stack = [value]
    while stack:
        v = stack.pop()
        if id(v) in seen:
            continue
        seen.add(id(v))
        out.append(v)
        stack.extend(v.inputs)
    return out


def attention_kinds(stream: Stream) -> set[str]:
    """Which of `attn` and `cross` a layer makes."""
    return {self_or_cross(c, stream) for c in attention_calls(stream)}


def self_or_cross(call: AttentionCall, stream: Stream) -> str:
    """`attn` when the keys come from the layer's own stream, `cross` when they come from elsewhere."""
    return "attn" if reaches(call.values["key"], stream.values()) else "cross"
