"""TensorBoard, Weights & Biases and MLflow: listeners that log every finished round.

A tracker that fails (no network, disk full) is turned off with a warning; the run goes on, and
metrics.jsonl, which the server writes itself, stays complete.
"""

from __future__ import annotations

import importlib
import math
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from cgfedllm.config import Config
from cgfedllm.errors import MissingExtraError
from cgfedllm.events import Event, Notice, RoundFinished, RunStarted, publish
from cgfedllm.metrics import RoundRecord
from cgfedllm.report.fidelity import finite_snr, total_fidelity
from cgfedllm.report.rows import flatten
from cgfedllm.report.summary import mean_train_loss
from cgfedllm.runs import RunFolder


def trackers(config: Config, run: RunFolder) -> list[Tracker]:
    """Trackers that the configuration asks for, not yet entered.

    Parameters
    ----------
    config : Config
        Its `tracking` table chooses.
    run : RunFolder
        Where files go.

    Returns
    -------
    list of Tracker
        Each a listener and a context manager; enter it before the run starts.

    Raises
    ------
    MissingExtraError
        If a chosen tracker is not installed; the message gives the command that installs it.
    """
    chosen: list[Tracker] = []
    if config.tracking.tensorboard:
        chosen.append(TensorBoardTracker(config, run))
    if config.tracking.wandb:
        chosen.append(WandbTracker(config, run))
    if config.tracking.mlflow:
        chosen.append(MlflowTracker(config, run))
    return chosen


def scalars(record: RoundRecord) -> dict[str, float]:
    """Every number of a round worth a curve, under ``group/name``; non-finite ones left out."""
    sent, fp32 = record.uplink_bytes_total, record.uplink_bytes_fp32_total
    values: dict[str, float | None] = {
        "nll/heldout": record.heldout_nll,
        "loss/train": mean_train_loss(record),
        "bytes/uplink": record.uplink_bytes,
        "bytes/downlink": record.downlink_bytes,
        "bytes/uplink_total": sent,
        "bytes/downlink_total": record.downlink_bytes_total,
        "bytes/uplink_fp32_total": fp32,
        "bytes/downlink_fp32_total": record.downlink_bytes_fp32_total,
        "bytes/uplink_times_fewer": fp32 / sent if sent else None,
        # curves of their own, and only where there is such a codec
        "bytes/codec": record.codec_bytes if record.codec_bytes_total else None,
        "bytes/codec_total": record.codec_bytes_total or None,
        "bytes/secagg_uplink_total": record.secagg_uplink_bytes_total or None,
        "bytes/secagg_downlink_total": record.secagg_downlink_bytes_total or None,
        "bytes/tgap_uplink": record.tgap_uplink_bytes or None,
        "bytes/tgap_downlink": record.tgap_downlink_bytes or None,
        "update/norm": record.update_norm,
        "update/snr_db": finite_snr(total_fidelity([record])),
        "update/product_gap": record.product_gap,
        "privacy/epsilon": record.epsilon,
        "privacy/clip": record.clip,
        "clients/usable": len(record.clients),
        "clients/failed": len(record.failures),
        "clients/odd": sum(bool(client.suspicion) for client in record.clients),
    }
    values.update({f"nll_client/{name}": nll for name, nll in record.client_nll.items()})
    if not record.flush:  # in which nobody trains
        values.update({f"loss_client/{row.client}": row.train_loss for row in record.clients})
    values.update({f"seconds/{phase}": spent for phase, spent in record.seconds.items()})
    return {k: float(v) for k, v in values.items() if v is not None and math.isfinite(v)}


class Tracker(ABC):
    """A listener that sends each round's `scalars` somewhere.

    Parameters
    ----------
    config : Config
        Logged as the run's parameters.
    run : RunFolder
        Where local files go.
    """

    name: str

    def __init__(self, config: Config, run: RunFolder) -> None:
        self.config = config
        self.run = run
        self._on = False

    def __call__(self, event: Event) -> None:
        """Hear an event."""
        if not self._on:
            return
        try:
            if isinstance(event, RunStarted):
                self._start(event)
            elif isinstance(event, RoundFinished):
                self._log(event.record.round, scalars(event.record))
        except Exception as error:  # whatever a tracker's network or disk does, the run goes on
            self._turn_off(error)

    def __enter__(self) -> Tracker:
        try:
            self._open()
            self._on = True
        except Exception as error:
            self._turn_off(error)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._on:
            return
        self._on = False
        try:
            self._close(failed=error is not None)
        except Exception as closing:
            self._turn_off(closing)

    @abstractmethod
    def _open(self) -> None:
        """Connect."""

    def _start(self, event: RunStarted) -> None:  # noqa: B027 - most have nothing to do here
        """Hear that the federation is set up."""

    @abstractmethod
    def _log(self, round: int, values: Mapping[str, float]) -> None:
        """Send one round."""

    @abstractmethod
    def _close(self, *, failed: bool) -> None:
        """Flush and disconnect."""

    def _turn_off(self, error: Exception) -> None:
        self._on = False
        publish(
            Notice(
                f"{self.name} is turned off for the rest of the run: {error}; "
                f"every number is in {self.run.metrics_path}",
                level="warning",
            )
        )


class TensorBoardTracker(Tracker):
    """Event files in the run folder, through tensorboard's own writer (no torch needed)."""

    name = "TensorBoard"

    def __init__(self, config: Config, run: RunFolder) -> None:
        super().__init__(config, run)
        key = "tracking.tensorboard"
        writer = _need("tensorboard.summary.writer.event_file_writer", "tensorboard", key)
        self._writer_class = writer.EventFileWriter
        self._events = _need("tensorboard.compat.proto.event_pb2", "tensorboard", key)
        self._summaries = _need("tensorboard.compat.proto.summary_pb2", "tensorboard", key)

    def _open(self) -> None:
        self.run.tensorboard_dir.mkdir(parents=True, exist_ok=True)
        self._writer = self._writer_class(str(self.run.tensorboard_dir))

    def _start(self, event: RunStarted) -> None:
        if event.resumed_from:
            # tells TensorBoard to forget what the killed run logged after its last checkpoint
            log = self._events.SessionLog(status=self._events.SessionLog.START)
            self._write(event.resumed_from + 1, session_log=log)

    def _log(self, round: int, values: Mapping[str, float]) -> None:
        value = self._summaries.Summary.Value
        rows = [value(tag=tag, simple_value=number) for tag, number in values.items()]
        self._write(round, summary=self._summaries.Summary(value=rows))

    def _write(self, step: int, **content: Any) -> None:
        self._writer.add_event(self._events.Event(wall_time=time.time(), step=step, **content))
        self._writer.flush()

    def _close(self, *, failed: bool) -> None:
        self._writer.close()


class WandbTracker(Tracker):
    """Weights & Biases; offline (`wandb sync` later) where no account is set up."""

    name = "Weights & Biases"

    def __init__(self, config: Config, run: RunFolder) -> None:
        super().__init__(config, run)
        self._wandb = _need("wandb", "wandb", "tracking.wandb")

    def _open(self) -> None:
        # without an account wandb would stop and ask for one
        account = getattr(getattr(self._wandb, "api", None), "api_key", None)
        mode = os.environ.get("WANDB_MODE") or ("online" if account else "offline")
        self._session = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "cgfedllm"),
            name=self.config.name,
            dir=str(self.run.path),
            config=self.config.model_dump(),
            mode=mode,
        )

    def _log(self, round: int, values: Mapping[str, float]) -> None:
        self._session.log(dict(values), step=round)

    def _close(self, *, failed: bool) -> None:
        self._session.finish(exit_code=1 if failed else 0)


class MlflowTracker(Tracker):
    """MLflow; a file store in the run folder unless MLFLOW_TRACKING_URI says otherwise."""

    name = "MLflow"

    def __init__(self, config: Config, run: RunFolder) -> None:
        super().__init__(config, run)
        self._mlflow = _need("mlflow", "mlflow", "tracking.mlflow")

    def _open(self) -> None:
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            self._mlflow.set_tracking_uri((self.run.path / "mlruns").resolve().as_uri())
        self._mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "cgfedllm"))
        self._mlflow.start_run(run_name=self.config.name)
        # MLflow refuses values longer than this
        parameters = {k: str(v)[:500] for k, v in flatten(self.config.model_dump()).items()}
        self._mlflow.log_params(parameters)

    def _log(self, round: int, values: Mapping[str, float]) -> None:
        # names may hold only these characters; client names may hold any
        named = {re.sub(r"[^\w\-./ ]", "_", tag): value for tag, value in values.items()}
        self._mlflow.log_metrics(named, step=round)

    def _close(self, *, failed: bool) -> None:
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


def _need(module: str, package: str, key: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{key} = true needs {package}, which cannot be imported ({error}): "
            f"`pip install {package}`, or set {key} = false"
        ) from None
