"""The page of a comparison: every run's numbers, differences to the plain run, curves over doses, what it costs."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from interp.cli.evaluation.comparison import METRICS, PLAIN, comparison, zero_changes
from interp.cli.evaluation.folder import EvaluationFolder
from interp.figures import interval_lines
from interp.report import Figure, KeyValues, Provenance, Section, Table, Text, write_report

if TYPE_CHECKING:
    import pandas as pd

DRAWN = {"chair": ("chair_i", "recall", "length", "perplexity"), "pope": ("accuracy", "yes_ratio", "auroc")}
ABOUT = {
    "vhr": "the heads whose output depends most on the image, louder (He et al. 2025)",
    "iri": "what early layers write at the newest token, added to later ones (Li et al. 2026)",
    "var": "attention moved from sinks to the rest of the image (Kang et al. 2025)",
    "edit": "the heads of the largest divergence without the image, scaled (Basile et al. 2025)",
    "vcd": "contrast with the image under noise (Leng et al. 2024)",
    "m3id": "contrast with no image, growing with the text (Favero et al. 2024)",
    "avisc": "contrast with the image's blind tokens alone (Woo et al. 2025)",
}
READ = (
    "Everything is greedy and on the same images. A dose of 0 changes nothing, 1 is the usual strength of an "
    "intervention, others lie in proportion. Controls, random: as many random heads of the same layers (of vhr for "
    "each image or question anew, of edit once), as many random image tokens (avisc), or the recovery rates permuted "
    "over layers (iri); norm: the same heads, but what attention adds to the stream is brought back to its size. var, "
    "vcd and m3id choose no heads, layers or tokens that could be drawn at random.\n\n"
    "An intervention that does not beat its random control does not work by what it chooses; one that its "
    "size-keeping form does not equal works by size. Fewer hallucinations beside less recall or a shorter text are no "
    "gain, nor is accuracy that comes from the yes-ratio alone: compare AUROC. perplexity is that of the captions "
    "under the model as it is, with their ends."
)


def write_comparison(folder: EvaluationFolder) -> Path:
    """Write `report.html` of a comparison from what its folder holds.

    Raises:
        FileError: a run is missing or damaged.
    """
    frame, settings = comparison(folder), folder.settings
    task = settings.task
    changed = zero_changes(folder)
    acting = KeyValues({name: ABOUT[name] for name in settings.names})
    known = {**folder.record["settings"], **folder.record.get("model", {}), **folder.record.get("estimated", {})}
    sections = [
        Section("Numbers", [Text(_first(frame, changed)), Table(_wide(frame, ""), _caption())]),
        Section("Differences to the plain run", [Table(_wide(frame, "change"), "Paired: the same draws of images.")]),
        Section("Over doses", _curves(frame, settings.names, task)),
        Section("Time", [Table(_latency(folder), "16 tokens with all that it needs, over plain decoding; a median.")]),
        Section("How to read them", [Text(READ), acting]),
        Section("Settings", [KeyValues(known)]),
    ]
    source = Provenance(**{**folder.record.get("provenance", {}), "settings": known})
    title = f"{task.upper()} of {settings.model} with {', '.join(settings.names)}"
    many = len(dict.fromkeys(frame["run"]))
    return write_report(
        folder.path, title=title, subtitle=f"{many} runs, data: {settings.source}", sections=sections, provenance=source
    )


def _first(frame: "pd.DataFrame", changed: dict[str, int]) -> str:
    metric = frame["metric"].iloc[0]
    rows = frame[(frame["metric"] == metric) & (frame["run"] != PLAIN) & (frame["control"] == "") & (frame["dose"] > 0)]
    lower = metric.startswith("chair")
    better = rows[rows["change_high"] < 0] if lower else rows[rows["change_low"] > 0]
    said = ", ".join(better["run"]) or "no run"
    wrong = [f"{name} ({count} texts)" for name, count in changed.items() if count]
    zero = f"At a dose of zero these change texts, and should not: {', '.join(wrong)}." if wrong else ""
    same = "At a dose of zero no text is changed." if changed and not wrong else ""
    return f"{metric} is better than that of the plain run, by a paired 95% interval, in: {said}. {zero}{same}"


def _caption() -> str:
    return "Each number with its 95% bootstrap interval over images."


def _wide(frame: "pd.DataFrame", what: str) -> "pd.DataFrame":
    import pandas as pd

    ends = ("change", "change_low", "change_high") if what else ("value", "low", "high")
    rows: dict[str, dict[str, object]] = {}
    for one in frame.to_dict("records"):
        name, strength = one["run"], one["strength"]
        if what and name == PLAIN:
            continue
        shown = "" if np.isnan(strength) else f"{strength:g}"
        row = rows.setdefault(name, {"run": name, "dose": one["dose"], "strength": shown})
        value, low, high = (one[key] for key in ends)
        row[one["metric"]] = f"{value:.4f} ({low:.4f} to {high:.4f})"
    return pd.DataFrame(list(rows.values()))


def _curves(frame: "pd.DataFrame", names: tuple[str, ...], task: str) -> list[Figure]:
    doses = sorted(set(frame[frame["run"] != PLAIN]["dose"]))
    found = []
    for metric in DRAWN[task]:
        series = {name: _series(frame, metric, name, "", doses) for name in names}
        hint = "Within 95% intervals over images; the text about doses stands below."
        found.append(Figure(interval_lines(doses, series, title=metric, x_title="dose"), hint))
    metric = METRICS[task][0]
    for name in names:
        mine = [row["control"] for row in frame.to_dict("records") if row["intervention"] == name]
        controls = [control for control in dict.fromkeys(mine) if control]
        if controls:
            series = {name: _series(frame, metric, name, "", doses)}
            series |= {f"{name}, {c}": _series(frame, metric, name, c, doses) for c in controls}
            drawn = interval_lines(doses, series, title=f"{metric}: {name} and its controls", x_title="dose")
            found.append(Figure(drawn, "Within 95% intervals over images."))
    return found


def _series(
    frame: "pd.DataFrame", metric: str, name: str, control: str, doses: list[float]
) -> tuple[list[float], list[float], list[float]]:
    """Values and ends of their intervals over doses; controls start from the plain run."""
    rows = [row for row in frame.to_dict("records") if row["metric"] == metric]
    (plain,) = (row for row in rows if row["run"] == PLAIN)
    mine = {row["dose"]: row for row in rows if row["intervention"] == name and row["control"] == control}
    taken = [mine.get(dose, plain) for dose in doses]
    value, low, high = ([float(row[key]) for row in taken] for key in ("value", "low", "high"))
    return value, low, high


def _latency(folder: EvaluationFolder) -> "pd.DataFrame":
    import pandas as pd

    return pd.DataFrame([{"run": name, "time / plain": ratio} for name, ratio in folder.record["latency"].items()])
