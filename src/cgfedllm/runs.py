"""The folder of one run: what lies where, who may write, and how it is read back.

::

    runs/NAME/
        config.toml        resolved configuration; reruns the experiment
        environment.json   versions, hardware, seed, command line
        metrics.jsonl      one RoundRecord a line
        checkpoints/       what the server needs to resume
        clients/           what simulated clients keep between rounds (residuals, optimiser)
        tensorboard/  adapter/ (PEFT)  codec.safetensors  report.html  figures/  evaluation/
        recording/         every client's updates, where `cgfedllm record` keeps them here
        recording.json     where they are kept
        privacy.json       what the server has released under a privacy budget, and its secret key
        .lock              held by the process that works here
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import secrets
import shutil
import sys
import tomllib
from contextlib import suppress
from datetime import UTC, datetime
from errno import EACCES, EAGAIN
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

from cgfedllm import __version__, storage
from cgfedllm.config import Config, parse_config
from cgfedllm.errors import CgFedLlmError, CheckpointError, StorageError
from cgfedllm.metrics import RoundRecord
from cgfedllm.privacy.ledger import FILE as PRIVACY_LEDGER

_PACKAGES = ("torch", "flwr", "transformers", "peft", "numpy", "safetensors")


class RunExistsError(CgFedLlmError):
    """The folder holds a run already, or things that are not a run."""


class RunLockedError(CgFedLlmError):
    """Another process works in the run folder."""


class RunFolder:
    """One run on disk.

    A folder is entered (``with RunFolder(path) as run:``) by the one process that writes to it;
    reading needs no lock.

    Parameters
    ----------
    path : path-like
        The folder; it need not exist yet.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock: int | None = None

    @classmethod
    def create(cls, config: Config, *, overwrite: bool = False) -> RunFolder:
        """Start a new run in ``config.run_dir`` and hold its lock.

        Parameters
        ----------
        config : Config
            Resolved configuration; written as config.toml.
        overwrite : bool
            Remove the files of an earlier run (and nothing else) first.

        Returns
        -------
        RunFolder
            Locked; use it as a context manager, or call `release`.

        Raises
        ------
        RunExistsError
            If the folder holds a run with progress and `overwrite` is False.
        RunLockedError
            If another process works there.
        StorageError
            If the folder cannot be written.
        """
        run = cls(config.run_dir)
        run.acquire()
        try:
            if run.has_progress():
                if not overwrite:
                    raise RunExistsError(
                        f"{run.path} holds a run already ({run._progress()}). Go on with it: "
                        f"`cgfedllm resume {run.path}`; start again: --overwrite; "
                        "keep both: --name NEW"
                    )
                if not run.config_path.exists():
                    raise RunExistsError(
                        f"{run.path} is not a run folder (no config.toml), so nothing in it is "
                        "removed; choose another --name or --output"
                    )
            run._clear()
            storage.write_json(run.environment_path, environment(config))
            # last, because config.toml is what makes the folder a run
            storage.write_atomic(run.config_path, config.to_toml())
        except BaseException:
            run.release()
            raise
        return run

    @property
    def config_path(self) -> Path:
        """Resolved configuration."""
        return self.path / "config.toml"

    @property
    def environment_path(self) -> Path:
        """Versions, hardware, seed, command line."""
        return self.path / "environment.json"

    @property
    def metrics_path(self) -> Path:
        """One `RoundRecord` a line."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard_dir(self) -> Path:
        """TensorBoard event files."""
        return self.path / "tensorboard"

    @property
    def checkpoints_dir(self) -> Path:
        """What the server needs to resume."""
        return self.path / "checkpoints"

    @property
    def clients_dir(self) -> Path:
        """What simulated clients keep between rounds."""
        return self.path / "clients"

    @property
    def adapter_dir(self) -> Path:
        """The global adapter in PEFT format."""
        return self.path / "adapter"

    @property
    def codec_path(self) -> Path:
        """State of a learned codec."""
        return self.path / "codec.safetensors"

    @property
    def recording_dir(self) -> Path:
        """Every client's updates, unless they are kept elsewhere."""
        return self.path / "recording"

    @property
    def recording_note_path(self) -> Path:
        """Where this run's recording lies; there only if it is recorded."""
        return self.path / "recording.json"

    @property
    def report_path(self) -> Path:
        """The single-file report."""
        return self.path / "report.html"

    @property
    def figures_dir(self) -> Path:
        """Figures of the report."""
        return self.path / "figures"

    @property
    def evaluation_dir(self) -> Path:
        """Results of `cgfedllm evaluate`."""
        return self.path / "evaluation"

    def exists(self) -> bool:
        """Whether this is a run folder."""
        return self.config_path.is_file()

    def has_progress(self) -> bool:
        """Whether something is here that starting again would destroy."""
        metrics = self.metrics_path
        return (
            (metrics.is_file() and metrics.stat().st_size > 0)
            or (self.checkpoints_dir.is_dir() and any(self.checkpoints_dir.iterdir()))
            or self.adapter_dir.exists()
        )

    def config(self) -> Config:
        """Read the resolved configuration; paths in it are taken as they were written.

        Raises
        ------
        CheckpointError
            If this is not a run folder or its config.toml cannot be read.
        ConfigError
            If this version of the program does not accept the configuration.
        """
        try:
            tree = tomllib.loads(self.config_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(
                f"{self.path} is not a run folder: it has no config.toml"
            ) from None
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
            raise CheckpointError(f"{self.config_path} cannot be read: {error}") from None
        return parse_config(tree)

    def append(self, record: RoundRecord) -> None:
        """Write one finished round to metrics.jsonl.

        Raises
        ------
        StorageError
            If it cannot be written; earlier rounds are untouched.
        """
        storage.append_line(self.metrics_path, json.dumps(record.to_dict(), ensure_ascii=False))

    def records(self) -> list[RoundRecord]:
        """All finished rounds, in order; a line that a crash left unfinished is passed over.

        Raises
        ------
        CheckpointError
            If a whole line is damaged; the message gives file and line.
        """
        try:
            text = self.metrics_path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(f"{self.metrics_path} cannot be read: {error}") from None
        records = []
        for number, line in enumerate(text.split(b"\n")[:-1], start=1):
            try:
                records.append(RoundRecord.from_dict(storage.parse_json(line)))
            except ValueError as error:
                raise CheckpointError(
                    f"{self.metrics_path}, line {number} is damaged: {error!r}; "
                    "remove that line to go on without it"
                ) from None
        return records

    def truncate_after(self, round: int) -> None:
        """Drop the rounds after `round`, all at once: a resumed run does them again.

        Raises
        ------
        CheckpointError
            As `records`.
        StorageError
            If the file cannot be rewritten; it is untouched then.
        """
        if not self.metrics_path.exists():
            return
        kept = [record for record in self.records() if record.round <= round]
        lines = (json.dumps(record.to_dict(), ensure_ascii=False) + "\n" for record in kept)
        storage.write_atomic(self.metrics_path, "".join(lines))

    @property
    def key(self) -> str:
        """What tells this run from others of the same name; empty if it was not noted."""
        return str(self._noted().get("run", ""))

    def note_resume(self, round: int) -> None:
        """Add to environment.json that the run goes on after `round`, now and here."""
        known = self._noted()
        if not isinstance(known.get("resumed", []), list):
            known = {}
        again = {"after_round": round, **_machine(), "started_at": _now(), "command": _command()}
        known.setdefault("resumed", []).append(again)
        storage.write_json(self.environment_path, known)

    def _noted(self) -> dict[str, Any]:
        """What environment.json holds; nothing if it is damaged, for a run does without it."""
        try:
            known = storage.read_json(self.environment_path)
        except CheckpointError:
            return {}
        return known if isinstance(known, dict) else {}

    def acquire(self) -> None:
        """Take the lock; it is gone with the process, however that ends.

        Raises
        ------
        RunLockedError
            If another process (or another `RunFolder` of this one) holds it.
        StorageError
            If the folder cannot be written.
        """
        if self._lock is not None:
            return
        path = self.path / ".lock"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise StorageError(
                f"cannot work in {self.path}: {error.strerror}; choose another folder with "
                "--output or change its permissions"
            ) from error
        try:
            # flock rather than lockf: closing some other descriptor of the file must not free it
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # some network file systems cannot lock at all; refusing to run there helps nobody
            if error.errno in (EAGAIN, EACCES):
                holder = os.read(descriptor, 20).decode(errors="replace").strip()
                os.close(descriptor)
                who = f"process {holder}" if holder else "another process"
                raise RunLockedError(
                    f"{self.path} is in use by {who}; wait until it ends, or give this run "
                    "another --name"
                ) from None
        with suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
        self._lock = descriptor

    def is_busy(self) -> bool:
        """Whether another process works here."""
        if self._lock is not None:
            return False
        try:
            descriptor = os.open(self.path / ".lock", os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in (EAGAIN, EACCES)
        finally:
            os.close(descriptor)
        return False

    def release(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunFolder:
        self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    def _progress(self) -> str:
        try:
            records = self.records()
        except CheckpointError:
            return "damaged"
        return f"done up to round {records[-1].round}" if records else "no round done"

    def _clear(self) -> None:
        """Remove the files of an earlier run, by name: whatever else lies here is not ours."""
        try:
            for file in (
                self.config_path,  # first: half a removed run must not look like a run
                self.environment_path,
                self.metrics_path,
                self.codec_path,
                self.recording_note_path,
                self.report_path,
                self.path / PRIVACY_LEDGER,
            ):
                file.unlink(missing_ok=True)
            for folder in (
                self.tensorboard_dir,
                self.checkpoints_dir,
                self.clients_dir,
                self.adapter_dir,
                self.recording_dir,
                self.figures_dir,
                self.evaluation_dir,
            ):
                if folder.is_dir():
                    shutil.rmtree(folder)
        except OSError as error:
            raise StorageError(
                f"cannot clear {self.path}: {error}; remove it by hand or choose another --name"
            ) from error
        storage.remove_leftovers(self.path)


def environment(config: Config) -> dict[str, Any]:
    """Collect what may explain a number later: versions, hardware, seed, command line.

    And a random key by which clients elsewhere tell this run from others of the same name.
    """
    key = secrets.token_hex(8)
    about = {"run": key, "seed": config.seed, "started_at": _now(), "command": _command()}
    return {**_machine(), **about}


def _machine() -> dict[str, Any]:
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "cgfedllm": __version__,
    }
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions,
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "usable_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        **_torch_facts(),
    }


def _torch_facts() -> dict[str, Any]:
    """Threads and GPU, if torch is loaded; loading it only to ask would take seconds."""
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return {"threads": None, "gpu": None}
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {"threads": torch.get_num_threads(), "gpu": gpu}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _command() -> list[str]:
    return list(sys.argv)
