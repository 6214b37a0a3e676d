"""What two runs must have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cgfedllm.runs import RunFolder


def read_outcome(run_dir: Path) -> dict[str, Any]:
    """All that a run left behind and that does not depend on the clock."""
    folder = RunFolder(run_dir)
    rounds = []
    for record in folder.records():
        row = record.to_dict()
        row.pop("seconds")
        for client in row["clients"]:
            for key in ("train_seconds", "encode_seconds", "decode_seconds"):
                client.pop(key)
        rounds.append(row)
    adapter = {
        str(path.relative_to(folder.adapter_dir)): path.read_bytes()
        for path in sorted(folder.adapter_dir.rglob("*"))
        if path.is_file()
    }
    return {"rounds": rounds, "adapter": adapter}
