"""A lens's anatomy as plain data: what `interp inspect` prints and writes as json."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from interp.sites import SITES

if TYPE_CHECKING:
    from interp.engine.anatomy import Layer, Tower
    from interp.lens import Lens


def describe(lens: "Lens") -> dict[str, Any]:
    """Towers, modules, proof and refusals of a model.

    Raises:
        AnatomyError: its parts are found only on a batch with images.
    """
    anatomy = lens.anatomy
    config: Any = lens.model.config
    unseen = hasattr(config, "vision_config") and "vision" not in anatomy.towers
    return {
        "model": lens.name,
        "class": type(lens.model).__name__,
        "parameters": sum(p.numel() for p in lens.model.parameters()),
        "dtype": str(lens.dtype).removeprefix("torch."),
        "main": anatomy.main,
        "embed": anatomy.embed[1] if anatomy.embed else None,
        "unembed": anatomy.unembed.name if anatomy.unembed else None,
        "note": "the vision tower is found on the first batch with images, and is not shown here" if unseen else None,
        "towers": [_tower(tower) for tower in anatomy.towers.values()],
        "refused": refusals(lens),
    }


def _tower(tower: "Tower") -> dict[str, Any]:
    parts = [part for layer in tower.layers for part in layer.attention.values()]
    return {
        "name": tower.name,
        "layers": len(tower.layers),
        "heads": sorted({p.n_heads for p in parts}),
        "kv_heads": sorted({p.n_kv_heads for p in parts}),
        "d_model": tower.d_model,
        "d_head": sorted({p.d_head for p in parts}),
        "container": tower.container,
        "packed": tower.packed,
        "blocks": [{"kind": k, "layers": spans(i)} for k, i in _grouped((_kind(x), x.index) for x in tower.layers)],
        "modules": [
            {"site": site, "module": name, "layers": spans(layers)}
            for (site, name), layers in _grouped((row, x.index) for x in tower.layers for row in _modules(x))
        ],
        "proof": {what: float(error) for what, error in tower.proof.items()},
    }


def _kind(layer: "Layer") -> str:
    norm = "post-norm (the stream itself is normed)" if layer.post_norm else "pre-norm"
    order = "parallel" if layer.parallel else "sequential"
    words = [norm, order, " + ".join(layer.branches) or "no branch"]
    if "cross" in layer.branches:
        words.append("with cross-attention")
    if layer.adjusted:
        words.append("something is written into the stream before it")
    return ", ".join(words)


def _modules(layer: "Layer") -> Iterable[tuple[str, str]]:
    """Which module gives a site, with the layer's number as {i}."""
    for kind, terms in layer.branches.items():
        site = "cross:attn_out" if kind == "cross" else f"{kind}_out"
        names = " + ".join(_named(p.name, layer) + (" (scaled)" if p.scales else "") for p in terms)
        yield site, f"output of {names}"
    for kind, part in layer.attention.items():
        front = "cross:" if kind == "cross" else ""
        yield f"{front}pattern", f"attention call in {_named(part.name, layer)}"
        if part.out_proj is not None:
            yield f"{front}z", f"input of {_named(part.out_name, layer)}"


def _named(name: str, layer: "Layer") -> str:
    return re.sub(rf"\.{layer.index}(?=\.|$)", ".{i}", name, count=1)


def refusals(lens: "Lens") -> list[dict[str, str]]:
    """Every site that some layer cannot give, with the reason, the same reasons of several layers together."""
    anatomy = lens.anatomy
    rows = [{"tower": "-", "site": site, "layers": "-", "reason": reason} for site, reason in anatomy.refused.items()]
    cross = any("cross" in layer.attention for layer in anatomy.towers[anatomy.main].layers)
    for name in [*anatomy.towers, *(["cross"] if cross and "cross" not in anatomy.towers else [])]:
        tower, kind = anatomy.tower(name)
        found: list[tuple[tuple[str, str], int]] = []
        for site in SITES.values():
            if not site.per_layer or (kind == "cross" and site.scope != "attention"):
                continue
            for layer in tower.layers:
                message = lens.refusal(site.name, layer.index, tower=name)
                if message is not None:
                    found.append(((site.name, _reason(message, layer)), layer.index))
        rows += [
            {"tower": name, "site": site, "layers": spans(layers), "reason": reason}
            for (site, reason), layers in _grouped(found)
        ]
    return rows


def _reason(message: str, layer: "Layer") -> str:
    """A refusal without the site and the layer's number, so that equal ones can be told."""
    reason = message.split(" is refused: ", 1)[-1]
    return _named(re.sub(rf"\blayer {layer.index}\b", "the layer", reason), layer)


def _grouped(pairs: Iterable[tuple[Any, int]]) -> list[tuple[Any, list[int]]]:
    groups: dict[Any, list[int]] = {}
    for key, index in pairs:
        groups.setdefault(key, []).append(index)
    return list(groups.items())


def spans(indices: Iterable[int]) -> str:
    """Whole numbers as text: `0-3, 5`."""
    runs: list[list[int]] = []
    for i in sorted(set(indices)):
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
