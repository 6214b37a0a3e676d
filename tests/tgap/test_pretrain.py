"""Pre-training from recordings: what is fitted, kept, resumed, refused and told."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cgfedllm import api, events, interrupt
from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.analysis.fidelity import Fidelity
from cgfedllm.codecs import CodecContext
from cgfedllm.config import Config, load_config
from cgfedllm.errors import (
    CheckpointError,
    CodecStateError,
    ConfigError,
    RecordingError,
    RunInterrupted,
)
from cgfedllm.metrics import RoundRecord
from cgfedllm.report.figures import pretraining as pretraining_figures
from cgfedllm.runs import RunFolder
from cgfedllm.storage import load_tensors
from cgfedllm.tgap.codec_file import load_codec_file
from cgfedllm.tgap.recorder import note
from cgfedllm.tgap.recording import Recording

from .pca_codec import PcaCodec

Write = Callable[..., Path]
Values = Callable[[int, str], AdapterUpdate]
SIX = ("a", "b", "c", "d", "e", "f")


class Killed(BaseException):
    """Nobody catches it."""


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Config]:
    return lambda *changes: load_config(
        None, ["name=exp", f'output="{tmp_path / "out"}"', "tgap.epochs=6", *changes]
    )


@pytest.fixture
def recorded(write: Write, learnable: Values) -> Path:
    """8 rounds of 6 clients whose updates lie mostly in a plane."""
    return write(rounds=8, clients=SIX, make=learnable)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Figures are asked for, not drawn: that is half a second each."""
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(pretraining_figures, "plot_fit", lambda *args: asked.append(args))
    return asked


@pytest.fixture
def fit(
    figures: object, pca: str, config: Callable[..., Config], recorded: Path
) -> Callable[..., Any]:
    """``fit(*config changes, codec=, to=, listeners=, ...)``."""

    def make(*changes: str, codec: str = pca, **options: Any) -> Any:
        options = {"recordings": [recorded], **options}
        return api.pretrain(config(*changes), codec, **options)

    return make


Fit = Callable[..., Any]


def at_epoch(number: int, action: Callable[[], Any]) -> Callable[[events.Event], None]:
    def listen(event: events.Event) -> None:
        if isinstance(event, events.FitEpoch) and event.row["epoch"] == number:
            action()

    return listen


def kill() -> None:
    raise Killed


def test_what_is_written(
    fit: Fit, figures: list[tuple[Any, ...]], recorded: Path, tmp_path: Path
) -> None:
    result = fit()
    folder = tmp_path / "out" / "exp-tgap"
    assert (result.path, result.folder) == (folder / "codec.safetensors", folder)
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "codec.safetensors", "codec.md", "curve.csv", "pretrain.json", ".lock",
    }  # fmt: skip
    ((curve, best, label, place),) = figures
    assert (len(curve), label, place) == (6, "test-pca", folder / "curve")
    assert best == result.file.card["fit"]["best_epoch"]
    file = load_codec_file(result.path)
    file.check(Recording.open(recorded).spec)
    assert file.card == result.file.card
    rows = list(csv.DictReader((folder / "curve.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert list(rows[0]) == [
        "epoch", "train_loss", "validation_snr_db", "validation_cosine", "validation_bpp",
        "seconds",
    ]  # fmt: skip
    told = json.loads((folder / "pretrain.json").read_text())
    assert told["environment"]["versions"]["numpy"]
    assert "command" not in told["environment"]
    assert len(told["curve"]) == 6
    assert told["state_hash"] == file.state.hash.hex()
    splits = told["splits"]
    assert sorted(splits["train"]["clients"] + splits["unseen_clients"]["clients"]) == list(SIX)
    assert told["identity"]["recordings"] == [Recording.open(recorded).fingerprint]


def test_it_learns_and_is_measured_by_real_packets(
    fit: Fit, recorded: Path, learnable: Values
) -> None:
    result = fit("tgap.epochs=30")
    fidelity = result.file.card["fidelity"]
    assert set(fidelity) == {"train", "unseen_rounds", "unseen_clients", "unseen_both"}
    assert all(found["snr_db"] > 8 for found in fidelity.values())  # a plane holds nearly all
    codec, file = result.file.codec(), result.file
    told = json.loads((result.folder / "pretrain.json").read_text())["splits"]["unseen_both"]
    total, size = Fidelity(), 0
    for round_ in told["rounds"][0]:
        for client in told["clients"]:
            context = CodecContext(file.spec, round_, 0, file.state)
            packet = codec.encode(learnable(round_, client), context)
            total.add(learnable(round_, client).vector, codec.decode(packet, context).vector)
            size += len(packet)
    count = len(told["rounds"][0]) * len(told["clients"])
    assert fidelity["unseen_both"] == {
        "updates": count,
        "snr_db": pytest.approx(total.snr_db),
        "cosine": pytest.approx(total.cosine),
        "bpp": pytest.approx(8 * size / count / file.spec.size),
    }


def test_the_state_depends_on_no_update_that_is_held_out(
    fit: Fit, write: Write, learnable: Values, values: Values
) -> None:
    """Other values in all held-out updates: the same states epoch by epoch, another choice."""
    splits = json.loads((fit().folder / "pretrain.json").read_text())["splits"]
    last = max(splits["train"]["rounds"][0])

    def make(round_: int, client: str) -> AdapterUpdate:
        seen = round_ <= last and client in splits["train"]["clients"]
        return (learnable if seen else values)(round_, client)

    changed = write("changed", rounds=8, clients=SIX, make=make)
    kept: dict[str, list[Any]] = {}
    for name, options in (("one", {}), ("two", {"recordings": [changed]})):
        states = kept.setdefault(name, [])

        def look(event: events.Event, name: str = name, states: list[Any] = states) -> None:
            if isinstance(event, events.FitEpoch):
                path = Path(fit_folder(name)) / "fit.safetensors"
                states.append(load_tensors(path)[0]["basis"])

        def fit_folder(name: str) -> Path:
            return changed.parent / name

        fit(to=changed.parent / f"{name}.safetensors", listeners=[look], **options)
    for one, two in zip(kept["one"], kept["two"], strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_killed_fit_goes_on_to_the_same_codec(fit: Fit, tmp_path: Path) -> None:
    whole = fit()
    broken = {"to": tmp_path / "broken.safetensors"}
    for number in (1, 4, 6):  # the last time all epochs are done, but nothing is written
        with pytest.raises(Killed):
            fit(**broken, listeners=[at_epoch(number, kill)])
        assert not (tmp_path / "broken.safetensors").exists()
    heard: list[events.Event] = []
    again = fit(**broken, listeners=[heard.append])
    assert [e.resumed_from for e in heard if isinstance(e, events.FitStarted)] == [6]
    assert again.file.state.hash == whole.file.state.hash
    curves = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in told["curve"]]
        for told in (
            json.loads((result.folder / "pretrain.json").read_text()) for result in (whole, again)
        )
    ]
    assert curves[0] == curves[1]
    assert again.file.card["fidelity"] == whole.file.card["fidelity"]
    assert not (again.folder / "fit.safetensors").exists()


def test_stopping_keeps_the_epochs_done(fit: Fit, tmp_path: Path) -> None:
    with pytest.raises(RunInterrupted, match=r"kept in .*exp-tgap, and the same command goes on"):
        fit(listeners=[at_epoch(3, interrupt._requested.set)])
    heard: list[events.Event] = []
    fit(listeners=[heard.append])
    assert [e.row["epoch"] for e in heard if isinstance(e, events.FitEpoch)] == [4, 5, 6]


def test_it_stops_early_and_keeps_the_best(fit: Fit) -> None:
    result = fit("tgap.epochs=500", "tgap.patience=3")
    curve = json.loads((result.folder / "pretrain.json").read_text())["curve"]
    outcome = result.file.card["fit"]
    assert outcome["epochs_run"] == len(curve) == outcome["best_epoch"] + 3 < 500
    best = max(curve, key=lambda row: row["validation_snr_db"])
    assert best["epoch"] == outcome["best_epoch"]


def test_a_complete_one_is_not_fitted_again(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fit()
    monkeypatch.setattr(PcaCodec, "fit", lambda *_, **__: pytest.fail("fitted again"))
    again = fit()
    assert (again.path, again.file.card) == (first.path, first.file.card)
    assert again.file.state.hash == first.file.state.hash


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize(
    ("changes", "codec", "difference"),
    [
        (["tgap.epochs=7"], "test-pca", r'settings is {"epochs": 6}, not {"epochs": 7}'),
        (["tgap.sampling=clients"], "test-pca", "sampling"),
        (["seed=1"], "test-pca", r'settings is {"seed": 0}, not {"seed": 1}'),
        ([], "test-pca:components=3", r'options is {"components": 2}'),
    ],
)
def test_another_fit_is_not_gone_on_with(
    fit: Fit, complete: bool, changes: list[str], codec: str, difference: str
) -> None:
    if complete:
        fit()
    else:
        with pytest.raises(Killed):
            fit(listeners=[at_epoch(2, kill)])
    with pytest.raises(CheckpointError, match=difference) as caught:
        fit(*changes, codec=codec)
    assert "--overwrite" in str(caught.value)
    assert fit(*changes, codec=codec, overwrite=True).file.options["components"] in (2, 3)


def test_other_updates_are_another_fit(fit: Fit, write: Write) -> None:
    with pytest.raises(Killed):
        fit(listeners=[at_epoch(2, kill)])
    with pytest.raises(CheckpointError, match="recordings is"):
        fit(recordings=[write("other", rounds=8, clients=SIX)])


def test_a_damaged_checkpoint_is_named(fit: Fit, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        fit(listeners=[at_epoch(2, kill)])
    path = tmp_path / "out" / "exp-tgap" / "fit.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"fit\.safetensors is damaged"):
        fit()
    assert fit(overwrite=True).path.exists()


def test_somebody_elses_files_are_left_alone(fit: Fit, tmp_path: Path) -> None:
    mine = tmp_path / "mine.safetensors"
    mine.write_text("chapter one")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="no codec file, so it is not replaced"):
            fit(to=mine, overwrite=overwrite)
    assert mine.read_text() == "chapter one"
    other = fit().path.rename(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other\.safetensors exists already"):
        fit(to=other)


@pytest.mark.parametrize("to", ["codec.bin", "folder.safetensors"])
def test_to_names_a_codec_file(fit: Fit, tmp_path: Path, to: str) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(ConfigError, match="--to names the codec file"):
        fit(to=tmp_path / to)


def test_codecs_that_learn_nothing_are_refused(fit: Fit) -> None:
    with pytest.raises(ConfigError, match=r"'int8' learns nothing.*test-pca"):
        fit(codec="int8")
    with pytest.raises(ConfigError, match="'component'"):
        fit(codec="test-pca:component=3")


def test_the_configurations_own_codec_keeps_its_options(fit: Fit) -> None:
    own = ["uplink.name=test-pca", "uplink.options={components = 1}"]
    assert fit(*own).file.options == {"components": 1, "rate": 0.3}


def test_too_short_a_recording_is_refused(fit: Fit, write: Write) -> None:
    with pytest.raises(RecordingError, match="1 round, too few to split"):
        fit(recordings=[write("short", rounds=1)])


def test_what_a_codec_learned_is_checked(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    learn = PcaCodec.fit

    def diverge(self: PcaCodec, *args: Any, **options: Any) -> Any:
        state = learn(self, *args, **options)
        state.tensors["basis"][0, 0] = np.nan
        return state

    monkeypatch.setattr(PcaCodec, "fit", diverge)
    with pytest.raises(CodecStateError, match="NaN"):
        fit()


# ---- the card -----------------------------------------------------------------------------------


def test_the_card_tells_no_client_and_no_folder(
    fit: Fit, write: Write, learnable: Values, tmp_path: Path
) -> None:
    clients = ("st-marys", "st-josephs", "st-annes")
    config = Config().with_overrides({"data.source": str(tmp_path / "secret" / "rows.jsonl")})
    folder = write("hospitals", rounds=4, clients=clients, make=learnable, config=config)
    result = fit(recordings=[folder])
    markdown = result.card_path.read_text()
    for text in (markdown, json.dumps(result.file.card)):
        assert not any(name in text for name in (*clients, str(tmp_path), "secret"))
        assert "rows.jsonl" in text
    assert result.file.spec.hash.hex() in markdown
    assert "Uplink 1.22 KiB" in markdown  # 12 updates of 26 values
    assert '[uplink]\nname = "test-pca"\nstate = "codec.safetensors"' in markdown
    assert "part" not in markdown.split("```")[1]  # it was not recorded on D1


def test_the_card_says_how_to_keep_to_d2(fit: Fit, write: Write, learnable: Values) -> None:
    config = Config().with_overrides({"data.part": "d1", "data.d1_share": 0.4, "seed": 3})
    folder = write("d1", rounds=4, clients=SIX, make=learnable, config=config)
    result = fit(recordings=[folder])
    assert '[data]\npart = "d2"\nd1_share = 0.4\nseed = 3\n' in result.card_path.read_text()
    assert not any("data.part" in note for note in result.file.card["notes"])


def test_a_recording_of_all_rows_is_noted(fit: Fit) -> None:
    notes = fit().file.card["notes"]
    assert any("data.part = all, not d1" in text for text in notes)


@pytest.mark.parametrize(
    ("mechanism", "said"), [("local", "comes on top"), ("central", "does not cover this codec")]
)
def test_what_privacy_means_for_the_codec_is_noted(
    fit: Fit, write: Write, mechanism: str, said: str
) -> None:
    config = Config().with_overrides(
        {"privacy.mechanism": mechanism, "federation.weighting": "uniform", "data.part": "d1"}
    )
    (told,) = fit(recordings=[write("r", clients=SIX, config=config)]).file.card["notes"]
    assert said in told


@pytest.mark.parametrize(
    ("kind", "uplink", "downlink", "basis"),
    [
        ("federated", 48, 48, "estimated"),
        ("local-only", 48, 0, "once as float32"),
        ("centralised", 0, 0, "no update travels"),
    ],
)
def test_costs_that_a_recording_tells_by_itself(
    fit: Fit, write: Write, spec: AdapterSpec, kind: str, uplink: int, downlink: int, basis: str
) -> None:
    cost = fit(recordings=[write("r", rounds=8, clients=SIX, kind=kind)]).file.card["cost"]
    weight = 4 * spec.size
    assert (cost["uplink_bytes"], cost["downlink_bytes"]) == (uplink * weight, downlink * weight)
    assert cost["collect_seconds"] is None
    assert cost["fit_seconds"] > 0
    assert basis in cost["basis"]


def test_costs_that_the_recorded_run_counted(
    fit: Fit, write: Write, tmp_path: Path, learnable: Values
) -> None:
    config = Config(name="r", output=str(tmp_path))
    with RunFolder.create(config) as run:
        for number in (0, 1, 2):
            run.append(
                RoundRecord(
                    number,
                    uplink_bytes_total=100 * number,
                    downlink_bytes_total=250 * number,
                    seconds={"total": 1.5},
                )
            )
        note(run, run.recording_dir)
        write("r/recording", rounds=8, clients=SIX, make=learnable)
    alone = write("alone", rounds=8, clients=SIX, kind="local-only", make=learnable)
    cost = fit(recordings=[run.recording_dir]).file.card["cost"]
    assert (cost["uplink_bytes"], cost["downlink_bytes"]) == (200, 500)
    assert cost["collect_seconds"] == 4.5
    both = fit(recordings=[run.recording_dir, alone], to=tmp_path / "both.safetensors").file.card[
        "cost"
    ]
    assert both["uplink_bytes"] == 200 + Recording.open(alone).nbytes
    assert both["collect_seconds"] is None  # of one of them nobody knows
    # the run is another recording's neighbour, so its bytes are not that one's
    moved = run.recording_dir.rename(tmp_path / "elsewhere")
    moved_cost = fit(recordings=[moved], to=tmp_path / "moved.safetensors").file.card["cost"]
    assert moved_cost["uplink_bytes"] == Recording.open(moved).nbytes
