"""Faults of all kinds in a long run, and a kill at every point of a short one: what came of it.

    python benchmarks/faults.py

The soak: 200 clients, 50 rounds, three in ten fail in every round, each in one of thirteen ways;
the same run without faults beside it, each in a process of its own. Seconds are processor time:
what a machine without other work would take. The kills: a run is ended by SIGKILL at one point,
resumed, and compared with one that nobody stopped.

Runs, points and faults are those of the tests (tests/federation: soak.py, fault_injection.py,
kill_and_resume.py), on their tiny model. `python benchmarks/faults_page.py` puts the numbers into
docs/faults.md.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", FLWR_TELEMETRY_ENABLED="0", CUDA_VISIBLE_DEVICES="")

import argparse
import gc
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from common import write_result

import cgfedllm
from cgfedllm import events
from cgfedllm.config import load_config
from cgfedllm.metrics import RoundRecord

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "federation"))

import fault_injection
import kill_and_resume
import learned_codecs
import soak
from outcome import read_outcome

import tiny

# what a run of each kind is killed in, each point in a run of its own, and what it is set to
KILLED: dict[str, tuple[list[str], list[str]]] = {
    "three rounds": ([*kill_and_resume.POINTS, kill_and_resume.DAMAGED], []),
    "then a flush": ([*kill_and_resume.FLUSH_POINTS], ["uplink.flush=int8"]),
    "a codec that adapts": (
        [*kill_and_resume.CODEC_POINTS],
        [f"uplink.name={learned_codecs.MEAN}", "uplink.adapt_every=1"],
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("one", nargs="?", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(soaked(options.one)))
        return
    long: dict[str, Any] = {
        "clients": soak.CLIENTS,
        "rounds": soak.ROUNDS,
        "share": soak.SHARE,
        "settings": soak.SETTINGS,
    }
    kills: list[dict[str, Any]] = []
    content = {"what": __doc__.split("\n")[0], "soak": long, "kills": kills}
    # written as it grows: all of it takes a while
    for name, share in (("faults", soak.SHARE), ("none", 0.0)):
        long[name] = in_a_process(share)
        write_result("faults", content)
    for what, (points, settings) in KILLED.items():
        kills += killed(what, points, settings)
        print(write_result("faults", content), flush=True)


# ---- the soak -----------------------------------------------------------------------------------


def in_a_process(share: float) -> dict[str, Any]:
    """As `soaked`, in a process of its own."""
    command = [sys.executable, __file__, str(share)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def soaked(share: float) -> dict[str, Any]:
    """The long run, with that share of clients failing in every round."""
    process = psutil.Process()
    memory: list[int] = []
    files: list[int] = []
    clock: list[float] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.RoundFinished):
            gc.collect()
            memory.append(process.memory_info().rss)
            files.append(process.num_fds())
            clock.append(time.process_time())

    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        many = soak.write_many(folder / "many.jsonl")
        model = tiny.write_model(folder / "model", tiny.build_tokenizer())
        base = tiny.settings(model, many, folder / "runs")
        config = load_config(None, [*base, *soak.SETTINGS])
        plan = fault_injection.at_random(soak.SEED, share)
        grids = fault_injection.install(patch, plan)
        records = cgfedllm.run(config, listeners=[listen]).records
        return {
            **told(grids[0].happened, records),
            "heldout_nll": {r.round: r.heldout_nll for r in records if r.heldout_nll is not None},
            # by round, from round 1
            "resident_mib": [round(bytes_ / 2**20, 1) for bytes_ in memory[1:]],
            "open_files": files[1:],
            "round_cpu_seconds": [round(b - a, 3) for a, b in itertools.pairwise(clock)],
        }


def told(happened: list[tuple[str, int, str]], records: tuple[RoundRecord, ...]) -> dict[str, Any]:
    """What was done to clients, and what the server wrote down of it, by kind.

    A reply that is late is told of twice: when its round ends without it, and when it comes. A
    second reply is told of when it comes: after the last one of a round, that is in the next.
    """
    left = {record.round: list(record.failures) for record in records}
    written = sum(map(len, left.values()))

    def take(round_: int, client: str, reason: str) -> bool:
        for at, failure in enumerate(left.get(round_, [])):
            if failure.client == client and reason in failure.reason:
                del left[round_][at]
                return True
        return False

    kinds = {kind: {"injected": 0, "recorded": 0} for kind in fault_injection.KINDS}
    late = {"injected": 0, "recorded": 0}
    for client, round_, kind in happened:
        kinds[kind]["injected"] += 1
        reason = fault_injection.REASONS[kind]
        found = take(round_, client, reason)
        if kind == "twice":
            found = found or take(round_ + 1, client, reason)
        kinds[kind]["recorded"] += found
        if kind == "late" and round_ < soak.ROUNDS:
            late["injected"] += 1
            late["recorded"] += take(round_ + 1, client, fault_injection.REASONS["twice"])
    lost = sum(counts["injected"] for kind, counts in kinds.items() if kind != "twice")
    return {
        "kinds": kinds,
        "late replies that came": late,
        "failures": written,
        "failures_without_a_fault": sum(map(len, left.values())),
        "updates_expected": soak.CLIENTS * soak.ROUNDS - lost,
        "updates_used": sum(len(record.clients) for record in records),
    }


# ---- the kills ----------------------------------------------------------------------------------


def killed(what: str, points: list[str], settings: list[str]) -> list[dict[str, Any]]:
    """A row for each point, at which a run is killed once and resumed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = tiny.write_model(folder / "model", tiny.build_tokenizer())
        base = tiny.settings(model, tiny.write_rows(folder / "rows.jsonl"), folder / "runs")
        file = folder / "config.toml"
        overrides = [*base, *kill_and_resume.SETTINGS, *settings]
        file.write_text(load_config(None, overrides).to_toml())
        command = [sys.executable, kill_and_resume.__file__, str(file)]
        done = subprocess.run(
            [*command, "unbroken", *points], check=True, stdout=subprocess.PIPE, text=True
        )
        runs = json.loads(done.stdout.splitlines()[-1])
        unbroken = read_outcome(Path(runs["unbroken"]["run_dir"]))
        rows = []
        for point in points:
            broken = read_outcome(Path(runs[point]["run_dir"]))
            again = len(runs[point]["rounds_begun"]) - len(runs["unbroken"]["rounds_begun"])
            rows.append(
                {
                    "run": what,
                    "killed": point,
                    "kills": runs[point]["kills"],
                    "same_adapter": broken["adapter"] == unbroken["adapter"],
                    "same_metrics": broken["rounds"] == unbroken["rounds"],
                    "rounds_begun_again": again,
                }
            )
        return rows


if __name__ == "__main__":
    main()
