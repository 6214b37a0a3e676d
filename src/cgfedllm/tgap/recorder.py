"""Keeps a recording of a run by listening to it; training knows nothing of it."""

from __future__ import annotations

from pathlib import Path

from cgfedllm import events, storage
from cgfedllm.codecs import codec_class, codec_names
from cgfedllm.config import Config
from cgfedllm.errors import CheckpointError, ConfigError, RecordingError
from cgfedllm.federation.checkpoint import config_fingerprint
from cgfedllm.runs import RunFolder
from cgfedllm.tgap.index import RecordingKind, is_recording, read_index
from cgfedllm.tgap.writer import RecordingWriter, discard_recording


class Recorder:
    """A listener that writes what the server received.

    A new run replaces a recording that is there; a resumed one goes on with it. The run folder
    gets a note of where the recording lies, so that whoever resumes the run resumes both.

    Parameters
    ----------
    run : RunFolder
        The run that is recorded.
    folder : Path
        Where to.
    config : Config
        Of the run.
    kind : str
        "federated", "centralised" or "local-only".
    """

    def __init__(
        self, run: RunFolder, folder: Path, config: Config, kind: RecordingKind = "federated"
    ) -> None:
        self._run = run
        self._folder = folder
        self._config = config
        self._kind = kind
        self._writer: RecordingWriter | None = None

    def __call__(self, event: events.Event) -> None:
        """Hear an event."""
        if isinstance(event, events.RunStarted):
            self._begin(event.resumed_from)
        elif isinstance(event, events.UpdateReceived):
            self._add(event)
        elif self._writer is None:
            return
        elif isinstance(event, events.RoundStarted):
            self._writer.drop_round()  # what there is of it is from an attempt that failed
        elif isinstance(event, events.RoundAggregated):
            self._writer.finish_round()

    def _begin(self, done: int) -> None:
        """Leave exactly the rounds that the run does not do again."""
        if done == 0:
            discard_recording(self._folder)
            self._writer = None
            note(self._run, self._folder)
            return
        self._writer = RecordingWriter.resume(self._folder)
        self._writer.keep_through(done)
        check_rounds(self._folder, self._writer.rounds(), done)

    def _add(self, event: events.UpdateReceived) -> None:
        if self._writer is None:
            self._writer = RecordingWriter(
                self._folder, event.update.spec, self._config, kind=self._kind
            )
        metrics = event.metrics
        self._writer.add(
            event.update,
            round=event.round,
            client=event.client,
            steps=int(metrics.get("steps", 0)),
            examples=int(metrics.get("num-examples", 0)),
            tokens=int(metrics.get("tokens", 0)),
            loss=metrics.get("train-loss", 0.0),
            weight=event.weight,
        )


def note(run: RunFolder, folder: Path) -> None:
    """Write into the run folder where its recording lies."""
    inside = folder.resolve().is_relative_to(run.path.resolve())
    where = folder.resolve().relative_to(run.path.resolve()) if inside else folder.resolve()
    storage.write_json(run.recording_note_path, {"folder": str(where)})


def noted(run: RunFolder) -> Path | None:
    """Where the run's recording lies; None if it is not recorded.

    Raises
    ------
    CheckpointError
        If the note is damaged.
    """
    path = run.recording_note_path
    if not path.exists():
        return None
    tree = storage.read_json(path)
    if not isinstance(tree, dict) or not isinstance(tree.get("folder"), str):
        raise CheckpointError(f"{path} does not say where the run's recording lies; remove it")
    return run.path / str(tree["folder"])


def check_rounds(folder: Path, rounds: list[int], done: int) -> None:
    """Refuse a recording with gaps: a round was done while nobody recorded it.

    Raises
    ------
    RecordingError
        If it does not hold the rounds 1 to `done`.
    """
    missing = sorted(set(range(1, done + 1)) - set(rounds))
    if missing:
        raise RecordingError(
            f"{folder} lacks round {missing[0]} of the run; record again with --overwrite, or "
            "under another --name"
        )


def check_lossless(config: Config) -> None:
    """Refuse to record what a codec made of the updates.

    Raises
    ------
    ConfigError
        If the uplink is lossy, or the server sees sums of updates only.
    """
    if config.privacy.secagg.enabled:
        raise ConfigError(
            "privacy.secagg keeps single updates from the server, and a recording holds them; "
            "set privacy.secagg.enabled = false, or record on clients' data that may be seen"
        )
    if not codec_class(config.uplink.name).lossless:
        lossless = [name for name in codec_names() if codec_class(name).lossless]
        raise ConfigError(
            f"uplink.name = {config.uplink.name!r} is lossy, and a recording holds what clients "
            f"computed; set it to {' or '.join(map(repr, lossless))} "
            "(--set uplink.name=raw --set uplink.options={})"
        )


def check_goes_on(run: RunFolder, folder: Path, config: Config, kind: RecordingKind) -> None:
    """Verify that a started run is of this experiment and recorded into this folder.

    Raises
    ------
    ConfigError
        If the run has another configuration.
    RecordingError
        If it is not recorded, or elsewhere, or the folder holds another recording.
    """
    again = "under another --name, or start again with --overwrite"
    if config_fingerprint(run.config()) != config_fingerprint(config):
        raise ConfigError(f"{run.path} holds a run of another configuration; record {again}")
    where = noted(run)
    if where is None:
        raise RecordingError(f"{run.path} holds a run that was not recorded; record {again}")
    if where.resolve() != folder.resolve():
        raise RecordingError(
            f"{run.path} is recorded into {where}, not {folder}; go on with --to {where}, or "
            "start again with --overwrite"
        )
    if not is_recording(folder):
        return  # stopped before its first update
    index = read_index(folder)
    same = config_fingerprint(index.config) == config_fingerprint(config)
    if not same or index.kind != kind:
        raise RecordingError(f"{folder} is a recording of another experiment; record {again}")
