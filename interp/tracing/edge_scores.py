"""`EdgeScores`: how much each edge between two components carries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.errors import InputError, SettingsError, unknown
from interp.results import Scores, checked, describe, jsonable, register

if TYPE_CHECKING:
    import pandas as pd
else:
    pd = Any

INPUTS = ("q", "k", "v", "mlp", "logits")
RANKED = ("abs", "score")


@register
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class EdgeScores(Scores):
    """The estimated change of a metric when one edge carries the other run's value. Made by `edge_attribution`.

    Attributes:
        scores: the mean over prompts [source, target], in the metric's unit; NaN where there is no edge.
        errors: its standard error over prompts; NaN with a single prompt.
        sources: layer and head of each source [source, 2]: head -1 for an MLP, layer -1 for the embeddings.
        targets: layer, head and input of each target [target, 3]: the input by its number in `INPUTS`; the head -1 for
            MLPs and the logits, a key/value head for `k` and `v`.
        valid: where there is an edge [source, target].
        clean: the metric of the clean run [prompt].
        corrupt: the metric of the corrupt run [prompt].
        direction: `denoise` or `noise`.
        metric: name of the metric.
        unit: what it is measured in; empty for a plain number.
        settings: what it was computed with: anything that json can hold.

    Raises:
        InputError: tensors that do not fit together.
        NonFiniteError: NaN or infinity at an edge.
        SettingsError: something in `settings` cannot be written as json.
        UnknownNameError: another direction.
    """

    scores: Float[Tensor, "source target"]
    errors: Float[Tensor, "source target"]
    sources: Int[Tensor, "source 2"]
    targets: Int[Tensor, "target 3"]
    valid: Bool[Tensor, "source target"]
    clean: Float[Tensor, " prompt"]
    corrupt: Float[Tensor, " prompt"]
    direction: str
    metric: str
    unit: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.direction not in ("denoise", "noise"):
            raise unknown("direction", self.direction, ("denoise", "noise"))
        keep: dict[str, Any] = {n: getattr(self, n).detach().cpu().long() for n in ("sources", "targets")}
        for name, width in (("sources", 2), ("targets", 3)):
            if keep[name].ndim != 2 or keep[name].shape[1] != width or not len(keep[name]):
                raise InputError(f"{name} are [{name[:-1]}, {width}], found {describe(getattr(self, name))}.")
        sizes = {"source": len(keep["sources"]), "target": len(keep["targets"])}
        valid = keep["valid"] = self.valid.detach().cpu().bool()
        if list(valid.shape) != list(sizes.values()) or not bool(valid.any()):
            raise InputError(f"valid is [source, target] with at least one edge, found {describe(self.valid)}.")
        if bool((keep["targets"][:, 2] < 0).any()) or bool((keep["targets"][:, 2] >= len(INPUTS)).any()):
            raise InputError(f"the input of a target is a number below {len(INPUTS)}.")
        keep["scores"] = checked("scores", self.scores, sizes, valid)
        single = len(self.clean) < 2
        keep["errors"] = checked("errors", self.errors, sizes, torch.zeros_like(valid) if single else valid)
        for name in ("clean", "corrupt"):
            keep[name] = checked(name, getattr(self, name), {"prompt": len(self.clean)})
        keep["settings"] = jsonable(self.settings, "settings")
        for key, value in keep.items():
            object.__setattr__(self, key, value)

    def __len__(self) -> int:
        """Number of edges."""
        return int(self.valid.sum())

    def frame(self) -> pd.DataFrame:
        """A tidy pandas frame, one row for each edge.

        Columns: `source` (`embed`, a head as "layer.head", or "mlp.layer") and `target` (the same, or `logits`), `via`
        (`q`, `k`, `v`, `mlp` or `logits`), `score`, `error` (standard error over prompts), and `source_layer`,
        `source_head`, `target_layer`, `target_head` as numbers (-1 where there is none).
        """
        import pandas

        at, to = self.valid.nonzero(as_tuple=True)
        source, target = self.sources[at].numpy().T, self.targets[to].numpy().T
        names = np.array([_source(*row) for row in self.sources.tolist()], dtype=object)
        goals = np.array([_target(*row) for row in self.targets.tolist()], dtype=object)
        columns = {"source": names[at.numpy()], "target": goals[to.numpy()]}
        columns["via"] = np.array(INPUTS, dtype=object)[target[2]]
        columns |= {"score": self.scores[at, to].numpy(), "error": self.errors[at, to].numpy()}
        columns |= {"source_layer": source[0], "source_head": source[1]}
        columns |= {"target_layer": target[0], "target_head": target[1]}
        return pandas.DataFrame(columns)

    def top(
        self, k: int = 20, by: str = "abs", *, via: str | None = None, target: str | None = None, largest: bool = True
    ) -> pd.DataFrame:
        """The first `k` edges of a ranking, best first.

        Args:
            k: how many, at least 1.
            by: `abs` (the size without the sign) or `score`.
            via: only edges into this input; None for all.
            target: only edges to this component, as `frame` names it; None for all.
            largest: from the largest value down; False from the smallest up.

        Raises:
            UnknownNameError: `by`, `via` or `target` names nothing.
            SettingsError: `k` is below 1.
        """
        if by not in RANKED:
            raise unknown("ranking", by, RANKED)
        if via is not None and via not in INPUTS:
            raise unknown("input", via, INPUTS)
        if type(k) is not int or k < 1:
            raise SettingsError(f"k is a whole number from 1, got {k!r}.")
        frame: Any = self.frame()
        if target is not None and target not in set(frame["target"]):
            raise unknown("target", target, sorted(set(frame["target"])))
        frame = frame if via is None else frame[frame["via"] == via]
        frame = frame if target is None else frame[frame["target"] == target]
        keys = frame["score"].abs() if by == "abs" else frame["score"]
        return frame.loc[keys.sort_values(ascending=not largest, kind="stable").index[:k]].reset_index(drop=True)

    def __repr__(self) -> str:
        best = self.top(1).iloc[0]
        model = self.settings.get("model")
        title = " · ".join([self.direction, self.metric, *([str(model)] if model else [])])
        return (
            f"EdgeScores({title}: {len(self)} edges, {len(self.clean)} prompts; strongest {best['source']} -> "
            f"{best['target']} via {best['via']} = {best['score']:.4g})"
        )

    def _tensors(self) -> dict[str, Tensor]:
        names = ("scores", "errors", "sources", "targets", "valid", "clean", "corrupt")
        return {name: getattr(self, name) for name in names}

    def _fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("direction", "metric", "unit", "settings")}

    @classmethod
    def _restore(cls, tensors: dict[str, Tensor], fields: dict[str, Any]) -> EdgeScores:
        return cls(**tensors, **fields)


def _source(layer: int, head: int) -> str:
    return "embed" if layer < 0 else f"mlp.{layer}" if head < 0 else f"{layer}.{head}"


def _target(layer: int, head: int, number: int) -> str:
    return "logits" if INPUTS[number] == "logits" else f"mlp.{layer}" if head < 0 else f"{layer}.{head}"
