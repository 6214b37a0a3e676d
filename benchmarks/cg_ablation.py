"""The paper's auto-encoders on recorded updates: layout, order, rectifiers, and what they reach.

    cgfedllm record ... configs/recordings/medquad_4.toml
    python benchmarks/cg_ablation.py runs/recordings/medquad_4

Rounds are split in order: the first half to learn from, then two to judge epochs by, the rest to
measure on. First a few short fits of `cg_resnet`, fair preset, that differ in one thing at a time;
then every network in both presets, longer, with what was best as the default. One thread. Sums over
updates are divided once: no mean of decibels. Rows that the results file has already are left as
they are; delete it to measure all of them anew.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from typing import Any

from common import RESULTS, write_result

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.analysis.fidelity import Fidelity
from cgfedllm.codecs import CodecContext, CodecState, make_codec
from cgfedllm.codecs.learning import FitProgress, FitSettings, LearnedCodec
from cgfedllm.tgap.recording import Recording

SHORT = 12
LONG = 60
JUDGED_ROUNDS = 2
# name of the comparison: options that are tried
ABLATION: dict[str, list[dict[str, Any]]] = {
    "layout and order": [
        {"layout": layout, "order": order}
        for layout in ("stack", "fold")
        for order in ("spec", "kind")
    ],
    "signs of rank vectors": [{"align_signs": False}],
    "slope of rectifiers": [{"slope": slope} for slope in (0.0, 0.5, 1.0)],
}
NETWORKS: list[tuple[str, dict[str, Any]]] = [
    *(
        (name, {"preset": preset})
        for preset in ("fair", "printed")
        for name in ("cg_resnet", "cg_unet", "cg_cnn")
    ),
    ("cg_resnet", {"preset": "printed", "normalise": False}),
]


class InMemory:
    """Updates of a part of a recording."""

    def __init__(self, recording: Recording) -> None:
        self.spec: AdapterSpec = recording.spec
        self._updates = [recording.update(index) for index in range(len(recording))]

    def __len__(self) -> int:
        return len(self._updates)

    def __getitem__(self, index: int) -> AdapterUpdate:
        return self._updates[index]

    def __iter__(self) -> Iterator[AdapterUpdate]:
        return iter(self._updates)


Parts = tuple[InMemory, InMemory, InMemory]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recording")
    arguments = parser.parse_args()
    recording = Recording.open(arguments.recording)
    rounds = recording.rounds()
    half = len(rounds) // 2
    split = rounds[:half], rounds[half : half + JUDGED_ROUNDS], rounds[half + JUDGED_ROUNDS :]
    parts = tuple(InMemory(recording.select(rounds=own)) for own in split)
    content = {
        "what": __doc__.split("\n")[0],
        "recording": {
            "name": recording.path.name,
            "model": recording.metadata["model"],
            "parameters": recording.spec.size,
            "rounds": dict(zip(("fit", "judged", "measured"), split, strict=True)),
            "updates": [len(part) for part in parts],
        },
    }
    done = RESULTS / "cg_ablation.json"
    rows: list[dict[str, Any]] = json.loads(done.read_text())["results"] if done.exists() else []
    for row in planned():
        if not any(row.items() <= old.items() for old in rows):
            rows.append({**row, **measure(row["codec"], row["options"], parts, row["most_epochs"])})
            write_result("cg_ablation", {**content, "results": rows})


def planned() -> Iterator[dict[str, Any]]:
    for what, tried in ABLATION.items():
        for options in tried:
            row = {"compared": what, "codec": "cg_resnet", "options": options}
            yield {**row, "most_epochs": SHORT}
    for name, options in NETWORKS:
        yield {"codec": name, "options": options, "most_epochs": LONG}


def measure(name: str, options: dict[str, Any], parts: Parts, epochs: int) -> dict[str, Any]:
    train, judged, measured = parts
    codec = make_codec(name, options)
    assert isinstance(codec, LearnedCodec)
    last: list[FitProgress] = []

    def told(progress: FitProgress) -> None:
        last[:] = [progress]

    start = time.process_time()
    state = codec.fit(train, judged, FitSettings(epochs=epochs), on_epoch=told)
    fit_seconds = time.process_time() - start
    row = {
        "epochs": len(last[0].curve),
        "best_epoch": last[0].best,
        "fit_processor_seconds": round(fit_seconds, 1),
        **outcome(codec, state, measured),
    }
    print(name, options, row, flush=True)
    return row


def outcome(codec: LearnedCodec, state: CodecState, updates: InMemory) -> dict[str, Any]:
    fidelity, swapped = Fidelity(), Fidelity()
    sizes, encode, decode = [], [], []
    context = CodecContext(updates.spec, 1, state=state)
    for at, update in enumerate(updates):
        start = time.process_time()
        packet = codec.encode(update, context)
        between = time.process_time()
        decoded = codec.decode(packet, context)
        decode.append(1e3 * (time.process_time() - between))
        encode.append(1e3 * (between - start))
        sizes.append(len(packet))
        fidelity.add(update.vector, decoded.vector)
        # another client's update: what a packet holds beside what all have in common
        swapped.add(updates[at - 1].vector, decoded.vector)
    return {
        "bits_per_parameter": 8 * statistics.fmean(sizes) / updates.spec.size,
        "snr_db": fidelity.snr_db,
        "cosine": fidelity.cosine,
        "swapped_snr_db": swapped.snr_db,
        "encode_ms": round(statistics.median(encode), 1),
        "decode_ms": round(statistics.median(decode), 1),
        "state_bytes": len(codec.pack_state(state)),
    }


if __name__ == "__main__":
    main()
