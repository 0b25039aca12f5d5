"""Drawing a causal map: one heat map for each site, all on the same scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from interp.errors import InputError
from interp.figures import FONT, escape, show_token
from interp.palette import DIVERGING, SEQUENTIAL, colour_range, finite_array, is_diverging

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_INK, _GAP = "#1f2933", "#c6ccd3"
_BETWEEN, _LEFT, _RIGHT, _TOP, _BOTTOM = 56, 64, 110, 76, 90  # pixels around and between the panels


def panels(
    tables: Mapping[str, pd.DataFrame], *, labels: Mapping[Any, str], title: str = "", unit: str = ""
) -> go.Figure:
    """Heat maps side by side: layers downwards, the columns of each table to the right.

    Args:
        tables: numbers with a row for each layer, by site; NaN leaves a gap.
        labels: tokens that are written in the place of columns.
        title: plain text above the picture.
        unit: what the numbers are measured in, at the colour bar.

    Raises:
        InputError: nothing to draw.
        NonFiniteError: an infinity stands in a table.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    if not tables:
        raise InputError("nothing to draw: no site was chosen.")
    grids = {
        name: finite_array(table.to_numpy(), 2, f"{name} [layer, column]", gaps=True) for name, table in tables.items()
    }
    every = np.concatenate([grid.ravel() for grid in grids.values()])
    diverging = is_diverging(every)
    low, high = colour_range(every, diverging)
    colours = DIVERGING if diverging else SEQUENTIAL
    scale = [[i / (len(colours) - 1), colour] for i, colour in enumerate(colours)]
    wide = [max(90, min(30, 620 // grid.shape[1]) * grid.shape[1]) for grid in grids.values()]
    tall = max(len(grid) for grid in grids.values())
    tall = max(120, max(10, min(26, 520 // tall)) * tall)
    width = sum(wide) + _BETWEEN * (len(wide) - 1)
    figure = make_subplots(
        rows=1,
        cols=len(grids),
        column_widths=[w / sum(wide) for w in wide],
        horizontal_spacing=_BETWEEN / width if len(wide) > 1 else 0,
        subplot_titles=[escape(name) for name in grids],
    )
    for number, (name, grid) in enumerate(grids.items(), 1):
        table = tables[name]
        what = escape(table.columns.name or "column")
        names = [show_token(labels[c]) if c in labels else escape(c) for c in table.columns]
        layers = [str(layer) for layer in table.index]
        hover = np.empty((*grid.shape, 2), dtype=object)
        hover[..., 0] = np.array(
            [f"{escape(c)}: {n}" if c in labels else n for c, n in zip(table.columns, names, strict=True)]
        )
        hover[..., 1] = np.array(layers, dtype=object)[:, None]
        figure.add_trace(
            go.Heatmap(
                z=grid,
                zmin=low,
                zmax=high,
                colorscale=scale,
                xgap=1,
                ygap=1,
                hoverongaps=False,
                customdata=hover,
                hovertemplate=(
                    f"{escape(name)}<br>layer %{{customdata[1]}} · {what} %{{customdata[0]}}<br><b>%{{z:.4g}}</b> "
                    f"{escape(unit)}<extra></extra>"
                ),
                showscale=number == 1,
                colorbar={
                    "title": {"text": escape(unit), "side": "top"},
                    "thickness": 12,
                    "outlinewidth": 0,
                    "x": 1.02,
                },
            ),
            row=1,
            col=number,
        )
        figure.update_xaxes(row=1, col=number, tickangle=-60, **_ticks(names, wide[number - 1], 14))
        figure.update_yaxes(row=1, col=number, autorange="reversed", **_ticks(layers, tall, 13))
    figure.update_yaxes(row=1, col=1, title_text="layer")
    figure.update_xaxes(showgrid=False, zeroline=False, automargin=True)
    figure.update_yaxes(showgrid=False, zeroline=False, automargin=True)
    figure.update_layout(
        template="none",
        title={"text": escape(title), "x": 0, "xref": "container", "pad": {"l": 16}, "font": {"size": 16}},
        font={"family": FONT, "size": 12, "color": _INK},
        margin={"l": _LEFT, "r": _RIGHT, "t": _TOP, "b": _BOTTOM},
        width=width + _LEFT + _RIGHT,
        height=tall + _TOP + _BOTTOM,
        paper_bgcolor="white",
        plot_bgcolor=_GAP,
    )
    return figure


def _ticks(names: list[str], pixels: int, needed: int) -> dict[str, Any]:
    """Ticks at the indices, thinned until each label has the pixels it needs."""
    step = max(1, -(-needed * len(names) // pixels))
    places = list(range(0, len(names), step))
    return {"tickmode": "array", "tickvals": places, "ticktext": [names[i] for i in places]}
