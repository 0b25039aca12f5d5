"""Blocks of the page on what the heads of a ranking do: their topics, where they look, what removing them changes."""

from typing import TYPE_CHECKING, Any

from interp.cli.ranking.folder import RunFolder
from interp.cli.ranking.maps import map_panels
from interp.cli.ranking.texts import EFFECTS, TITLES
from interp.figures import ranked_bars
from interp.heads.measure import UNITS
from interp.report import Figure, Panels, Section, Table, Text

if TYPE_CHECKING:
    import pandas as pd

LONGEST = 70  # letters of a prompt in a table


def topic_blocks(folder: RunFolder, method: str) -> list[Any]:
    """The topics and strongest prompts of a method's top heads, and maps of their attention."""
    import pandas as pd

    blocks: list[Any] = []
    found = folder.topics(method)
    if found is not None and len(found):
        rows = [
            {
                "head": f"L{row['layer']} H{row['head']}",
                "topic": " ".join(token.strip() or repr(token) for token in row["tokens"]),
                "explained": f"{row['explained']:.0%}",
                "strongest prompts": "\n".join(named(folder, int(i)) for i in row["prompts"]),
            }
            for row in found.to_dict("records")
        ]
        blocks.append(
            Table(pd.DataFrame(rows), "What the top heads write, and the prompts that they are strongest for.")
        )
    panels = map_panels(folder, method)
    if panels:
        caption = (
            "Where the top heads look from the last position, each in the picture that it is strongest for. Attention, "
            "not effect."
        )
        blocks.append(Panels(panels, caption))
    return blocks


def named(folder: RunFolder, i: int) -> str:
    """A prompt in one line: its number, its image's name, the end of its text, its answer."""
    prompt = folder.prompts[i]
    text = " ".join(prompt.text.split())
    text = text if len(text) <= LONGEST else "..." + text[-LONGEST:]
    image = f"[{prompt.image.name}] " if prompt.image else ""
    return f"{i + 1}: {image}{text}" + (f" → {prompt.answer.strip()}" if prompt.answer else "")


def effects_table(folder: RunFolder) -> "pd.DataFrame | None":
    """What removing the heads at both ends of every ranking changes; None where nothing was removed."""
    import pandas as pd

    frames = []
    for method in folder.complete:
        effects = folder.effects(method)
        if effects is not None:
            frames.append(effects.frame(seed=folder.settings.seed).assign(method=method))
    return pd.concat(frames, ignore_index=True) if frames else None


def effects_section(folder: RunFolder) -> Section | None:
    """What removing the heads at both ends of every ranking does, beside random heads; None without such numbers."""
    import pandas as pd

    frame = effects_table(folder)
    if frame is None:
        return None
    settings = folder.settings
    what = "removed" if settings.effect_scale == 0 else f"multiplied by {settings.effect_scale:g}"
    shown = list(dict.fromkeys(frame["metric"]))[-1]
    bars: list[tuple[str, float, float, float]] = []
    for row in frame.to_dict("records"):
        if row["metric"] != shown:
            continue
        bars.append((f"{TITLES[row['method']]}: {row['set']}", row["change"], row["low"], row["high"]))
        bars.append(("random heads", row["random"], row["random_low"], row["random_high"]))
    labels, change, low, high = zip(*bars, strict=True)
    if not bool(frame["low"].notna().all()):  # a single prompt has no interval
        low = high = None
    rows = [
        {
            "ranking": TITLES[row["method"]],
            "heads": row["set"],
            "what": row["metric"],
            "before": f"{row['before']:.3f}",
            "change": signed(row["change"], row["low"], row["high"]),
            "random": signed(row["random"], row["random_low"], row["random_high"]),
            "p": row["p"],
        }
        for row in frame.to_dict("records")
    ]
    text = EFFECTS.format(what=what, controls=settings.controls, least=1 / (1 + settings.controls))
    figure = ranked_bars(labels, change, low=low, high=high, unit=f"change of {shown}, {UNITS.get(shown, '')}")
    caption = (
        f"Change of the {shown}. Lines: 95% bootstrap interval over prompts; on random heads, the range of the draws."
    )
    title = f"What happens when these heads are {what}?"
    return Section(
        title, [Text(text), Figure(figure, caption), Table(pd.DataFrame(rows), "Every ranking and measure.")]
    )


def signed(value: float, low: float, high: float) -> str:
    """A change with its interval."""
    return f"{value:+.3f}" if low != low else f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"
