"""Write one file of rows a clinic, and a held-out set for the server, to try a deployment with.

    python make_data.py data

The rows are docstrings of Python libraries installed here (the demo data of cgfedllm), so nothing
is downloaded. With data of your own you do not need this.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from cgfedllm.data.demo import demo_files

CLINICS = {"clinic-a": "numpy", "clinic-b": "pandas", "clinic-c": "peft"}
SERVER = "huggingface_hub"
HELDOUT_ROWS = 24


def main() -> None:
    parser = argparse.ArgumentParser(description="Rows to try a deployment with.")
    parser.add_argument("folder", type=Path, help="where the files go")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    rows = {file.stem: file.rows for file in demo_files((*CLINICS.values(), SERVER))}
    for name, library in [*CLINICS.items(), ("heldout", SERVER)]:
        own = rows[library][: HELDOUT_ROWS if name == "heldout" else None]
        kept = [{key: row[key] for key in ("prompt", "completion")} for row in own]
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        print(f"{path}: {len(kept)} rows")


if __name__ == "__main__":
    main()
