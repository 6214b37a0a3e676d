"""Two of nine clients lie, through the codec: what each strategy keeps of the clean run.

    python benchmarks/robust.py configs/compare-medquad.toml

Every row is a run of its own, from the same start on the same split, of a few rounds over a lossy
codec with error feedback. Rows that the results file has already are left as they are; delete it to
measure all of them anew. `python benchmarks/robust_page.py` puts them into docs/robustness.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attacks import attack
from common import RESULTS, write_result

import cgfedllm
from cgfedllm.config import Config, load_config
from cgfedllm.federation import engine
from cgfedllm.federation.client_app import make_client_app
from cgfedllm.metrics import RoundRecord

ROUNDS = 4
# few rows and steps, so that a run takes a minute; the higher rate makes up for it
SETTINGS = {
    "uplink.name": "lowrank",
    "uplink.options": {"bpp": 0.2},
    "federation.rounds": ROUNDS,
    "training.local_steps": 2,
    "training.batch_size": 1,
    "training.lr": 1e-3,
    "data.max_length": 32,
    "data.splits.max_heldout_rows": 32,
    "evaluation.every": 0,
}
LIARS = 2
# each takes the number of liars as known
DEFENCES: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "median": {"federation.strategy.name": "median"},
    # 0.25 of nine clients: two at either end
    "trimmed_mean": {"federation.strategy.name": "trimmed_mean", "federation.strategy.trim": 0.25},
    "krum": {"federation.strategy.name": "krum", "federation.strategy.malicious": LIARS},
    "fedavg, screening": {"federation.screening.mode": "reject"},
}


def planned() -> Iterator[dict[str, str]]:
    """The rows, those that say most first."""
    yield {"attack": "none", "defence": "fedavg"}
    for kind in ("flip5", "scale10", "noise", "flip"):
        yield from ({"attack": kind, "defence": defence} for defence in DEFENCES)
    yield from ({"attack": "none", "defence": name} for name in DEFENCES if name != "fedavg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    options = parser.parse_args()
    config = load_config(options.config).with_overrides(SETTINGS)
    done = RESULTS / "robust.json"
    rows: list[dict[str, Any]] = json.loads(done.read_text())["results"] if done.exists() else []
    for row in planned():
        if any(row.items() <= old.items() for old in rows):
            continue
        rows.append({**row, **measured(config, **row)})
        print(rows[-1], flush=True)
        content = {
            "what": __doc__.split("\n")[0],
            "config": options.config.name,
            "settings": SETTINGS,
            "defences": DEFENCES,
            "results": rows,
        }
        write_result("robust", content)


def measured(config: Config, attack: str, defence: str) -> dict[str, Any]:
    """One run, and what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        changes = {**DEFENCES[defence], "output": folder, "name": "robust"}
        records, liars = run(config.with_overrides(changes), attack)
    return {
        "liars": liars,
        "heldout_nll": {r.round: r.heldout_nll for r in records if r.heldout_nll is not None},
        "uplink_bytes": records[-1].uplink_bytes_total,
        "screened": screened(records[1:], set(liars)),
    }


def run(config: Config, kind: str) -> tuple[list[RoundRecord], list[str]]:
    """Run with the first clients by name as liars."""
    names = client_names(config)
    liars = [] if kind == "none" else names[:LIARS]
    mods = [attack(kind, liars)] if liars else []
    # the embedded engine makes the clients; these lie
    engine.make_client_app = lambda: make_client_app(*mods)
    result = cgfedllm.run(config)
    if result.interrupted:
        sys.exit("stopped; rows that were finished are kept")
    return list(result.records), liars


def client_names(config: Config) -> list[str]:
    from cgfedllm.workspace import workspace_for

    workspace = workspace_for(config.to_toml(), str(config.run_dir))
    return sorted(client.name for client in workspace.data.clients)


def screened(records: list[RoundRecord], liars: set[str]) -> dict[str, Any]:
    """Of updates of liars and of others: how many were found odd, and by what margin."""
    found: dict[str, Any] = {}
    for kind, of_liars in (("liars", True), ("honest", False)):
        rows = [c for r in records for c in r.clients if (c.client in liars) == of_liars]
        out = [
            f
            for r in records
            for f in r.failures
            if (f.client in liars) == of_liars and f.reason.startswith("screened out")
        ]
        ratios = [c.norm_ratio for c in rows if c.norm_ratio is not None]
        cosines = [c.cosine for c in rows if c.cosine is not None]
        found[kind] = {
            "updates": len(rows) + len(out),
            "odd": sum(bool(c.suspicion) for c in rows) + len(out),
            "norm_ratio": [min(ratios), max(ratios)] if ratios else None,
            "cosine": [min(cosines), max(cosines)] if cosines else None,
        }
    return found


if __name__ == "__main__":
    main()
