"""A long run of many clients of whom three in ten fail in every round."""

from __future__ import annotations

import json
from pathlib import Path

CLIENTS, ROUNDS = 200, 50
# how many fail in a round, and the seed that says who and how
SHARE, SEED = 0.3, 7
TIMEOUT = 30

SETTINGS = (
    "data.partition.min_rows=1",
    "data.splits.validation=0.0",
    "data.splits.heldout=0.1",
    "data.max_length=48",
    "training.local_steps=1",
    "training.batch_size=2",
    "uplink.name=int8",
    "downlink.name=int8",
    "evaluation.clients=false",
    "evaluation.every=10",
    f"federation.rounds={ROUNDS}",
    f"federation.timeout={TIMEOUT}",
)


def write_many(path: Path) -> Path:
    """JSONL file of all clients, with four rows each."""
    rows = [
        {"client": f"c{client:03d}", "question": f"what is {at} of {client}", "answer": f"{at}"}
        for client in range(CLIENTS)
        for at in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
