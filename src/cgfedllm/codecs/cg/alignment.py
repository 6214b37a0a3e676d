"""Which rank vectors to turn over before they are laid side by side.

The sign of a rank vector is an accident of how its adapter was drawn, but it stays: what moves one
rank vector of a factor moves the others too, each in its own direction, the same in every round.
With signs learned from recorded updates, neighbours in the image look alike, and convolution has
something to hold on to. They are part of the state, one byte a rank vector.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cgfedllm.adapter import Float32Array
from cgfedllm.codecs.cg.layout import Layout
from cgfedllm.codecs.parts.rows import count_rows, row_count, to_rows

Signs = NDArray[np.int8]

# factors with more rank vectors, such as whole weight matrices, are left as they are
_MOST_ROWS = 64


def unaligned(layout: Layout) -> Signs:
    """No rank vector is turned over; shape (rank vectors,)."""
    return np.ones(count_rows(layout.spec), np.int8)


def aligned(layout: Layout, vectors: Iterable[Float32Array]) -> Signs:
    """Learn signs, shape (rank vectors,), 1 or -1.

    Within a factor, those of the leading eigenvector of the rank vectors' inner products; a factor
    as a whole, so that it is like the one laid before it. Products are summed over all updates.

    Parameters
    ----------
    vectors : iterable of ndarray, shape (spec.size,)
        Updates, normalised.
    """
    pairs = list(_neighbours(layout))
    inner: dict[str, Any] = {name: 0.0 for name, _ in pairs}
    across: dict[str, Any] = {name: 0.0 for name, before in pairs if before}
    for vector in vectors:
        rows = {
            block.factor.name: to_rows(vector[layout.spec.slices[block.factor.name]], block.factor)
            for block in layout.blocks
            if block.factor.name in inner
        }
        for name, before in pairs:
            inner[name] = inner[name] + rows[name] @ rows[name].T
            if before:
                across[name] = across[name] + rows[before] @ rows[name].T
    chosen: dict[str, Float32Array] = {}
    for name, before in pairs:
        leading = np.linalg.eigh(inner[name])[1][:, -1]
        own = np.where(leading < 0, -1, 1).astype(np.float32)
        if before and chosen[before] @ across[name] @ own < 0:
            own = -own
        chosen[name] = own
    signs = unaligned(layout)
    for block in layout.blocks:
        if block.factor.name in chosen:
            signs[block.rows] = chosen[block.factor.name]
    return signs


def _neighbours(layout: Layout) -> Iterable[tuple[str, str]]:
    """Names of factors in the order they are laid, each with the last one of equal length."""
    last: dict[int, str] = {}
    for block in layout.blocks:
        rows = row_count(block.factor)
        if rows > _MOST_ROWS:
            continue
        length = block.factor.size // rows
        yield block.factor.name, last.get(length, "")
        last[length] = block.factor.name
