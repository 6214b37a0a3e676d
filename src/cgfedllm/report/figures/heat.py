"""Numbers in a grid, coloured by size: codecs down, kinds of factors across."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray


def draw_decibels(
    axes: Axes, values: NDArray[np.float64], names: Sequence[str], *, top: float
) -> None:
    """Fill a panel with decibels.

    Parameters
    ----------
    axes : Axes
        The panel.
    values : ndarray, shape (names, columns), float64
        NaN where there is nothing to tell; infinity is "exact".
    names : sequence of str
        Of the rows.
    top : float
        End of the colour scale, which begins at 0: what is worse than sending nothing shares the
        bottom.
    """
    axes.imshow(np.clip(values, 0, top), cmap="viridis", vmin=0, vmax=top, aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        if not math.isnan(value):
            text = "exact" if value == math.inf else f"{value:.2f}"
            colour = "black" if min(value, top) > 0.6 * top else "white"
            axes.text(x, y, text, ha="center", va="center", fontsize=7.5, color=colour)
    axes.grid(False)
    axes.set_xticks(range(values.shape[1]), [])
    axes.set_yticks(range(len(names)), list(names))
    axes.tick_params(length=0)
