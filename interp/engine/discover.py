"""Finding a model's anatomy in the record of one watched run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from interp.engine.anatomy import Anatomy, Tower
from interp.engine.ends import find_embedding, find_unembedding
from interp.engine.layers import build_layer
from interp.engine.proof import pattern_error
from interp.engine.streams import Stream, attention_calls, attention_kinds, find_stream
from interp.engine.trail import trail
from interp.engine.watch import Value, Watch, reaches, watch_forward
from interp.errors import AnatomyError


def discover(model: nn.Module, inputs: Mapping[str, Any]) -> Anatomy:
    """Watch the model on `inputs`, find its towers and prove them.

    Args:
        model: any transformers model.
        inputs: keyword arguments of one small forward pass. Towers that do not run on it are not found.

    Raises:
        AnatomyError: no residual stack was found, or one failed its proof; the message holds the numbers.
    """
    watch, out, sources = watch_forward(model, inputs)
    counts = Counter(id(c.module) for c in watch.calls)
    stacks, reasons = _stacks(model, watch, counts)
    if not stacks:
        detail = "; ".join(f"{n}: {r}" for n, r in reasons.items()) or "no list of layers was called"
        raise AnatomyError(f"{type(model).__name__}: no stack of layers on one residual stream was found ({detail}).")
    towers: dict[str, Tower] = {}
    order = sorted(stacks, key=lambda n: -len(stacks[n]))
    ends: dict[str, Value] = {}
    for container in order:
        streams = stacks[container]
        name = _tower_name(model, streams, sources, towers, container)
        built = [build_layer(i, s, streams[i - 1] if i else None, counts) for i, s in enumerate(streams)]
        parts = [p for x in built for p in x.attention.values()]
        calls = [c for s in streams for c in attention_calls(s)]
        proof = (
            {"pattern": max(map(pattern_error, calls))}
            if parts and not any("pattern" in p.refused for p in parts)
            else {}
        )
        width, ndim = streams[0].start.tensor.shape[-1], streams[0].start.tensor.ndim
        towers[name] = Tower(name, tuple(built), width, ndim == 2, container, proof)
        ends[name] = streams[-1].end
    main = next((t for t in ("text", "decoder", "encoder", "vision") if t in towers), next(iter(towers)))
    refused: dict[str, str] = {}
    unembed = find_unembedding(model, watch, out, ends[main], counts, refused)
    ids = sources.get("decoder_input_ids" if main == "decoder" else "input_ids")
    embed = find_embedding(model, watch, towers[main], stacks, counts, ids, refused)
    return Anatomy(towers, main, embed, unembed, refused)


def _stacks(model: nn.Module, watch: Watch, counts: Counter) -> tuple[dict[str, list[Stream]], dict[str, str]]:
    calls = {id(c.module): c for c in watch.calls}
    found: dict[str, list[Stream]] = {}
    reasons: dict[str, str] = {}
    for name, group in model.named_modules():
        if not isinstance(group, (nn.ModuleList, nn.Sequential)) or len(group) == 0:
            continue
        if any(name.startswith(done + ".") for done in found):
            continue
        children = list(group)
        if any(counts[id(m)] == 0 for m in children):
            continue
        if any(counts[id(m)] > 1 for m in children):
            if any(list(m.parameters()) for m in children):
                reasons[name] = "one module is called several times (shared layers)"
            continue
        streams = [find_stream(calls[id(m)]) for m in children]
        if any(s is None for s in streams):
            reasons[name] = f"no residual path through layer {[s is None for s in streams].index(True)}"
            continue
        chained = [s for s in streams if s is not None]
        broken = _broken(chained)
        if broken is None:
            found[name] = chained
        else:
            reasons[name] = f"layer {broken} does not continue the stream of layer {broken - 1}"
    return found, reasons


def _broken(streams: list[Stream]) -> int | None:
    for i in range(1, len(streams)):
        before = streams[i - 1].end
        if trail(streams[i].start, lambda v, b=before: v is b, layer=None) is None and not _adjusted(
            streams[i].start, before
        ):
            return i
    return None


def _adjusted(start: Value, before: Value) -> bool:
    """Whether features were written into the stream between two layers (deep-stack injection)."""
    return start.tensor.shape == before.tensor.shape and reaches(start, before)


def _tower_name(
    model: nn.Module, streams: list[Stream], sources: dict[str, Value], taken: Mapping[str, Tower], container: str
) -> str:
    first = streams[0].start
    fed = {name for name, value in sources.items() if name.endswith(("ids", "embeds", "values", "features", "images"))}
    fed = {name for name in fed if reaches(first, sources[name])}
    tokens = {n for n in fed if n in ("input_ids", "inputs_embeds")}
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        crossed = any(len(attention_kinds(s)) > 1 for s in streams)
        if any(n.startswith("decoder_input") for n in fed) or crossed:
            name = "decoder"
        else:
            name = "vision" if any("pixel" in n for n in fed) and not tokens else "encoder"
    elif any("pixel" in n or "patch" in n for n in fed) and not tokens:
        name = "vision"
    elif any(n in ("input_features", "input_values") for n in fed) and not tokens:
        name = "encoder"
    else:
        name = "vision" if re.search(r"vision|visual", container) else "text"
    if name in taken:
        parts = [p for p in container.split(".") if p not in ("layers", "layer", "model", "blocks", "block")]
        name = re.sub(r"\W", "_", parts[-1] if parts and parts[-1] not in taken else container)
        name = name if name[0].isalpha() else f"stage_{name}"
    return name
