"""From a configuration to the paper's table, step by step; what is done is not done again.

::

    D1 --record--> updates --pretrain--> six codec files --.
    D2 -----------------------------------------------------+--> a run a row --> adapters
    C-Eval, MMLU --> the same questions to every adapter  ----> table, figure

Every step leaves its result on the disk, so a reproduction that was stopped goes on with what is
missing, and the table always tells what is there.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cgfedllm import api, events
from cgfedllm.adapter import AdapterUpdate
from cgfedllm.analysis.candidates import Candidate
from cgfedllm.config import Config
from cgfedllm.errors import ConfigError
from cgfedllm.evaluating import BASE, read_adapter
from cgfedllm.metrics import RoundRecord
from cgfedllm.reproduce.results import Entry, write_paper
from cgfedllm.reproduce.rows import ROWS, Row
from cgfedllm.runs import RunFolder
from cgfedllm.tgap.codec_file import load_codec_file
from cgfedllm.workspace import Workspace

if TYPE_CHECKING:
    from cgfedllm.evaluation.scores import BenchmarkResult

BENCHMARKS = ("ceval", "mmlu")
# the best there is: nothing was chosen by the first, one half was known of the others
_POOLS = ("unseen_both", "unseen_clients", "unseen_rounds")


@dataclass(frozen=True)
class PaperResult:
    """The table and where it lies.

    Parameters
    ----------
    entries : list of Entry
        The rows.
    files : list of Path
        Results file, tables, figure.
    """

    entries: list[Entry]
    files: list[Path]

    def rows(self) -> list[tuple[str, str]]:
        """For a table of two columns."""
        return [
            (
                entry.row.label,
                f"held-out NLL {entry.heldout_nll:.4f}"
                + (f", {entry.times_fewer:.1f}x fewer uplink" if entry.times_fewer else ""),
            )
            for entry in self.entries
        ] + [("file", str(path)) for path in self.files]

    def to_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON."""
        return {
            "rows": [entry.to_dict() for entry in self.entries],
            "files": [str(path) for path in self.files],
        }


@dataclass
class Reproduction:
    """One reproduction.

    Parameters
    ----------
    config : Config
        The experiment all rows share.
    folder : Path
        For results.
    benchmarks : sequence of str
        "ceval", "mmlu", both or none.
    hub : Path or None
        Folder with the benchmarks' data sets; None: the hub or its cache.
    shots : int
        Worked examples in each prompt.
    per_subject : int or None
        Questions asked of a subject; None is all.
    about : mapping
        Put into the results file.
    listeners : sequence of callables
        Told every event.
    rows : sequence of Row
        The table's lines.
    """

    config: Config
    folder: Path
    benchmarks: Sequence[str] = BENCHMARKS
    hub: Path | None = None
    shots: int = 0
    per_subject: int | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    listeners: Sequence[Callable[[events.Event], None]] = ()
    rows: Sequence[Row] = ROWS

    def run(self) -> PaperResult:
        """Do what is missing and write the table.

        Raises
        ------
        RunInterrupted
            After Ctrl-C; the same call goes on.
        CgFedLlmError
            Whatever stops a step; the table holds the rows that are done.
        """
        self._check()
        entries: list[Entry] = []
        codecs = self._pretrain()
        for row in self.rows:
            entries.append(self._entry(row, codecs))
            self._write(entries)
        entries = self._benchmark(entries, codecs)
        files = self._write(entries)

        from cgfedllm.report.figures.paper import plot_paper

        files += plot_paper(files[0], self.folder / "paper")
        return PaperResult(entries, files)

    def _check(self) -> None:
        if not any(row.kind == "base" for row in self.rows):
            raise ConfigError("the table needs the row 'base': the others are compared with it")
        unknown = [name for name in self.benchmarks if name not in BENCHMARKS]
        if unknown:
            raise ConfigError(f"benchmarks are {', '.join(BENCHMARKS)}; got {unknown[0]!r}")

    def _pretrain(self) -> dict[str, Path]:
        """A codec file for each auto-encoder and preset, all from one recording."""
        wanted = {row.pretrained: row for row in self.rows if row.codec}
        if not wanted:
            return {}

        from cgfedllm.pretraining import Pretraining

        first = next(iter(wanted.values()))
        job = Pretraining(self.config, first.candidate, collects=True)
        self._tell("updates are collected on D1")
        recorded = api.record(
            job.collecting, kind=self.config.tgap.collect, listeners=self.listeners
        )
        api.check_not_interrupted(recorded.run)
        files = {}
        for key, row in wanted.items():
            self._tell(f"{row.candidate} is pre-trained")
            to = self._runs / f"{self.config.name}-codecs" / f"{key}.safetensors"
            files[key] = api.pretrain(
                self.config,
                row.candidate,
                recordings=[recorded.path],
                to=to,
                listeners=self.listeners,
            ).path
        return files

    def _entry(self, row: Row, codecs: Mapping[str, Path]) -> Entry:
        """Train the row, or read what it left."""
        if row.kind == "base":
            # the start of every run is the base model: B is zero
            records = self._records(self._row("fedavg"), codecs)
            return Entry(row, _nll(records[0]))
        self._tell(f"row {row.label!r}")
        records = self._records(row, codecs)
        last = records[-1]
        clients = [client for record in records for client in record.clients]
        if row.kind == "centralised" or not clients:
            return Entry(row, _nll(last), seconds=_seconds(records))
        fidelity = _fidelity(codecs[row.pretrained]) if row.codec else {}
        sent = last.uplink_bytes_fp32_total
        return Entry(
            row,
            _nll(last),
            uplink_bytes=last.uplink_bytes_total,
            uplink_bytes_fp32=sent,
            codec_bytes=last.codec_bytes_total,
            tgap_bytes=records[0].tgap_uplink_bytes + records[0].tgap_downlink_bytes,
            bpp=32 * last.uplink_bytes_total / sent if sent else None,
            snr_db=fidelity.get("snr_db"),
            cosine=fidelity.get("cosine"),
            encode_ms=1e3 * statistics.median(c.encode_seconds for c in clients),
            decode_ms=1e3 * statistics.median(c.decode_seconds for c in clients),
            seconds=_seconds(records),
        )

    def _benchmark(self, entries: Sequence[Entry], codecs: Mapping[str, Path]) -> list[Entry]:
        """Ask every adapter the same questions."""
        asked = [entry.row for entry in entries if entry.row.benchmarks]
        if not self.benchmarks or not asked:
            return list(entries)

        from cgfedllm.evaluation.benchmarks import run_benchmark

        config = self._row("fedavg").config(self.config)
        workspace = Workspace(config, config.run_dir)
        adapters: dict[str, AdapterUpdate] = {}
        for row in asked:
            if row.kind == "base":
                adapters[row.key] = workspace.whole(workspace.start)
            else:
                path = self._config_of(row, codecs).run_dir
                adapters[row.key] = read_adapter(RunFolder(path).adapter_dir, workspace)
        found: dict[str, dict[str, BenchmarkResult]] = {row.key: {} for row in asked}
        with events.listening(*self.listeners):
            for name in self.benchmarks:
                self._tell(f"{len(adapters)} adapters are asked {name}")
                results = run_benchmark(
                    workspace.model,
                    adapters,
                    name,
                    shots=self.shots,
                    per_subject=self.per_subject,
                    hub=self.hub,
                    batch_size=config.evaluation.batch_size,
                    answers=self._runs / f"{self.config.name}-answers.jsonl",
                )
                for result in results:
                    found[result.adapter][name] = result
        base = found[self._row(BASE).key]
        return [
            Entry(
                **{
                    **vars(entry),
                    "benchmarks": {
                        name: result.to_dict(None if entry.row.kind == "base" else base[name])
                        for name, result in found.get(entry.row.key, {}).items()
                    },
                }
            )
            for entry in entries
        ]

    def _records(self, row: Row, codecs: Mapping[str, Path]) -> list[RoundRecord]:
        config = self._config_of(row, codecs)
        cells = api.Cells(self.listeners)
        cells.check(config)
        kind = Candidate(row.label, "variant")
        if row.kind == "centralised":
            kind = Candidate("centralised", "reference")
        return cells.complete(config, kind)

    def _config_of(self, row: Row, codecs: Mapping[str, Path]) -> Config:
        return row.config(self.config, str(codecs[row.pretrained]) if row.codec else "")

    def _row(self, key: str) -> Row:
        return next(row for row in ROWS if row.key == key)

    @property
    def _runs(self) -> Path:
        return Path(self.config.output)

    def _write(self, entries: Sequence[Entry]) -> list[Path]:
        done = {entry.row.key for entry in entries}
        missing = [row.key for row in self.rows if row.key not in done]
        about = {
            **self.about,
            "benchmarks": list(self.benchmarks),
            "shots": self.shots,
            "per_subject": self.per_subject,
        }
        return write_paper(self.folder, entries, missing, self.config, about)

    def _tell(self, text: str) -> None:
        with events.listening(*self.listeners):
            events.publish(events.Notice(text))


def _nll(record: RoundRecord) -> float:
    if record.heldout_nll is None:
        raise ConfigError("rows are compared on the held-out set; leave evaluation.heldout on")
    return record.heldout_nll


def _seconds(records: Sequence[RoundRecord]) -> float:
    return sum(record.seconds.get("total", 0.0) for record in records)


def _fidelity(path: Path) -> Mapping[str, Any]:
    """What the codec's card says of updates it did not learn from."""
    pools: Mapping[str, Mapping[str, Any]] = load_codec_file(path).card.get("fidelity", {})
    return next((pools[name] for name in _POOLS if name in pools), {})
