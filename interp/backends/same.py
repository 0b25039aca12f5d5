"""Whether two models give the same on the same inputs: what a back end is checked by when it is wrapped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from interp.engine.anatomy import relative_error
from interp.engine.proof import TOLERANCE
from interp.engine.run import evaluating
from interp.engine.watch import outputs_of
from interp.errors import UnsupportedError


def check_same(
    theirs: Callable[[], Any],
    ours: Any,
    inputs: Mapping[str, Tensor],
    *,
    what: str,
    real: Tensor | None = None,
    hooks: int = 0,
) -> float:
    """Compare what two models give: logits, or whatever tensor comes first.

    Args:
        theirs: a call of the model that was given.
        ours: the transformers model that stands for it.
        inputs: what `ours` gets.
        what: what the model is, for the error.
        real: which tokens count [batch, pos]; None for all.
        hooks: how many hooks the model has, for the error.

    Returns:
        The relative error.

    Raises:
        UnsupportedError: they differ.
    """
    with torch.no_grad(), evaluating(ours):
        one, two = _first(theirs()), _first(ours(**inputs))
    one = one.to(two.device)
    error = relative_error(two, one) if real is None else relative_error(two[real], one[real])
    if not error <= TOLERANCE.get(two.dtype, 1e-4):
        told = f" It has {hooks} hooks, which are not run here: reset_hooks() first." if hooks else ""
        raise UnsupportedError(
            f"this {what} is refused: what it gives differs from what its weights give here by {error:.1e} "
            f"relative.{told}"
        )
    return error


def _first(out: Any) -> Tensor:
    found = outputs_of(out)
    return found[("logits",)] if ("logits",) in found else next(iter(found.values()))
