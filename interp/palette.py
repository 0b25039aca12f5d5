"""Numbers as colours: the two scales, the range they cover, and a grid as a small PNG.

Colours read the same everywhere: white is zero, blue is negative, red-orange is positive (a pair that colour-blind
readers can tell apart); quantities that cannot be negative run from white to dark blue.
"""

import base64
import io
from typing import Any

import numpy as np

from interp.errors import InputError, NonFiniteError

SEQUENTIAL = ("#fbfcfe", "#dbe7f4", "#b3cee8", "#7fafd9", "#4a8cc4", "#2067a6", "#0d477f", "#082c54")
DIVERGING = ("#0b3c73", "#1f66a8", "#5a9acb", "#a6cbe5", "#f8f8f7", "#f7c9a5", "#eb9158", "#cb5a26", "#8a3210")


def finite_array(values: Any, dimensions: int, what: str, *, gaps: bool = False) -> np.ndarray:
    """A tensor or array as float64, with something to draw in it.

    Args:
        values: a tensor, array or nested list.
        dimensions: how many axes it must have.
        what: what it is called in errors.
        gaps: allow NaN.

    Raises:
        InputError: it has other axes, is empty or all NaN.
        NonFiniteError: an infinity, or NaN where no gaps are allowed; the message gives the first place.
    """
    if hasattr(values, "detach"):
        values = values.detach().cpu().double()
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != dimensions or array.size == 0 or np.isnan(array).all():
        found = "nothing but NaN" if array.size and array.ndim == dimensions else f"shape {list(array.shape)}"
        raise InputError(f"nothing to draw: expected {what} with at least one number, found {found}.")
    wrong = np.isinf(array) if gaps else ~np.isfinite(array)
    if wrong.any():
        first = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise NonFiniteError(f"{what} holds {array[first]} at {list(first)}; a picture needs finite numbers.")
    return array


def is_diverging(values: np.ndarray) -> bool:
    """Whether a diverging scale is the right one: true as soon as one finite value is negative."""
    return bool((values[np.isfinite(values)] < 0).any())


def colour_range(values: np.ndarray, diverging: bool) -> tuple[float, float]:
    """The values at the two ends of the colour scale.

    Diverging scales are symmetric about zero. Sequential ones start at zero, or at the smallest value where that is
    more than half of the largest, so that differences stay visible.
    """
    finite = values[np.isfinite(values)]
    low, high = float(finite.min()), float(finite.max())
    if diverging:
        bound = max(abs(low), abs(high)) or 1.0
        return -bound, bound
    start = low if high > low > high / 2 else min(0.0, low)
    return start, (high if high > start else start + 1.0)


def thumbnail(values: Any, *, diverging: bool | None = None) -> str:
    """A grid [layer, head] as a `data:` address of a PNG with one pixel for each head, gaps transparent."""
    from PIL import Image

    grid = finite_array(values, 2, "values [layer, head]", gaps=True)
    diverging = is_diverging(grid) if diverging is None else diverging
    low, high = colour_range(grid, diverging)
    stops = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in (DIVERGING if diverging else SEQUENTIAL)])
    place = np.nan_to_num((grid - low) / (high - low)).clip(0, 1) * (len(stops) - 1)
    channels = [np.interp(place, np.arange(len(stops)), stops[:, c]) for c in range(3)]
    pixels = np.stack([*channels, np.where(np.isnan(grid), 0, 255)], axis=-1).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
