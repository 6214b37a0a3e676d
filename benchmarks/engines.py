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
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import tomli_w
from common import spread, touch_memory, write_result

BIN = Path(sys.executable).parent
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
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = prepare(folder)
        (folder / "job.toml").write_text(tomli_w.dumps(job(folder, clients)))
        command = [str(BIN / "cgfedllm"), "run", str(folder / "job.toml")]
        superlink = None
        if engine == "simulation":
            superlink = start_superlink(folder, environment)
            resources = f"num-supernodes={clients} client-resources-num-cpus=1"
            command += ["--superlink", "bench", "--federation-config", resources]
        began = time.perf_counter()
        run = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
        )
        with Memory(run.pid, *([superlink.pid] if superlink else [])) as memory:
            if run.wait():
                raise SystemExit(f"{engine} with {clients} clients failed")
        seconds = time.perf_counter() - began
        if superlink is not None:
            stop(superlink)
        lines = (folder / "runs/engines/metrics.jsonl").read_text().splitlines()
        last = json.loads(lines[-1])
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


def prepare(folder: Path) -> dict[str, str]:
    """Flower's own home, with a connection called `bench`."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
    home = folder / "flower"
    home.mkdir()
    connection = {"address": address, "insecure": True}
    settings = {"superlink": {"default": "bench", "bench": connection}}
    (home / "config.toml").write_text(tomli_w.dumps(settings))
    return {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "XDG_STATE_HOME": str(folder / "state"),
        "ADDRESS": address,
    }


def start_superlink(folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    host, port = environment["ADDRESS"].split(":")
    program = [str(BIN / "flower-superlink"), "--insecure", "--simulation"]
    with (folder / "superlink.log").open("wb") as log:
        started = subprocess.Popen(
            [*program, "--disable-runtime-dependency-installation", "--host", host, "--port", port],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
        )
    while started.poll() is None:
        try:
            if httpx.get(f"http://{host}:{port}/health").is_success:
                return started
        except httpx.HTTPError:
            time.sleep(0.2)
    raise SystemExit((folder / "superlink.log").read_text())


def stop(process: subprocess.Popen[bytes]) -> None:
    own = psutil.Process(process.pid)
    for one in [*own.children(recursive=True), own]:
        one.kill()
    process.wait()


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
