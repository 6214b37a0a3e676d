"""What the in-process engine costs beyond training, and how memory grows with clients.

    python benchmarks/engine.py overhead
    python benchmarks/engine.py memory

Each run has a process of its own, so that peak memory is its own. Overhead is everything in a
round but training and evaluation: coding, copying, aggregating, checkpoints, bookkeeping.
Memory is measured with the `raw` codec, full participation, and one training step a client: the
worst case for a server that would keep every client's update.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import spread, touch_memory, write_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("overhead", "memory", "one"))
    parser.add_argument("job", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--few", type=int, default=4)
    parser.add_argument("--many", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.what == "one":
        print(json.dumps(_run(json.loads(options.job))))
    elif options.what == "overhead":
        _overhead(options.few, options.rounds)
    else:
        _memory(options.few, options.many)


def _overhead(clients: int, rounds: int) -> None:
    touch_memory()
    results = {}
    for codec in ("raw", "int8"):
        job = {"clients": clients, "rounds": rounds, "codec": codec, "steps": 4}
        seconds = _in_process(job)["seconds"]
        # the first round also tokenises and warms up
        shares = [1 - (r["train"] + r["evaluate"]) / r["total"] for r in seconds[2:]]
        results[codec] = {"share_of_round": spread(shares), "seconds_of_last_round": seconds[-1]}
        print(codec, results[codec]["share_of_round"])
    what = (
        f"in-process engine, embedded model, demo rows, {clients} clients, 4 local steps of 4 rows"
    )
    print(write_result("engine_overhead", {"what": what, "overhead": results}))


def _memory(few: int, many: int) -> None:
    peaks = {
        str(clients): _in_process({"clients": clients, "rounds": 1, "codec": "raw", "steps": 1})[
            "peak_mib"
        ]
        for clients in (few, many)
    }
    ratio = peaks[str(many)] / peaks[str(few)]
    print(f"peak memory {peaks}, ratio {ratio:.3f}")
    what = "in-process engine, embedded model, demo rows, raw codec, full participation"
    content = {"what": what, "peak_memory_mib_by_clients": peaks, "ratio": ratio}
    print(write_result("engine_memory", content))


def _in_process(job: dict[str, Any]) -> Any:
    done = subprocess.run(
        [sys.executable, __file__, "one", json.dumps(job)],
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def _run(job: dict[str, Any]) -> dict[str, Any]:
    import cgfedllm

    with tempfile.TemporaryDirectory() as folder:
        config = cgfedllm.load_config(
            None,
            [
                f'output="{folder}"',
                "data.partition.kind=iid",
                f"data.partition.clients={job['clients']}",
                "data.max_length=128",
                "data.splits.max_heldout_rows=16",
                f"training.local_steps={job['steps']}",
                "training.batch_size=4",
                f"federation.rounds={job['rounds']}",
                f"uplink.name={job['codec']}",
                f"downlink.name={job['codec']}",
                "evaluation.clients=false",
            ],
        )
        result = cgfedllm.run(config)
    return {
        "seconds": [record.seconds for record in result.records],
        "peak_mib": _peak_mib(),
    }


def _peak_mib() -> float:
    """Peak resident memory; `getrusage` would report the parent's if that was larger."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
