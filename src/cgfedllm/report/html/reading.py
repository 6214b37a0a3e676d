"""What a run folder holds, read so that one damaged file costs the report only what was in it."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from cgfedllm.analysis.portable import portable
from cgfedllm.config import Config, parse_config
from cgfedllm.errors import CgFedLlmError, CheckpointError
from cgfedllm.metrics import RoundRecord
from cgfedllm.report.summary import Summary, summarise
from cgfedllm.report.weight_change import weight_changes
from cgfedllm.runs import RunFolder
from cgfedllm.storage import read_json

State = Literal["finished", "running", "unfinished", "unclear"]
T = TypeVar("T")

_RECORD = TypeAdapter(RoundRecord)


class Machine(BaseModel):
    """Where and with what a process ran."""

    versions: dict[str, str | None] = {}
    platform: str | None = None
    processor: str | None = None
    cpus: int | None = None
    usable_cpus: int | None = None
    memory_bytes: int | None = None
    threads: int | None = None
    gpu: str | None = None
    started_at: str | None = None
    command: list[str] = []


class Resumed(Machine):
    """A process that went on with a run."""

    after_round: int = 0


class Environment(Machine):
    """environment.json."""

    seed: int | None = None
    resumed: list[Resumed] = []


class CardFidelity(BaseModel):
    """One pool of updates in a codec's card."""

    updates: int
    snr_db: float | None = None
    cosine: float | None = None
    bpp: float | None = None


@dataclass(frozen=True)
class WeightChange:
    """Norm of the change of one adapted weight matrix."""

    layer: int | None
    module: str
    norm: float


@dataclass(frozen=True)
class RunFacts:
    """A run as its folder tells it.

    Parameters
    ----------
    path : Path
        The folder.
    name : str
        Of the run; of the folder, where the configuration cannot be read.
    state : State
        "finished"; "running" (another process works on it); "unfinished"; "unclear", where there is
        no configuration to tell.
    config : Config or None
        None where this release does not accept it.
    tree : dict
        The configuration as written, without this machine's folders.
    records : list of RoundRecord
        Rounds that could be read.
    environment : Environment
        Empty where it could not be read.
    weights : list of WeightChange
        Empty where there is no global adapter.
    card : dict of CardFidelity
        What the card of the run's learned codec says of its fidelity, by pool.
    problems : list of str
        What could not be read, for people.
    """

    path: Path
    name: str
    state: State
    config: Config | None
    tree: dict[str, Any]
    records: list[RoundRecord]
    environment: Environment = field(default_factory=Environment)
    weights: list[WeightChange] = field(default_factory=list)
    card: dict[str, CardFidelity] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @cached_property
    def summary(self) -> Summary:
        """The run in a few numbers."""
        return summarise(self.records)

    @property
    def rounds(self) -> int | None:
        """The last round there is to be, a flush included."""
        return None if self.config is None else self.config.last_round

    @property
    def clients(self) -> list[str]:
        """Everybody who took part, was evaluated or failed."""
        names = {c.client for r in self.records for c in r.clients}
        names |= {f.client for r in self.records for f in r.failures}
        return sorted(names.union(*(r.client_nll for r in self.records)))

    @property
    def is_reference(self) -> bool:
        """Trained without a federation: rounds without a single client."""
        trained = [r for r in self.records if r.round > 0]
        return bool(trained) and not any(r.clients or r.failures for r in trained)


def read_run(folder: RunFolder) -> RunFacts:
    """Read all that a report shows.

    Raises
    ------
    CheckpointError
        If this is not a run folder. Whatever else is wrong is among the `problems`.
    """
    if not folder.exists():
        raise CheckpointError(f"{folder.path} is not a run folder: it has no config.toml")
    problems: list[str] = []

    def attempt(read: Callable[[RunFolder], T], otherwise: T) -> T:
        try:
            return read(folder)
        except CgFedLlmError as error:
            problems.append(" ".join(str(error).replace(f"{folder.path}/", "").split()))
            return otherwise

    tree: dict[str, Any] = attempt(_tree, {})
    config = attempt(lambda _: parse_config(tree), None) if tree else None
    records = _records(folder, problems)
    return RunFacts(
        path=folder.path,
        name=config.name if config is not None else folder.path.resolve().name,
        state=_state(folder, config, records),
        config=config,
        tree=portable(tree),
        records=records,
        environment=attempt(_environment, Environment()),
        weights=attempt(_weights, []),
        card=attempt(_card, {}),
        problems=problems,
    )


def _state(folder: RunFolder, config: Config | None, records: list[RoundRecord]) -> State:
    if config is not None and records and records[-1].round >= config.last_round:
        return "finished"
    if folder.is_busy():
        return "running"
    return "unfinished" if config is not None else "unclear"


def _tree(folder: RunFolder) -> dict[str, Any]:
    try:
        return tomllib.loads(folder.config_path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise CheckpointError(f"config.toml cannot be read: {error}") from None


def _records(folder: RunFolder, problems: list[str]) -> list[RoundRecord]:
    """Every line that is whole, in the order of rounds; of a round told twice the last."""
    try:
        lines = folder.metrics_path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as error:
        problems.append(f"metrics.jsonl cannot be read: {error.strerror}")
        return []
    found: dict[int, RoundRecord] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = _RECORD.validate_python(json.loads(line))
        except (ValueError, RecursionError):  # a ValidationError is one
            problems.append(f"line {number} of metrics.jsonl is damaged and left out")
        else:
            found[record.round] = record
    return [found[number] for number in sorted(found)]


def _environment(folder: RunFolder) -> Environment:
    return _checked(Environment, read_json(folder.environment_path), "environment.json")


def _weights(folder: RunFolder) -> list[WeightChange]:
    from cgfedllm.peft_format import CONFIG, load_adapter

    if not (folder.adapter_dir / CONFIG).is_file():
        return []
    config = read_json(folder.adapter_dir / CONFIG)
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder.adapter_dir / CONFIG} is not a PEFT configuration")
    adapter = load_adapter(folder.adapter_dir)
    return [
        WeightChange(factor.layer, factor.module, norm)
        for factor, norm in weight_changes(adapter.spec, adapter.views(), config)
    ]


def _card(folder: RunFolder) -> dict[str, CardFidelity]:
    from cgfedllm.tgap.codec_file import load_codec_file

    if not folder.codec_path.is_file():
        return {}
    fidelity = load_codec_file(folder.codec_path).card.get("fidelity", {})
    return _checked(dict[str, CardFidelity], fidelity, "the card of codec.safetensors")


def _checked(kind: type[T], value: Any, what: str) -> T:
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        at = ".".join(map(str, error.errors()[0]["loc"])) or "top"
        raise CheckpointError(f"{what} is damaged at {at!r} and left out") from None


def labels_of(runs: Sequence[RunFacts]) -> list[str]:
    """One name a run, no two alike: the folder's where runs share their name."""
    names = [run.name for run in runs]
    labels = [
        name if names.count(name) == 1 else run.path.as_posix()
        for name, run in zip(names, runs, strict=True)
    ]
    return [
        label if labels.count(label) == 1 else f"{label} ({number})"
        for number, label in enumerate(labels, start=1)
    ]
