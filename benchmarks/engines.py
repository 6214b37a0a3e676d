"""The same run in this process and on Flower's simulation engine: time and memory, side by side.

    python benchmarks/engines.py                  (needs `pip install "cgfedllm[simulation]"`)

Runs of 4, 20 and 100 clients, all of whom take part in one round of one training step, on each
engine in turn, `--repeats` times. The round is the second of two, so that both engines have loaded
what they need. Memory is the peak of the proportional set sizes of all processes of the run: what
processes share is counted once.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import tomli_w
from common import spread, touch_memory, write_result

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "federation"))

from deployment import Loopback

CLIENTS = (4, 20, 100)
ENGINES = ("in-process", "simulation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    touch_memory()
    results: dict[str, Any] = {}
    for clients in options.clients:
        measured: dict[str, list[dict[str, float]]] = {engine: [] for engine in ENGINES}
        for _ in range(options.repeats):
            for engine in ENGINES:
                measured[engine].append(measure(engine, clients))
                print(clients, engine, measured[engine][-1], flush=True)
        check_equal(measured)
        results[str(clients)] = {
            engine: {
                name: spread([run[name] for run in runs])
                for name in ("round_seconds", "run_seconds", "peak_mib")
            }
            for engine, runs in measured.items()
        }
    what = (
        "embedded model, demo rows, uplink lowrank at 0.2 bpp, full participation, one training "
        "step of 4 rows a client; simulation: Ray, one CPU a client"
    )
    print(write_result("engines", {"what": what, "by_clients": results}))


def check_equal(measured: dict[str, list[dict[str, float]]]) -> None:
    """The engine must not show in what comes out."""
    losses = {round(run["nll"], 4) for runs in measured.values() for run in runs}
    if len(losses) > 1:
        raise SystemExit(f"the engines end with different losses: {sorted(losses)}")


def measure(engine: str, clients: int) -> dict[str, float]:
    """One run, in processes of its own."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        here = Loopback(folder)
        here.connect("bench", insecure=True)
        (folder / "job.toml").write_text(tomli_w.dumps(job(folder, clients)))
        command = ["cgfedllm", "run", str(folder / "job.toml")]
        running = []
        if engine == "simulation":
            running.append(stack.enter_context(here.start("--insecure", "--simulation")))
            resources = f"num-supernodes={clients} client-resources-num-cpus=1"
            command += ["--superlink", "bench", "--federation-config", resources]
        began = time.perf_counter()
        run = stack.enter_context(here.process(*command, log="run.log"))
        running.append(run)
        with Memory(*(process.pid for process in running)) as memory:
            failed = run.wait(None)
        seconds = time.perf_counter() - began
        metrics = folder / "runs/engines/metrics.jsonl"
        if failed or not metrics.exists():
            raise SystemExit(f"{engine} with {clients} clients failed:\n{run.log}")
        last = json.loads(metrics.read_text().splitlines()[-1])
        return {
            "round_seconds": last["seconds"]["total"] - last["seconds"]["evaluate"],
            "run_seconds": seconds,
            "peak_mib": memory.peak / 2**20,
            "nll": last["heldout_nll"],
        }


def job(folder: Path, clients: int) -> dict[str, Any]:
    return {
        "name": "engines",
        "output": str(folder / "runs"),
        "data": {
            "max_length": 128,
            "partition": {"kind": "iid", "clients": clients},
            "splits": {"max_heldout_rows": 16},
        },
        "training": {"local_steps": 1, "batch_size": 4},
        "federation": {"rounds": 2, "min_clients": clients},
        "uplink": {"name": "lowrank", "options": {"bpp": 0.2}},
        "evaluation": {"clients": False},
        "tracking": {"tensorboard": False},
    }


class Memory:
    """Peak memory of processes and all they start, looked at twice a second."""

    def __init__(self, *roots: int) -> None:
        self.peak = 0
        self._roots = [psutil.Process(root) for root in roots]
        self._done = threading.Event()
        self._watch = threading.Thread(target=self._look)

    def __enter__(self) -> Memory:
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watch.join()

    def _look(self) -> None:
        while not self._done.wait(0.5):
            total = 0
            for root in self._roots:
                try:
                    for one in [root, *root.children(recursive=True)]:
                        total += one.memory_full_info().pss
                except psutil.Error:  # gone meanwhile
                    continue
            self.peak = max(self.peak, total)


if __name__ == "__main__":
    main()
