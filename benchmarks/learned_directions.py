"""What `learned` finds when it is pre-trained on less or on other data: energy along directions.

    cgfedllm pretrain learned configs/flagship-medquad.toml
    cgfedllm pretrain learned configs/flagship-medquad.toml --name exact \
        --set tgap.codec=raw --set tgap.rounds=8
    cgfedllm pretrain learned configs/flagship-medquad.toml --name elsewhere \
        --set data.source=/where/gsm8k/train.jsonl.gz --set data.partition.kind=iid \
        --set data.partition.clients=9 --set tgap.collect=centralised --set tgap.rounds=8
    python benchmarks/learned_directions.py runs/exact-tgap/recording \
        "8 rounds, exact=runs/exact-tgap/codec.safetensors" \
        "4 rounds of int4 (default)=runs/flagship-medquad-tgap/codec.safetensors" \
        "GSM8K, on the server=runs/elsewhere-tgap/codec.safetensors"

The last quarter of the recording's rounds, which none of them learned from, is measured on: the
share of a factor's squared gradient that lies along the directions, in the mean over updates and
layers.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from common import write_result

from cgfedllm.adapter import factor_kind
from cgfedllm.codecs.learned.directions import described, orthonormal
from cgfedllm.codecs.parts.rows import to_rows
from cgfedllm.tgap.codec_file import load_codec_file
from cgfedllm.tgap.recording import Recording

MEASURED = 0.75


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recording", type=Path, help="of gradients, on D1")
    parser.add_argument("codecs", nargs="+", metavar="LABEL=FILE", help="codec files of `learned`")
    options = parser.parse_args()
    _, later = Recording.open(options.recording).split_by_round(MEASURED)
    found = {}
    for text in options.codecs:
        label, _, path = text.rpartition("=")
        found[label] = measured(Path(path), later)
        print(label, found[label])
    content = {"rounds": later.rounds(), "updates": len(later), "results": found}
    print(write_result("learned/directions", content))


def measured(path: Path, recording: Recording) -> dict[str, Any]:
    """Energy by kind of factor, and what the codec cost."""
    file = load_codec_file(path)
    known = orthonormal(recording.spec, file.state)
    factors = described(recording.spec)
    shares: dict[str, list[float]] = {}
    for entry in recording.entries:
        vector = recording.update(entry).vector
        for factor in factors:
            rows = to_rows(vector[recording.spec.slices[factor.name]], factor).astype(np.float64)
            energy = np.square(rows).sum()
            if energy:
                along = np.square(rows @ known[factor.name].T).sum() / energy
                shares.setdefault(factor_kind(factor), []).append(float(along))
    cost = file.card["cost"]
    return {
        "tgap_uplink_bytes": cost["uplink_bytes"],
        "tgap_downlink_bytes": cost["downlink_bytes"],
        "collect_seconds": cost["collect_seconds"],
        "state_bytes": len(file.codec().pack_state(file.state)),
        "energy": {kind: statistics.fmean(own) for kind, own in shares.items()},
    }


if __name__ == "__main__":
    main()
