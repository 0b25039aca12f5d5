"""Maps put together: of several batches of prompts, or of several sites."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from interp.errors import InputError
from interp.tracing.causal_map import CausalMap

SUMS = ("prompts", "tokens", "computed", "left_out")
_SAME = ("direction", "metric", "unit", "single", "min_gap")


def join_prompts(maps: Sequence[CausalMap]) -> CausalMap:
    """One map of the prompts of several, in their order.

    A group that a map does not have does not exist in its prompts. Counts in the settings are added, mean sizes of
    groups averaged over the prompts that have them.

    Args:
        maps: of one method with the same settings.

    Raises:
        InputError: none, or maps that differ in more than their prompts.
    """
    _check(maps, "prompts")
    names = _names(maps)
    sites = list(dict.fromkeys(site for one in maps for site in one.sites))
    keys: dict[tuple[str, int, int, str], int] = {}
    for one in maps:
        for key in _keys(one):
            keys.setdefault(key, len(keys))
    order = sorted(keys, key=lambda key: (sites.index(key[0]), key[1], key[2], names.index(key[3])))
    row = {key: i for i, key in enumerate(order)}
    values = torch.full((len(order), sum(map(len, maps))), torch.nan)
    exists = torch.zeros(len(names), values.shape[1], dtype=torch.bool)
    begin = 0
    for one in maps:
        some = slice(begin, begin := begin + len(one))
        values[[row[key] for key in _keys(one)], some] = one.values.to(values)
        exists[[names.index(g) for g in one.groups], some] = one.exists
    # A cell that a map left out does not exist in its prompts: exists is by group, so its sites must be the same.
    held = exists[[names.index(key[3]) for key in order]]
    if bool((held & values.isnan()).any()):
        raise InputError("the maps have other cells at the same groups: choose the same sites, layers and heads.")
    cells = [(sites.index(site), layer, head, names.index(group)) for site, layer, head, group in order]
    return replace(
        maps[0],
        values=values,
        clean=torch.cat([one.clean for one in maps]),
        corrupt=torch.cat([one.corrupt for one in maps]),
        cells=torch.tensor(cells),
        exists=exists,
        sites=tuple(sites),
        groups=tuple(names),
        tokens=_tokens(maps, names),
        settings=_settings(maps),
    )


def join_sites(maps: Sequence[CausalMap]) -> CausalMap:
    """One map of the sites of several, on the same prompts.

    Args:
        maps: of one method with the same settings, each with sites of its own.

    Raises:
        InputError: none, a site twice, or maps of other prompts.
    """
    _check(maps, "sites")
    one = maps[0]
    sites = [site for found in maps for site in found.sites]
    if len(set(sites)) < len(sites):
        raise InputError(f"a site stands in two of the maps: {', '.join(sites)}.")
    for found in maps[1:]:
        same = all(torch.equal(getattr(found, n), getattr(one, n)) for n in ("clean", "corrupt", "exists"))
        if not same or found.groups != one.groups:
            raise InputError("the maps are of other prompts or groups: only their sites may differ.")
    cells, offset = [], 0
    for found in maps:
        cells.append(found.cells + torch.tensor([offset, 0, 0, 0]))
        offset += len(found.sites)
    shared = {k: v for k, v in one.settings.items() if all(m.settings.get(k) == v for m in maps)}
    apart = {
        k: {", ".join(m.sites): m.settings.get(k) for m in maps} for m in maps for k in m.settings if k not in shared
    }
    return replace(
        one,
        values=torch.cat([found.values for found in maps]),
        cells=torch.cat(cells),
        sites=tuple(sites),
        settings={**shared, **apart},
    )


def _check(maps: Sequence[CausalMap], what: str) -> None:
    if not maps:
        raise InputError("no map was given to join.")
    for found in maps[1:]:
        other = [name for name in _SAME if getattr(found, name) != getattr(maps[0], name)]
        if other:
            theirs, mine = getattr(found, other[0]), getattr(maps[0], other[0])
            raise InputError(f"maps with {other[0]} {mine!r} and {theirs!r} are not joined: only {what} may differ.")


def _keys(one: CausalMap) -> list[tuple[str, int, int, str]]:
    return [(one.sites[s], layer, head, one.groups[g]) for s, layer, head, g in one.cells.tolist()]


def _names(maps: Sequence[CausalMap]) -> list[str]:
    """The groups of all; positions in order of number, names in the order in which they stand in the fullest map."""
    found = dict.fromkeys(g for one in sorted(maps, key=lambda m: -len(m.groups)) for g in one.groups)
    return sorted(found, key=int) if maps[0].single else list(found)


def _tokens(maps: Sequence[CausalMap], names: Sequence[str]) -> tuple[str, ...]:
    """The token of each group where all maps that have the group agree on it."""
    if not all(one.tokens for one in maps):
        return ()
    known = [dict(zip(one.groups, one.tokens, strict=True)) for one in maps]
    found = [{one[name] for one in known if name in one} for name in names]
    return tuple(tokens.pop() if len(tokens) == 1 else "" for tokens in found)


def _settings(maps: Sequence[CausalMap]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key in dict.fromkeys(key for one in maps for key in one.settings):
        values = [one.settings.get(key) for one in maps]
        if isinstance(values[0], dict) and key == "tokens":
            out[key] = {name: _mean(maps, name) for name in dict.fromkeys(n for v in values if v for n in v)}
        elif key in SUMS and all(type(v) is int for v in values):
            out[key] = sum(v for v in values if v is not None)
        elif all(v == values[0] for v in values):
            out[key] = values[0]
        elif all(isinstance(v, str) for v in values):
            out[key] = "; ".join(dict.fromkeys(map(str, values)))
        elif all(isinstance(v, list) for v in values):
            out[key] = [x for v in values if v is not None for x in v]
        else:
            raise InputError(f"the maps have other settings: {key} is {values[0]!r} in the first, {values[1:]!r} then.")
    return out


def _mean(maps: Sequence[CausalMap], name: str) -> float:
    """The mean size of a group, over the prompts of all maps (those without it have none of its tokens)."""
    total = sum(one.settings["tokens"].get(name, 0.0) * len(one) for one in maps)
    return total / sum(map(len, maps))
