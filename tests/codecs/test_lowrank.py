"""Rank-one pieces: what they recover, which are chosen, and the parts they are sent in."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import CodecContext, make_codec
from cgfedllm.codecs.entropy import SymbolReader, SymbolWriter
from cgfedllm.codecs.lowrank import pieces
from cgfedllm.codecs.parts import trellis
from cgfedllm.codecs.parts.matrices import MAX_ROWS, batches
from cgfedllm.errors import CodecError

A, B = "m.{}.q.lora_A.weight", "m.{}.q.lora_B.weight"
SPEC = AdapterSpec.from_shapes(
    {name.format(i): shape for i in range(16) for name, shape in ((A, (8, 512)), (B, (384, 8)))}
)
CONTEXT = CodecContext(SPEC, round=1)


def low_rank(spec: AdapterSpec, rank: int, seed: int = 0, scales: dict[str, float] | None = None):
    rng = np.random.default_rng(seed)
    update = AdapterUpdate.zeros(spec)
    for name, view in update.views().items():
        left = rng.standard_normal((view.shape[0], rank))
        right = rng.standard_normal((rank, view.shape[1]))
        view[...] = (scales or {}).get(name, 1.0) * left @ right
    return update


def snr(update: AdapterUpdate, decoded: AdapterUpdate) -> float:
    return 20 * np.log10(update.norm() / (update - decoded).norm())


def through(update: AdapterUpdate, **options: object) -> AdapterUpdate:
    codec = make_codec("lowrank", options)
    context = CodecContext(update.spec, round=1)
    return codec.decode(codec.encode(update, context), context)


def test_a_rank_one_update_is_recovered_at_an_eighth_of_its_rate() -> None:
    # one row of eight is all there is: 8 bits an entry of it are one bit a parameter
    update = low_rank(SPEC, 1)
    assert snr(update, through(update, bpp=1.0)) > 35
    assert snr(update, through(update, bpp=1.0, max_pieces=1)) > 25
    assert snr(update, through(update, bpp=0.05)) > 0.9


def test_a_low_rank_update_costs_less_than_white_noise() -> None:
    noise = AdapterUpdate(
        SPEC, np.random.default_rng(0).standard_normal(SPEC.size).astype(np.float32)
    )
    gains = [
        snr(low_rank(SPEC, rank), through(low_rank(SPEC, rank), bpp=0.2)) for rank in (1, 2, 4)
    ]
    assert gains == sorted(gains, reverse=True)
    assert gains[-1] > snr(noise, through(noise, bpp=0.2)) > 0


@pytest.mark.parametrize("bpp", [0.05, 0.1, 0.2, 0.4, 1.0, 4.0])
def test_rate_and_monotone_error(bpp: float) -> None:
    update = low_rank(SPEC, 8)
    codec = make_codec("lowrank", {"bpp": bpp})
    blob = codec.encode(update, CONTEXT)
    assert len(blob) * 8 / SPEC.size == pytest.approx(bpp, rel=0.02)
    assert snr(update, codec.decode(blob, CONTEXT)) > snr(update, through(update, bpp=bpp * 0.8))


def test_pieces_are_complete_at_high_rate() -> None:
    noise = np.random.default_rng(3).standard_normal(SPEC.size).astype(np.float32)
    update = AdapterUpdate(SPEC, noise)
    # an ideal dead-zone quantiser of a Gaussian has 22.6 dB at 4 bits
    assert snr(update, through(update, bpp=4.0)) > 22


def test_bits_go_where_the_energy_is() -> None:
    loud, quiet = A.format(0), A.format(1)
    update = low_rank(SPEC, 2, scales={loud: 10.0, quiet: 0.1})
    decoded = through(update, bpp=0.05)
    views = decoded.views()
    assert views[loud].any()
    assert not views[quiet].any()


def test_max_pieces_bounds_the_rank() -> None:
    decoded = through(low_rank(SPEC, 8), bpp=0.6, max_pieces=2)
    ranks = [np.linalg.matrix_rank(view, tol=1e-4) for view in decoded.views().values()]
    assert max(ranks) == 2


def test_a_rate_that_so_few_pieces_cannot_use_is_refused() -> None:
    with pytest.raises(CodecError, match="the nearest is"):
        through(low_rank(SPEC, 8), bpp=8.0, max_pieces=1)


def test_signs_are_enough_for_a_sign_like_piece() -> None:
    rng = np.random.default_rng(0)
    update = AdapterUpdate.zeros(SPEC)
    for view in update.views().values():
        view[...] = np.outer(rng.choice([-1, 1], view.shape[0]), rng.choice([-1, 1], view.shape[1]))
    assert snr(update, through(update, bpp=0.2)) > 20


@pytest.mark.parametrize("rank", [1, 3, 16, 64])
def test_ranks(rank: int) -> None:
    spec = AdapterSpec.from_shapes({A.format(0): (rank, 700), B.format(0): (600, rank)})
    assert snr(low_rank(spec, rank), through(low_rank(spec, rank), bpp=4.0)) > 15


def test_the_same_bytes_for_every_memory_order() -> None:
    update = low_rank(SPEC, 3)
    codec = make_codec("lowrank")
    strided = np.repeat(update.vector, 2)[::2]
    assert codec.encode(update, CONTEXT) == codec.encode(AdapterUpdate(SPEC, strided), CONTEXT)


# ---- its parts ------------------------------------------------------------------------------


@pytest.mark.parametrize("k", trellis.GENERATORS)
def test_codewords_survive_and_point_the_right_way(k: int) -> None:
    vectors = np.random.default_rng(k).standard_normal((5, 203)).astype(np.float32)
    bits = trellis.encode(vectors, k)
    assert bits.shape == (5, -(-203 // k))
    words = trellis.decode(bits, k, 203)
    np.testing.assert_array_equal(trellis.encode(words.astype(np.float32), k), bits)
    kept = (vectors * words).sum(1) ** 2 / 203 / np.square(vectors).sum(1)
    # a Gaussian's rate-distortion function allows 1 - 2^(-2 / k); without memory, k bits in one
    # would keep 0.637 / k
    assert 0.637 / k * 0.95 < kept.mean() < 1 - 2 ** (-2 / k)


@pytest.mark.parametrize("k", [2, 4])
def test_no_codeword_is_nearer(k: int) -> None:
    vectors = np.random.default_rng(k).standard_normal((3, 8 * k)).astype(np.float32)
    every = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
    best = (vectors @ trellis.decode(every, k, 8 * k).T.astype(np.float32)).max(axis=1)
    found = (vectors * trellis.decode(trellis.encode(vectors, k), k, 8 * k)).sum(axis=1)
    np.testing.assert_allclose(found, best, rtol=1e-2)


@given(seed=st.integers(0, 1000), rows=st.integers(1, 9))
def test_side_information_round_trips(seed: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    modes = [
        np.minimum.accumulate(rng.integers(0, 4, (7, depth)) > 0, axis=1)
        * rng.integers(1, 8, (7, depth))
        for depth in (rows, 1)
    ]
    shapes = [(int((own > 0).sum()), height) for own, height in zip(modes, (rows, 1), strict=True)]
    levels = [rng.integers(-5, 6, shape) for shape in shapes]
    for own in levels:
        own[:, 0] = 1 + np.abs(own[:, 0]) if own.shape[1] > 1 else 1
    writer = SymbolWriter()
    pieces.write_modes(writer, modes, 8)
    pieces.write_levels(writer, levels)
    reader = SymbolReader(writer.finish())
    for got, wanted in zip(
        pieces.read_modes(reader, [own.shape for own in modes], 8), modes, strict=True
    ):
        np.testing.assert_array_equal(got, wanted)
    for got, wanted in zip(pieces.read_levels(reader, shapes), levels, strict=True):
        np.testing.assert_array_equal(got, wanted)
    reader.finish()


def test_bases_are_orthonormal_and_dependent_vectors_vanish() -> None:
    levels = np.random.default_rng(0).integers(-4, 5, (20, 8, 8))
    levels[0, 3] = levels[0, 1] - levels[0, 2]
    levels[1, 5:] = 0
    basis = pieces.orthonormal(levels)
    assert not basis[0, 3].any()
    assert not basis[1, 5:].any()
    gram = np.einsum("fki,fli->fkl", basis, basis)
    wanted = np.zeros_like(gram)
    present = np.abs(basis).max(axis=2) > 0
    wanted[:, range(8), range(8)] = present
    np.testing.assert_allclose(gram, wanted, atol=1e-9)


def test_every_element_is_in_one_matrix() -> None:
    spec = AdapterSpec.from_shapes(
        {
            "s": (),
            "v": (9,),
            "c": (3, 2, 2),
            A.format(0): (4, 4),
            B.format(0): (4, 4),
            "w": (200, 130),
        }
    )
    vector = np.arange(1, spec.size + 1, dtype=np.float32)
    back = np.zeros_like(vector)
    for batch in batches(spec):
        assert batch.rows <= min(batch.columns, MAX_ROWS)
        batch.scatter(batch.gather(vector), back)
    np.testing.assert_array_equal(back, vector)
