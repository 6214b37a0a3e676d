"""Put the measured numbers into docs/codecs.md, each from a file in benchmarks/results.

    python benchmarks/codec_pages.py
    python benchmarks/codec_pages.py --check

The page has pairs of comments, `<!-- numbers: NAME -->` and `<!-- /numbers -->`; what stands
between them is written here. A file that is not there yet leaves its rows out.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "codecs.md"
RESULTS = ROOT / "benchmarks" / "results"

RATES = (0.05, 0.2, 1.0)
STEPS = (4, 32)
BIG = "llama-7b r=8 qkvo"
BLOCK = re.compile(r"(<!-- numbers: (.+?) -->\n).*?(<!-- /numbers -->)", re.S)

Row = dict[str, str]


def main() -> None:
    fill(PAGE, filled, __doc__)


def fill(page: Path, filled: Callable[[str], str], about: str | None) -> None:
    """Write a page anew, or with ``--check`` fail if that would change it."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--check", action="store_true", help="fail if the page is out of date")
    options = parser.parse_args()
    before = page.read_text(encoding="utf-8")
    after = filled(before)
    if options.check:
        sys.exit(f"{page.relative_to(ROOT)} is out of date" if before != after else 0)
    page.write_text(after, encoding="utf-8")


def filled(page: str) -> str:
    """The page with every block written anew."""
    numbers = Numbers()
    return BLOCK.sub(lambda m: m[1] + numbers.block(m[2]) + m[3], page)


class Numbers:
    """What the result files hold."""

    def __init__(self) -> None:
        self.open = csv_file("open_loop/codecs.csv")
        self.facts = csv_file("open_loop/structure.csv")
        self.speed = result_file("codec_speed.json").get("results", [])
        summary = result_file("compare_medquad.json")["summary"]
        self.closed = {row["candidate"]: row for row in summary if row["final_nll"]["n"]}
        self.auto_encoders = result_file("cg_ablation.json").get("results", [])

    def block(self, name: str) -> str:
        if name == "structure":
            return self._structure()
        if name == "closed loop":
            return self._closed_loop()
        if name == "auto-encoders":
            return self._auto_encoders([row for row in self.auto_encoders if "compared" not in row])
        if name == "auto-encoders, one thing at a time":
            return self._auto_encoders([row for row in self.auto_encoders if "compared" in row])
        return self._codec(name)

    def _codec(self, name: str) -> str:
        """Table of one codec: a column a rate."""
        rates = [r for r in RATES if self._any_row(name, r)] or [None]
        heads = ["" if rate is None else f"{rate:g} bpp" for rate in rates]
        rows = []
        for label in dict.fromkeys(_label(r) for r in self.open if r["codec"] == name):
            for steps in STEPS:
                cells = [self._snr(label, rate, steps) for rate in rates]
                rows.append([f"`{label}`, {steps} local steps: SNR / cosine", *cells])
        rows.append(["encode / decode", *(self._milliseconds(name, rate) for rate in rates)])
        rows.append(["closed loop: gain kept", *(self._gain(name, rate) for rate in rates)])
        return table_of(heads, [row for row in rows if any(row[1:])])

    def _any_row(self, name: str, rate: float) -> bool:
        return any(r["codec"] == name and _rate(r) == rate for r in self.open)

    def _snr(self, label: str, rate: float | None, steps: int) -> str:
        rows = [
            r
            for r in self.open
            if _label(r) == label and _rate(r) == rate and r["recording"].endswith(f"_{steps}")
        ]
        values = [float(r["snr_db"]) for r in rows]
        if not values:
            return ""
        cosine = statistics.fmean(float(r["cosine"]) for r in rows)
        if math.inf in values:
            return "exact"
        return f"{statistics.fmean(values):.2f} dB / {cosine:.2f}"

    def _milliseconds(self, name: str, rate: float | None) -> str:
        for row in self.speed:
            if (row["model"], row["codec"], row.get("bpp")) == (BIG, name, rate):
                if "refused" in row:
                    return ""
                return f"{row['encode_ms']['median']:.0f} / {row['decode_ms']['median']:.0f} ms"
        return ""

    def _gain(self, name: str, rate: float | None) -> str:
        row = self.closed.get(name if rate is None else f"{name}:bpp={rate:g}")
        return "" if row is None else percent(row["gain_kept"])

    def _closed_loop(self) -> str:
        rows = [
            [
                f"`{name}`",
                f"{row['bits_per_parameter']['mean']:.3g}",
                f"{row['times_fewer_than_fp32']['mean']:.4g}x",
                plus_minus(row["final_nll"], "{:.4f}"),
                plus_minus(row["difference_to_reference"], "{:+.4f}"),
                *(percent(point) for point in row["gain_kept_by_round"]),
                str(row["final_nll"]["n"]),
            ]
            for name, row in self.closed.items()
        ]
        rounds = [
            f"kept, round {point['round']}"
            for row in list(self.closed.values())[:1]
            for point in row["gain_kept_by_round"]
        ]
        heads = ["bpp", "fewer", "held-out NLL", "against raw", *rounds, "seeds"]
        return table_of(heads, rows, first="codec")

    def _auto_encoders(self, rows: list[dict[str, Any]]) -> str:
        heads = ["bpp", "SNR", "cosine", "of another update", "encode / decode", "epochs"]
        cells = [
            [
                f"`{row['codec']}`, {_options(row['options'])}",
                f"{row['bits_per_parameter']:.3g}",
                f"{row['snr_db']:.2f} dB",
                f"{row['cosine']:.2f}",
                f"{row['swapped_snr_db']:.2f} dB",
                f"{row['encode_ms']:.0f} / {row['decode_ms']:.0f} ms",
                f"{row['best_epoch']} of {row['epochs']}",
            ]
            for row in rows
        ]
        return table_of(heads, cells, first="what")

    def _structure(self) -> str:
        recordings = list(dict.fromkeys(row["recording"] for row in self.facts))
        rows = []
        for fact in dict.fromkeys(row["fact"] for row in self.facts):
            cells = []
            for recording in recordings:
                values = [
                    float(row["value"])
                    for row in self.facts
                    if row["fact"] == fact and row["recording"] == recording
                ]
                spread = sorted({f"{value:.2f}" for value in values}, key=float)
                cells.append(" to ".join([*spread[:1], *spread[1:][-1:]]) or "-")
            rows.append([fact, *cells])
        return table_of(recordings, rows, first="fact")


def _label(row: Row) -> str:
    values = _options({k: v for k, v in json.loads(row["options"]).items() if k != "bpp"}, ",")
    return f"{row['codec']}:{values}" if values else row["codec"]


def _options(options: dict[str, Any], between: str = ", ") -> str:
    return between.join(
        f"{key}={json.dumps(value).strip(chr(34))}" for key, value in options.items()
    )


def _rate(row: Row) -> float | None:
    return float(row["asked_bpp"]) if row["asked_bpp"] else None


def percent(spread: dict[str, Any]) -> str:
    return plus_minus({**spread, **_hundredfold(spread)}, "{:.1f}") + " %"


def _hundredfold(spread: dict[str, Any]) -> dict[str, Any]:
    keys = ("mean", "standard_error")
    return {key: None if spread[key] is None else 100 * spread[key] for key in keys}


def plus_minus(spread: dict[str, Any], layout: str) -> str:
    text = layout.format(spread["mean"])
    error = spread["standard_error"]
    return text if error is None else f"{text} ±{layout.replace('+', '').format(error)}"


def table_of(heads: list[str], rows: Iterable[list[str]], first: str = "") -> str:
    lines = [[first, *heads], ["---"] * (len(heads) + 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def csv_file(name: str) -> list[Row]:
    path = RESULTS / name
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def result_file(name: str) -> dict[str, Any]:
    path = RESULTS / name
    if not path.exists():
        return {"summary": []}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


if __name__ == "__main__":
    main()
