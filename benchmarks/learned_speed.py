"""How long `learned` takes when it knows directions and the adapter has grown.

    python benchmarks/learned_speed.py

Updates are synthetic, one strong direction a factor and noise, as in `codec_speed.py`; the state is
learned from four of them and the adapter is their sum. Times are of one thread, medians, the first
run discarded. Axes are found once a round, by whoever codes in it first; encoding and decoding are
timed with axes at hand, and a client's round is the sum of finding and encoding. "inside" is an
update along known directions alone, as `training.subspace` leaves them.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")

import argparse
from typing import Any

import numpy as np
from codec_speed import MODELS, lora_spec, peak, synthetic_update, timed
from common import touch_memory, write_result

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import CodecContext, CodecState
from cgfedllm.codecs.base import Start
from cgfedllm.codecs.learned.axes import axes_of
from cgfedllm.codecs.learned.codec import Learned
from cgfedllm.codecs.learned.directions import lies_along, orthonormal
from cgfedllm.codecs.learned.fitting import learn
from cgfedllm.codecs.learned.options import LearnedOptions

RATES = (0.0125, 0.064, 0.2, 1.0)
LEARNED_FROM = 4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5, help="measured runs, after a first one")
    options = parser.parse_args()
    touch_memory()
    results = []
    for model, sizes in MODELS.items():
        spec = lora_spec(*sizes)
        seen = [synthetic_update(spec, seed) for seed in range(1, 1 + LEARNED_FROM)]
        state = CodecState.of(learn(spec, seen, LearnedOptions(bpp=RATES[0]).directions))
        head = {
            "model": model,
            "parameters": spec.size,
            "state_bytes": len(Learned(LearnedOptions(bpp=RATES[0])).pack_state(state)),
            "state_bytes_in_memory": sum(array.nbytes for array in state.tensors.values()),
        }
        starts = starts_of(spec, seen)
        whole = synthetic_update(spec)
        for where, update in {"everywhere": whole, "inside": projected(whole, state)}.items():
            for bpp in RATES:
                row = {**head, "trained": where, "bpp": bpp}
                row |= measure(bpp, update, state, starts, options.runs)
                results.append(row)
                print(line(row), flush=True)
    content = {"what": __doc__.split("\n")[0], "results": results}
    print(write_result("learned/speed", content))


def starts_of(spec: AdapterSpec, seen: list[AdapterUpdate]) -> list[Start]:
    """Adapters of three rounds: the axes of two are kept, so each is found anew in its turn."""
    origin = synthetic_update(spec, 100)
    for factor, view in zip(spec, origin.views().values(), strict=True):
        view[...] = 0 if factor.kind == "B" else view
    grown = origin.vector + np.sum([update.vector for update in seen], axis=0, dtype=np.float32)
    return [Start(grown * np.float32(scale), origin.vector) for scale in (1.0, 1.5, 2.0)]


def projected(update: AdapterUpdate, state: CodecState) -> AdapterUpdate:
    """What of an update lies along the state's directions."""
    inside = AdapterUpdate(update.spec, update.vector.copy())
    views = inside.views()
    for name, basis in orthonormal(update.spec, state).items():
        view = views[name]
        view[...] = view @ basis.T @ basis if ".lora_A." in name else basis.T @ (basis @ view)
    return inside


def measure(
    bpp: float, update: AdapterUpdate, state: CodecState, starts: list[Start], runs: int
) -> dict[str, Any]:
    codec, spec = Learned(LearnedOptions(bpp=bpp)), update.spec
    alone = lies_along(update.vector, spec, orthonormal(spec, state))
    contexts = [CodecContext(spec, round=3, state=state, start=start) for start in starts]
    metric = codec.options.metric

    def find() -> None:
        for each in contexts:
            axes_of(each, metric, alone=alone)

    _, rounds = timed(find, runs)
    context = contexts[0]
    blob, encode = timed(lambda: codec.encode(update, context), runs)
    _, decode = timed(lambda: codec.decode(blob, context), runs)
    return {
        "bits_per_parameter": 8 * len(blob) / spec.size,
        "axes_ms": {k: v if k == "n" else v / len(contexts) for k, v in rounds.items()},
        "encode_ms": encode,
        "decode_ms": decode,
        "encode_peak": peak(lambda: codec.encode(update, context)) / update.vector.nbytes,
        "decode_peak": peak(lambda: codec.decode(blob, context)) / update.vector.nbytes,
    }


def line(row: dict[str, Any]) -> str:
    times = ", ".join(
        f"{key} {row[f'{key}_ms']['median']:.0f} ms" for key in ("axes", "encode", "decode")
    )
    state = f"state {row['state_bytes'] / 2**20:.1f} MiB"
    return f"{row['model']:<20} {row['trained']:<10} {row['bpp']:<7g} {times}, {state}"


if __name__ == "__main__":
    main()
