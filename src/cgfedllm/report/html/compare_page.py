"""What the report of several runs says: outcomes, curves and what was configured differently."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cgfedllm.report.html import figures, kept, tables
from cgfedllm.report.html.charts import Chart, stacked
from cgfedllm.report.html.reading import RunFacts, labels_of
from cgfedllm.report.html.tables import Table
from cgfedllm.report.rows import flatten
from cgfedllm.report.summary import PHASES
from cgfedllm.report.units import count_of, human_bytes, human_seconds

_SAME_START = 1e-3
_NAMES = ("name", "output")


def compare_page(runs: Sequence[RunFacts]) -> dict[str, Any]:
    """Values for the template ``compare.html``."""
    named = dict(zip(labels_of(runs), runs, strict=True))
    return {
        "title": "Comparison of " + count_of(len(runs), "run"),
        "lede": ", ".join(named),
        "problems": [f"{name}: {text}" for name, run in named.items() for text in run.problems],
        "warnings": _warnings(named),
        "outcomes": outcomes(named),
        "costs": costs(named),
        "curves": _present(figures.nll_by_uplink(named), figures.nll_by_rounds(named)),
        "kept": kept.kept_by_run(named),
        "kept_charts": _present(figures.kept_chart(named)),
        "differences": differences(named),
        "time": _time(named),
    }


def outcomes(runs: Mapping[str, RunFacts]) -> Table:
    """What came out of each run."""
    rows = []
    for name, run in runs.items():
        summary = run.summary
        heldout = summary.heldout
        rows.append(
            [
                name,
                _progress(run),
                tables.fixed(heldout.before if heldout else None),
                tables.fixed(heldout.after if heldout else None),
                tables.signed(heldout.difference if heldout else None),
                human_bytes(summary.uplink.sent),
                tables.ratio(summary.uplink),
                tables.bits(summary.uplink),
                human_seconds(summary.seconds["total"]),
            ]
        )
    columns = [
        "run", "rounds", "NLL before", "NLL after", "change", "uplink", "fewer than fp32",
        "bits per parameter", "time",
    ]  # fmt: skip
    return Table("Outcome of each run", columns, rows)


def costs(runs: Mapping[str, RunFacts]) -> Table:
    """Every byte of each run, each kind apart."""
    rows = [
        [
            name,
            *(
                human_bytes(sent)
                for sent in (
                    run.summary.uplink.sent,
                    run.summary.downlink.sent,
                    run.summary.codec_bytes,
                    run.summary.tgap_uplink_bytes,
                    run.summary.tgap_downlink_bytes,
                )
            ),
            str(run.summary.failures),
        ]
        for name, run in runs.items()
    ]
    columns = [
        "run", "uplink", "downlink", "codec state, down", "pre-training, up",
        "pre-training, down", "failures",
    ]  # fmt: skip
    return Table("All bytes of each run", columns, rows)


def differences(runs: Mapping[str, RunFacts]) -> Table | None:
    """Settings that are not the same in all runs."""
    trees = [
        {key: value for key, value in flatten(run.tree).items() if value != {}}
        for run in runs.values()
    ]
    keys = dict.fromkeys(key for tree in trees for key in tree if key not in _NAMES)
    rows = [
        [key, *(tables.value_text(tree.get(key)) for tree in trees)]
        for key in keys
        if any(tree.get(key) != trees[0].get(key) for tree in trees)
    ]
    if not rows:
        return None
    words = frozenset(range(len(runs) + 1))
    return Table("Settings that differ", ["setting", *runs], rows, words)


def _progress(run: RunFacts) -> str:
    done = run.summary.rounds
    return f"{done}" if run.state == "finished" else f"{done} of {run.rounds or '?'} ({run.state})"


def _warnings(runs: Mapping[str, RunFacts]) -> list[str]:
    """What makes the losses of these runs no fair comparison."""
    notes = []
    starts = [run.summary.heldout.before for run in runs.values() if run.summary.heldout]
    if starts and any(not math.isclose(nll, starts[0], rel_tol=_SAME_START) for nll in starts):
        notes.append(
            "Held-out NLL before training is not the same in all runs: they were not evaluated "
            "on the same rows with the same model, so their losses do not compare."
        )
    if any(run.state != "finished" for run in runs.values()):
        notes.append("Not all runs have come to their end; what is shown is as far as they are.")
    return notes


def _time(runs: Mapping[str, RunFacts]) -> dict[str, Any] | None:
    parts = {name: tables.time_parts(run.summary.seconds) for name, run in runs.items()}
    longest = max(sum(spent for _, spent in own) for own in parts.values())
    if not longest or not math.isfinite(longest):
        return None
    return {
        "bars": [
            {
                "label": name,
                "pieces": stacked(own, longest, human_seconds),
                "phases": [phase for phase, _ in own],
                "text": human_seconds(runs[name].summary.seconds["total"]),
            }
            for name, own in parts.items()
        ],
        "legend": [
            phase for phase in (*PHASES, "other")
            if any(phase == name for own in parts.values() for name, _ in own)
        ],
    }  # fmt: skip


def _present(*charts: Chart | None) -> list[Chart]:
    return [chart for chart in charts if chart is not None]
