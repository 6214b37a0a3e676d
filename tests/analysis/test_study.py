"""The paper's analyses on recordings whose answers are known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.analysis.fidelity import Fidelity
from cgfedllm.analysis.fitted import load_fitted
from cgfedllm.analysis.noise import SIGMAS, UNCODED
from cgfedllm.analysis.open_loop import measure
from cgfedllm.analysis.rounds import FidelityRow
from cgfedllm.analysis.study import check_recording, read_parts, study
from cgfedllm.analysis.trials import Trial
from cgfedllm.codecs import CodecContext, Int4, make_codec
from cgfedllm.codecs.learning import LearnedCodec
from cgfedllm.config import Config
from cgfedllm.errors import CodecError, CodecStateError, ConfigError, RecordingError
from cgfedllm.tgap.recording import Recording, RecordingWriter

from .recordings import SPEC, noise, write_recording

CodecFile = Callable[..., Path]


def small(number: int, client: int) -> AdapterUpdate:
    return noise(number, client).scaled(1e-3)


def trials_of(*names: str) -> list[Trial]:
    return [Trial(name, {}) for name in names]


def fitted_of(*paths: Path) -> list[Trial]:
    return [Trial(one.file.name, {}, fitted=one) for one in load_fitted(paths)]


def row_of(rows: Sequence[Any], **wanted: Any) -> Any:
    (row,) = [r for r in rows if all(getattr(r, k) == v for k, v in wanted.items())]
    return row


@pytest.fixture
def recording(tmp_path: Path) -> Recording:
    return write_recording(tmp_path / "r", small, rounds=4)


class TestFidelity:
    def test_every_quantity_by_its_definition(self, recording: Recording) -> None:
        found = study("r", recording, trials_of("int4"), parts=["fidelity"])
        codec = make_codec("int4")
        update, innovation, aggregate = Fidelity(), Fidelity(), Fidelity()
        for number in (1, 2, 3, 4):
            context = CodecContext(SPEC, number)
            true = [small(number, client) for client in range(3)]
            decoded = [codec.decode(codec.encode(x, context), context) for x in true]
            for x, y in zip(true, decoded, strict=True):
                update.add(x.vector, y.vector)
                if number > 1:
                    before = recording.aggregate(number - 1)
                    innovation.add((x - before).vector, (y - before).vector)
            means = [
                sum((1 + i) / 6 * u.vector.astype(np.float64) for i, u in enumerate(us))
                for us in (true, decoded)
            ]
            aggregate.add(*means)
        pooled = {"codec": "int4", "round": None, "module": "all"}
        for level, quantity, wanted in (
            ("client", "update", update),
            ("client", "innovation", innovation),
            ("aggregate", "update", aggregate),
        ):
            row = row_of(found.fidelity, level=level, quantity=quantity, **pooled)
            assert row.snr_db == pytest.approx(wanted.snr_db, rel=1e-5)
            assert row.cosine == pytest.approx(wanted.cosine, rel=1e-6)
            assert (row.updates, row.seen) == (12, 0)

    def test_rounds_and_modules_sum_to_the_whole(self, recording: Recording) -> None:
        found = study("r", recording, trials_of("int4"), parts=["fidelity"])
        of_update = [r for r in found.fidelity if (r.level, r.quantity) == ("client", "update")]
        assert {r.module for r in of_update} == {
            "all", "q_proj.A", "q_proj.B", "v_proj.A", "v_proj.B",
        }  # fmt: skip
        assert [r.round for r in of_update if r.module == "all"] == [1, 2, 3, 4, None]
        products = {r.module for r in found.fidelity if r.quantity == "product"}
        assert products == {"all", "q_proj", "v_proj"}
        # pooled: between the worst and the best of its rounds
        own = [r.snr_db for r in of_update if r.module == "all"]
        assert min(own[:-1]) < own[-1] < max(own[:-1])
        # nothing is known before the first round
        assert 1 not in {r.round for r in found.fidelity if r.quantity == "innovation"}

    def test_raw_is_exact_and_the_predictor_knows_nothing_new(self, recording: Recording) -> None:
        found = study("r", recording, trials_of("raw", "zero"), parts=["fidelity"])
        whole = [r for r in found.fidelity if r.round is None and r.module == "all"]
        assert {r.snr_db for r in whole if r.codec == "raw"} == {math.inf}
        new: FidelityRow = row_of(whole, codec="zero", level="client", quantity="innovation")
        assert (new.snr_db, new.cosine) == (0, 0)

    def test_without_states_products_are_left_out_and_it_is_said(self, tmp_path: Path) -> None:
        whole = write_recording(tmp_path / "r", small, rounds=4)
        found = study("r", whole.select(rounds=[2, 3, 4]), trials_of("raw"), parts=["fidelity"])
        assert {r.quantity for r in found.fidelity} == {"update", "innovation"}
        assert found.notes == [
            "no effective changes of products: it does not hold every round from the first"
        ]


class TestRate:
    def test_elements_bits_and_bytes(
        self, recording: Recording, codec_file: CodecFile, tmp_path: Path
    ) -> None:
        path = codec_file(tmp_path / "h.safetensors", recording, [])
        codecs = [*trials_of("int8", "zero"), *fitted_of(path)]
        found = study("r", recording, codecs, parts=["rate"])
        eight, nothing, halved = found.rate
        size = make_codec("int8").packet_size(SPEC)
        assert size is not None
        assert (eight.least_bytes, eight.most_bytes, eight.packet_bytes) == (size, size, size)
        assert eight.bpp == 8 * size / SPEC.size
        assert eight.times_fewer_than_fp32 == 2 * eight.times_fewer_than_bf16 == 32 / eight.bpp
        assert (eight.latent_elements, eight.element_share, eight.state_bytes) == (None, None, 0)
        assert nothing.packet_bytes < 60  # a header
        assert halved.element_share == 0.5
        # half of the elements, and half of the bytes with a header: 16 bits, not 1/2 of nothing
        assert halved.bpp == pytest.approx(16, rel=0.1)
        assert halved.state_bytes > 4
        assert json.loads(halved.options) == {"state": "h"}


class TestSwap:
    def test_another_clients_packet_hurts_unless_it_says_nothing(
        self, recording: Recording
    ) -> None:
        found = study("r", recording, trials_of("raw", "int4", "zero"), parts=["swap"])
        raw, four, zero = found.swap
        assert raw.snr_db == math.inf
        assert raw.swapped_snr_db == pytest.approx(-3, abs=0.5)  # unrelated, of equal energy
        assert abs(raw.swapped_cosine) < 0.1
        assert four.lost_db > 5
        assert zero.lost_db == pytest.approx(0, abs=1e-9)
        assert zero.updates == 12

    def test_one_client_has_nobody_to_swap_with(self, tmp_path: Path) -> None:
        alone = write_recording(tmp_path / "r", small, clients=1)
        with pytest.raises(RecordingError, match="one client a round"):
            check_recording(alone, ["swap"])
        check_recording(alone, ["fidelity"])
        found = study("r", alone, trials_of("raw"))
        assert not found.swap
        assert any("no swap test" in note for note in found.notes)


class TestNoise:
    def test_noise_costs_what_it_weighs(self, recording: Recording) -> None:
        found = study("r", recording, trials_of("raw", "int8"), parts=["noise"], seed=3)
        for codec in ("raw", UNCODED):
            rows = [r for r in found.noise if r.codec == codec]
            assert [r.sigma for r in rows] == [0, *SIGMAS]
            assert (rows[0].snr_db, rows[0].norm_ratio) == (math.inf, 0)
            for row in rows[1:]:
                # values are 1e-3 wide: 5e-4 is half of them, 5e-2 fifty times as much
                assert row.norm_ratio == pytest.approx(row.sigma / 1e-3, rel=0.1)
                assert row.snr_db == pytest.approx(-20 * math.log10(row.norm_ratio), abs=0.05)
                assert row.noisy_snr_db > 60
        eight = {r.sigma: r for r in found.noise if r.codec == "int8"}
        assert 30 < eight[0.0].snr_db < 60
        # drowned, it still codes what went in
        assert eight[0.5].snr_db < -50
        assert eight[0.5].noisy_snr_db > 30

    def test_the_same_draws_for_every_codec_and_sigma(self, recording: Recording) -> None:
        one = study("r", recording, trials_of("raw"), parts=["noise"]).noise
        two = study("r", recording, trials_of("int8", "raw"), parts=["noise"]).noise
        other = study("r", recording, trials_of("raw"), parts=["noise"], seed=1).noise
        snr = [[r.snr_db for r in rows if r.codec == "raw"] for rows in (one, two, other)]
        assert snr[0] == snr[1] != snr[2]
        ratios = [r.norm_ratio / r.sigma for r in one if r.sigma and r.codec == "raw"]
        assert ratios == pytest.approx([ratios[0]] * len(SIGMAS))

    def test_on_the_latent_where_there_is_one(
        self, recording: Recording, codec_file: CodecFile, tmp_path: Path
    ) -> None:
        path = codec_file(tmp_path / "h.safetensors", recording, [])
        found = study("r", recording, [*trials_of("int8"), *fitted_of(path)], parts=["noise"])
        latent = [r for r in found.noise if r.place == "latent"]
        assert {r.codec for r in latent} == {"halves"}
        assert [r.sigma for r in latent] == [0, *SIGMAS]
        clean = row_of(found.noise, codec="halves", place="update", sigma=0.0)
        # what the decoder makes of the encoder's own latent is what decoding gives
        assert latent[0].snr_db == pytest.approx(clean.snr_db)
        assert latent[1].norm_ratio == pytest.approx(0.05, rel=0.1)
        assert [r.snr_db for r in latent] == sorted((r.snr_db for r in latent), reverse=True)
        # every value of the latent is decoded to two: the noise comes in twice
        assert latent[-1].snr_db == pytest.approx(-20 * math.log10(500), abs=0.6)


class TestDistributions:
    def test_scale_and_shape_by_kind_and_round(self, tmp_path: Path) -> None:
        def make(number: int, client: int) -> AdapterUpdate:
            update = noise(number, client)
            for name, view in update.views().items():
                if "lora_B" in name:
                    view[...] = np.sign(view)  # one magnitude
            return update.scaled(number)

        found = study(
            "r", write_recording(tmp_path / "r", make, rounds=3), [], parts=["distributions"]
        )
        rows = {(r.module, r.round): r for r in found.distributions}
        assert set(rows) == {
            (f"{m}.{f}", r) for m in ("q_proj", "v_proj") for f in "AB" for r in (1, 2, 3)
        }
        for number in (1, 2, 3):
            gaussian, sign = rows["q_proj.A", number], rows["q_proj.B", number]
            assert gaussian.std == pytest.approx(number, rel=0.1)
            assert gaussian.robust_scale == pytest.approx(number, rel=0.1)
            assert gaussian.excess_kurtosis == pytest.approx(0, abs=0.4)
            assert gaussian.q25 == pytest.approx(-0.674 * number, abs=0.15 * number)
            assert gaussian.q999 == pytest.approx(3.1 * number, rel=0.25)
            assert sign.excess_kurtosis == pytest.approx(-2, abs=0.05)
            assert sign.largest == number
            assert gaussian.values == 2 * 4 * 40 * 3  # layers, rank, width, clients
        assert len({(r.module, r.round) for r in found.histograms}) == len(rows)

    def test_histograms_are_densities_of_normalised_values(self, tmp_path: Path) -> None:
        found = study("r", write_recording(tmp_path / "r", small), [], parts=["distributions"])
        bins = [r for r in found.histograms if (r.module, r.round) == ("q_proj.A", 2)]
        width = bins[0].right - bins[0].left
        assert sum(r.density for r in bins) * width == pytest.approx(1, abs=2e-3)
        middle = sum(r.density for r in bins if abs(r.left + r.right) < 2) * width
        assert middle == pytest.approx(0.683, abs=0.05)  # within one standard deviation

    def test_values_that_are_all_equal_have_no_shape(self, tmp_path: Path) -> None:
        zeros = write_recording(tmp_path / "r", lambda r, c: AdapterUpdate.zeros(SPEC))
        found = study("r", zeros, [], parts=["distributions"])
        assert not found.histograms
        assert {row.std for row in found.distributions} == {0}


class TestCodecFiles:
    def test_the_state_is_the_files(
        self, recording: Recording, codec_file: CodecFile, tmp_path: Path
    ) -> None:
        path = codec_file(tmp_path / "mine" / "codec.safetensors", recording, [])
        found = study("r", recording, [*fitted_of(path), Trial("halves", {})], parts=["fidelity"])
        whole = [
            r for r in found.fidelity
            if (r.round, r.level, r.quantity, r.module) == (None, "client", "update", "all")
        ]  # fmt: skip
        learned, untaught = whole
        assert json.loads(learned.options) == {"state": "mine"}  # "codec" says nothing
        assert learned.cosine == pytest.approx(0.5, abs=0.05)  # one of two values, and a stranger
        assert untaught.cosine == 0

    def test_rounds_it_was_fitted_on_are_marked_and_left_out(
        self, recording: Recording, codec_file: CodecFile, tmp_path: Path
    ) -> None:
        path = codec_file(tmp_path / "h.safetensors", recording, [1, 2])
        found = study("r", recording, fitted_of(path))
        rows = [
            r for r in found.fidelity
            if (r.level, r.quantity, r.module) == ("client", "update", "all")
        ]  # fmt: skip
        assert [(r.round, r.updates, r.seen) for r in rows] == [
            (1, 3, 3), (2, 3, 3), (3, 3, 0), (4, 3, 0), (None, 6, 0),
        ]  # fmt: skip
        assert found.rate[0].updates == found.swap[0].updates == 6
        assert {r.updates for r in found.noise if r.codec == "halves"} == {2}
        assert "fitted on rounds 1, 2" in found.notes[0]

    def test_nothing_unseen_is_nothing_to_measure(
        self, recording: Recording, codec_file: CodecFile, tmp_path: Path
    ) -> None:
        path = codec_file(tmp_path / "h.safetensors", recording, [1, 2, 3, 4])
        found = study("r", recording, fitted_of(path))
        assert not found.fidelity
        assert "fitted on every update" in found.refusals[0].reason

    def test_the_bench_refuses_what_was_fitted_on_its_own_updates(
        self, recording: Recording, codec_file: CodecFile, tmp_path: Path
    ) -> None:
        half = load_fitted([codec_file(tmp_path / "half.safetensors", recording, [1, 2])])
        most = load_fitted([codec_file(tmp_path / "most.safetensors", recording, [1, 2, 3])])
        result = measure("r", recording, [("int8", {})], fitted=[*half, *most])
        assert [row.label for row in result.rows if row.bpp > 0] == ["int8", "halves:state=half"]
        (refusal,) = result.refusals
        assert json.loads(refusal.options) == {"state": "most"}
        assert "3 of the 6 updates" in refusal.reason
        assert "rounds 3" in refusal.reason

    def test_a_recording_that_has_grown_is_known_again_and_another_is_not(
        self, tmp_path: Path, codec_file: CodecFile
    ) -> None:
        short = write_recording(tmp_path / "short", small, rounds=3)
        grown = write_recording(tmp_path / "grown", small, rounds=5)
        other = write_recording(tmp_path / "other", noise, rounds=5)
        (fitted,) = load_fitted([codec_file(tmp_path / "h.safetensors", short, [1, 2])])
        assert fitted.seen(short) == fitted.seen(grown) == {1, 2}
        assert fitted.seen(other) == set()
        assert fitted.seen(grown.select(clients=["east"])) == set()  # not these updates alone

    def test_a_card_that_says_nothing_is_not_trusted(
        self, recording: Recording, codec_file: CodecFile, tmp_path: Path
    ) -> None:
        silent = codec_file(tmp_path / "a.safetensors", recording, [1], recordings=None)
        adapted = codec_file(
            tmp_path / "b.safetensors", recording, [1], federated=[{"run": "x", "adapt_every": 2}]
        )
        unchanged = codec_file(
            tmp_path / "c.safetensors", recording, [1], federated=[{"run": "x", "adapt_every": 0}]
        )
        one, two, three = load_fitted([silent, adapted, unchanged])
        with pytest.raises(CodecStateError, match="does not say which updates"):
            one.seen(recording)
        with pytest.raises(CodecStateError, match="learned on in a federated run"):
            two.seen(recording)
        assert three.seen(recording) == {1}

    def test_a_file_of_another_adapter_is_refused(
        self, recording: Recording, codec_file: CodecFile, tmp_path: Path,
        halves: type[LearnedCodec],
    ) -> None:  # fmt: skip
        path = codec_file(tmp_path / "h.safetensors", recording, [1])
        shapes = {factor.name: factor.shape for factor in list(SPEC)[:4]}
        spec = AdapterSpec.from_shapes(shapes)
        with RecordingWriter(tmp_path / "other", spec, Config(), environment={}) as writer:
            for number in (1, 2):
                writer.add(AdapterUpdate.zeros(spec), round=number, client="a", steps=1, weight=1.0)
                writer.finish_round()
        found = study("o", Recording.open(tmp_path / "other"), fitted_of(path), parts=["rate"])
        assert not found.rate
        assert "another adapter" in found.refusals[0].reason


def test_a_codec_that_refuses_is_in_no_table_and_the_others_go_on(
    recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Int4.encode

    def picky(self: Int4, update: AdapterUpdate, context: CodecContext) -> bytes:
        if context.round == 3:
            raise CodecError("int4: not in round 3")
        return encode(self, update, context)

    monkeypatch.setattr(Int4, "encode", picky)
    told: list[tuple[str, int, int]] = []
    found = study("r", recording, trials_of("int4", "int8"), tick=lambda *step: told.append(step))
    assert [(r.codec, r.reason) for r in found.refusals] == [("int4", "int4: not in round 3")]
    for rows in (found.fidelity, found.rate, found.swap, found.noise):
        assert {row.codec for row in rows} <= {"int8", UNCODED}
    assert found.rate
    counts = [done for _, done, _ in told]
    assert counts == sorted(counts)
    assert {total for _, _, total in told} == {2 * (12 + 6 * 4)}


def test_one_round_is_too_short(tmp_path: Path) -> None:
    short = write_recording(tmp_path / "r", small, rounds=1)
    with pytest.raises(RecordingError, match="one round only"):
        check_recording(short, [])


def test_parts_by_name() -> None:
    assert read_parts(["noise", "fidelity"]) == ("fidelity", "noise")
    assert read_parts([]) == ("fidelity", "rate", "swap", "noise", "distributions")
    with pytest.raises(ConfigError, match="'nose'"):
        read_parts(["nose"])
