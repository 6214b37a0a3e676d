"""EDEN: the rotation, its quantiser, and what unbiased means."""

import numpy as np
import pytest

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import CodecContext, make_codec
from cgfedllm.codecs.parts.draws import apply_signs, random_order, random_signs
from cgfedllm.codecs.parts.hadamard import LENGTH, transform
from cgfedllm.seeding import generator

N = 3 * LENGTH - 100
SPEC = AdapterSpec.from_shapes({"x": (N,)})


def snr(wanted: np.ndarray, got: np.ndarray) -> float:
    wanted = wanted.astype(np.float64)
    return float(10 * np.log10(np.square(wanted).sum() / np.square(wanted - got).sum()))


def through(options: dict[str, object], update: AdapterUpdate, round: int = 1) -> np.ndarray:
    codec = make_codec("eden", options)
    context = CodecContext(SPEC, round=round, seed=5)
    return codec.decode(codec.encode(update, context), context).vector


def spiky(seed: int = 0) -> AdapterUpdate:
    rng = np.random.default_rng(seed)
    return AdapterUpdate(SPEC, (rng.standard_t(2, N) * 1e-3).astype(np.float32))


# ---- its parts ----------------------------------------------------------------------------------


def test_transform_twice_is_its_length_times_the_input() -> None:
    values = np.random.default_rng(0).integers(-3, 4, (LENGTH, 33)).astype(np.float32)
    once = values.copy()
    transform(once)
    twice = once.copy()
    transform(twice)
    assert (twice == LENGTH * values).all()
    assert np.square(once).sum() == LENGTH * np.square(values).sum()


def test_transform_of_a_unit_is_a_row_of_signs() -> None:
    values = np.zeros((LENGTH, 1), np.float32)
    values[5] = 1
    transform(values)
    signs = [(-1) ** (5 & row).bit_count() for row in range(LENGTH)]
    assert values[:, 0].tolist() == signs


def test_signs_are_undone_by_themselves_and_about_even() -> None:
    signs = random_signs(generator(0, "test"), 100_003)
    values = np.ones(100_003, np.float32)
    apply_signs(values, signs)
    assert abs(values.mean()) < 0.02
    apply_signs(values, signs)
    assert (values == 1).all()


def test_random_order_is_a_permutation_and_depends_on_its_labels() -> None:
    first, again, other = (random_order(generator(0, "test", i), 1000) for i in (1, 1, 2))
    assert sorted(first) == list(range(1000))
    assert (first == again).all()
    assert (first != other).any()


# ---- the codec ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "distortion"), [(1, 0.3634), (2, 0.1175), (3, 0.03454)])
def test_whole_bits_reach_the_gaussians_distortion_whatever_the_update(
    bits: int, distortion: float
) -> None:
    # Max 1960, table I
    padded = 3 * LENGTH / N
    head = 8 * 60 / N
    got = snr(spiky().vector, through({"bpp": min(4.0, bits * padded + head)}, spiky()))
    assert got == pytest.approx(-10 * np.log10(distortion), abs=0.35)


def test_below_one_bit_a_share_of_the_coordinates_is_sent() -> None:
    update = spiky()
    got = snr(update.vector, through({"bpp": 0.5}, update))
    sent = (0.5 * N - 8 * 60) / (3 * LENGTH)
    assert got == pytest.approx(-10 * np.log10(1 - sent * 2 / np.pi), abs=0.1)


def test_between_whole_bits_more_bits_are_better() -> None:
    update = spiky()
    errors = [snr(update.vector, through({"bpp": bpp}, update)) for bpp in (1.1, 1.4, 1.7, 2.2)]
    assert errors == sorted(errors)


def test_unbiased_packets_average_to_the_update() -> None:
    values = np.tanh(3 * np.random.default_rng(0).standard_normal(N))
    update = AdapterUpdate(SPEC, values.astype(np.float32))
    mean = np.mean(
        [through({"bpp": 0.5, "scaling": "unbiased"}, update, round=r) for r in range(200)], axis=0
    )
    slope = float(mean @ update.vector) / float(update.vector @ update.vector)
    assert slope == pytest.approx(1.0, abs=0.02)
    # 200 packets whose error is 1 / (0.45 * 2 / pi) - 1 of the energy each
    assert snr(update.vector, mean) == pytest.approx(19.0, abs=0.5)


def test_each_client_has_a_rotation_of_its_own() -> None:
    a, b = (through({"bpp": 0.5}, spiky(seed)) - spiky(seed).vector for seed in (1, 2))
    correlation = float(a @ b) / float(np.linalg.norm(a) * np.linalg.norm(b))
    assert abs(correlation) < 0.1
