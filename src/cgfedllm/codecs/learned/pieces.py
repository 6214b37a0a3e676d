"""What is left beside known directions, at more bits: rank-one pieces, as `lowrank` sends them.

Axes that follow from the adapter cost nothing and suit an update roughly. From about a quarter of
a bit a parameter on, those of the update itself are worth what it takes to send them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cgfedllm.adapter import Float32Array
from cgfedllm.codecs.entropy import SymbolReader, SymbolWriter
from cgfedllm.codecs.learned.kinds import Axes, Kind
from cgfedllm.codecs.lowrank.choice import Stack
from cgfedllm.codecs.lowrank.coding import Shape, read_pieces, write_pieces
from cgfedllm.codecs.parts.matrices import MAX_ROWS


def apart(axes: Axes) -> Axes:
    """The same axes with every layer by itself."""
    return replace(axes, kinds=tuple(replace(kind, layers=None) for kind in axes.kinds))


def are_possible(axes: Axes) -> bool:
    """Whether all factors are low enough for pieces."""
    return all(_shape(kind).rows <= MAX_ROWS for kind in axes.kinds)


def write_left(
    writer: SymbolWriter,
    axes: Axes,
    rows: list[Float32Array],
    loose: Sequence[Float32Array],
    budget: float,
    before: float,
    dead_zones: Sequence[float],
) -> bool:
    """Write what is left as pieces, and loose values; as `rows.write_rows`.

    Parameters
    ----------
    axes : Axes
        As `apart` makes them.
    """
    stacks = []
    for kind, own in zip(axes.kinds, rows, strict=True):
        shape = _shape(kind)
        matrices = own.reshape(shape.rows, shape.count, shape.columns).swapaxes(0, 1)
        stacks.append(Stack.of(np.ascontiguousarray(matrices), shape.depth))
    return write_pieces(writer, stacks, budget, before, loose, dead_zones)


def read_left(
    reader: SymbolReader, axes: Axes, loose: Sequence[int]
) -> tuple[list[Float32Array], list[Float32Array]]:
    """Inverse of `write_left`: rows for `Axes.back`, and loose values."""
    stacks, values = read_pieces(reader, [_shape(kind) for kind in axes.kinds], loose)
    rows = [
        np.ascontiguousarray(own.swapaxes(0, 1)).reshape(kind.shape)
        for kind, own in zip(axes.kinds, stacks, strict=True)
    ]
    return rows, values


def _shape(kind: Kind) -> Shape:
    """Of a kind as a stack: a matrix a layer."""
    rows, columns = kind.shape
    rank = rows // len(kind.factors)
    return Shape(len(kind.factors), rank, rank, columns)
