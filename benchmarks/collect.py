"""Copy what a run showed into benchmarks/results, as one file with its configuration and machine.

cgfedllm run configs/medquad.toml
python benchmarks/collect.py runs/medquad medquad_int8
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from common import RESULTS

from cgfedllm.report.summary import summarise
from cgfedllm.runs import RunFolder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("name", help="name of the result")
    options = parser.parse_args()
    folder = RunFolder(options.run)
    records = folder.records()
    config = folder.config().model_dump(exclude_none=True)
    # where the data lay on this machine is nobody's business; its name is
    config["data"]["source"] = Path(config["data"]["source"]).name
    content = {
        "command": f"cgfedllm run configs/{config['name']}.toml; "
        f"python benchmarks/collect.py {options.run} {options.name}",
        "environment": json.loads(folder.environment_path.read_text()),
        "config": config,
        "summary": summarise(records).to_dict(),
        "rounds": [record.to_dict() for record in records],
    }
    # command lines hold this machine's paths
    for start in (content["environment"], *content["environment"].get("resumed", [])):
        start.pop("command", None)
    path = RESULTS / f"{options.name}.json"
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
