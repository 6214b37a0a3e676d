"""What all figures share: one look, one colour a codec, files that are the same every time.

matplotlib's figure objects are used directly: pyplot would keep global state and look for a
display. Colours are told apart by readers with any common colour blindness, and never carry a
meaning alone: every codec has a marker too, and variants of one codec differ in their dashes.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

from cgfedllm.storage import write_atomic

DPI = 150

COLOURS = {
    # after Okabe and Ito, and Paul Tol's muted scheme
    "raw": "#000000",
    "bf16": "#767676",
    "zstd": "#AAAAAA",
    "int8": "#56B4E9",
    "int4": "#332288",
    "ecsq": "#0072B2",
    "topk": "#009E73",
    "eden": "#CC79A7",
    "lowrank": "#E69F00",
    "qsgd": "#999933",
    "sign": "#882255",
    "dct": "#44AA99",
    "sketch": "#AA4499",
    "cg_cnn": "#CC6677",
    "cg_resnet": "#8B5A2B",
    "cg_unet": "#117733",
    "learned": "#D55E00",
    "peer:nncodec": "#661100",
    "peer:zfp": "#6699CC",
    "peer:sz3": "#DDCC77",
    "centralised": "#555555",
    "local-only": "#555555",
}
"""Colour of a codec, the same in every figure."""

_OTHERS = ("#E69F00", "#AA4499", "#117733", "#CC6677", "#44AA99", "#999933", "#332288", "#8B5A2B")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
_DASHES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
_LOOK: Any = {  # Any: matplotlib's own type lists three hundred literal keys
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so it is there everywhere
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.labelsize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "cgfedllm",
}

Dashes = str | tuple[int, tuple[int, ...]]


@dataclass(frozen=True)
class LineStyle:
    """How one label is drawn, wherever it appears in a figure."""

    colour: str
    marker: str
    dashes: Dashes

    def keywords(self) -> dict[str, Any]:
        """For `Axes.plot`."""
        return {
            "color": self.colour,
            "marker": self.marker,
            "linestyle": self.dashes,
            "linewidth": 1.6,
            "markersize": 4.0,
        }


def codec_of(label: str) -> str:
    """Name of the codec in a label like ``ecsq:bpp=0.05`` or, of a variant, ``ecsq 0.05``.

    ``peer:NAME`` is one name; a label that begins with no codec's name is one itself.
    """
    first, colon, rest = label.partition(":")
    if first == "peer":
        return first + colon + rest.partition(":")[0].strip()
    name = first.strip()
    word = name.partition(" ")[0]
    return word if word in COLOURS else name


def colour_of(label: str) -> str:
    """Colour of a label's codec; an unlisted name always gets the same of a few others."""
    name = codec_of(label)
    return COLOURS.get(name) or _OTHERS[zlib.crc32(name.encode()) % len(_OTHERS)]


def styles_of(labels: Sequence[str]) -> dict[str, LineStyle]:
    """One style a label, no two alike as long as a codec has at most six variants.

    Parameters
    ----------
    labels : sequence of str
        Everything one figure shows, in its order.
    """
    names = list(dict.fromkeys(codec_of(label) for label in labels))
    seen = dict.fromkeys(names, 0)
    styles = {}
    for label in dict.fromkeys(labels):
        name = codec_of(label)
        marker = _MARKERS[names.index(name) % len(_MARKERS)]
        styles[label] = LineStyle(colour_of(label), marker, _DASHES[seen[name] % len(_DASHES)])
        seen[name] += 1
    return styles


def new_figure(
    rows: int = 1,
    columns: int = 1,
    *,
    width: float = 7.0,
    height: float = 4.5,
    share_y: bool = False,
) -> tuple[Figure, list[Axes]]:
    """Make a figure and its panels, row by row.

    Parameters
    ----------
    rows, columns : int
        Panels.
    width, height : float
        Of the whole figure, inches.
    share_y : bool
        One scale for the panels of a row.
    """
    with mpl.rc_context(_LOOK):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False, sharey="row" if share_y else False)
    return figure, [panel for row in axes for panel in row]


def save(figure: Figure, path: Path | str) -> list[Path]:
    """Write a figure as PNG and SVG, atomically; equal figures give equal files.

    Parameters
    ----------
    figure : Figure
        From `new_figure`.
    path : path-like
        Where, without the suffix.

    Returns
    -------
    list of Path
        The PNG and the SVG.

    Raises
    ------
    StorageError
        If a file cannot be written.
    """
    # no dates and no version: a figure changes when its numbers do
    metadata: dict[str, dict[str, str | None]] = {
        "png": {"Software": None},
        "svg": {"Date": None, "Creator": None},
    }
    written = []
    for kind, about in metadata.items():
        content = BytesIO()
        with mpl.rc_context(_LOOK):
            figure.savefig(content, format=kind, dpi=DPI, metadata=about)
        target = Path(path).with_name(f"{Path(path).name}.{kind}")
        write_atomic(target, content.getvalue())
        written.append(target)
    return written


def label_lines(axes: Axes, lines: Mapping[str, Line2D], *, legend: bool = True) -> bool:
    """Write each label at the end of its line, unless that would collide with something.

    Call it last: it looks at where everything has come to lie.

    Parameters
    ----------
    axes : Axes
        The panel.
    lines : mapping of Line2D
        Lines by label.
    legend : bool
        Make a legend in the panel where labels would collide; False leaves that to the caller.

    Returns
    -------
    bool
        True if the labels stand at their lines.
    """
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    canvas = FigureCanvasAgg(figure)
    texts = [
        axes.annotate(
            label,
            (float(np.asarray(line.get_xdata())[-1]), float(np.asarray(line.get_ydata())[-1])),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.0,
            color=line.get_color(),
        )
        for label, line in lines.items()
    ]
    canvas.draw()  # type: ignore[no-untyped-call]
    renderer = canvas.get_renderer()  # type: ignore[no-untyped-call]
    boxes = [text.get_window_extent(renderer) for text in texts]
    room = axes.get_window_extent(renderer)
    if not _collide(boxes, [_points(line) for line in lines.values()], room):
        return True
    for text in texts:
        text.remove()
    if legend:
        axes.legend(list(lines.values()), list(lines), loc="best")
    return False


def fit_legend(figure: Figure, axes: Sequence[Axes], lines: Mapping[str, Line2D]) -> None:
    """One legend for all panels, below them, and no labels at the lines of any."""
    for panel in axes:
        for text in [t for t in panel.texts if t.get_text() in lines]:
            text.remove()
    # inches of a line's sample, and of a letter
    fit = max(1, int(figure.get_size_inches()[0] / (0.7 + 0.066 * max(map(len, lines)))))
    with mpl.rc_context(_LOOK):
        figure.legend(
            list(lines.values()),
            list(lines),
            loc="outside lower center",
            ncols=min(len(lines), fit),
        )


def _points(line: Line2D) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Positions along a line on the canvas, close enough to see what it runs through."""
    corners = line.get_transform().transform(np.asarray(line.get_xydata(), dtype=np.float64))
    steps = np.linspace(0.0, 1.0, 50)[:, None]
    pieces = [a + (b - a) * steps for a, b in pairwise(corners)]
    return np.concatenate([corners, *pieces])


def _collide(
    boxes: Sequence[Bbox],
    lines: Sequence[np.ndarray[Any, np.dtype[np.float64]]],
    room: Bbox,
) -> bool:
    for index, box in enumerate(boxes):
        if box.x1 > room.x1 or box.y0 < room.y0 or box.y1 > room.y1:
            return True
        if any(box.overlaps(other) for other in boxes[index + 1 :]):
            return True
        if any(box.count_contains(points) for points in lines):
            return True
    return False
