"""Eigenvectors by Jacobi's method."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cgfedllm.codecs.parts.jacobi import eigenvectors


def symmetric(seed: int, count: int, size: int, decades: float = 3.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((count, size, size + 5))
    rows *= 10.0 ** -(decades * np.arange(size) / size)[:, None]
    return rows @ rows.swapaxes(1, 2)


@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 33))
def test_vectors_are_orthonormal_and_rebuild_the_matrix(seed: int, count: int, size: int) -> None:
    matrices = symmetric(seed, count, size)
    values, vectors = eigenvectors(matrices)
    largest = values.max()
    np.testing.assert_allclose(
        vectors.swapaxes(1, 2) @ vectors, np.broadcast_to(np.eye(size), matrices.shape), atol=1e-12
    )
    rebuilt = (vectors * values[:, None]) @ vectors.swapaxes(1, 2)
    np.testing.assert_allclose(rebuilt, matrices, atol=1e-11 * largest)
    assert (np.diff(values, axis=1) <= 0).all()
    np.testing.assert_allclose(values[:, ::-1], np.linalg.eigvalsh(matrices), atol=1e-11 * largest)


def test_zeros_and_diagonals_keep_their_axes() -> None:
    matrices = np.stack([np.zeros((3, 3)), np.diag([3.0, 2.0, 1.0]), np.diag([1.0, 1.0, 1.0])])
    values, vectors = eigenvectors(matrices)
    assert (vectors == np.eye(3)).all()
    assert values.tolist() == [[0, 0, 0], [3, 2, 1], [1, 1, 1]]


def test_matrices_of_a_stack_do_not_touch_each_other() -> None:
    matrices = symmetric(0, 5, 8)
    together = eigenvectors(matrices)
    for at in range(5):
        alone = eigenvectors(matrices[at : at + 1])
        assert (alone[0] == together[0][at]).all()
        assert (alone[1] == together[1][at]).all()


@pytest.mark.parametrize("scale", [2.0**-600, 2.0**300])
def test_a_power_of_two_changes_nothing_but_the_values(scale: float) -> None:
    matrices = symmetric(1, 2, 9)
    values, vectors = eigenvectors(matrices)
    scaled = eigenvectors(matrices * scale)
    assert (scaled[1] == vectors).all()
    assert (scaled[0] == values * scale).all()


def test_its_bits_are_known() -> None:
    """Whoever changes them changes what packets of `learned` mean."""
    index = np.arange(36).reshape(1, 6, 6)
    odd = ((37 * index) % 101 - 50) / 64.0
    values, vectors = eigenvectors(odd @ odd.swapaxes(1, 2))
    assert values[0, 0].hex() == VALUE
    assert vectors[0, 0, 0].hex() == ENTRY


VALUE = "0x1.58496a1344506p+1"
ENTRY = "0x1.b20880161e2f5p-2"
