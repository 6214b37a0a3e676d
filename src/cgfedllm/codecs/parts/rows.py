"""Rows of a factor: the long axis, which codecs with a scale a row go along.

Row i of an A factor (r, in), column i of a B factor (out, r). Each holds one direction of the
adapter and has its own magnitude. Other arrays have their first axis as rows, vectors are one row.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cgfedllm.adapter import AdapterSpec, Factor

T = TypeVar("T", bound=np.generic)


def count_rows(spec: AdapterSpec) -> int:
    """Number of rows over all factors."""
    return sum(row_count(factor) for factor in spec)


def row_count(factor: Factor) -> int:
    """Number of rows of one factor."""
    if len(factor.shape) < 2:
        return 1
    return factor.shape[1] if by_column(factor) else factor.shape[0]


def by_column(factor: Factor) -> bool:
    """Whether a factor's rows are its columns."""
    return factor.kind == "B" and len(factor.shape) == 2


def to_rows(array: NDArray[T], factor: Factor) -> NDArray[T]:
    """A factor's array, in any shape that holds its values in C order, as (rows, row length)."""
    array = array.reshape(factor.shape)
    return (array.T if by_column(factor) else array).reshape(row_count(factor), -1)


def from_rows(rows: NDArray[T], factor: Factor) -> NDArray[T]:
    """Inverse of `to_rows`, flat."""
    return (rows.T if by_column(factor) else rows).reshape(-1)
