"""Put the numbers of benchmarks/results/faults.json into docs/faults.md.

    python benchmarks/faults_page.py
    python benchmarks/faults_page.py --check

Blocks are marked as in docs/codecs.md.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from codec_pages import BLOCK, ROOT, fill, result_file, table_of

PAGE = ROOT / "docs" / "faults.md"
KINDS = {
    "lost": "the message never arrives",
    "silent": "no reply",
    "late": "the reply comes a round later",
    "crash": "an error",
    "corrupt": "a bit is flipped",
    "cut": "half a packet",
    "oversized": "more than any packet can be",
    "stale": "a packet of an earlier round",
    "foreign state": "coded with another codec state",
    "not finite": "NaN in the packet",
    "nan metrics": "NaN in the metrics",
    "mute": "no packet",
    "twice": "the reply comes twice",
}


def main() -> None:
    fill(PAGE, filled, __doc__)


def filled(page: str) -> str:
    """The page with every block written anew."""
    results = result_file("faults.json")
    soak, kills = results["soak"], results["kills"]
    blocks = {"faults": _faults(soak["faults"]), "soak": _soak(soak), "kills": _kills(kills)}
    return BLOCK.sub(lambda m: m[1] + blocks[m[2]] + m[3], page)


def _faults(run: dict[str, Any]) -> str:
    """Of each kind, how many there were and how many the server wrote down."""
    counts = {KINDS[kind]: of for kind, of in run["kinds"].items()}
    counts["a late reply came in the end"] = run["late replies that came"]
    lines = [[what, *map(str, of.values())] for what, of in counts.items()]
    lines.append(["neither", "0", str(run["failures_without_a_fault"])])
    return table_of(["injected", "in `failures`, with that reason"], lines)


def _soak(soak: dict[str, Any]) -> str:
    runs = [soak["faults"], soak["none"]]

    def row(what: str, cell: Callable[[dict[str, Any]], str]) -> list[str]:
        return [what, *map(cell, runs)]

    def quarters(key: str, places: int) -> Callable[[dict[str, Any]], str]:
        def cell(run: dict[str, Any]) -> str:
            values = run[key]
            quarter = len(values) // 4
            ends = (values[:quarter], values[-quarter:])
            return " / ".join(f"{statistics.median(end):.{places}f}" for end in ends)

        return cell

    lines = [
        row("updates used", lambda run: f"{run['updates_used']:,} of {_all(soak):,}"),
        row("held-out NLL before the first round", lambda run: f"{_nll(run, min):.4f}"),
        row("held-out NLL after the last", lambda run: f"{_nll(run, max):.4f}"),
        row("resident memory, MiB: first / last quarter", quarters("resident_mib", 0)),
        row("open files: first / last quarter", quarters("open_files", 0)),
        row("CPU seconds a round: first / last quarter", quarters("round_cpu_seconds", 1)),
    ]
    return table_of([f"{soak['share']:.0%} fail", "nobody fails"], lines)


def _all(soak: dict[str, Any]) -> int:
    return int(soak["clients"] * soak["rounds"])


def _nll(run: dict[str, Any], which: Callable[..., str]) -> float:
    return float(run["heldout_nll"][which(run["heldout_nll"], key=int)])


def _kills(rows: list[dict[str, Any]]) -> str:
    lines = [
        [row["killed"], row["run"], *map(_yes, _same(row)), str(row["rounds_begun_again"])]
        for row in rows
    ]
    heads = ["run", "same adapter", "same metrics", "rounds done again"]
    return table_of(heads, lines, first="killed when")


def _same(row: dict[str, Any]) -> tuple[bool, bool]:
    return row["same_adapter"], row["same_metrics"]


def _yes(what: bool) -> str:
    return "yes" if what else "**no**"


if __name__ == "__main__":
    main()
