"""Drawing from plain arrays with plotly: heads, ranked bars, attention patterns, lines over layers; with CircuitsVis.

Colours are those of [`interp.palette`][interp.palette]. Text from models or data is escaped, since plotly reads a
subset of HTML in every label. Plotly is imported when something is drawn.
"""

import html
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.errors import InputError, MissingPackageError
from interp.palette import DIVERGING, SEQUENTIAL, colour_range, finite_array, is_diverging

if TYPE_CHECKING:
    import plotly.graph_objects as go

LINES = ("#2f7bc0", "#d4652f", "#1b9472", "#b45c9c", "#b58900", "#63b3e4", "#7b8794")  # after Okabe and Ito
NEGATIVE, POSITIVE = LINES[:2]
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
_INK, _FAINT, _GAP = "#1f2933", "#d5dbe1", "#c6ccd3"


def escape(text: object) -> str:
    """Text that plotly shows letter by letter: no tags, no entities, no formulas, no templates."""
    return html.escape(str(text), quote=False).replace("$", "&#36;").replace("%{", "&#37;{")


def show_token(token: str) -> str:
    """A token as one visible, escaped label: a leading or trailing space becomes `·`, a line end `↵`, a tab `⇥`."""
    body = token.strip(" ")
    if not body:
        return "·" * len(token) or "∅"
    start = len(token) - len(token.lstrip(" "))
    body = "·" * start + body + "·" * (len(token) - start - len(body))
    return escape(body.replace("\r", "␍").replace("\n", "↵").replace("\t", "⇥"))


def head_heatmap(
    values: Any, *, title: str = "", unit: str = "", diverging: bool | None = None, text: bool | None = None
) -> "go.Figure":
    """One cell for each head: layers downwards from layer 0 at the top, heads to the right.

    Args:
        values: numbers [layer, head]; NaN leaves a gap (a head that does not exist).
        title: plain text above the picture.
        unit: what the numbers are measured in, at the colour bar.
        diverging: a scale centred on zero; None chooses it when a value is negative.
        text: write the numbers into the cells; None does so when they fit.

    Raises:
        InputError: `values` is empty, all NaN or not two-dimensional.
        NonFiniteError: an infinity stands in `values`.
    """
    import plotly.graph_objects as go

    grid = finite_array(values, 2, "values [layer, head]", gaps=True)
    layers, heads = grid.shape
    wide, tall = _cell(heads, 600, 9, 92), _cell(layers, 520, 10, 44)
    diverging = is_diverging(grid) if diverging is None else diverging
    low, high = colour_range(grid, diverging)
    text = (wide >= 48 and tall >= 24) if text is None else text
    figure = go.Figure(
        go.Heatmap(
            z=grid,
            zmin=low,
            zmax=high,
            colorscale=_scale(DIVERGING if diverging else SEQUENTIAL),
            **_gaps(wide, tall),
            hoverongaps=False,
            hovertemplate=f"layer %{{y}} · head %{{x}}<br><b>%{{z:.4g}}</b> {escape(unit)}<extra></extra>",
            texttemplate="%{z:.2f}" if text else None,
            colorbar=_colourbar(unit, tall * layers),
        )
    )
    _frame(figure, title, width=wide * heads, height=tall * layers)
    figure.update_xaxes(title_text="head", **_ticks([str(h) for h in range(heads)], wide, 22), showgrid=False)
    ticks = _ticks([str(layer) for layer in range(layers)], tall, 13)
    figure.update_yaxes(title_text="layer", **ticks, showgrid=False, autorange="reversed")
    figure.update_layout(plot_bgcolor=_GAP)
    return figure


def pattern_heatmap(
    pattern: Any,
    tokens: Sequence[str],
    *,
    query_tokens: Sequence[str] | None = None,
    title: str = "",
    unit: str = "probability",
    largest: float | None = None,
    max_cells: int = 1_000_000,
) -> "go.Figure":
    """An attention pattern: one row for each query token, one column for each key token; query 0 at the top.

    Args:
        pattern: numbers [query, key], not negative.
        tokens: the key tokens as text; equal tokens stay apart.
        query_tokens: the query tokens; None takes the key tokens, and needs a square pattern.
        title: plain text above the picture.
        unit: what the numbers are, at the colour bar.
        largest: the value with the darkest colour; None takes the largest in the pattern.
        max_cells: refuse to draw more cells than this, since a browser would freeze.

    Raises:
        InputError: the tokens do not fit the pattern, or it is empty, negative or too large to draw.
        NonFiniteError: NaN or infinity stands in the pattern.
    """
    import plotly.graph_objects as go

    grid = finite_array(pattern, 2, "pattern [query, key]")
    queries = tokens if query_tokens is None else query_tokens
    if grid.shape != (len(queries), len(tokens)):
        raise InputError(
            f"the pattern is {grid.shape[0]} queries by {grid.shape[1]} keys, found {len(queries)} query and "
            f"{len(tokens)} key tokens; give query_tokens when only some query rows were read."
        )
    if grid.size > max_cells:
        raise InputError(
            f"{grid.shape[0]} x {grid.shape[1]} = {grid.size:,} cells are more than max_cells={max_cells:,}: "
            "choose some query rows or a stretch of keys, or raise max_cells."
        )
    if (grid < 0).any():
        row, column = np.argwhere(grid < 0)[0]
        where = f"pattern[{row}, {column}] is {grid[row, column]:.4g}"
        raise InputError(f"{where}: attention cannot be negative. Are these the scores before the softmax?")
    keys, rows = [show_token(t) for t in tokens], [show_token(t) for t in queries]
    wide, tall = _cell(len(keys), 620, 3, 40), _cell(len(rows), 620, 3, 40)
    wide = tall = min(wide, tall) if len(keys) == len(rows) else max(wide, tall)
    names = np.empty((*grid.shape, 2), dtype=object)
    names[..., 0], names[..., 1] = np.array(rows, dtype=object)[:, None], np.array(keys, dtype=object)[None, :]
    figure = go.Figure(
        go.Heatmap(
            z=grid,
            zmin=0.0,
            zmax=float(grid.max() or 1.0) if largest is None else largest,
            colorscale=_scale(SEQUENTIAL),
            **_gaps(wide, tall),
            customdata=names,
            hovertemplate=(
                "query %{y}: <b>%{customdata[0]}</b><br>key %{x}: <b>%{customdata[1]}</b><br>"
                f"%{{z:.4g}} {escape(unit)}<extra></extra>"
            ),
            colorbar=_colourbar(unit, tall * len(rows)),
        )
    )
    _frame(figure, title, width=wide * len(keys), height=tall * len(rows))
    figure.update_xaxes(title_text="key", **_ticks(keys, wide, 14), showgrid=False, tickangle=-60)
    figure.update_yaxes(title_text="query", **_ticks(rows, tall, 14), showgrid=False, autorange="reversed")
    figure.update_layout(plot_bgcolor=_GAP)
    return figure


def ranked_bars(
    labels: Sequence[object], values: Any, *, low: Any = None, high: Any = None, title: str = "", unit: str = ""
) -> "go.Figure":
    """Horizontal bars in the order given, the first at the top, with an interval on each where one is known.

    Args:
        labels: one plain-text label for each bar; equal labels stay apart.
        values: lengths [bar]; negative bars run to the left in the other colour.
        low: lower ends of the intervals [bar]; needs `high`.
        high: upper ends of the intervals [bar]; needs `low`.
        title: plain text above the picture.
        unit: what the values are measured in.

    Raises:
        InputError: lengths differ, nothing is given, only one end of the intervals is given, or low lies above high.
        NonFiniteError: NaN or infinity stands in the numbers.
    """
    import plotly.graph_objects as go

    lengths = finite_array(values, 1, "values [bar]")
    if (low is None) != (high is None):
        raise InputError("intervals need both ends: give low and high, or neither.")
    ends = [] if low is None else [finite_array(low, 1, "low [bar]"), finite_array(high, 1, "high [bar]")]
    sizes = [len(labels), len(lengths), *map(len, ends)]
    if len(set(sizes)) > 1:
        raise InputError(f"labels, values, low and high differ in length: {', '.join(map(str, sizes))}.")
    if ends and (ends[0] > ends[1]).any():
        at = int(np.argmax(ends[0] > ends[1]))
        raise InputError(f"interval {at} ({labels[at]!r}) has low {ends[0][at]:.4g} above high {ends[1][at]:.4g}.")
    places = np.arange(len(lengths))
    span = "<br>interval %{customdata[0]:.4g} to %{customdata[1]:.4g}" if ends else ""
    names = [escape(label) for label in labels]
    figure = go.Figure(
        go.Bar(
            x=lengths,
            y=places,
            orientation="h",
            marker={"color": [NEGATIVE if v < 0 else POSITIVE for v in lengths], "opacity": 0.9},
            text=names,
            textposition="none",
            customdata=np.stack(ends, axis=1) if ends else None,
            hovertemplate=f"%{{text}}<br><b>%{{x:.4g}}</b> {escape(unit)}{span}<extra></extra>",
        )
    )
    if ends:
        # Drawn as lines of their own: an interval need not hold its value, and plotly's error bars must.
        figure.add_scatter(
            x=np.stack([ends[0], ends[1], np.full_like(ends[0], np.nan)], axis=1).ravel(),
            y=np.repeat(places, 3),
            mode="lines+markers",
            name="interval",
            line={"color": _INK, "width": 1.5},
            marker={"symbol": "line-ns", "size": 7, "line": {"width": 1.5, "color": _INK}},
            hoverinfo="skip",
        )
    tall = _cell(len(lengths), 640, 20, 28)
    _frame(figure, title, width=560, height=tall * len(lengths))
    figure.update_xaxes(title_text=escape(unit) or None, zeroline=True, zerolinecolor="#8a949e")
    figure.update_yaxes(**_ticks(names, tall, 14), showgrid=False, range=[len(lengths) - 0.4, -0.6])
    figure.update_layout(bargap=0.32, showlegend=False)
    return figure


def layer_lines(values: Any | Mapping[str, Any], *, title: str = "", unit: str = "") -> "go.Figure":
    """One line over the layers, or several with a legend.

    Args:
        values: numbers [layer], or a mapping from a series' name to its numbers; all of one length.
        title: plain text above the picture.
        unit: what the values are measured in.

    Raises:
        InputError: nothing to draw, lengths differ, or there are more series than colours.
        NonFiniteError: NaN or infinity stands in the numbers.
    """
    import plotly.graph_objects as go

    series = values if isinstance(values, Mapping) else {"": values}
    arrays = {str(name): finite_array(line, 1, f"values [layer] {name}".strip()) for name, line in series.items()}
    lengths = {len(line) for line in arrays.values()}
    if not 1 <= len(arrays) <= len(LINES) or len(lengths) != 1:
        raise InputError(
            f"layer_lines draws 1 to {len(LINES)} series of one length; found {len(arrays)}, lengths {sorted(lengths)}."
        )
    layers = lengths.pop()
    figure = go.Figure()
    for colour, (name, line) in zip(LINES, arrays.items(), strict=False):
        figure.add_scatter(
            x=np.arange(layers),
            y=line,
            name=escape(name),
            mode="lines+markers",
            line={"color": colour, "width": 2.2},
            marker={"size": 6},
            hovertemplate=f"layer %{{x}}<br><b>%{{y:.4g}}</b> {escape(unit)}<extra>{escape(name)}</extra>",
        )
    _frame(figure, title, width=620, height=300)
    figure.update_xaxes(
        title_text="layer", **_ticks([str(x) for x in range(layers)], 620 // layers, 22), showgrid=False
    )
    figure.update_yaxes(title_text=escape(unit) or None, zeroline=is_diverging(np.concatenate(list(arrays.values()))))
    figure.update_layout(showlegend=len(arrays) > 1)
    return figure


def interval_lines(
    x: Any,
    series: Mapping[str, tuple[Any, Any, Any]],
    *,
    title: str = "",
    x_title: str = "",
    unit: str = "",
    quiet: Sequence[str] = (),
) -> "go.Figure":
    """Lines over numbers, each within its interval.

    Args:
        x: where the values stand [point], the same for all.
        series: for each name its values, and the lower and upper ends of their intervals [point]; None for no ends,
            NaN for a gap.
        title: plain text above the picture.
        x_title: what `x` is.
        unit: what the values are measured in.
        quiet: names of series drawn in grey, such as a baseline.

    Raises:
        InputError: nothing to draw, lengths differ, one end of an interval is missing, or there are more series than
            colours.
        NonFiniteError: an infinity stands in the numbers.
    """
    import plotly.graph_objects as go

    places = finite_array(x, 1, "x [point]")
    loud = [name for name in series if name not in quiet]
    if not series or len(loud) > len(LINES):
        raise InputError(f"interval_lines draws 1 to {len(LINES)} series, found {len(loud)}.")
    colours = dict(zip(loud, LINES, strict=False))
    figure, ranges = go.Figure(), []
    for name, given in series.items():
        if (given[1] is None) != (given[2] is None):
            raise InputError(f"the intervals of {name!r} need both ends, or neither.")
        line, *ends = (finite_array(a, 1, f"values [point] {name}", gaps=True) for a in given if a is not None)
        if any(len(a) != len(places) for a in (line, *ends)):
            raise InputError(f"{name!r} has {[len(a) for a in (line, *ends)]} values for {len(places)} points.")
        colour, ranges = colours.get(name, LINES[-1]), [*ranges, line, *ends]
        span = "<br>interval %{customdata[0]:.4g} to %{customdata[1]:.4g}" if ends else ""
        if ends:
            known = np.isfinite(ends).all(0)
            at, low, high = places[known], ends[0][known], ends[1][known]
            figure.add_scatter(
                x=np.r_[at, at[::-1]],
                y=np.r_[high, low[::-1]],
                mode="lines",
                line={"width": 0},
                fill="toself",
                fillcolor=colour,
                opacity=0.16,
                hoverinfo="skip",
                showlegend=False,
                legendgroup=escape(name),
            )
        figure.add_scatter(
            x=places,
            y=line,
            name=escape(name),
            legendgroup=escape(name),
            mode="lines+markers",
            line={"color": colour, "width": 2.2, "dash": "solid" if name in colours else "dot"},
            marker={"size": 5},
            customdata=np.stack(ends, axis=1) if ends else None,
            hovertemplate=f"%{{x}}<br><b>%{{y:.4g}}</b> {escape(unit)}{span}<extra>{escape(name)}</extra>",
        )
    _frame(figure, title, width=620, height=300)
    figure.update_xaxes(title_text=escape(x_title) or None, showgrid=False)
    figure.update_yaxes(title_text=escape(unit) or None, zeroline=is_diverging(np.concatenate(ranges)))
    figure.update_layout(showlegend=len(series) > 1)
    return figure


def circuitsvis_tokens(names: Sequence[str], values: np.ndarray, labels: Sequence[str]) -> Any:
    """A row of names, coloured by the kind of value that is chosen above it: CircuitsVis's `colored_tokens_multi`.

    Args:
        names: what is coloured, such as tokens [name].
        values: the numbers [name, kind].
        labels: names of the kinds.

    Returns:
        CircuitsVis's `RenderedHTML`, which a notebook shows.

    Raises:
        MissingPackageError: CircuitsVis is not installed.
        InputError: NaN or infinity among the values.
    """
    try:
        from circuitsvis.tokens import colored_tokens_multi  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingPackageError(f"drawing with CircuitsVis needs `pip install circuitsvis` ({error}).") from error
    import torch

    numbers = finite_array(values, 2, "values")
    # CircuitsVis writes names into a script as they are: what could end or open one there is broken up.
    plain = [re.sub(r"<(?=[/!a-zA-Z])", "<\u200b", name) for name in (*names, *labels)]
    return colored_tokens_multi(plain[: len(names)], torch.from_numpy(numbers), plain[len(names) :])


def _cell(count: int, total: int, least: int, most: int) -> int:
    return max(least, min(most, total // count))


def _gaps(wide: int, tall: int) -> dict[str, int]:
    return dict.fromkeys(("xgap", "ygap"), 1 if min(wide, tall) >= 14 else 0)


def _scale(colours: Sequence[str]) -> list[list[Any]]:
    return [[i / (len(colours) - 1), colour] for i, colour in enumerate(colours)]


def _colourbar(unit: str, height: int) -> dict[str, Any]:
    return {
        "title": {"text": f"{escape(unit)}<br> " if unit else "", "side": "top", "font": {"size": 12}},
        **{"thickness": 12, "outlinewidth": 0, "lenmode": "pixels", "len": max(110, min(height, 320))},
        **{"nticks": 6 if height >= 200 else 4, "ticks": "", "x": 1.02, "xpad": 8},
    }


def _ticks(names: Sequence[str], pixels: int, needed: int) -> dict[str, Any]:
    """Ticks at the indices, thinned (every 2nd, 5th, 10th, ...) until each label has the pixels it needs."""
    steps = (s * 10**e for e in range(7) for s in (1, 2, 5))
    step = next(s for s in steps if s * pixels >= needed)
    places = list(range(0, len(names), step))
    return {"tickmode": "array", "tickvals": places, "ticktext": [names[i] for i in places]}


def _frame(figure: "go.Figure", title: str, *, width: int, height: int) -> None:
    """The one look of every picture; width and height are those of the plot itself, in pixels."""
    left, right, top, bottom = 64, 104, 56 if title else 20, 48
    width = max(width, 280)
    axis = {"automargin": True, "zeroline": False, "linewidth": 0, "ticks": "", "gridcolor": _FAINT} | {
        "title": {"standoff": 10},
        "ticklabelstandoff": 4,
    }
    figure.update_layout(
        template="none",
        title={"text": escape(title), "x": 0, "xref": "container", "xanchor": "left", "pad": {"l": 16}, "y": 0.98}
        | {"yref": "container", "yanchor": "top", "font": {"size": 16, "weight": 600}},
        font={"family": FONT, "size": 12, "color": _INK},
        margin={"l": left, "r": right, "t": top, "b": bottom},
        width=width + left + right,
        height=height + top + bottom,
        **dict.fromkeys(("paper_bgcolor", "plot_bgcolor"), "white"),
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "#9aa5b1", "activecolor": _INK},
        hoverlabel={"font": {"family": FONT, "size": 13}, "align": "left"},
        xaxis=axis,
        yaxis=axis,
    )
