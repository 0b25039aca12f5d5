"""Results of several batches as one, so that their intervals are over all samples."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from interp.errors import InputError
from interp.evaluation.agreement import Agreement
from interp.evaluation.curve import Curve
from interp.evaluation.localisation import Localisation

_R = TypeVar("_R", Curve, Agreement, Localisation)
_SUMS, _BOOTSTRAP = ("prompts", "tokens"), ("seed", "resamples")


def joined(results: Sequence[_R]) -> _R:
    """Curves, agreements or localisations of several batches as one result, sample after sample.

    Args:
        results: results of one kind, of the same scores by name, computed alike.

    Returns:
        One result. Of its settings, those that differ between batches stand as lists; numbers of prompts and tokens
        are added.

    Raises:
        InputError: none, or results of different kinds, names, fractions, units or seeds.
    """
    parts = list(results)
    if not parts or any(type(part) is not type(parts[0]) for part in parts):
        raise InputError(f"joined takes results of one kind, found {[type(part).__name__ for part in parts]}.")
    first = parts[0]
    changes: dict[str, Any] = {}
    for name in (f.name for f in fields(first)):
        values = [getattr(part, name) for part in parts]
        if name in first._along:
            values = _filled(values) if name in first._ragged else values
            changes[name] = _cat(values, first._along[name], name)
        elif name == "settings":
            changes[name] = _settings(values)
        elif name == "caveat":
            changes[name] = " ".join(dict.fromkeys(filter(None, values)))
        elif any(not _same(value, values[0]) for value in values):
            shown = [value.tolist() if isinstance(value, Tensor) else value for value in values]
            raise InputError(f"these results differ in {name} and cannot be joined: {shown}.")
    return replace(first, **changes)


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


def _filled(values: list[Tensor]) -> list[Tensor]:
    """With fillers where the samples of one batch have fewer targets than those of another."""
    width = max(value.shape[-1] for value in values)
    gap = torch.nan if values[0].is_floating_point() else 0
    return [torch.nn.functional.pad(v, (0, width - v.shape[-1]), value=gap) for v in values]


def _cat(values: list[Tensor], axis: int, name: str) -> Tensor:
    others = {(*v.shape[:axis], *v.shape[axis + 1 :]) for v in values}
    if len(others) > 1:
        raise InputError(f"these results differ in the shape of {name} and cannot be joined: {sorted(others)}.")
    return torch.cat(values, axis)


def _settings(parts: list[dict[str, Any]]) -> dict[str, Any]:
    found = {}
    for key in dict.fromkeys(key for part in parts for key in part):
        values = [part.get(key) for part in parts]
        same = all(value == values[0] for value in values)
        if not same and key in _BOOTSTRAP:
            raise InputError(f"these results differ in {key} and cannot be joined: {values}.")
        found[key] = sum(v or 0 for v in values) if key in _SUMS else values[0] if same else values
    return found
