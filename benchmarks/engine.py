"""What the in-process engine costs beyond training, and how memory grows with clients.

    python benchmarks/engine.py

Each run has a process of its own, so that peak memory is its own. Overhead is everything in a
round but training and evaluation: coding, copying, aggregating, checkpoints, bookkeeping.
Memory is measured with the `raw` codec, full participation, and one training step a client: the
worst case for a server that would keep every client's update.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from typing import Any

from common import spread, touch_memory, write_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--few", type=int, default=4)
    parser.add_argument("--many", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(_run(json.loads(options.one))))
        return
    touch_memory()
    overhead = {}
    for codec in ("raw", "int8"):
        rows = _in_process(
            {"clients": options.few, "rounds": options.rounds, "codec": codec, "steps": 4}
        )
        # the first round also tokenises and warms up
        shares = [1 - (r["train"] + r["evaluate"]) / r["total"] for r in rows["seconds"][2:]]
        overhead[codec] = {
            "share_of_round": spread(shares),
            "seconds_of_last_round": rows["seconds"][-1],
        }
        print(codec, overhead[codec]["share_of_round"])
    memory = {
        str(n): _in_process({"clients": n, "rounds": 1, "codec": "raw", "steps": 1})["peak_mib"]
        for n in (options.few, options.many)
    }
    ratio = memory[str(options.many)] / memory[str(options.few)]
    print(f"peak memory {memory}, ratio {ratio:.3f}")
    path = write_result(
        "engine",
        {
            "what": "in-process engine, embedded model, demo rows",
            "overhead": overhead,
            "peak_memory_mib_by_clients": memory,
            "memory_ratio": ratio,
        },
    )
    print(path)


def _in_process(job: dict[str, Any]) -> Any:
    done = subprocess.run(
        [sys.executable, __file__, "--one", json.dumps(job)],
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
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


if __name__ == "__main__":
    main()
