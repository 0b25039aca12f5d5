"""Turn sections into one HTML file: scripts and pictures inside, nothing fetched, every text escaped."""

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.errors import InputError
from interp.files import write_text
from interp.report.blocks import (
    Block,
    Figure,
    Folded,
    KeyValues,
    Panel,
    Panels,
    Pictures,
    Prompts,
    Provenance,
    Scale,
    Section,
    Table,
    Text,
)

if TYPE_CHECKING:
    from markupsafe import Markup

HERE = Path(__file__).parent


def write_report(
    folder: str | os.PathLike[str],
    *,
    title: str,
    sections: Sequence[Section],
    subtitle: str = "",
    provenance: Provenance | None = None,
) -> Path:
    """Write `report.html` into a folder: one file that shows the same on any machine, with or without a network.

    The page forbids itself to load or run anything but its own two scripts (by their hashes), so text that slipped
    through as markup would stay without effect.

    Args:
        folder: made when it is missing; an older `report.html` in it is replaced.
        title: plain text.
        sections: at least one.
        subtitle: plain text below the title.
        provenance: where the numbers came from; `Provenance.here(settings)` fills in what this process knows.

    Returns:
        The path of the page.

    Raises:
        InputError: there is no title or no section, a picture's text has an unknown mark, or a colour is none.
        FileError: the file cannot be written.
    """
    import jinja2
    from markupsafe import Markup

    if not title.strip() or not sections:
        raise InputError(
            f"a report needs a title and at least one section, found {title!r} and {len(sections)} sections."
        )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scripts = [(HERE / "script.html").read_text(encoding="utf-8")]
    if any(isinstance(block, Figure) for section in sections for block in section.blocks):
        from plotly.offline import get_plotlyjs

        scripts.insert(0, get_plotlyjs())
    page = environment.get_template("page.html").render(
        title=title,
        subtitle=subtitle,
        sections=_named(sections),
        provenance=_provenance(provenance) if provenance else [],
        style=Markup((HERE / "style.html").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],
        hashes=" ".join(f"'sha256-{_digest(script)}'" for script in scripts),
    )
    path = Path(folder) / "report.html"
    write_text(path, page)
    return path


def _named(sections: Sequence[Section]) -> list[dict[str, Any]]:
    """The sections with names for links, and their blocks in the form that the template knows."""
    return [
        {
            "id": f"s{number}-" + (re.sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-") or "section"),
            "title": section.title,
            "blocks": [_block(block) for block in section.blocks],
        }
        for number, section in enumerate(sections, 1)
    ]


def _block(block: Block) -> dict[str, Any]:
    match block:
        case Text():
            paragraphs = [part.strip() for part in re.split(r"\n\s*\n", block.text) if part.strip()]
            return {"kind": "text", "paragraphs": paragraphs}
        case KeyValues():
            return {"kind": "pairs", "pairs": _pairs(block.values)}
        case Prompts():
            shown = list(block.texts[: block.max_texts])
            return {"kind": "prompts", "texts": shown, "caption": block.caption, "total": len(block.texts)}
        case Pictures():
            items = [
                {"png": base64.b64encode(item.png).decode("ascii"), "title": item.title, "text": _marks(item.text)}
                for item in block.items
            ]
            return {"kind": "pictures", "items": items, "caption": block.caption}
        case Folded():
            return {"kind": "folded", "title": block.title, "blocks": [_block(inner) for inner in block.blocks]}
        case Panels():
            return {"kind": "panels", "items": [_panel(item) for item in block.items], "caption": block.caption}
        case Table():
            return {"kind": "table", "caption": block.caption, **_table(block)}
        case Figure():
            width, height = block.figure.layout.width, block.figure.layout.height
            return {
                "kind": "figure",
                "json": _inline(block.figure.to_json() or "{}"),
                "caption": block.caption,
                "width": int(width) if width else None,
                "height": int(height or 450),
            }


def _marks(text: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Pieces of text; a mark becomes the name of a style, so it must be a known one."""
    for _, mark in text:
        if mark not in ("", "right", "wrong"):
            raise InputError(f"a piece of text is marked 'right', 'wrong' or '', found {mark!r}.")
    return list(text)


def _panel(panel: Panel) -> dict[str, Any]:
    chips = [
        {"text": text, "hover": hover, "look": f"background:{_colour(back)};color:{_colour(ink)}"}
        for text, hover, back, ink in panel.chips
    ]
    return {
        "title": panel.title,
        "chips": chips,
        "scale": _scale(panel.scale),
        "png": base64.b64encode(panel.png).decode("ascii"),
        "png_scale": _scale(panel.png_scale),
        "note": panel.note,
    }


def _scale(scale: Scale | None) -> dict[str, str] | None:
    if scale is None:
        return None
    colours = ",".join(map(_colour, scale.colours))
    return {"look": f"background:linear-gradient(90deg,{colours})", "low": scale.low, "high": scale.high}


def _colour(colour: str) -> str:
    """A colour becomes part of a style, so it must be one."""
    if not re.fullmatch(r"#[0-9a-f]{6}", colour):
        raise InputError(f"a colour is written '#rrggbb' in lower case, found {colour!r}.")
    return colour


def _table(block: Table) -> dict[str, Any]:
    import pandas as pd

    frame = block.frame
    numeric = [
        bool(pd.api.types.is_numeric_dtype(kind) and not pd.api.types.is_bool_dtype(kind)) for kind in frame.dtypes
    ]
    rows = [
        [_cell(value, number) for value, number in zip(row, numeric, strict=True)]
        for row in frame.head(block.max_rows).itertuples(index=False, name=None)
    ]
    columns = [{"name": str(name), "numeric": number} for name, number in zip(frame.columns, numeric, strict=True)]
    return {"columns": columns, "rows": rows, "total": len(frame)}


def _cell(value: Any, numeric: bool) -> dict[str, str]:
    """What a cell shows, and what it is sorted by where that is another."""
    if value is None or value != value:  # NaN and missing values are the ones that differ from themselves
        return {"text": "\N{EN DASH}", "sort": ""}
    if numeric and isinstance(value, float) and not math.isinf(value):
        return {"text": f"{value:.4g}".replace("-", "\N{MINUS SIGN}"), "sort": repr(float(value))}
    return {"text": str(value), "sort": str(value)}


def _provenance(source: Provenance) -> list[dict[str, Any]]:
    run = {"Date": source.date, "Command": source.command, "Seed": source.seed, "Hardware": source.hardware}
    groups = [
        ("Run", {name: value for name, value in run.items() if value not in ("", None)}),
        ("Settings", source.settings),
        ("Versions", source.versions),
    ]
    return [{"title": title, "pairs": _pairs(values)} for title, values in groups if values]


def _pairs(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(str(name), _shown(value)) for name, value in values.items()]


def _shown(value: Any) -> str:
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value, ensure_ascii=False, default=str)
    return "none" if value is None else str(value)


def _inline(text: str) -> "Markup":
    """Json that may stand inside a script element: no `<` can end the element or open a comment."""
    from markupsafe import Markup

    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
