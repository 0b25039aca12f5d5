"""What a Lorsa is trained on: what an attention layer reads, and what its heads write, in whole contexts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from interp.dictionaries.activations import Contexts, Source, State
from interp.dictionaries.lorsa.rule import AttentionRule
from interp.errors import InputError, SettingsError


class AttentionPairs:
    """Contexts of what attention layers read (`x.LAYER`) and what their heads write (`y.LAYER`); see `Source`.

    On a GPU it is best put behind a `Prefetch`, not before one: it calls
    the norms of the model.

    Args:
        source: contexts with the two reads of each layer, `rule.reads`: an `ActivationStream`, or a store's contexts.
        rules: of a layer, or of several of one tower.

    Attributes:
        reads: for each layer the names of what is read, and of what is to be reconstructed.

    Raises:
        SettingsError: there is no rule, or a layer has two.
        InputError: the source lacks a read.
    """

    def __init__(self, source: Source[Contexts], rules: AttentionRule | Sequence[AttentionRule]) -> None:
        self.source = source
        self.rules = [rules] if isinstance(rules, AttentionRule) else list(rules)
        layers = [rule.layer for rule in self.rules]
        if not layers or len(set(layers)) < len(layers) or len({rule.tower for rule in self.rules}) > 1:
            raise SettingsError(f"pairs are of one or several layers of one tower, each once; found layers {layers}.")
        self.reads = [(f"x.{layer}", f"y.{layer}") for layer in layers]
        missing = [read for rule in self.rules for read in rule.reads if read not in source.d_in]
        if missing:
            raise InputError(f"the source reads {', '.join(source.d_in)}, but a Lorsa needs {' and '.join(missing)}.")

    @property
    def d_in(self) -> dict[str, int]:
        """Widths of all."""
        widths: dict[str, int] = {}
        for rule, (x, y) in zip(self.rules, self.reads, strict=True):
            widths |= {x: rule.W_Q.shape[1], y: rule.W_O.shape[-1]}
        return widths

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the source, and the layers."""
        layers: Any = [rule.layer for rule in self.rules]
        return {**self.source.settings, "layers": layers, "tower": self.rules[0].tower}

    def __iter__(self) -> AttentionPairs:
        """Itself."""
        return self

    @torch.no_grad()
    def __next__(self) -> Contexts:
        """The next contexts.

        Raises:
            InputError: contexts have less than two positions, or more than a rule was measured on.
        """
        found = next(self.source)
        self._check(found.mask.shape[1])
        values = {}
        for rule, (x, y) in zip(self.rules, self.reads, strict=True):
            stream, z = (found[read] for read in rule.reads)
            values |= {x: rule.inputs(stream), y: rule.target(z)}
        return Contexts(values, found.mask, found.real, found.ids, found.document, found.number)

    def _check(self, positions: int) -> None:
        known = min(rule.context for rule in self.rules)
        if positions < 2:
            raise InputError("the contexts have one position each: a Lorsa needs sequences of at least two.")
        if positions > known:
            raise InputError(
                f"a context has {positions} positions, but the rule of the layer was measured on {known}: take a "
                "longer context."
            )

    def state(self) -> State:
        """The source's place."""
        return self.source.state()

    def restore(self, state: State) -> None:
        """Go to a place."""
        self.source.restore(state)

    def close(self) -> None:
        """Close the source."""
        self.source.close()
