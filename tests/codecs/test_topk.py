"""Top-k keeps the largest values of every chunk, and says where they are."""

import numpy as np
import pytest

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import CodecContext, make_codec
from cgfedllm.codecs.packet import HEADER_SIZE, Packet
from cgfedllm.codecs.topk import TopK
from cgfedllm.errors import PacketError

N = 40_000
SPEC = AdapterSpec.from_shapes({"x": (N,)})
CONTEXT = CodecContext(SPEC, round=2)


def heavy(seed: int = 0) -> AdapterUpdate:
    rng = np.random.default_rng(seed)
    return AdapterUpdate(SPEC, (rng.standard_t(2, N) * 1e-3).astype(np.float32))


def through(options: dict[str, object], update: AdapterUpdate) -> np.ndarray:
    codec = make_codec("topk", options)
    return codec.decode(codec.encode(update, CONTEXT), CONTEXT).vector


@pytest.mark.parametrize("positions", ["coded", "fixed"])
@pytest.mark.parametrize("value_bits", [1, 2])
def test_the_largest_of_each_chunk_are_kept(positions: str, value_bits: int) -> None:
    update = heavy()
    options = {"bpp": 0.3, "positions": positions, "value_bits": value_bits, "chunk": 1000}
    decoded = through(options, update)
    for chunk, sent in zip(
        np.abs(update.vector).reshape(-1, 1000), decoded.reshape(-1, 1000) != 0, strict=True
    ):
        assert sent.any()
        assert chunk[sent].min() >= chunk[~sent].max()
    assert (np.sign(decoded[decoded != 0]) == np.sign(update.vector[decoded != 0])).all()


def test_coded_positions_leave_room_for_more_values() -> None:
    update = heavy()
    kept = [
        np.count_nonzero(through({"bpp": 0.1, "positions": how}, update))
        for how in ("fixed", "coded")
    ]
    assert kept[1] > 1.15 * kept[0]


def test_of_equal_values_the_first_are_kept() -> None:
    update = AdapterUpdate(SPEC, np.full(N, 0.5, np.float32))
    sent = np.flatnonzero(through({"bpp": 0.2, "chunk": 4096}, update)) % 4096
    per_chunk = np.bincount(sent)
    assert (np.diff(np.flatnonzero(per_chunk)) == 1).all()


def test_two_magnitudes_are_better_than_one_at_equal_positions() -> None:
    update = heavy()
    one, two = (
        through({"bpp": bpp, "value_bits": bits, "positions": "fixed"}, update)
        for bits, bpp in ((1, 0.26), (2, 0.28))
    )
    errors = [np.square(update.vector - v, dtype=np.float64).sum() for v in (one, two)]
    assert errors[1] < errors[0]


def test_a_last_chunk_of_another_length_gets_its_share() -> None:
    spec = AdapterSpec.from_shapes({"x": (5000,)})
    update = AdapterUpdate(spec, heavy().vector[:5000].copy())
    context = CodecContext(spec, round=1)
    codec = make_codec("topk", {"bpp": 0.5})
    sent = codec.decode(codec.encode(update, context), context).vector != 0
    assert np.count_nonzero(sent[4096:]) / 904 == pytest.approx(sent.mean(), rel=0.1)


@pytest.mark.parametrize("total", [0, N + 1, 2**32 - 1])
def test_impossible_counts_are_refused(total: int) -> None:
    from cgfedllm.codecs.entropy import SymbolWriter

    writer = SymbolWriter()
    writer.bits(total, 32)
    writer.float32(1.0)
    writer.bits(np.arange(1, 100), 16)
    packet = Packet("topk", TopK.version, SPEC.hash, bytes(8), 2, N, writer.finish())
    with pytest.raises(PacketError, match="cannot be kept"):
        make_codec("topk").decode(packet.to_bytes(), CONTEXT)


def test_fixed_positions_out_of_order_are_refused() -> None:
    codec = make_codec("topk", {"bpp": 0.3, "positions": "fixed"})
    blob = codec.encode(heavy(), CONTEXT)
    payload = bytearray(blob[HEADER_SIZE:])
    refused = 0
    for at in range(40, 140):
        damaged = bytearray(payload)
        damaged[at] ^= 0x5A
        packet = Packet("topk", TopK.version, SPEC.hash, bytes(8), 2, N, bytes(damaged))
        try:
            codec.decode(packet.to_bytes(), CONTEXT)
        except PacketError:
            refused += 1
    assert refused > 50
