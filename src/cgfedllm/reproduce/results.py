"""The table of the reproduction, as it is kept: JSON for everything, CSV and Markdown to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cgfedllm.analysis.portable import provenance
from cgfedllm.config import Config
from cgfedllm.report.rows import plain, table_to_csv
from cgfedllm.report.units import human_bytes
from cgfedllm.reproduce.rows import Row
from cgfedllm.storage import write_atomic, write_json

FORMAT = 1

DEFINITIONS = {
    "heldout_nll": "after the last round, nats per label token, on rows nobody trained on",
    "uplink_bytes": "all update packets of the run, headers included",
    "times_fewer": "the same updates as bare fp32, over uplink_bytes; half of that against bf16",
    "codec_bytes": "the codec's state on its way to clients, not part of uplink_bytes",
    "tgap_bytes": "what collecting updates on D1 sent up and down, once for all codecs",
    "snr_db": "of updates of unseen rounds of unseen clients of D1, real packets, sum over sum; of "
    "unseen clients or rounds where there are no others",
    "accuracy": "per cent of the questions asked, with one standard error; 25 is chance",
}


@dataclass(frozen=True)
class Entry:
    """What came of one row.

    Parameters
    ----------
    row : Row
        What was done.
    heldout_nll : float
        Nats per label token.
    uplink_bytes, uplink_bytes_fp32, codec_bytes, tgap_bytes : int
        See `DEFINITIONS`.
    bpp : float or None
        Bits per parameter sent; None where nothing was.
    snr_db, cosine : float or None
        What the codec keeps of updates it did not learn from.
    encode_ms, decode_ms : float or None
        Of one update, median.
    seconds : float
        The run took.
    benchmarks : mapping of str to dict
        As `BenchmarkResult.to_dict`, by name.
    """

    row: Row
    heldout_nll: float
    uplink_bytes: int = 0
    uplink_bytes_fp32: int = 0
    codec_bytes: int = 0
    tgap_bytes: int = 0
    bpp: float | None = None
    snr_db: float | None = None
    cosine: float | None = None
    encode_ms: float | None = None
    decode_ms: float | None = None
    seconds: float = 0.0
    benchmarks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def times_fewer(self) -> float | None:
        """By how much less went up than as fp32."""
        return self.uplink_bytes_fp32 / self.uplink_bytes if self.uplink_bytes else None

    def to_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON."""
        tree = asdict(self)
        row = tree.pop("row")
        return {**row, "changes": dict(row["changes"]), **tree, "times_fewer": self.times_fewer}


def write_paper(
    folder: Path,
    entries: Sequence[Entry],
    missing: Sequence[str],
    config: Config,
    about: Mapping[str, Any],
) -> list[Path]:
    """Write ``paper.json``, ``paper.csv`` and ``paper.md``.

    Parameters
    ----------
    folder : Path
        Made if missing.
    entries : sequence of Entry
        Rows that are there.
    missing : sequence of str
        Keys of those that are not yet.
    config : Config
        The experiment all rows share.
    about : mapping
        Scale, benchmarks, shots and sample.

    Raises
    ------
    StorageError
        If the disk refuses.
    """
    document = {
        "format": FORMAT,
        **provenance(config),
        **about,
        "rows": [entry.to_dict() for entry in entries],
        "missing": list(missing),
        "definitions": DEFINITIONS,
    }
    # a codec file lies wherever it lies; its name tells which it is
    names, cells = table(entries)
    write_json(folder / "paper.json", plain(document))
    write_atomic(folder / "paper.csv", table_to_csv(names, cells))
    write_atomic(folder / "paper.md", markdown(entries))
    return [folder / name for name in ("paper.json", "paper.csv", "paper.md")]


def table(entries: Sequence[Entry]) -> tuple[list[str], list[list[object]]]:
    """Names of columns, and a line a row: losses, bytes, fidelity, then accuracies in per cent."""
    groups = _groups(entries)
    names = ["row", "heldout_nll", "uplink_bytes", "times_fewer", "bpp", "snr_db", "cosine"]
    names += ["codec_bytes", "tgap_bytes", "encode_ms", "decode_ms", "seconds"]
    for benchmark, group in groups:
        names += [f"{benchmark}: {group}", f"{benchmark}: {group}, standard error"]
    cells = []
    for e in entries:
        line: list[object] = [e.row.label, e.heldout_nll, e.uplink_bytes, e.times_fewer, e.bpp]
        line += [e.snr_db, e.cosine, e.codec_bytes, e.tgap_bytes]
        line += [e.encode_ms, e.decode_ms, e.seconds]
        for benchmark, group in groups:
            score = _score(e, benchmark, group)
            line += [None, None] if score is None else list(score)
        cells.append(line)
    return names, cells


def markdown(entries: Sequence[Entry]) -> str:
    """Two tables: what it cost and lost, and what it answers."""
    lines = [
        "| row | held-out NLL | uplink | times fewer than fp32 | bpp | SNR, dB | cosine "
        "| codec state | TGAP |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for e in entries:
        cells = [
            e.row.label,
            f"{e.heldout_nll:.4f}",
            _bytes(e.uplink_bytes),
            _number(e.times_fewer, "{:.1f}"),
            _number(e.bpp, "{:.3f}"),
            _number(e.snr_db, "{:.2f}"),
            _number(e.cosine, "{:.3f}"),
            _bytes(e.codec_bytes),
            _bytes(e.tgap_bytes),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    groups = _groups(entries)
    for benchmark in dict.fromkeys(name for name, _ in groups):
        members = [group for name, group in groups if name == benchmark]
        lines += ["", f"| {benchmark}, % right | {' | '.join(members)} |"]
        lines.append("|---" * (len(members) + 1) + "|")
        for e in entries:
            if benchmark in e.benchmarks:
                scores = [_score(e, benchmark, group) for group in members]
                cells = ["-" if s is None else _accuracy(*s) for s in scores]
                lines.append(f"| {e.row.label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _groups(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    found = [
        (name, str(group["name"]))
        for entry in entries
        for name, result in entry.benchmarks.items()
        for group in result["groups"]
    ]
    return list(dict.fromkeys(found))


def _score(entry: Entry, benchmark: str, group: str) -> tuple[float, float | None] | None:
    """Per cent and its standard error."""
    for score in entry.benchmarks.get(benchmark, {}).get("groups", ()):
        if score["name"] == group:
            error = score["standard_error"]
            return 100 * score["value"], None if error is None else 100 * error
    return None


def _accuracy(value: float, error: float | None) -> str:
    return f"{value:.1f}" if error is None else f"{value:.1f} ± {error:.1f}"


def _bytes(count: int) -> str:
    return human_bytes(count) if count else "-"


def _number(value: float | None, pattern: str) -> str:
    return "-" if value is None else pattern.format(value)
