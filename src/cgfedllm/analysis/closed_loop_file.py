"""The results file of a comparison: everything a figure or a claim needs, in one JSON.

It is rebuilt from the run folders whenever something finishes, and says which cells it lacks.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cgfedllm.analysis.candidates import Candidate
from cgfedllm.analysis.curves import (
    Bytes,
    Point,
    area_between,
    bytes_to_share,
    curve_of,
    gain_kept,
    gain_kept_by_round,
    total,
    uplink,
)
from cgfedllm.analysis.portable import portable, provenance
from cgfedllm.analysis.tuning import JUDGED_ON, Choice, Tuning
from cgfedllm.config import Config
from cgfedllm.errors import CheckpointError
from cgfedllm.metrics import RoundRecord
from cgfedllm.storage import read_json

FORMAT = 1
SHARES = (0.95, 0.99)

DEFINITIONS = {
    "bytes": "lengths of serialised packets, headers included, summed over clients; downlink bytes "
    "include evaluation broadcasts",
    "codec_state": "state of a learned uplink codec, sent down; in total_bytes, not in downlink",
    "pre_training": "bytes that collecting updates to pre-train the uplink codec took, as its file "
    "says; part of no other number",
    "heldout_nll": "nats per label token on the global held-out rows, the same for all cells",
    "bits_per_parameter": "8 * uplink bytes per packet / parameters of the base configuration's "
    "adapter, also for candidates whose own adapter is smaller",
    "times_fewer_than_fp32": "32 / bits_per_parameter, packet by packet; fewer rounds show only in "
    "times_fewer_than_reference",
    "times_fewer_than_reference": "uplink bytes of the reference's whole run / of this one's, "
    "paired by seed",
    "reference": "the first candidate; differences and shares are paired with its run of the same "
    "seed",
    "gain_kept": "NLL gain from before training to the end, as a share of the reference's",
    "gain_kept_by_round": "the same after equal numbers of rounds",
    "bytes_to_share": "cumulative bytes after the first evaluated round whose NLL is at or below "
    "the reference's start less the share of the reference's final gain; null: not reached",
    "area": "integral over log10(bytes) of reference NLL - candidate NLL, both as step functions "
    "of bytes received, from the first round of either to the end of the longer; nats * decades, "
    "positive is better than the reference",
    "spread": "stdev is the sample standard deviation over seeds",
}


@dataclass(frozen=True)
class Cell:
    """A run that came to its end."""

    config: Config
    records: list[RoundRecord]


@dataclass
class Matrix:
    """What a comparison is to hold and what it holds so far."""

    base: Config
    candidates: list[Candidate]
    seeds: list[int]
    tuning: Tuning | None
    parameters: int
    """Values in an update of the base configuration."""
    own_parameters: dict[str, int]
    """The same for each candidate."""
    choices: dict[str, Choice] = field(default_factory=dict)
    cells: dict[tuple[str, int], Cell] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def scale(self, label: str) -> float:
        """Base parameters for one of the candidate's own."""
        return self.parameters / self.own_parameters[label]


def document(matrix: Matrix, rounds_done: Mapping[tuple[str, int], int]) -> dict[str, Any]:
    """Everything known, as plain types.

    Parameters
    ----------
    matrix : Matrix
        What is compared, and what is there.
    rounds_done : mapping
        For missing cells, how far each has come.
    """
    base = matrix.base
    return {
        "format": FORMAT,
        **provenance(base),
        "what": _what(matrix),
        "seeds": matrix.seeds,
        "split_seed": base.seed if base.data.seed is None else base.data.seed,
        "parameters": matrix.parameters,
        "reference": matrix.candidates[0].label,
        "candidates": [
            {
                "label": c.label,
                "kind": c.kind,
                "changes": portable(dict(c.changes)),
                "uplink": portable(_uplink(c, base)),
                "rounds": c.config(base).federation.rounds,
                "parameters": matrix.own_parameters[c.label],
            }
            for c in matrix.candidates
        ],
        "tuning": _tuning(matrix),
        "cells": [
            _cell(matrix, c, seed)
            for seed in matrix.seeds
            for c in matrix.candidates
            if (c.label, seed) in matrix.cells
        ],
        "missing": [
            _missing(matrix, c, seed, rounds_done.get((c.label, seed), 0))
            for seed in matrix.seeds
            for c in matrix.candidates
            if (c.label, seed) not in matrix.cells
        ],
        "summary": [_summary(matrix, c) for c in matrix.candidates],
        "definitions": DEFINITIONS,
    }


def read_results(path: Path | str) -> dict[str, Any]:
    """Read a results file back.

    Raises
    ------
    CheckpointError
        If it is missing, damaged, or no results file of a comparison.
    """
    found = read_json(path)
    if not isinstance(found, dict) or not {"cells", "candidates", "what"} <= found.keys():
        raise CheckpointError(f"{path} is no results file of `cgfedllm compare`")
    if found.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {found.get('format')!r}; this release reads {FORMAT}"
        )
    return found


def _what(matrix: Matrix) -> dict[str, Any]:
    base = matrix.base
    names = {c.client for cell in matrix.cells.values() for r in cell.records for c in r.clients}
    return {
        "model": Path(base.model.id).name,
        "data": Path(base.data.source).name,
        "clients": len(names) or base.data.partition.clients,
        "fraction_train": base.federation.fraction_train,
        "rounds": base.federation.rounds,
        "local_steps": base.training.local_steps,
        "local_epochs": base.training.local_epochs,
    }


def _uplink(candidate: Candidate, base: Config) -> dict[str, Any] | None:
    if candidate.kind == "reference":
        return None
    return candidate.config(base).uplink.model_dump()


def _tuning(matrix: Matrix) -> dict[str, Any] | None:
    if matrix.tuning is None:
        return None
    return {
        "grid": {axis.key: list(axis.values) for axis in matrix.tuning.axes},
        "trials_per_candidate": len(matrix.tuning.settings()),
        "rounds": matrix.tuning.rounds,
        "seed": matrix.tuning.seed,
        "judged_on": JUDGED_ON,
        "note": "settings that make no difference to a candidate are not run twice (same_as); "
        "references are not tuned",
        "candidates": {
            label: choice.to_dict() | {"at_grid_edge": _at_edge(matrix.tuning, choice)}
            for label, choice in matrix.choices.items()
        },
    }


def _at_edge(tuning: Tuning, choice: Choice) -> list[str]:
    """Keys whose chosen value is the least or greatest tried: a wider grid might do better."""
    chosen = choice.setting or {}
    edges = {
        axis.key: {min(axis.values), max(axis.values)}
        for axis in tuning.axes
        if all(isinstance(value, int | float) for value in axis.values)
    }
    return [key for key, ends in edges.items() if key in chosen and chosen[key] in ends]


def _cell(matrix: Matrix, candidate: Candidate, seed: int) -> dict[str, Any]:
    cell = matrix.cells[candidate.label, seed]
    choice = matrix.choices.get(candidate.label)
    return {
        "candidate": candidate.label,
        "seed": seed,
        "run": cell.config.name,
        "setting": choice.setting if choice else {},
        "rounds": cell.records[-1].round,
        "curve": [
            {
                "round": p.round,
                "heldout_nll": p.nll,
                "uplink_bytes": p.uplink,
                "downlink_bytes": p.downlink,
                "total_bytes": p.total,
            }
            for p in curve_of(cell.records)
        ],
        "uplink": _traffic(matrix, candidate.label, cell.records),
        "downlink": {"bytes": cell.records[-1].downlink_bytes_total},
        **_learned(cell.records),
        **_secagg(cell.records[-1]),
        "seconds": _seconds(cell.records),
        "lost_replies": sum(len(r.failures) for r in cell.records),
    }


def _secagg(last: RoundRecord) -> dict[str, Any]:
    """What keys and shares of secure aggregation weigh beside packets; nothing without it."""
    up, down = last.secagg_uplink_bytes_total, last.secagg_downlink_bytes_total
    return {"secure_aggregation": {"uplink_bytes": up, "downlink_bytes": down}} if up else {}


def _learned(records: Sequence[RoundRecord]) -> dict[str, Any]:
    """What an uplink codec that learns costs beside its packets; nothing for the others."""
    state = records[-1].codec_bytes_total
    up, down = (
        sum(getattr(record, f"tgap_{way}_bytes") for record in records)
        for way in ("uplink", "downlink")
    )
    if not (state or up or down):
        return {}
    return {
        "codec_state": {"bytes": state},
        "pre_training": {"uplink_bytes": up, "downlink_bytes": down},
    }


def _traffic(matrix: Matrix, label: str, records: Sequence[RoundRecord]) -> dict[str, Any]:
    last = records[-1]
    sent = last.uplink_bytes_total
    packets = round(last.uplink_bytes_fp32_total / (4 * matrix.own_parameters[label]))
    bits = 8 * sent / (packets * matrix.parameters) if packets else None
    return {
        "bytes": sent,
        "packets": packets,
        "bytes_per_packet": sent / packets if packets else None,
        "bits_per_parameter": bits,
        "times_fewer_than_fp32": 32 / bits if bits else None,
    }


def _seconds(records: Sequence[RoundRecord]) -> dict[str, Any]:
    spent: dict[str, Any] = {
        phase: sum(r.seconds.get(phase, 0.0) for r in records)
        for phase in ("train", "encode", "decode", "total")
    }
    train = spent["train"]
    spent["encode_share_of_train"] = spent["encode"] / train if train else None
    spent["decode_share_of_train"] = spent["decode"] / train if train else None
    return spent


def _missing(matrix: Matrix, candidate: Candidate, seed: int, done: int) -> dict[str, Any]:
    row = {
        "candidate": candidate.label,
        "seed": seed,
        "run": candidate.cell(matrix.base, seed, {}).name,
        "rounds_done": done,
    }
    reason = matrix.failures.get(f"{candidate.label}, seed {seed}")
    return {**row, "failure": reason} if reason else row


def _summary(matrix: Matrix, candidate: Candidate) -> dict[str, Any]:
    label, reference = candidate.label, matrix.candidates[0].label
    own = {s: matrix.cells[label, s] for s in matrix.seeds if (label, s) in matrix.cells}
    curves = {seed: curve_of(cell.records) for seed, cell in own.items()}
    pairs = {
        seed: (curve, curve_of(matrix.cells[reference, seed].records))
        for seed, curve in curves.items()
        if (reference, seed) in matrix.cells
    }
    pairs = {seed: (a, b) for seed, (a, b) in pairs.items() if a and b}
    traffic = {seed: _traffic(matrix, label, cell.records) for seed, cell in own.items()}
    sent = {seed: t["bytes"] for seed, t in traffic.items()}
    whole = {
        seed: matrix.cells[reference, seed].records[-1].uplink_bytes_total / sent[seed]
        for seed in pairs
        if sent[seed]
    }
    return {
        "candidate": label,
        "seeds": list(own),
        "final_nll": spread({s: c[-1].nll for s, c in curves.items() if c}),
        "difference_to_reference": spread(
            {s: a[-1].nll - b[-1].nll for s, (a, b) in pairs.items()}
        ),
        "gain_kept": spread({s: gain_kept(a, b) for s, (a, b) in pairs.items()}),
        "gain_kept_by_round": _by_round(pairs),
        "bytes_to_share": {
            name: {f"{share:g}": _reached(pairs, share, bytes_of) for share in SHARES}
            for name, bytes_of in (("uplink", uplink), ("total", total))
        },
        "area": {
            name: spread({s: area_between(a, b, bytes_of) for s, (a, b) in pairs.items()})
            for name, bytes_of in (("uplink", uplink), ("total", total))
        },
        "uplink_bytes": spread(sent),
        "bytes_per_packet": spread({s: t["bytes_per_packet"] for s, t in traffic.items()}),
        "bits_per_parameter": spread({s: t["bits_per_parameter"] for s, t in traffic.items()}),
        "times_fewer_than_fp32": spread(
            {s: t["times_fewer_than_fp32"] for s, t in traffic.items()}
        ),
        "times_fewer_than_reference": spread(whole),
    }


def spread(by_seed: Mapping[int, float | None]) -> dict[str, Any]:
    """Mean, standard deviation and standard error over seeds, and the values themselves.

    Where a seed has no value there is no mean either: one over the lucky seeds would mislead.
    """
    values = [value for value in by_seed.values() if value is not None]
    whole = bool(values) and len(values) == len(by_seed)
    deviation = statistics.stdev(values) if whole and len(values) > 1 else None
    return {
        "mean": statistics.fmean(values) if whole else None,
        "stdev": deviation,
        "standard_error": deviation / len(values) ** 0.5 if deviation is not None else None,
        "n": len(values),
        "by_seed": {str(seed): value for seed, value in by_seed.items()},
    }


def _by_round(pairs: Mapping[int, tuple[list[Point], list[Point]]]) -> list[dict[str, Any]]:
    kept = {seed: gain_kept_by_round(a, b) for seed, (a, b) in pairs.items()}
    rounds: Iterable[int] = sorted({round_ for shares in kept.values() for round_ in shares})
    return [
        {"round": r, **spread({seed: shares.get(r) for seed, shares in kept.items()})}
        for r in rounds
    ]


def _reached(
    pairs: Mapping[int, tuple[list[Point], list[Point]]], share: float, bytes_of: Bytes
) -> dict[str, Any]:
    """As `spread`; `reached` counts the seeds that got there."""
    found = {seed: bytes_to_share(a, b, share, bytes_of) for seed, (a, b) in pairs.items()}
    result = spread(found)
    result["reached"] = result.pop("n")
    result["of"] = len(found)
    return result
