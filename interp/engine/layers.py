"""One layer from its watched call: branches, their order, the middle of the stream, what is refused and why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn

from interp.engine.anatomy import Layer, Part
from interp.engine.parts import Inside, attention_part, down_projection
from interp.engine.shards import shards_of
from interp.engine.streams import Stream, branch_ancestors, self_or_cross
from interp.engine.trail import Add, Norm, split_sum, trail
from interp.engine.watch import Call, Value, reaches

_ATTENTION_NAME = re.compile(r"attn|attention", re.I)
_MIXER_NAME = re.compile(r"mamba|mixer|ssm|delta|recurrent|linear_attn|conv|rwkv|time_mix|lru|retention", re.I)


def _kind(source: Value, name: str, stream: Stream) -> str:
    inside = branch_ancestors(source, stream.values())
    calls = [v.attention for v in inside if v.attention is not None]
    if calls:
        return self_or_cross(calls[0], stream)
    local = name.removeprefix(stream.call.name)
    if any(v.op in ("softmax", "_softmax") and v.tensor.ndim == 4 for v in inside):
        return "attn"
    if _MIXER_NAME.search(local) or any(v.op == "conv1d" for v in inside):
        return "mixer"
    return "attn" if _ATTENTION_NAME.search(local) else "mlp"


def build_layer(index: int, stream: Stream, below: Stream | None, counts: Counter) -> Layer:
    """A layer's parts; `below` is the layer before it and `counts` says how often each module was called."""
    call = stream.call

    def inside(c: Call) -> bool:
        if counts[id(c.module)] != 1:
            return False
        while c.parent is not None:
            if c.parent is call:
                return True
            c = c.parent
        return False

    branches: dict[str, list[Part]] = {}
    origin: dict[str, list[Value]] = {}
    refused: dict[str, str] = {}
    last_attention, post_norm = -1, False
    kinds_at: list[set[str]] = []
    for i, step in enumerate(stream.steps):
        kinds_at.append(set())
        post_norm = post_norm or isinstance(step, Norm)
        if not isinstance(step, Add):
            continue
        for source, scales in split_sum(step.branch, inside, call):
            maker = next((m for m in source.made_by if inside(m[0]) and m[1] == ()), None)
            maker = maker or next((m for m in source.made_by if inside(m[0])), None)
            kind = _kind(source, maker[0].name if maker else "", stream)
            kinds_at[-1].add(kind)
            if kind in ("attn", "cross"):
                last_attention = i
            origin.setdefault(kind, []).append(source)
            if maker is None:
                refused[f"{kind}_out" if kind != "cross" else "cross"] = (
                    f"one of its terms ({source.op}) is not the output of a module of its own"
                )
                continue
            part = Part(maker[0].module, maker[0].name, maker[1], tuple(s.factor for s in scales), source.overwritten)
            branches.setdefault(kind, []).append(part)
    parallel, mid = _middle(stream, origin, kinds_at, last_attention, inside, refused)
    attention = {}
    for kind in ("attn", "cross"):
        if kind in branches:
            found = attention_part(kind, origin[kind], stream, inside)
            if found is not None:
                attention[kind] = found
    down = down_projection(origin.get("mlp", []), stream, inside)
    if down is None:
        refused["mlp_act"] = (
            "the layer has no MLP" if "mlp" not in branches else "its MLP does not end in one projection (experts?)"
        )
    for kind in ("attn", "mlp", "mixer"):
        if kind not in branches:
            what = "a state-space or recurrent mixer" if "mixer" in branches else ", ".join(branches) or "nothing"
            refused.setdefault(f"{kind}_out", f"the layer has no {kind} branch (it has {what})")
    in_place = any(v.overwritten for v in _stream_values(stream))
    return Layer(
        index,
        call.module,
        call.name,
        stream.in_key,
        stream.out_path,
        {k: tuple(v) for k, v in branches.items()},
        attention,
        parallel,
        mid,
        down,
        post_norm,
        in_place,
        call.form,
        len(call.outputs) == 1,
        below is not None and trail(stream.start, lambda v: v is below.end, layer=None, adds=False) != [],
        tuple(_recipe(stream, kinds_at)),
        refused,
        shards_of(down),
    )


def _recipe(stream: Stream, kinds_at: list[set[str]]) -> Iterator[tuple[str, Any]]:
    added: set[str] = set()
    for step, kinds in zip(stream.steps, kinds_at, strict=True):
        if isinstance(step, Add):
            yield "add", tuple(sorted(kinds - added))
            added |= kinds
        elif isinstance(step, Norm):
            yield "norm", step.call.module
        else:
            yield "scale", step.factor


def _stream_values(stream: Stream) -> list[Value]:
    return [stream.start, *(s.result for s in stream.steps)]


def _middle(
    stream: Stream,
    origin: dict[str, list[Value]],
    kinds_at: list[set[str]],
    last_attention: int,
    inside: Inside,
    refused: dict[str, str],
) -> tuple[bool, tuple[nn.Module, str, Any] | None]:
    if last_attention < 0 or "mlp" not in origin:
        refused["resid_mid"] = "the layer does not add attention and then an MLP"
        return False, None
    place = last_attention
    while place + 1 < len(stream.steps) and not isinstance(stream.steps[place + 1], Add):
        place += 1
    mid = stream.steps[place].result
    if "mlp" in kinds_at[last_attention] or not all(reaches(v, mid) for v in origin["mlp"]):
        refused["resid_mid"] = (
            "attention and MLP run in parallel on the same stream, so there is no stream between them"
        )
        return True, None
    takers = [(call.module, "in", key) for call, key in mid.read_by if inside(call)]
    makers = [(call.module, "out", path) for call, path in mid.made_by if inside(call)]
    # A normed stream is one tensor that a module makes: only there can it be changed.
    normed = any(not isinstance(s, Add) for s in stream.steps[: place + 1])
    for found in makers + takers if normed else takers + makers:
        return False, found
    if normed:
        refused["resid_mid"] = "no module reads or makes it, and the stream is scaled before it"
    return False, None
