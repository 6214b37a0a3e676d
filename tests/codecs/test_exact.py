"""Products that end at the same bits everywhere."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cgfedllm.codecs.parts.exact import gram, times, transposed


@given(st.integers(0, 1000), st.integers(1, 9), st.integers(1, 60))
def test_a_gram_is_rows_times_rows(seed: int, rows: int, columns: int) -> None:
    matrix = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    wanted = matrix.astype(np.float64) @ matrix.T
    np.testing.assert_allclose(gram(matrix), wanted, atol=2e-3 * columns)
    assert (gram(matrix) == gram(matrix).T).all()


def test_a_gram_does_not_depend_on_the_order_of_columns() -> None:
    matrix = np.random.default_rng(0).standard_normal((8, 577)).astype(np.float32)
    assert (gram(matrix) == gram(matrix[:, ::-1])).all()


def test_a_gram_of_zeros_is_zeros() -> None:
    assert not gram(np.zeros((3, 4), np.float32)).any()


@given(st.integers(0, 1000), st.integers(1, 9))
def test_products_are_those_of_matrices(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((3, size, 5)), rng.standard_normal((3, 5, 2))
    np.testing.assert_allclose(times(x, y), x @ y, rtol=1e-9, atol=1e-9)
    assert (transposed(x) == x.swapaxes(1, 2)).all()
