"""The bench measures what was really sent, on rounds no codec may learn from."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from cgfedllm.adapter import AdapterUpdate, Float32Array
from cgfedllm.analysis.coding import CodecCoder
from cgfedllm.analysis.fidelity import Fidelity
from cgfedllm.analysis.fitted import Fitted
from cgfedllm.analysis.open_loop import PREVIOUS, PREVIOUS_SCALED, measure
from cgfedllm.analysis.open_loop_rows import OpenLoop, OpenLoopRow
from cgfedllm.analysis.samples import choose, spread
from cgfedllm.analysis.trials import Trial, read_candidate, trials
from cgfedllm.codecs import Codec, CodecContext, CodecOptions, base, make_codec, register
from cgfedllm.errors import CodecError, ConfigError, RecordingError
from cgfedllm.tgap.codec_file import CodecFile

from .recordings import SPEC, noise, write_recording


@pytest.fixture
def rated(monkeypatch: pytest.MonkeyPatch) -> type[Codec]:
    """A codec with a rate: the first so many values as float32, refusing less than one."""
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))

    class FirstOptions(CodecOptions):
        bpp: float = 1.0
        scale: float = 1.0

    class First(Codec):
        name = "first"
        summary = "the first values"
        Options = FirstOptions

        def _encode(self, update: AdapterUpdate, context: CodecContext) -> bytes:
            assert isinstance(self.options, FirstOptions)
            kept = int(self.options.bpp * context.spec.size / 32)
            if kept < 20:
                raise CodecError("first: too few bits")
            return update.vector[:kept].tobytes()

        def _decode(self, payload: bytes, context: CodecContext) -> Float32Array:
            vector = np.zeros(context.spec.size, np.float32)
            values = np.frombuffer(payload, np.float32)
            vector[: len(values)] = values
            return vector

    return register(First)


def row_of(result: OpenLoop, codec: str, bpp: float | None = None) -> OpenLoopRow:
    (row,) = [r for r in result.rows if r.codec == codec and r.asked_bpp == bpp]
    return row


def test_raw_is_exact_and_costs_what_its_packets_weigh(tmp_path: Path) -> None:
    recording = write_recording(tmp_path / "r")
    result = measure("r", recording, [("raw", {})])
    row = row_of(result, "raw")
    size = make_codec("raw").packet_size(SPEC)
    assert size is not None
    assert row.bpp == 8 * size / SPEC.size
    assert row.times_fewer_than_fp32 == pytest.approx(32 / row.bpp)
    assert (row.snr_db, row.aggregate_snr_db) == (math.inf, math.inf)
    assert row.cosine == pytest.approx(1)
    assert row.updates == 9  # three clients in rounds 4, 5, 6
    assert row.n_parameters == SPEC.size
    assert result.rounds == (4, 5, 6)


@pytest.mark.parametrize("name", ["bf16", "int8"])
def test_fixed_size_codecs_by_their_definition(tmp_path: Path, name: str) -> None:
    recording = write_recording(tmp_path / "r")
    row = row_of(measure("r", recording, [(name, {})]), name)
    codec = make_codec(name)
    size = codec.packet_size(SPEC)
    assert size is not None
    assert row.bpp == 8 * size / SPEC.size
    clients, aggregates = Fidelity(), Fidelity()
    for number in (4, 5, 6):
        context = CodecContext(SPEC, number)
        true = [noise(number, index) for index in range(3)]
        decoded = [codec.decode(codec.encode(u, context), context) for u in true]
        for x, y in zip(true, decoded, strict=True):
            clients.add(x.vector, y.vector)
        weights = np.array([1, 2, 3]) / 6
        means = [
            np.tensordot(weights, np.stack([u.vector for u in us]).astype(np.float64), 1)
            for us in (true, decoded)
        ]
        aggregates.add(*[m.astype(np.float32) for m in means])
    assert row.snr_db == pytest.approx(clients.snr_db, rel=1e-9)
    assert row.aggregate_snr_db == pytest.approx(aggregates.snr_db, rel=1e-3)
    assert row.aggregate_cosine == pytest.approx(aggregates.cosine)
    assert row.encode_ms > 0
    assert row.decode_ms > 0


def test_somebody_elses_packet_hurts(tmp_path: Path) -> None:
    result = measure("r", write_recording(tmp_path / "r"), [("raw", {}), ("int8", {})])
    for name in ("raw", "int8"):
        row = row_of(result, name)
        # of two unrelated updates of equal energy: -10 log10 2
        assert row.swap_snr_db == pytest.approx(-3.01, abs=0.4)
        assert row.swap_snr_db < row.snr_db


def test_one_client_leaves_nobody_to_swap_with(tmp_path: Path) -> None:
    recording = write_recording(tmp_path / "r", clients=1)
    row = row_of(measure("r", recording, [("int8", {})]), "int8")
    assert math.isnan(row.swap_snr_db)


def test_the_previous_aggregate_is_measured_as_a_predictor(tmp_path: Path) -> None:
    common = noise(0, 0).vector

    def make(number: int, client: int) -> AdapterUpdate:
        return AdapterUpdate(SPEC, common * np.float32(number))

    result = measure("r", write_recording(tmp_path / "r", make), [])
    plain, scaled = row_of(result, PREVIOUS), row_of(result, PREVIOUS_SCALED)
    assert plain.bpp == 0
    assert plain.times_fewer_than_fp32 == math.inf
    # rounds 4, 5, 6 times the common vector, predicted as 3, 4, 5 times it
    assert plain.snr_db == pytest.approx(10 * math.log10(77 / 3), rel=1e-5)
    assert json.loads(scaled.options)["scale"] == pytest.approx((12 + 20 + 30) / 50, rel=1e-5)
    assert scaled.snr_db > plain.snr_db
    assert scaled.cosine == pytest.approx(plain.cosine)


def test_a_codec_with_a_rate_runs_at_each_and_may_refuse(
    tmp_path: Path, rated: type[Codec]
) -> None:
    recording = write_recording(tmp_path / "r")
    seen: list[int] = []
    result = measure(
        "r",
        recording,
        [("first", {"scale": 2.0}), ("int8", {})],
        rates=(0.1, 8.0, 16.0),
        tick=lambda what, done: seen.append(done),
    )
    low, high = row_of(result, "first", 8.0), row_of(result, "first", 16.0)
    assert low.bpp == pytest.approx(8, rel=0.1)
    assert high.snr_db > low.snr_db > 0
    assert low.label == high.label == "first:scale=2.0"
    (refusal,) = result.refusals
    assert (refusal.asked_bpp, refusal.reason) == (0.1, "first: too few bits")
    assert seen == sorted(seen)
    assert seen[-1] == 4 * 9
    modules = {r.module: r for r in result.modules if r.asked_bpp == 8.0}
    assert modules["q_proj.A"].snr_db > 0  # among the first values
    assert modules["v_proj.B"].snr_db == 0
    assert sum(r.energy_share for r in modules.values()) == pytest.approx(1)


def test_memory_is_measured_where_asked(tmp_path: Path) -> None:
    recording = write_recording(tmp_path / "r")
    row = row_of(measure("r", recording, [("raw", {})], memory=True), "raw")
    assert row.peak_extra_bytes is not None
    assert row.peak_extra_bytes >= 4 * SPEC.size
    assert row_of(measure("r", recording, [("raw", {})]), "raw").peak_extra_bytes is None


def test_the_same_command_gives_the_same_numbers(tmp_path: Path) -> None:
    recording = write_recording(tmp_path / "r")
    one, two = (measure("r", recording, [("int8", {})], updates=4) for _ in range(2))
    assert row_of(one, "int8").snr_db == row_of(two, "int8").snr_db
    assert one.models == two.models


def test_models_are_three_curves_in_order_of_what_they_know(tmp_path: Path) -> None:
    result = measure("r", write_recording(tmp_path / "r"), [])
    at_one = {}
    for row in result.models:
        at_one.setdefault(row.model, {})[row.bpp] = row.snr_db
    iid, factors, spectrum = at_one.values()
    for bpp, snr in iid.items():
        assert snr == pytest.approx(6.0206 * bpp, rel=1e-4)
        assert snr <= factors[bpp] * (1 + 1e-9) <= spectrum[bpp] * (1 + 1e-9)


class TestChoose:
    def test_whole_rounds_of_the_later_half_spread_evenly(self, tmp_path: Path) -> None:
        recording = write_recording(tmp_path / "r", rounds=10)
        chosen = choose(recording, 6)
        assert list(chosen) == [6, 10]
        for number, indices in chosen.items():
            entries = [recording.entries[i] for i in indices]
            assert {entry.round for entry in entries} == {number}
            assert len({entry.client for entry in entries}) == 3

    def test_about_a_round_more_or_less_leaves_single_clients_out(self, tmp_path: Path) -> None:
        chosen = choose(write_recording(tmp_path / "r", rounds=10), 5)
        assert [len(indices) for indices in chosen.values()] == [2, 2]

    def test_no_limit_reached_takes_all(self, tmp_path: Path) -> None:
        chosen = choose(write_recording(tmp_path / "r", rounds=5), 100)
        assert sum(map(len, chosen.values())) == 9

    def test_fewer_than_a_round_has_takes_some_of_its_clients(self, tmp_path: Path) -> None:
        chosen = choose(write_recording(tmp_path / "r"), 2)
        assert [len(indices) for indices in chosen.values()] == [2]

    def test_one_round_is_too_short(self, tmp_path: Path) -> None:
        recording = write_recording(tmp_path / "short", rounds=1)
        with pytest.raises(RecordingError, match=r"short holds one round only.*record more"):
            choose(recording, 16)

    def test_spread(self) -> None:
        assert spread(5, 9) == [0, 1, 2, 3, 4]
        assert spread(10, 2) == [0, 9]
        assert spread(10, 1) == [5]
        assert len(set(spread(100, 17))) == 17


class TestTrials:
    def test_codecs_without_a_rate_run_once(self) -> None:
        assert trials([("raw", {}), ("int8", {})], (0.1, 1.0)) == [
            Trial("raw", {}), Trial("int8", {}),
        ]  # fmt: skip

    def test_a_rate_of_its_own_is_kept(self, rated: type[Codec]) -> None:
        assert [t.asked_bpp for t in trials([("first", {"bpp": 2.0})], (0.1, 1.0))] == [2.0]
        assert [t.label for t in trials([("first", {})], (0.1, 1.0))] == [
            "first:bpp=0.1", "first:bpp=1.0",
        ]  # fmt: skip

    def test_a_codec_file_serves_every_rate(self, tmp_path: Path) -> None:
        spec = write_recording(tmp_path / "r").spec
        codec = make_codec("learned", {"bpp": 0.1, "directions": 4})
        state = codec.initial_state(spec)
        options = codec.options.model_dump(mode="json")
        file = CodecFile("learned", codec.version, options, spec, state)
        tried = trials([], (0.1, 1.0), [Fitted("mine", file)])
        assert [t.label for t in tried] == [
            "learned:bpp=0.1,state=mine", "learned:bpp=1.0,state=mine",
        ]  # fmt: skip
        assert [t.asked_bpp for t in tried] == [0.1, 1.0]
        for trial in tried:
            made = trial.make(spec)
            assert isinstance(made, CodecCoder)
            assert made.state == state
            assert made.codec.options.model_dump() == {**options, "bpp": trial.asked_bpp}

    def test_reading_a_candidate(self, rated: type[Codec]) -> None:
        assert read_candidate("raw") == ("raw", {})
        assert read_candidate("first:bpp=0.5,scale=3.0") == ("first", {"bpp": 0.5, "scale": 3.0})
        with pytest.raises(ConfigError, match="no codec is named 'nit8'"):
            read_candidate("nit8")
