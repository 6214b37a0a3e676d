"""The rate asked for is the rate got, and more bits mean less error, for all that have `bpp`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import CodecContext, codec_class, codec_names, make_codec
from cgfedllm.codecs.packet import HEADER_SIZE
from cgfedllm.errors import CodecError

RATED = [name for name in codec_names() if "bpp" in codec_class(name).Options.model_fields]
RATES = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0)

Realistic = Callable[[AdapterSpec, int], AdapterUpdate]


@pytest.fixture(scope="module")
def spec(lora_spec: Callable[[int, int], AdapterSpec]) -> AdapterSpec:
    made = lora_spec(8, 512)
    assert made.size == 131_072
    return made


def packet(name: str, bpp: float, update: AdapterUpdate) -> bytes | None:
    """The packet at a rate; None if the codec has no such rate."""
    try:
        return make_codec(name, {"bpp": bpp}).encode(update, CodecContext(update.spec, round=1))
    except CodecError:
        return None


@pytest.mark.parametrize("name", RATED)
@pytest.mark.parametrize("kind", ["Gaussian", "realistic"])
def test_rate_asked_is_rate_got(
    name: str, kind: str, spec: AdapterSpec, realistic: Realistic
) -> None:
    update = realistic(spec, 1)
    if kind == "Gaussian":
        normal = np.random.default_rng(0).standard_normal(spec.size, np.float32)
        update = AdapterUpdate(spec, normal * np.float32(1e-3))
    got = {}
    for bpp in RATES:
        blob = packet(name, bpp, update)
        if blob is not None:
            got[bpp] = 8 * len(blob) / spec.size
    assert len(got) >= 2
    assert {bpp: round(rate, 4) for bpp, rate in got.items()} == {
        bpp: pytest.approx(bpp, rel=0.02) for bpp in got
    }


@pytest.mark.parametrize("name", RATED)
def test_more_bits_mean_less_error(name: str, spec: AdapterSpec, realistic: Realistic) -> None:
    update = realistic(spec, 2)
    errors = []
    for bpp in (0.05, 0.2, 1.0):
        blob = packet(name, bpp, update)
        if blob is not None:
            decoded = make_codec(name, {"bpp": bpp}).decode(blob, CodecContext(spec, round=1))
            errors.append((update - decoded).norm() / update.norm())
    assert len(errors) >= 2
    assert all(after < before for before, after in pairwise(errors)), errors


@pytest.mark.parametrize("name", RATED)
def test_an_adapter_smaller_than_its_header_still_gets_a_packet(
    name: str, lora_spec: Callable[[int, int], AdapterSpec], realistic: Realistic
) -> None:
    spec = lora_spec(1, 16)
    blob = packet(name, 0.1, realistic(spec, 0))
    assert blob is not None
    assert len(blob) < HEADER_SIZE + 64
    decoded = make_codec(name, {"bpp": 0.1}).decode(blob, CodecContext(spec, round=1))
    assert decoded.is_finite()


@pytest.mark.parametrize("name", RATED)
def test_three_million_parameters_in_twenty_kilobytes(
    name: str, lora_spec: Callable[[int, int], AdapterSpec], realistic: Realistic
) -> None:
    spec = lora_spec(23, 4096)
    assert spec.size == 3_014_656
    blob = packet(name, 0.05, realistic(spec, 0))
    if blob is None:
        pytest.skip("has no such rate")
    assert HEADER_SIZE <= 64
    assert len(blob) < 20_000
