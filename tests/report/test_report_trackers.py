"""Trackers log each round, stay out of the way when they fail, and name what is missing."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cgfedllm import events
from cgfedllm.config import Config, load_config
from cgfedllm.errors import MissingExtraError
from cgfedllm.metrics import RoundRecord
from cgfedllm.report.trackers import TensorBoardTracker, scalars, trackers
from cgfedllm.runs import RunFolder


def _config(tmp_path: Path, *overrides: str) -> Config:
    return load_config(None, [f"output={str(tmp_path)!r}", "name=trial", *overrides])


def _started(resumed_from: int = 0) -> events.RunStarted:
    return events.RunStarted("trial", 3, ("numpy",), 100, "int8", "raw", resumed_from)


def _follow(config: Config, records: list[RoundRecord], resumed_from: int = 0) -> list[str]:
    """Publish a run to the configured trackers; returns the notices."""
    notices: list[str] = []

    def keep(event: events.Event) -> None:
        if isinstance(event, events.Notice):
            notices.append(event.text)

    (tracker,) = trackers(config, RunFolder(config.run_dir))
    with events.listening(keep), tracker, events.listening(tracker):
        events.publish(_started(resumed_from))
        for record in records:
            events.publish(events.RoundFinished(record))
    return notices


def test_scalars_hold_what_matters(records: list[RoundRecord]) -> None:
    values = scalars(records[2])
    assert values["bytes/uplink_times_fewer"] == pytest.approx(4.0)
    assert values["nll/heldout"] == pytest.approx(2.6)
    assert values["nll_client/torch"] == pytest.approx(2.69)
    assert values["loss_client/torch"] == pytest.approx(2.7)
    assert values["loss/train"] == pytest.approx(2.7)
    assert values["seconds/train"] == 15.0
    assert values["clients/failed"] == 1.0
    assert values["clients/odd"] == 0.0


def test_what_packets_kept_has_a_curve(keeping: list[RoundRecord]) -> None:
    values = [scalars(record).get("update/snr_db") for record in keeping]
    assert values == [
        None,
        *(pytest.approx(10 * math.log10(8 / (2 * n + 0.02))) for n in (1, 2, 3)),
    ]


def test_what_a_codec_that_learns_costs_has_curves_of_its_own(
    learning: list[RoundRecord],
) -> None:
    sent = [scalars(record).get("bytes/codec_total") for record in learning]
    assert sent == [None, None, 3 * 2**20, 3 * 2**20]
    assert scalars(learning[2])["bytes/codec"] == 3 * 2**20
    assert scalars(learning[0])["bytes/tgap_uplink"] == 5 * 2**20
    assert not any("tgap" in key or "codec" in key for key in scalars(learning[1]))


def test_scalars_leave_out_what_is_unknown() -> None:
    values = scalars(RoundRecord(0, client_nll={"a": float("nan")}))
    assert not any(key.startswith(("nll", "loss")) for key in values)
    assert "bytes/uplink_times_fewer" not in values


def test_tensorboard_files_can_be_read_back(tmp_path: Path, records: list[RoundRecord]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = _config(tmp_path)
    assert _follow(config, records) == []
    # a resumed run does round 3 again; the first round 3 is forgotten
    assert _follow(config, records[3:], resumed_from=2) == []
    read = EventAccumulator(str(RunFolder(config.run_dir).tensorboard_dir))
    read.Reload()
    curve = [(e.step, e.value) for e in read.Scalars("nll/heldout")]
    assert [step for step, _ in curve] == [0, 1, 2, 3]
    assert curve[3][1] == pytest.approx(2.4)


def test_nothing_chosen(tmp_path: Path) -> None:
    config = _config(tmp_path, "tracking.tensorboard=false")
    assert trackers(config, RunFolder(config.run_dir)) == []


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    config = _config(tmp_path, f"tracking.{package}=true")
    with pytest.raises(MissingExtraError, match=f"pip install {package}"):
        trackers(config, RunFolder(config.run_dir))


class _FakeWandb:
    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.api = SimpleNamespace(api_key=None)

    def init(self, **options: Any) -> _FakeWandb:
        self.calls.append(("init", options))
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.calls.append(("log", (step, values)))

    def finish(self, exit_code: int) -> None:
        self.calls.append(("finish", exit_code))


def test_wandb_is_offline_without_an_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: list[RoundRecord]
) -> None:
    fake = _FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    monkeypatch.delenv("WANDB_MODE", raising=False)
    config = _config(tmp_path, "tracking.tensorboard=false", "tracking.wandb=true")
    assert _follow(config, records) == []
    assert fake.calls[0][1]["mode"] == "offline"
    assert fake.calls[0][1]["config"]["seed"] == 0
    assert [c[1][0] for c in fake.calls if c[0] == "log"] == [0, 1, 2, 3]
    assert fake.calls[-1] == ("finish", 0)


def test_mlflow_logs_to_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: list[RoundRecord]
) -> None:
    calls: dict[str, list[Any]] = {}

    def note(name: str) -> Any:
        return lambda *args, **named: calls.setdefault(name, []).append((args, named))

    names = ("set_tracking_uri", "set_experiment", "start_run", "log_params", "log_metrics")
    fake = SimpleNamespace(**{name: note(name) for name in (*names, "end_run")})
    monkeypatch.setitem(sys.modules, "mlflow", fake)  # type: ignore[arg-type]
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    records[0].client_nll = {"a:b*c": 1.0}
    config = _config(tmp_path, "tracking.tensorboard=false", "tracking.mlflow=true")
    assert _follow(config, records) == []
    assert calls["set_tracking_uri"][0][0][0].endswith("/trial/mlruns")
    assert calls["log_params"][0][0][0]["lora.rank"] == "8"
    assert "nll_client/a_b_c" in calls["log_metrics"][0][0][0]
    assert calls["end_run"] == [(("FINISHED",), {})]


def test_a_failing_tracker_is_turned_off_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: list[RoundRecord]
) -> None:
    def fail(self: TensorBoardTracker, round: int, values: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(TensorBoardTracker, "_log", fail)
    notices = _follow(_config(tmp_path), records)
    assert len(notices) == 1
    assert "TensorBoard is turned off" in notices[0]
    assert "metrics.jsonl" in notices[0]
