"""What the drop-in does to a plain Flower app: the quickstart in examples/, codec by codec.

    python benchmarks/drop_in.py

Two things. *Federated*: accuracy on held-out rows, and bytes up, of whole runs; nothing differs but
the codec. *Open loop*: how well each codec keeps the changes of that network's dense and
convolutional weights at one rate, which is why the drop-in has no other codec for them.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import spread, write_result
from flwr.app import ArrayRecord, Context, RecordDict

from cgfedllm.adapter import AdapterUpdate
from cgfedllm.federation.inprocess import InProcessGrid
from cgfedllm.flower.arrays import Layout, read_arrays
from cgfedllm.flower.choice import choose

EXAMPLE = Path(__file__).parent.parent / "examples" / "flower_quickstart"
sys.path.insert(0, str(EXAMPLE))

from digits import client_app, server_app, task  # noqa: E402

PLAIN = "plain"
FEDERATED = (PLAIN, "int8", "ecsq:bpp=1", "lowrank:bpp=1", "ecsq:bpp=0.2", "lowrank:bpp=0.2")
OPEN_LOOP = ("lowrank", "ecsq", "topk", "eden", "dct", "learned")
RATES = (0.2, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    logging.getLogger("flwr").disabled = True
    config = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["tool"]["flwr"]["app"][
        "config"
    ]
    federated = {}
    for codec in FEDERATED:
        runs = [_run(config, codec, seed, options.clients) for seed in options.seeds]
        federated[codec] = {
            "accuracy": spread([run["accuracy"][-1] for run in runs]),
            "accuracy_by_round": [run["accuracy"] for run in runs],
            "bytes_per_reply": runs[0]["bytes_per_reply"],
            "times_fewer": runs[0]["times_fewer"],
        }
        print(codec, federated[codec]["accuracy"], federated[codec]["times_fewer"])
    content = {
        "what": f"examples/flower_quickstart, {options.clients} clients, "
        f"{config['num-server-rounds']} rounds, FedAvg, seeds {options.seeds}, in-process engine",
        "federated": federated,
        "open_loop_snr_db": _open_loop(config, options.clients),
    }
    print(write_result("drop_in", content))


def _run(config: dict[str, Any], codec: str, seed: int, clients: int) -> dict[str, Any]:
    run_config = {**config, "codec": "" if codec == PLAIN else codec, "seed": seed}
    contexts = {
        index + 2: _context(
            index + 2, run_config, {"partition-id": index, "num-partitions": clients}
        )
        for index in range(clients)
    }
    random.seed(seed)  # Flower's order of clients, on which the last bits of a mean depend
    grid = InProcessGrid(client_app.app, contexts)
    result = server_app.federate(grid, _context(1, run_config, {}))
    plain = sum(values.nbytes for values in _arrays(task.Net()).values())
    metrics = result.train_metrics_clientapp.values()
    sent = [m.get("cgfedllm-uplink-bytes", clients * plain) / clients for m in metrics]
    return {
        "accuracy": [m["accuracy"] for m in result.evaluate_metrics_serverapp.values()],
        "bytes_per_reply": round(float(np.mean(sent))),
        "times_fewer": round(plain / float(np.mean(sent)), 1),
    }


def _open_loop(config: dict[str, Any], clients: int) -> dict[str, dict[str, float]]:
    """Signal-to-noise ratio, pooled over the changes of all clients in three rounds."""
    signal = 0.0
    noise = {f"{codec}:bpp={rate:g}": 0.0 for codec in OPEN_LOOP for rate in RATES}
    torch.manual_seed(0)
    model = task.Net()
    for round_ in (1, 2, 3):
        held = _arrays(model)
        layout = Layout(held, {name: values.dtype for name, values in held.items()})
        assert layout.spec is not None
        changes = []
        for index in range(clients):
            own = task.Net()
            own.load_state_dict(model.state_dict())
            rows = task.partition(index, clients)
            task.train(own, rows, epochs=config["local-epochs"], lr=config["lr"], seed=round_)
            change = layout.change(layout.spec, _arrays(own))
            signal += change.norm() ** 2
            for name in noise:
                choice = choose(name)
                context = choice.context(layout, layout.spec, round_)
                packet = choice.codec.encode(change, context)
                noise[name] += (change - choice.codec.decode(packet, context)).norm() ** 2
            changes.append(change.vector)
        mean = AdapterUpdate(layout.spec, np.mean(changes, axis=0, dtype=np.float32))
        after = {n: torch.from_numpy(a) for n, a in layout.changed(mean).items()}
        model.load_state_dict(after, strict=False)
    snr = {name: round(10 * float(np.log10(signal / own)), 2) for name, own in noise.items()}
    return {
        codec: {f"{rate:g} bpp": snr[f"{codec}:bpp={rate:g}"] for rate in RATES}
        for codec in OPEN_LOOP
    }


def _arrays(model: torch.nn.Module) -> dict[str, Any]:
    return read_arrays(ArrayRecord(model.state_dict()))


def _context(node: int, run_config: dict[str, Any], node_config: dict[str, Any]) -> Context:
    return Context(
        run_id=1, node_id=node, node_config=node_config, state=RecordDict(), run_config=run_config
    )


if __name__ == "__main__":
    main()
