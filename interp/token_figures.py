"""Drawing scores of tokens and patches: coloured text, and a heat map over a picture, from plain arrays."""

from __future__ import annotations

import base64
import html
import io
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.errors import InputError
from interp.figures import FONT, escape, show_token
from interp.palette import DIVERGING, SEQUENTIAL, colour_range, finite_array, is_diverging

if TYPE_CHECKING:
    import plotly.graph_objects as go

MONO = 'ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace'
_INK, QUIET = "#1f2933", "#e4e7eb"
_LETTER, _LINE, _WIDE, _TALL, _BAR = 7.4, 27, 760, 440, 90  # pixels: a letter, a line, the largest text and picture


@dataclass(frozen=True, slots=True)
class Chip:
    """One token as it is drawn, or a stretch of image tokens as one.

    Attributes:
        text: what is written, escaped.
        hover: what the mouse shows, escaped.
        score: its score; None for a stretch of image tokens.
        length: letters, wide ones counted twice.
    """

    text: str
    hover: str
    score: float | None
    length: int


def chips_of(tokens: Sequence[str], scores: np.ndarray, kinds: Sequence[str]) -> Iterator[Chip]:
    """The tokens in order; image tokens that stand together become one chip."""
    for image, run in groupby(range(len(tokens)), lambda at: kinds[at] == "image"):
        places = list(run)
        if image:
            text = f"[{len(places)} image token{'s' if len(places) > 1 else ''}]"
            total = float(scores[places].sum())
            yield Chip(text, f"{places[0]} to {places[-1]}: {text}, in all {total:.4g}", None, len(text))
            continue
        for at in places:
            shown = show_token(tokens[at])
            yield Chip(shown, f"{at}: {shown}", float(scores[at]), _length(shown))


def _length(shown: str) -> int:
    text = html.unescape(shown)
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c) for c in text)


def text_range(scores: np.ndarray, kinds: Sequence[str], largest: float | None) -> tuple[float, float, bool]:
    """The scores at both ends of the text's colours, and whether they are signed; see `TokenScores.plot`."""
    signed = is_diverging(scores)
    written = np.array([k != "image" for k in kinds])
    plain = written & np.array([i > 0 and k == "text" for i, k in enumerate(kinds)])
    chosen = next((c for c in (scores[plain], scores[written]) if c.any()), np.ones(1))
    if largest is not None:
        return -largest * signed, largest, signed
    low, high = colour_range(chosen, signed)
    return low, high, signed


def colours(values: np.ndarray, low: float, high: float, signed: bool) -> list[str]:
    """Each value as a colour `#rrggbb`."""
    stops = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in (DIVERGING if signed else SEQUENTIAL)])
    place = np.clip((values - low) / (high - low), 0, 1) * (len(stops) - 1)
    mixed = np.stack([np.interp(place, np.arange(len(stops)), stops[:, c]) for c in range(3)], -1).round().astype(int)
    return ["#{:02x}{:02x}{:02x}".format(*rgb) for rgb in mixed]


def inks(backgrounds: Sequence[str]) -> list[str]:
    """Dark or light text, whichever can be read on each background."""
    parts = [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in backgrounds]
    return [_INK if 0.299 * r + 0.587 * g + 0.114 * b > 140 else "#ffffff" for r, g, b in parts]


def token_html(tokens: Sequence[str], scores: np.ndarray, kinds: Sequence[str], limit: int = 600) -> str:
    """Coloured text as HTML, every token escaped; image tokens that stand together become one mark."""
    low, high, signed = text_range(scores, kinds, None)
    chips = list(chips_of(tokens, scores, kinds))
    out = []
    for chip in chips[:limit]:
        back = QUIET if chip.score is None else colours(np.array([chip.score]), low, high, signed)[0]
        number = "" if chip.score is None else f" = {chip.score:.4g}"
        look = f"background:{back};color:{inks([back])[0]};padding:1px 2px;margin:1px;border-radius:3px"
        title = html.escape(html.unescape(chip.hover) + number, quote=True)
        out.append(f"<span style='{look};display:inline-block' title=\"{title}\">{chip.text}</span>")
    more = f" … {len(chips) - limit} more" if len(chips) > limit else ""
    return f"<div style='font-family:{html.escape(MONO)};font-size:13px;line-height:1.9'>{''.join(out)}{more}</div>"


def token_figure(
    tokens: Sequence[str],
    scores: np.ndarray,
    kinds: Sequence[str],
    *,
    title: str = "",
    unit: str = "",
    largest: float | None = None,
    grid: np.ndarray | None = None,
    picture: Any = None,
) -> go.Figure:
    """Tokens as coloured text in lines, below a heat map where there is one.

    Args:
        tokens: texts of the tokens.
        scores: their scores [token].
        kinds: `text`, `special` or `image` for each token.
        title: plain text above the picture.
        unit: what the scores are measured in.
        largest: the score with the darkest colour in the text; None chooses it (see `TokenScores.plot`).
        grid: scores of a picture [height, width]; NaN is left clear.
        picture: what lies beneath: a PIL image or an array of that size.

    Raises:
        InputError: the picture has another size than the grid.
        NonFiniteError: an infinity stands among the numbers.
    """
    import plotly.graph_objects as go

    values = finite_array(scores, 1, "scores [token]")
    chips = list(chips_of(tokens, values, kinds))
    columns = int(_WIDE / _LETTER)
    places, lines = _wrapped(chips, columns)
    scale = 0.0 if grid is None else min(_WIDE / grid.shape[1], _TALL / grid.shape[0])
    tall = 0 if grid is None else round(grid.shape[0] * scale)
    gap, top = 30 if tall else 0, 56 if title else 20
    body = tall + gap + lines * _LINE
    below = max(16, (_BAR - lines * _LINE) // 2 + 14)  # the text's colour bar may be longer than the text is high
    figure = go.Figure()
    bottom = lines * _LINE / body
    _add_text(figure, chips, places, text_range(values, kinds, largest), unit, (0.0, bottom), lines * _LINE)
    hidden = {"visible": False, "fixedrange": True}
    figure.update_layout(
        template="none",
        title={"text": escape(title), "x": 0, "xref": "container", "xanchor": "left", "pad": {"l": 16}, "y": 0.98}
        | {"yref": "container", "yanchor": "top", "font": {"size": 16, "weight": 600}},
        font={"family": FONT, "size": 12, "color": _INK},
        margin={"l": 16, "r": 110, "t": top, "b": below},
        width=_WIDE + 126,
        height=body + top + below,
        **dict.fromkeys(("paper_bgcolor", "plot_bgcolor"), "white"),
        barmode="overlay",
        showlegend=False,
        xaxis={**hidden, "range": [0, columns]},
        yaxis={**hidden, "range": [lines - 0.5, -0.5], "domain": [0, bottom]},
        hoverlabel={"font": {"family": FONT, "size": 13}, "align": "left"},
    )
    if grid is not None:
        share = grid.shape[1] * scale / _WIDE
        _add_map(figure, finite_array(grid, 2, "grid [height, width]", gaps=True), picture, unit, share, body, tall)
    return figure


def _wrapped(chips: Sequence[Chip], columns: int) -> tuple[list[tuple[int, int, int]], int]:
    """Line, first column and width of each chip, and the number of lines; a token with a line end closes its line."""
    places: list[tuple[int, int, int]] = []
    line = at = 0
    for chip in chips:
        wide = min(chip.length + 1, columns)
        if at and at + wide > columns:
            line, at = line + 1, 0
        places.append((line, at, wide))
        at += wide
        if chip.text.endswith("↵"):
            line, at = line + 1, 0
    return places, max((p[0] for p in places), default=0) + 1


def _add_text(
    figure: go.Figure,
    chips: Sequence[Chip],
    places: Sequence[tuple[int, int, int]],
    ends: tuple[float, float, bool],
    unit: str,
    domain: tuple[float, float],
    pixels: int,
) -> None:
    """Every chip as a bar with its text inside, so that colour bar and hover come with it."""
    low, high, signed = ends
    for scored in (True, False):
        some = [i for i, chip in enumerate(chips) if (chip.score is not None) == scored]
        if not some:
            continue
        values = np.array([chips[i].score for i in some]) if scored else np.zeros(len(some))
        back = colours(values, low, high, signed) if scored else [QUIET] * len(some)
        number = f"<br><b>%{{customdata[1]:.4g}}</b> {escape(unit)}" if scored else ""
        figure.add_bar(
            orientation="h",
            base=[places[i][1] + 0.06 for i in some],
            x=[places[i][2] - 0.12 for i in some],
            y=[places[i][0] for i in some],
            width=0.84,
            marker={"color": back, "line": {"width": 0}},
            text=[chips[i].text for i in some],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            constraintext="none",
            insidetextfont={"family": MONO, "size": 12, "color": inks(back)},
            customdata=[[chips[i].hover, v] for i, v in zip(some, values, strict=True)],
            hovertemplate=f"%{{customdata[0]}}{number}<extra></extra>",
        )
    # A point that is never seen carries the colour bar.
    ticks = np.linspace(low, high, 5 if pixels > 110 else 3)
    names = [f"{t:.2g}" for t in ticks]
    scored = [chip.score for chip in chips if chip.score is not None]
    names[-1] = f"≥ {names[-1]}" if max(scored, default=high) > high else names[-1]
    names[0] = f"≤ {names[0]}" if min(scored, default=low) < low else names[0]
    bar = _colourbar(unit, domain[1] / 2, max(70, pixels)) | {"tickvals": ticks, "ticktext": names}
    scale = _scale(DIVERGING if signed else SEQUENTIAL)
    marker = {"color": [low], "cmin": low, "cmax": high, "colorscale": scale, "showscale": True, "colorbar": bar}
    figure.add_scatter(x=[None], y=[None], mode="markers", marker=marker, hoverinfo="skip")


def _add_map(
    figure: go.Figure, grid: np.ndarray, picture: Any, unit: str, share: float, body: int, pixels: int
) -> None:
    height, width = grid.shape
    signed = is_diverging(grid)
    low, high = colour_range(grid, signed)
    bottom = 1 - pixels / body
    if picture is not None:
        source, clear = picture_source(picture, width, height), True
        figure.add_layout_image(
            source=source, xref="x2", yref="y2", x=0, y=0, sizex=width, sizey=height, sizing="stretch", layer="below"
        )
    else:
        clear = False
    figure.add_heatmap(
        z=grid.astype(np.float32),
        x0=0.5,
        dx=1,
        y0=0.5,
        dy=1,
        zmin=low,
        zmax=high,
        colorscale=_clear_scale(signed) if clear else _scale(DIVERGING if signed else SEQUENTIAL),
        xaxis="x2",
        yaxis="y2",
        hoverongaps=False,
        hovertemplate=f"x %{{x:.0f}} · y %{{y:.0f}}<br><b>%{{z:.4g}}</b> {escape(unit)}<extra></extra>",
        colorbar=_colourbar(unit, (1 + bottom) / 2, pixels),
    )
    plain = {"visible": False, "fixedrange": True}
    figure.update_layout(
        xaxis2={**plain, "range": [0, width], "domain": [0, share], "anchor": "y2"},
        yaxis2={**plain, "range": [height, 0], "domain": [bottom, 1], "anchor": "x2"},
    )


def picture_source(picture: Any, width: int, height: int) -> str:
    """A picture as a grey `data:` address, so that the colours above it can be read.

    Args:
        picture: a PIL image, or an array or tensor [height, width], [height, width, 3] or [3, height, width]; floats
            are scaled from their smallest to their largest value.
        width: pixels that it must have.
        height: pixels that it must have.

    Raises:
        InputError: it has another size, or is no picture.
    """
    from PIL import Image

    if not isinstance(picture, Image.Image):
        array = np.asarray(picture.detach().cpu() if hasattr(picture, "detach") else picture)
        if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[:2] != (height, width):
            array = array.transpose(1, 2, 0)
        if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
            raise InputError(f"a picture is a PIL image or an array [height, width, 3], found shape {array.shape}.")
        if array.dtype != np.uint8:
            array = array.astype(np.float64)
            array = ((array - array.min()) / (np.ptp(array) or 1) * 255).astype(np.uint8)
        picture = Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)
    if picture.size != (width, height):
        raise InputError(
            f"the picture is {picture.size[0]} x {picture.size[1]} pixels, the patch map {width} x {height}: give the "
            "picture that the map is of (for a vision tower the processed one, batch.inputs['pixel_values'][i])."
        )
    buffer = io.BytesIO()
    picture.convert("RGB").convert("L").save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _scale(stops: Sequence[str]) -> list[list[Any]]:
    return [[i / (len(stops) - 1), colour] for i, colour in enumerate(stops)]


def _clear_scale(signed: bool) -> list[list[Any]]:
    """A scale to be laid over a picture: clear where the score is zero."""

    def rgba(colour: str, alpha: float) -> str:
        return f"rgba({','.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))},{alpha:.2f})"

    blue, orange = "#1f66a8", "#e8590c"
    if signed:
        return [[0, rgba(blue, 0.85)], [0.5, rgba("#ffffff", 0.0)], [1, rgba(orange, 0.85)]]
    return [[0, rgba(orange, 0.0)], [0.5, rgba(orange, 0.5)], [1, rgba("#b02a02", 0.88)]]


def _colourbar(unit: str, middle: float, pixels: int) -> dict[str, Any]:
    return {
        "title": {"text": f"{escape(unit)}<br> " if unit else "", "side": "top", "font": {"size": 12}},
        **{"thickness": 12, "outlinewidth": 0, "lenmode": "pixels", "len": max(_BAR, min(pixels, 300))},
        **{"nticks": 5, "ticks": "", "exponentformat": "power", "x": 1.01, "xpad": 8, "y": middle, "yanchor": "middle"},
    }
