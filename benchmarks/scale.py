"""What one round takes the server, for 10 to 10,000 clients, without a model or a network.

    python benchmarks/scale.py costs
    python benchmarks/scale.py limits

`costs` measures, `limits` lets `cgfedllm plan --server` tell what ends first on this machine.

Updates are made up, each packet is encoded once and decoded as often as there are clients, through
the strategy that a run uses; replies are made as they are taken. Times are of one core and
per client, medians of several rounds after a first one that is not counted. Memory is what Python
and numpy allocate at most during a round, in a process of its own, as multiples of the adapter's
float32 bytes. Seconds are processor time: what a machine without other work would take.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")

import argparse
import json
import logging
import subprocess
import sys
import tracemalloc
from typing import Any

from common import RESULTS, spread, touch_memory, write_result

from cgfedllm.adapter import AdapterSpec
from cgfedllm.codecs import make_codec
from cgfedllm.config import FederationConfig, load_config
from cgfedllm.federation.rehearsal import Rehearsal
from cgfedllm.plan import make_plan

# name: layers, width, width of values, rank of adapters on q and v (and k and o)
MODELS: dict[str, tuple[int, tuple[tuple[str, int, int], ...], int]] = {
    "SmolLM2-135M, q k v o, r=8": (
        30,
        (("q", 576, 576), ("k", 576, 192), ("v", 576, 192), ("o", 576, 576)),
        8,
    ),
    "SmolLM2-135M, q k v o, r=1": (
        30,
        (("q", 576, 576), ("k", 576, 192), ("v", 576, 192), ("o", 576, 576)),
        1,
    ),
    "LLaMA-7B, q v, r=16": (32, (("q", 4096, 4096), ("v", 4096, 4096)), 16),
}
CODECS: dict[str, dict[str, Any]] = {
    "raw": {},
    "int8": {},
    "sign": {},
    "zstd": {},
    "qsgd": {"bpp": 0.5},
    "ecsq": {"bpp": 0.1},
    "topk": {"bpp": 0.1},
    "lowrank": {"bpp": 0.05},
    "learned": {"bpp": 0.02},
}
TIMED = 8
SMALL, SMALLEST = "SmolLM2-135M, q k v o, r=8", "SmolLM2-135M, q k v o, r=1"
TIMED_MODELS = (SMALL, "LLaMA-7B, q v, r=16")
# [federation] tables: those that are handed the mean, and those that need every reply
STREAMED: dict[str, dict[str, Any]] = {
    name: {"strategy": {"name": name}} for name in ("fedavg", "fedavgm", "fedadam", "fedyogi")
} | {"sum": {"aggregation": "sum"}}
WHOLE: dict[str, dict[str, Any]] = {
    name: {"strategy": {"name": name}} for name in ("median", "trimmed_mean", "krum")
} | {"product": {"aggregation": "product"}}
MEMORY = [("fedavg", SMALL, clients) for clients in (10, 100, 1_000)]
MEMORY += [("fedavg", SMALLEST, clients) for clients in (10, 10_000)]
MEMORY += [(name, SMALL, clients) for name in STREAMED if name != "fedavg" for clients in (10, 40)]
MEMORY += [(name, SMALL, clients) for name in WHOLE for clients in (10, 40, 100)]
# a raw adapter down is the default; a coded one is an increment on what clients hold
DOWN = ("downlink.name=int8", "evaluation.clients=false")
LIMITS: list[tuple[str, ...]] = [
    ("uplink.name=raw",),
    ("uplink.name=int8",),
    ("uplink.name=int8", *DOWN),
    ("uplink.name=ecsq", "uplink.options.bpp=0.1", *DOWN),
    ("uplink.name=learned", "uplink.options.bpp=0.02", *DOWN),
    ("uplink.name=int8", "federation.strategy.name=krum", *DOWN),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("costs", "limits", "one"))
    parser.add_argument("job", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--runs", type=int, default=5, help="measured rounds, after a first one")
    parser.add_argument("--quick", action="store_true", help="tiny; writes nothing")
    options = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    if options.what == "one":
        print(json.dumps(peak(json.loads(options.job))))
    elif options.quick:
        print(times(SMALLEST, "int8", 1), peak_of("fedavg", SMALLEST, 10))
    elif options.what == "limits":
        limits()
    else:
        costs(options.runs)


def costs(runs: int) -> None:
    touch_memory(2.0)
    seconds = []
    for model in TIMED_MODELS:
        for codec in CODECS:
            seconds.append(times(model, codec, runs))
            print(seconds[-1], flush=True)
    memory = []
    for job in MEMORY:
        memory.append(peak_of(*job))
        print(memory[-1], flush=True)
    content = {"what": __doc__.split("\n")[0], "seconds": seconds, "memory": memory}
    print(write_result("scale", content))
    draw(seconds, memory)


def limits() -> None:
    """Plans of the embedded model's adapter; clients with 10 Mbit/s up and 50 down."""
    rows = []
    for settings in LIMITS:
        config = load_config(None, list(settings))
        for seconds in (0.0, 60.0):
            plan = make_plan(config, clients=100, server_mbit=1_000.0, training_seconds=seconds)
            assert plan.server is not None
            rows.append(
                {
                    "settings": settings,
                    "uplink_packet": plan.uplink.packet,
                    "round_seconds_of_a_client": plan.round_seconds,
                    "reply_ms": 1e3 * plan.server.reply_seconds,
                    "training_seconds": seconds,
                    "server_mbit": 1_000.0,
                    "suffices_up_to_clients": plan.server.to_dict()["limits"],
                }
            )
            print(rows[-1], flush=True)
    print(write_result("scale_limits", {"what": __doc__.split("\n")[0], "plans": rows}))


def rehearsal(model: str, codec: str, strategy: str) -> tuple[AdapterSpec, Rehearsal]:
    spec = lora_spec(*MODELS[model])
    uplink = make_codec(codec, CODECS[codec])
    federation = FederationConfig.model_validate((STREAMED | WHOLE)[strategy])
    state = uplink.initial_state(spec)
    return spec, Rehearsal(federation, spec, uplink, make_codec("raw"), state)


def times(model: str, codec: str, runs: int) -> dict[str, Any]:
    spec, made = rehearsal(model, codec, "fedavg")
    made.round(TIMED)
    rounds = [made.round(TIMED) for _ in range(runs)]
    return {
        "model": model,
        "parameters": spec.size,
        "codec": codec,
        **CODECS[codec],
        "packet_bytes": rounds[0].packet,
        "decode_ms": spread([1e3 * r.decode_seconds / TIMED for r in rounds]),
        "aggregate_ms": spread([1e3 * r.aggregate_seconds / TIMED for r in rounds]),
        "broadcast_ms": spread([1e3 * r.broadcast_seconds / TIMED for r in rounds]),
        "reply_ms": spread([1e3 * r.reply_seconds for r in rounds]),
    }


def peak_of(strategy: str, model: str, clients: int) -> dict[str, Any]:
    """As `peak`, in a process of its own."""
    job = {"strategy": strategy, "model": model, "clients": clients}
    command = [sys.executable, __file__, "one", json.dumps(job)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def peak(job: dict[str, Any]) -> dict[str, Any]:
    spec, made = rehearsal(job["model"], "sign", job["strategy"])
    made.round(2)
    tracemalloc.start()
    took = made.round(job["clients"])
    allocated = tracemalloc.get_traced_memory()[1]
    return {
        **job,
        "parameters": spec.size,
        "codec": "sign",
        "peak_bytes": allocated,
        "adapters": allocated / (4 * spec.size),
        "round_seconds": took.reply_seconds * job["clients"],
    }


def lora_spec(layers: int, modules: tuple[tuple[str, int, int], ...], rank: int) -> AdapterSpec:
    shapes = {}
    for layer in range(layers):
        for module, width, out in modules:
            stem = f"base_model.model.model.layers.{layer}.self_attn.{module}_proj"
            shapes[f"{stem}.lora_A.weight"] = (rank, width)
            shapes[f"{stem}.lora_B.weight"] = (out, rank)
    return AdapterSpec.from_shapes(shapes)


def draw(seconds: list[dict[str, Any]], memory: list[dict[str, Any]]) -> None:
    from cgfedllm.report.figures.style import new_figure, save

    figure, (left, right) = new_figure(1, 2, width=9.0, height=4.0)
    for model, shade in zip(TIMED_MODELS, ("#1f77b4", "#ff7f0e"), strict=True):
        rows = [row for row in seconds if row["model"] == model]
        values = [row["reply_ms"]["median"] for row in rows]
        left.plot(values, range(len(rows)), "o", color=shade, label=model)
        left.set_yticks(range(len(rows)), [row["codec"] for row in rows])
    left.set_xscale("log")
    left.set_xlabel("server time a client, ms on one core")
    left.legend(fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    for strategy in dict.fromkeys(row["strategy"] for row in memory):
        rows = [row for row in memory if row["strategy"] == strategy and row["model"] == SMALL]
        points = [row["clients"] for row in rows], [row["adapters"] for row in rows]
        right.plot(*points, "o-", label=strategy)
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlabel("clients a round")
    right.set_ylabel("peak memory, adapters in float32")
    right.legend(fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    save(figure, RESULTS / "scale")


if __name__ == "__main__":
    main()
