"""The scalar quantiser: searched on a histogram, a share of the values where that is better."""

import numpy as np
import pytest

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import CodecContext, make_codec
from cgfedllm.codecs.entropy import SymbolReader, SymbolWriter
from cgfedllm.codecs.parts.deadzone import (
    Histogram,
    Quantiser,
    design_for_bits,
    design_for_slope,
    read_levels,
    write_levels,
)
from cgfedllm.errors import CodecError

N = 200_000
SPEC = AdapterSpec.from_shapes({"x": (N,)})


def draw(kind: str, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = {
        "gaussian": rng.standard_normal(N),
        "laplacian": rng.laplace(size=N),
        "saturated": np.tanh(3 * rng.standard_normal(N)),
    }[kind]
    return (1e-3 * values).astype(np.float32)


def snr(codec_options: dict[str, float], values: np.ndarray) -> tuple[float, float]:
    codec = make_codec("ecsq", codec_options)
    context = CodecContext(SPEC, round=1, seed=3)
    blob = codec.encode(AdapterUpdate(SPEC, values), context)
    decoded = codec.decode(blob, context).vector.astype(np.float64)
    error = np.square(values - decoded).sum()
    return 10 * np.log10(np.square(values.astype(np.float64)).sum() / error), 8 * len(blob) / N


# ---- the quantiser ------------------------------------------------------------------------------


def test_levels_follow_threshold_and_offset() -> None:
    quantiser = Quantiser(step=1.0, threshold=0.7, offset=0.6)
    values = np.array([0, 0.69, 0.71, 1.59, 1.61, 2.61, -0.69, -0.71, -1.61], np.float32)
    assert quantiser.levels(values).tolist() == [0, 0, 1, 1, 2, 3, 0, -1, -2]


@pytest.mark.parametrize("kind", ["gaussian", "laplacian", "saturated"])
@pytest.mark.parametrize("step", [2e-3, 5e-4, 5e-5])
def test_histogram_foretells_bits_and_error(kind: str, step: float) -> None:
    values = draw(kind)
    quantiser = Quantiser(float(np.float32(step)), 0.6, 0.55)
    bits, error = Histogram([values]).try_out(quantiser)
    writer = SymbolWriter()
    write_levels(writer, values, quantiser.levels(values), quantiser.step)
    payload = writer.finish()
    decoded = read_levels(SymbolReader(payload), N, np.float32(quantiser.step))
    assert 8 * len(payload) == pytest.approx(bits, rel=0.01, abs=100)
    assert np.square(values.astype(np.float64) - decoded).sum() == pytest.approx(error, rel=0.01)


def test_levels_are_put_where_their_values_are() -> None:
    values = np.full(1000, 1.3, np.float32)
    quantiser = Quantiser(1.0, 0.5, 0.5)
    writer = SymbolWriter()
    write_levels(writer, values, quantiser.levels(values), quantiser.step)
    decoded = read_levels(SymbolReader(writer.finish()), 1000, np.float32(1))
    assert np.abs(decoded - 1.3).max() <= 1 / 64


def test_nothing_is_sent_where_nothing_fits() -> None:
    histogram = Histogram([draw("gaussian")])
    assert design_for_bits(histogram, 10.0) is None or design_for_bits(histogram, 0.0) is None
    assert design_for_bits(Histogram([np.zeros(10, np.float32)]), 1e6) is None
    assert design_for_slope(Histogram([np.zeros(10, np.float32)]), 1.0) is None


# ---- the codec ----------------------------------------------------------------------------------


def test_gaussian_at_high_rate_is_a_quarter_of_a_bit_from_its_rate_distortion_function() -> None:
    got, bpp = snr({"bpp": 4.0}, draw("gaussian"))
    # 1.53 dB is what scalar quantisation loses (Gish and Pierce 1968)
    assert got == pytest.approx(6.02 * bpp - 1.53, abs=0.15)


def test_gaussian_is_coded_everywhere_and_saturated_values_in_a_share() -> None:
    budget = 0.05 * N
    everywhere = design_for_bits(Histogram([draw("gaussian")]), budget)
    shared = design_for_bits(Histogram([draw("saturated")]), budget)
    assert everywhere is not None
    assert shared is not None
    assert everywhere.share > 0.9
    assert 0.03 < shared.share < 0.1


def test_a_share_of_signs_keeps_its_share_of_the_energy() -> None:
    values = draw("saturated")
    got, bpp = snr({"bpp": 0.1}, values)
    kept = np.abs(values).mean(dtype=np.float64) ** 2 / np.square(values, dtype=np.float64).mean()
    assert got >= -10 * np.log10(1 - 0.95 * bpp * kept)


def test_another_packet_sends_another_share() -> None:
    context = CodecContext(SPEC, round=1, seed=3)
    codec = make_codec("ecsq", {"bpp": 0.05})
    sent = []
    for seed in range(2):
        update = AdapterUpdate(SPEC, draw("saturated", seed))
        sent.append(codec.decode(codec.encode(update, context), context).vector != 0)
    assert (sent[0] & sent[1]).sum() < 0.2 * sent[0].sum()


def test_a_bit_costs_what_lam_says() -> None:
    # the slope of the Gaussian's distortion at the rate found must be about lam
    values = draw("laplacian")
    coarse, few = snr({"lam": 0.1}, values)
    fine, many = snr({"lam": 0.01}, values)
    assert few < many
    assert coarse < fine
    change = 10 ** (-coarse / 10) - 10 ** (-fine / 10)
    assert 0.01 < change / (many - few) < 0.1


def test_rate_and_slope_exclude_each_other() -> None:
    with pytest.raises(CodecError, match="either bpp or lam"):
        make_codec("ecsq", {"bpp": 0.1, "lam": 0.1})
    assert make_codec("ecsq").options.bpp == 0.1  # type: ignore[attr-defined]


def test_quiet_factors_do_not_pay_for_loud_ones() -> None:
    spec = AdapterSpec.from_shapes({"loud": (N // 2,), "quiet": (N // 2,)})
    values = draw("gaussian")
    values[N // 2 :] *= 1e-3
    codec = make_codec("ecsq", {"bpp": 1.0})
    context = CodecContext(spec, round=1)
    update = AdapterUpdate(spec, values)
    decoded = codec.decode(codec.encode(update, context), context)
    error = np.square((update - decoded).views()["loud"], dtype=np.float64).sum()
    energy = np.square(update.views()["loud"], dtype=np.float64).sum()
    # all bits go to the loud half, two for each of its values
    assert 10 * np.log10(energy / error) > 10
