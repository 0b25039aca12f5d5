"""What acts on the model in a run of `interp evaluate`: an intervention of `interp.steering`, made for each batch.

A run that was cut off is taken up with other batches, so nothing here may depend on who shares a batch: sink
dimensions, rankings and rates are found once, and random heads and tokens are drawn for each image or question by its
id.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import typer

from interp.cli.evaluation.probing import Probe
from interp.cli.evaluation.settings import EvaluateSettings
from interp.heads import norm_matched, random_heads, vision_divergence
from interp.steering import (
    M3ID,
    BlindTokenContrast,
    VisualContrast,
    attention_redistribution,
    blind_tokens,
    edit_heads,
    representation_injection,
    sink_dimensions,
    vision_heads,
)

if TYPE_CHECKING:
    from interp.batch import Batch
    from interp.edits import Edit
    from interp.lens import Lens

MLP_SHARE = 0.16 / 0.26  # injection's published strength for MLPs over that for attention
MOST_HEADS, HEAD_SHARE = 16, 12  # edited: a twelfth of all heads, at most sixteen


@dataclass(frozen=True, slots=True)
class Acting:
    """What acts in a batch: functions that make its edits and its logits processors."""

    edits: "Callable[[Batch], list[Edit]]" = lambda batch: []
    processors: "Callable[[Batch], list[Any]]" = lambda batch: []


Maker = Callable[[Sequence[str]], Acting]


def intervention(lens: "Lens", settings: EvaluateSettings, probe: Probe) -> Maker | None:
    """What acts in a batch, from the ids of its images or questions; None where nothing is done.

    Args:
        lens: the model.
        settings: of the run.
        probe: what sink dimensions, rankings and rates are found on.

    Raises:
        InterpError: the model cannot be changed in this way.
    """
    if settings.intervention is None:
        return None
    return MAKERS[settings.intervention](lens, settings, probe)


def _reinforcement(lens: "Lens", settings: EvaluateSettings, probe: Probe) -> Maker:
    def edits(batch: "Batch", ids: Sequence[str]) -> "list[Edit]":
        chosen = vision_heads(lens, batch, scale=settings.force)
        if settings.control == "norm":
            return norm_matched(lens, chosen.chosen, settings.force, positions="last")
        if settings.control == "random":
            alone = [replace(chosen, chosen=chosen.chosen[i : i + 1]) for i in range(len(ids))]
            drawn = [one.shuffled(lens, _seed(settings.seed, name)) for one, name in zip(alone, ids, strict=True)]
            chosen = replace(chosen, chosen=torch.cat([one.chosen for one in drawn]))
        return chosen.edits(settings.force)

    return lambda ids: Acting(lambda batch: edits(batch, ids))


def _injection(lens: "Lens", settings: EvaluateSettings, probe: Probe) -> Maker:
    rates = probe.rates(lens).rates
    if settings.control == "random":
        random = torch.Generator().manual_seed(settings.seed)
        rates = rates[:, torch.randperm(rates.shape[1], generator=random)]
    attn, mlp = rates
    force = settings.force
    made = representation_injection(lens, attn=attn, mlp=mlp, attn_strength=force, mlp_strength=force * MLP_SHARE)
    return lambda ids: Acting(lambda batch: made)


def _redistribution(lens: "Lens", settings: EvaluateSettings, probe: Probe) -> Maker:
    found, strength = sink_dimensions(lens, probe.prompts(lens)), settings.force
    if not found and strength:
        typer.echo(f"var: {lens.name} has no sink dimensions at the published threshold, so that nothing is changed.")
    return lambda ids: Acting(lambda batch: attention_redistribution(lens, batch, dimensions=found, p=1 - strength))


def _editing(lens: "Lens", settings: EvaluateSettings, probe: Probe) -> Maker:
    ranking = vision_divergence(lens, probe.prompts(lens))
    many = max(1, min(MOST_HEADS, int(ranking.scores.isfinite().sum()) // HEAD_SHARE))
    top = ranking.top(many)
    pairs = [(int(layer), int(head)) for layer, head in zip(top["layer"], top["head"], strict=True)]
    if settings.control == "random":
        (pairs,) = random_heads(pairs, ranking, matched="nearest", draws=1, seed=settings.seed)
    keep = settings.control == "norm"
    made = norm_matched(lens, pairs, settings.force) if keep else edit_heads(pairs, settings.force)
    return lambda ids: Acting(lambda batch: made)


def _contrast(lens: "Lens", settings: EvaluateSettings, probe: Probe) -> Maker:
    if settings.intervention == "m3id":
        return lambda ids: Acting(processors=lambda batch: [M3ID(lens, batch, rate=settings.force)])
    return lambda ids: Acting(processors=lambda batch: [VisualContrast(lens, batch, strength=settings.force)])


def _blind_tokens(lens: "Lens", settings: EvaluateSettings, probe: Probe) -> Maker:
    def processors(batch: "Batch", ids: Sequence[str]) -> list[Any]:
        blind = blind_tokens(lens, batch)
        if settings.control == "random":
            for i, name in enumerate(ids):
                columns = batch.span("image")[i].nonzero()[:, 0]
                random = torch.Generator().manual_seed(_seed(settings.seed, name))
                drawn = torch.randperm(len(columns), generator=random)[: int(blind[i].sum())]
                blind[i] = False
                blind[i, columns[drawn.to(columns.device)]] = True
        return [BlindTokenContrast(lens, batch, strength=settings.force, blind=blind)]

    return lambda ids: Acting(processors=lambda batch: processors(batch, ids))


MAKERS: dict[str, "Callable[[Lens, EvaluateSettings, Probe], Maker]"] = {
    "vhr": _reinforcement,
    "iri": _injection,
    "var": _redistribution,
    "edit": _editing,
    "vcd": _contrast,
    "m3id": _contrast,
    "avisc": _blind_tokens,
}


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7])
