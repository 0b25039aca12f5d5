"""The report of a run folder: the model's answers, a section for each method, their agreement, what removing does."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.cli.ranking.evidence import leading
from interp.cli.ranking.findings import effects_section, topic_blocks
from interp.cli.ranking.folder import RunFolder, with_interval
from interp.cli.ranking.texts import QUESTIONS, ROLES, TITLES, TOPICS, explanation
from interp.figures import pattern_heatmap
from interp.heads.agreement import agreement, halves
from interp.report import (
    Figure,
    Folded,
    KeyValues,
    Prompts,
    Provenance,
    Section,
    Table,
    Text,
    head_sections,
    write_report,
)

if TYPE_CHECKING:
    import pandas as pd

    from interp.scores import HeadScores


def write_page(folder: RunFolder) -> Path:
    """Write `report.html` from what the folder holds.

    Raises:
        FileError: a result is missing or damaged.
    """
    results = folder.scores()
    sections = [_summary(folder, results)]
    answers = folder.path / "answers.parquet"
    if answers.is_file():
        import pandas as pd

        sections.append(_answers(pd.read_parquet(answers)))
    sections += [_method(folder, method, scores) for method, scores in results.items()]
    if len(results) > 1:
        sections.append(_agreement(results, folder.settings.top))
    effects = effects_section(folder)
    if effects is not None:
        sections.append(effects)
    sections.append(_all_heads(results))
    if folder.prompts:
        sections.append(_prompts(folder))
    source = Provenance(**{**folder.record.get("provenance", {}), "settings": _settings(folder)})
    title = f"Attention heads of {folder.settings.model}"
    names = ", ".join(TITLES[m].lower() for m in results)
    return write_report(folder.path, title=title, subtitle=f"Ranked by {names}", sections=sections, provenance=source)


def _settings(folder: RunFolder) -> dict[str, Any]:
    seconds = {m: row["seconds"] for m, row in folder.record["methods"].items()}
    left = {f"left out: {name}": why for name, why in folder.record.get("left_out", {}).items()}
    return {**folder.record["settings"], **folder.record.get("model", {}), "seconds": seconds, **left}


def _summary(folder: RunFolder, results: "dict[str, HeadScores]") -> Section:
    import pandas as pd

    rows = []
    for method, scores in results.items():
        top = scores.top(3, by=leading(method, scores))
        named = ", ".join(f"L{r['layer']} H{r['head']} ({r['score']:.3g})" for r in top.to_dict("records"))
        half = halves(scores)
        rows.append(
            {
                "method": TITLES[method],
                "question": QUESTIONS[method],
                "unit": scores.unit,
                "strongest heads": named,
                "prompts": scores.settings["prompts"],
                "split-half": "" if half is None else f"{half[0]} of {half[1]}",
            }
        )
    return Section(
        "Summary",
        [
            Text(
                "Each method gives every attention head one number. Heads are written L(layer) H(head), both counted "
                "from zero. The methods answer different questions and need not agree; each section says what its "
                "number means and what it does not." + _first(folder)
            ),
            *([Text(TOPICS)] if any(folder.topics(m) is not None for m in results) else []),
            Table(
                pd.DataFrame(rows),
                "Split-half: of the strongest heads on every other prompt, how many are also strongest on the rest. "
                "Where few are shared, the ranking says more of these prompts than of the model; more prompts help.",
            ),
        ],
    )


def _first(folder: RunFolder) -> str:
    if not folder.prompts:
        return ""
    one = folder.prompts[0]
    answer = f", with the answer {one.answer!r}" if one.answer else ""
    wrong = f" against {one.wrong!r}" if one.wrong else ""
    text = one.text if len(one.text) <= 300 else one.text[:300] + " ..."
    return f'\n\nThe first of the {len(folder.prompts)} prompts: "{text}"{answer}{wrong}.'


def _answers(frame: "pd.DataFrame") -> Section:
    facts = {
        "Prompts": f"{len(frame):,}",
        "Mean probability of the answer": f"{frame['p_answer'].mean():.3f}",
        "Answer is the most likely token": f"{(frame['rank'] == 1).mean():.0%}",
    }
    if "wrong" in frame:
        facts["Answer beats the wrong one"] = f"{(frame['logit_difference'] > 0).mean():.0%}"
        facts["Mean logit difference"] = f"{frame['logit_difference'].mean():.3f} logits"
    shown = frame.assign(prompt=frame["prompt"] + 1)
    for name in ("answer", "wrong", "top_token"):
        if name in shown:
            shown[name] = [text.strip() or repr(text) for text in shown[name]]
    names = {"p_answer": "P(answer)", "logit_difference": "logit difference", "top_token": "most likely"}
    shown = shown.drop(columns=["p_top", "p_wrong"], errors="ignore").rename(columns=names)
    return Section(
        "Does the model know the answers?",
        [
            Text(
                "A ranking of heads explains a behaviour only where the model shows it. This is what it answers itself."
            ),
            KeyValues(facts),
            Folded(
                "Every answer",
                [
                    Table(
                        shown, "Each prompt, at its last position. Rank 1: no token is more likely than the answer.", 50
                    )
                ],
            ),
        ],
    )


def _method(folder: RunFolder, method: str, scores: "HeadScores") -> Section:
    overview, strongest, *_ = head_sections(scores, k=folder.settings.top)
    top = scores.top(folder.settings.top, by=leading(method, scores))
    frame = with_interval(scores, folder.settings.seed, folder.intervals(method))
    interval = [c for c in ("low", "high") if c in frame]
    table = top.merge(frame[["layer", "head", *interval]], on=["layer", "head"]) if interval else top
    order = ["rank", "layer", "head", "score", *interval]
    table = table.reindex(columns=[*order, *(c for c in table.columns if c not in order)])
    table = table.drop(columns=[scores.settings.get("score", "")], errors="ignore")
    by = {"abs": "size of the score", "above_floor": "column above_floor"}.get(leading(method, scores), "score")
    caption = f"Ranked by the {by}." + (
        " low and high: 95% bootstrap interval over prompts, of each head by itself." if interval else ""
    )
    blocks = [Text(explanation(method, scores.settings)), overview.blocks[1], strongest.blocks[0]]
    if leading(method, scores) == "above_floor":
        bars = scores.plot(kind="bars", column="above_floor", k=folder.settings.top, title="")
        note = "How far the score lies above that of random lists: heads of these keywords, not of words in general."
        blocks[-1] = Figure(bars, note)
    blocks.append(Folded(f"Table of the {len(table)} strongest heads", [Table(table, caption)]))
    blocks += topic_blocks(folder, method)
    blocks += [_example(folder, method, shown) for shown in folder.examples(method)]
    roles = folder.roles(method)
    if roles is not None:
        names = [f"L{r['layer']} H{r['head']}" for r in roles.to_dict("records")]
        roles = roles.drop(columns=["layer", "head"]).round(3)
        roles.insert(0, "head", names)
        blocks += [Text(ROLES), Table(roles, "What the strongest heads do, averaged over the prompts.")]
    return Section(f"{TITLES[method]}: {QUESTIONS[method].lower()}", blocks)


def _example(folder: RunFolder, method: str, shown: dict[str, Any]) -> Figure:
    head = f"L{shown['layer']} H{shown['head']}"
    repeated = method == "patterns" and folder.settings.repeated
    where = "a row of repeated random tokens" if repeated else f"prompt {shown['prompt'] + 1}"
    hint = (
        "A head that does induction shows a bright diagonal in the lower half: each token of the second copy looks at "
        "the one that came after it in the first."
        if repeated
        else "The last row is the position where the answer is read off."
    )
    figure = pattern_heatmap(shown["pattern"], shown["tokens"], title=f"Attention of {head}")
    return Figure(
        figure,
        f"Where {head}, {shown['role']}, looks on {where}. Rows: the token that looks; columns: the token looked at; "
        f"each row sums to 1. {hint} One input, shown as an illustration.",
    )


def _agreement(results: "dict[str, HeadScores]", k: int) -> Section:
    frame = agreement(results, k)
    heads = int((~next(iter(results.values())).scores.isnan()).sum())
    return Section(
        "Do the methods agree?",
        [
            Text(
                "Baseline: two random rankings have a Spearman correlation of 0, give or take "
                f"{1 / max(heads - 1, 1) ** 0.5:.2f} (one standard deviation, {heads} heads), and share as many of "
                "their strongest heads as the column `by chance` says, on average. Signed scores are compared where "
                "both methods have a sign. Direct effect and ablation of a logit difference then have opposite signs "
                "where they agree: a head that writes towards the answer is missed when it is removed."
            ),
            Table(frame, "Each pair of methods."),
        ],
    )


def _all_heads(results: "dict[str, HeadScores]") -> Section:
    whole: Any = None
    for method, scores in results.items():
        frame = scores.frame().reindex(columns=["layer", "head", "score"]).rename(columns={"score": method})
        whole = frame if whole is None else whole.merge(frame, on=["layer", "head"], how="outer")
    table = Table(whole, "Every head that exists; click a column to sort.", 10_000)
    return Section("All heads", [Folded(f"Every head by every method ({len(whole)})", [table])])


def _prompts(folder: RunFolder) -> Section:
    texts = [
        *(
            (f"[{p.image.name}] " if p.image else "")
            + p.text
            + (f" → {p.answer.strip()}" if p.answer else "")
            + (f" (not {p.wrong.strip()})" if p.wrong else "")
            for p in folder.prompts
        )
    ]
    note = "The prompts, with the answer and the wrong answer where they have them."
    count = folder.settings.ablation_prompts
    if count and "ablation" in folder.complete:
        note += f" Ablation used the first {min(count, len(texts))}."
    if "patterns" in folder.complete and folder.settings.repeated:
        size = f"{folder.settings.repeat_rows} rows of {folder.settings.repeat_length}"
        note += f" Attention patterns were scored on other inputs: {size} random tokens, each row repeated once."
    return Section("Prompts", [Text(note), Prompts(texts)])
