"""The cosine transform: exact in integers, good for smooth updates, the largest are kept."""

import numpy as np
import pytest

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import CodecContext, make_codec
from cgfedllm.codecs.parts import cosine

SPEC = AdapterSpec.from_shapes(
    {
        f"m.{i}.q.lora_{k}.weight": (8, 600) if k == "A" else (600, 8)
        for i in range(12)
        for k in "AB"
    }
)
CONTEXT = CodecContext(SPEC, round=1)


def noise(seed: int = 0) -> AdapterUpdate:
    rng = np.random.default_rng(seed)
    return AdapterUpdate(SPEC, rng.standard_normal(SPEC.size).astype(np.float32))


def smooth() -> AdapterUpdate:
    rng = np.random.default_rng(1)
    update = AdapterUpdate.zeros(SPEC)
    for view in update.views().values():
        rows = view if view.shape[0] == 8 else view.T
        rows[...] = np.cumsum(rng.standard_normal(rows.shape), axis=1)
    return update


def snr(update: AdapterUpdate, **options: object) -> float:
    codec = make_codec("dct", options)
    decoded = codec.decode(codec.encode(update, CONTEXT), CONTEXT)
    return float(20 * np.log10(update.norm() / (update - decoded).norm()))


@pytest.mark.parametrize("n", [1, 2, 7, 64, 65, 130, 600])
@pytest.mark.parametrize("axis", [1, 2])
def test_transform_is_undone(n: int, axis: int) -> None:
    shape = (3, n, 5) if axis == 1 else (3, 5, n)
    values = np.random.default_rng(n).integers(-(1 << 20), 1 << 20, shape).astype(np.float64)
    back = cosine.inverse(cosine.forward(values, 64, axis), 64, axis)
    # the basis is rounded to 2^-19 and 64 of its entries are summed, twice
    assert np.abs(back - values).max() < 2.0**-19 * 128 * (1 << 20) / 4
    assert np.square(back - values).mean() < 100


def test_transform_is_exact_in_any_order_of_summation() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(-cosine.LARGEST_IN, cosine.LARGEST_IN, (4, 64, 256)) * 1.0
    values[0] = cosine.LARGEST_IN
    for axis, chunk in ((1, 64), (2, 256)):
        order = rng.permutation(4)
        whole = cosine.forward(values, chunk, axis)
        one_by_one = np.stack([cosine.forward(values[i : i + 1], chunk, axis)[0] for i in order])
        np.testing.assert_array_equal(one_by_one, whole[order])
        moved = np.moveaxis(values, axis, -1)
        basis = cosine._basis(chunk)
        exact = moved.astype(object)[0, :2] @ basis.astype(np.int64).astype(object).T
        rounded = np.rint(exact.astype(np.float64) / 2.0**18)
        np.testing.assert_array_equal(np.moveaxis(whole, axis, -1)[0, :2], rounded)


def test_two_axes_stay_below_2_to_the_53() -> None:
    worst = np.full((1, 256, 256), float(cosine.LARGEST_IN))
    first = cosine.inverse(worst, 256, 1, spare=2)
    # what the second axis sums: 256 of these times a basis of 2^18 whose rows have norm 1
    assert np.abs(first).max() * 16 * 2**18 < 2**53


def test_smooth_updates_cost_less_than_noise() -> None:
    assert snr(smooth(), bpp=0.1) > 8 > 1 > snr(noise(), bpp=0.1) > 0.2


def test_one_cosine_is_one_coefficient() -> None:
    spec = AdapterSpec.from_shapes({"v": (64 * 200,)})
    wave = np.tile(np.cos(np.pi / 64 * 5 * (np.arange(64) + 0.5)), 200).astype(np.float32)
    codec, context = make_codec("dct", {"bpp": 1.0}), CodecContext(spec, round=1)
    blob = codec.encode(AdapterUpdate(spec, wave), context)
    decoded = codec.decode(blob, context)
    assert len(blob) < 600
    np.testing.assert_allclose(decoded.vector, wave, atol=0.03)


@pytest.mark.parametrize("selection", ["global", "chunk"])
@pytest.mark.parametrize("bpp", [0.05, 0.2, 1.0, 4.0])
def test_rate_and_monotone_error(selection: str, bpp: float) -> None:
    codec = make_codec("dct", {"bpp": bpp, "selection": selection})
    blob = codec.encode(noise(), CONTEXT)
    assert len(blob) * 8 / SPEC.size == pytest.approx(bpp, rel=0.02)
    finer = snr(noise(), bpp=bpp * 1.3, selection=selection)
    assert finer > snr(noise(), bpp=bpp, selection=selection)


def test_choosing_over_the_update_beats_choosing_in_every_chunk() -> None:
    for update in (noise(), smooth()):
        assert snr(update, bpp=0.1) > snr(update, bpp=0.1, selection="chunk")


def test_every_chunk_gets_its_share() -> None:
    codec = make_codec("dct", {"bpp": 0.3, "selection": "chunk"})
    update = noise()
    update.vector[: SPEC.size // 2] *= 0.01
    decoded = codec.decode(codec.encode(update, CONTEXT), CONTEXT)
    # in the quiet half, too, though a step fit for the loud half is far too coarse for it
    assert all(view.any() for view in decoded.views().values())


def test_axes() -> None:
    update = AdapterUpdate.zeros(SPEC)
    for view in update.views().values():
        view[...] = np.random.default_rng(0).standard_normal(
            view.shape[1 if view.shape[0] == 8 else 0]
        )[None if view.shape[0] == 8 else slice(None), ... if view.shape[0] == 8 else None]
    # equal rows: all of it lies in the first frequency of the short axis
    assert snr(update, bpp=0.2) > snr(update, bpp=0.2, axes="long") + 3
