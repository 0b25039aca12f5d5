"""The sections of a report on head scores."""

from collections.abc import Sequence

from interp.figures import layer_lines
from interp.report.blocks import Figure, KeyValues, Prompts, Section, Table, Text
from interp.scores import HeadScores


def head_sections(scores: HeadScores, *, k: int = 20, prompts: Sequence[str] = ()) -> list[Section]:
    """The standard sections on one set of head scores: overview, strongest heads, layers, all heads, prompts.

    Args:
        scores: what to show.
        k: how many heads the ranking lists.
        prompts: the texts that the scores were computed on, for the last section.
    """
    values, valid = scores.scores, ~scores.scores.isnan()
    layers, heads = values.shape
    first = scores.top(1, by="abs").iloc[0]
    facts = {
        "Method": scores.name,
        "Unit": scores.unit or "none",
        "Tower": scores.tower,
        "Heads": f"{int(valid.sum()):,} in {layers} layers (up to {heads} each)",
        "Prompts": f"{len(scores.per_prompt):,}" if scores.per_prompt is not None else "not recorded one by one",
        "Strongest head": f"layer {first['layer']:.0f}, head {first['head']:.0f}: {first['score']:.4g} {scores.unit}",
        "Mean, standard deviation": f"{values[valid].mean():.4g}, {values[valid].std(correction=0):.4g}",
    }
    bars = scores.plot(kind="bars", k=k, title="")
    intervals = len(bars.data) > 1  # type: ignore[arg-type]
    note = "Strongest heads by the size of their score" + (
        ", each with its 95% bootstrap interval over prompts. The intervals are of single heads: they are not widened "
        "for having picked the strongest among many."
        if intervals
        else "."
    )
    size = {"largest size": values.abs().nan_to_num(0).amax(1), "mean size": values.abs().nanmean(1).nan_to_num(0)}
    sections = [
        Section(
            "Overview",
            [
                KeyValues(facts),
                Figure(scores.plot(title=""), "Every head: layers downwards, heads to the right. Grey: no such head."),
            ],
        ),
        Section(
            "Strongest heads", [Figure(bars, note), Table(scores.top(k, by="abs"), "Ranked by the size of the score.")]
        ),
        Section(
            "By layer",
            [Figure(layer_lines(size, unit=scores.unit), "Size of the scores (without sign) in each layer.")],
        ),
        Section(
            "All heads", [Table(scores.frame(), "Every head that exists; click a column to sort.", max_rows=10_000)]
        ),
    ]
    if prompts:
        sections.append(Section("Prompts", [Text("The texts that the scores were computed on."), Prompts(prompts)]))
    return sections
