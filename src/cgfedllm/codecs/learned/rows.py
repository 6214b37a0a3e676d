"""What is left beside known directions, at few bits: rows along axes that both ends know.

::

    for each class of foretold energy: the highest mode, then a table up to it | vectors

Nothing is sent of the axes. A row that is worth no bits takes a small part of one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cgfedllm.adapter import Float32Array
from cgfedllm.codecs.entropy import SymbolReader, SymbolWriter
from cgfedllm.codecs.learned.allocation import Allocation, Choice, IntArray
from cgfedllm.codecs.learned.kinds import Axes
from cgfedllm.codecs.parts.vectors import MODES, read_vectors, write_vectors

# bits lost to whole bytes, and the range of scales
_RANGE_BITS = 26
# expected bits of a scale
_SCALE_BITS = 3.2
_TRIES = 8
# dead-zone quantised rows take what is left of the budget; so much over it they still can
_ABSORBED = 0.05
_NO_MODES = [np.zeros(0, np.int64)]


def write_rows(
    writer: SymbolWriter,
    axes: Axes,
    rows: list[Float32Array],
    loose: Sequence[Float32Array],
    budget: float,
    before: float,
    dead_zones: Sequence[float],
) -> bool:
    """Write the rows that are worth their bits, and loose values.

    Parameters
    ----------
    rows : list of ndarray
        As `Axes.into` gives them.
    loose, budget, before, dead_zones
        As for `coding.write_pieces` of `lowrank`.

    Returns
    -------
    bool
        Whether anything was written that is not zero.
    """
    modes = _settle(rows, loose, axes, budget - before - _RANGE_BITS).modes
    _write_modes(writer, modes, axes)
    sent = [own[mode > 0] for own, mode in zip(rows, modes, strict=True)]
    chosen = [mode[mode > 0] for mode in modes]
    return write_vectors(writer, sent, chosen, budget, loose, dead_zones)


def read_rows(
    reader: SymbolReader, axes: Axes, loose: Sequence[int]
) -> tuple[list[Float32Array], list[Float32Array]]:
    """Inverse of `write_rows`."""
    modes = _read_modes(reader, axes)
    lengths = [kind.shape[1] for kind in axes.kinds]
    sent, values = read_vectors(reader, [own[own > 0] for own in modes], lengths, loose)
    rows = axes.no_rows()
    for full, mode, own in zip(rows, modes, sent, strict=True):
        full[mode > 0] = own
    return rows, values


def write_coefficients(
    writer: SymbolWriter,
    loose: Sequence[Float32Array],
    budget: float,
    dead_zones: Sequence[float],
) -> bool:
    """Write loose values and no row at all; as `write_rows`."""
    return write_vectors(
        writer, [np.zeros((0, 1), np.float32)], _NO_MODES, budget, loose, dead_zones
    )


def read_coefficients(reader: SymbolReader, loose: Sequence[int]) -> list[Float32Array]:
    """Inverse of `write_coefficients`."""
    return read_vectors(reader, _NO_MODES, [1], loose)[1]


def _settle(
    rows: list[Float32Array], loose: Sequence[Float32Array], axes: Axes, budget: float
) -> Allocation:
    """Modes that fill a budget.

    What goes beside entries is known only once it is written, so modes are chosen again until it
    costs what was expected of it.
    """
    target = budget
    choice = Choice(rows, list(loose))
    for _ in range(_TRIES):
        allocation = choice.within(target)
        scratch = SymbolWriter()
        _write_modes(scratch, allocation.modes, axes)
        predicted = scratch.spent + _SCALE_BITS * allocation.count + allocation.bits
        if abs(predicted - budget) <= max(0.005 * budget, _ABSORBED * allocation.absorbing):
            break
        target = max(target + budget - predicted, 0.0)
    return allocation


def _write_modes(writer: SymbolWriter, modes: list[IntArray], axes: Axes) -> None:
    """The highest mode of each class of foretold energy, and a table up to it."""
    classes = np.concatenate([kind.classes for kind in axes.kinds])
    values = np.concatenate(modes)
    for which in np.unique(classes):
        own = values[classes == which]
        highest = int(own.max())
        writer.uniform(highest, MODES)
        if highest:
            writer.symbols(own, highest + 1)


def _read_modes(reader: SymbolReader, axes: Axes) -> list[IntArray]:
    classes = np.concatenate([kind.classes for kind in axes.kinds])
    values = np.zeros(len(classes), np.int64)
    for which in np.unique(classes):
        at = classes == which
        highest = int(reader.uniform(MODES, 1)[0])
        if highest:
            values[at] = reader.symbols(highest + 1, int(np.count_nonzero(at)))
    return np.split(values, np.cumsum([kind.shape[0] for kind in axes.kinds])[:-1])
