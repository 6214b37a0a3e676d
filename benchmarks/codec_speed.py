"""How long every codec takes to encode and decode, and how much memory it takes beside the update.

    python benchmarks/codec_speed.py
    python benchmarks/codec_speed.py --quick qsgd int8

Updates are synthetic: one strong direction a factor, noise, saturated as by AdamW. Times are of
one thread, the first run discarded. Peaks are what numpy allocates during the call, result
included, as multiples of the update's float32 bytes; compiled extensions' own memory is not seen.
Signal-to-noise ratios are of this synthetic update, to show that something was done; codecs that
learn have learned nothing. What torch allocates is not in the peaks.
"""

from __future__ import annotations

import os

# before numpy: encoders must not differ in how many cores they find
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")

import argparse
import time
import tracemalloc
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from common import spread, touch_memory, write_result

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import Codec, CodecContext, codec_class, codec_names, make_codec
from cgfedllm.errors import CodecError

T = TypeVar("T")

RATES = (0.05, 0.2, 1.0)
# name: layers, width, width of keys and values
MODELS = {"llama-7b r=8 qkvo": (32, 4096, 4096), "embedded r=8 qkvo": (30, 576, 192)}
QUICK = {"two layers of the embedded": (2, 576, 192)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("codecs", nargs="*", help="names; all of them if none is given")
    parser.add_argument("--runs", type=int, default=5, help="measured runs, after a first one")
    parser.add_argument("--quick", action="store_true", help="a tiny adapter; writes nothing")
    options = parser.parse_args()
    if not options.quick:
        touch_memory()
    rows = []
    for model, sizes in (QUICK if options.quick else MODELS).items():
        update = synthetic_update(lora_spec(*sizes))
        for name in options.codecs or codec_names():
            for chosen in rates_of(name):
                row = {"model": model, "parameters": update.spec.size, "codec": name, **chosen}
                row.update(measure(make_codec(name, chosen), update, options.runs))
                rows.append(row)
                print(line(row), flush=True)
    if not options.quick:
        print(write_result("codec_speed", {"what": __doc__.split("\n")[0], "results": rows}))


def rates_of(name: str) -> list[dict[str, Any]]:
    if "bpp" not in codec_class(name).Options.model_fields:
        return [{}]
    return [{"bpp": bpp} for bpp in RATES]


def measure(codec: Codec, update: AdapterUpdate, runs: int) -> dict[str, Any]:
    state, previous = codec.initial_state(update.spec), update.scaled(0.5).vector
    context = CodecContext(update.spec, round=3, seed=1, state=state, previous=previous)
    try:
        blob, encode = timed(lambda: codec.encode(update, context), runs)
    except CodecError as error:
        return {"refused": str(error)}
    decoded, decode = timed(lambda: codec.decode(blob, context), runs)
    error = np.square((update - decoded).vector, dtype=np.float64).sum()
    energy = np.square(update.vector, dtype=np.float64).sum()
    return {
        "bytes": len(blob),
        "bits_per_parameter": 8 * len(blob) / update.spec.size,
        "snr_db": float(10 * np.log10(energy / error)) if error else None,
        "encode_ms": encode,
        "decode_ms": decode,
        "encode_peak": peak(lambda: codec.encode(update, context)) / update.vector.nbytes,
        "decode_peak": peak(lambda: codec.decode(blob, context)) / update.vector.nbytes,
    }


def timed(call: Callable[[], T], runs: int) -> tuple[T, dict[str, float]]:
    result = call()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        result = call()
        times.append(1e3 * (time.perf_counter() - start))
    return result, spread(times)


def peak(call: Callable[[], object]) -> int:
    """Bytes that numpy and Python allocate at most during a call."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def lora_spec(layers: int, width: int, kv_width: int, rank: int = 8) -> AdapterSpec:
    shapes = {}
    for layer in range(layers):
        for module, out in (("q", width), ("k", kv_width), ("v", kv_width), ("o", width)):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{module}_proj"
            shapes[f"{stem}.lora_A.weight"] = (rank, width)
            shapes[f"{stem}.lora_B.weight"] = (out, rank)
    return AdapterSpec.from_shapes(shapes)


def synthetic_update(spec: AdapterSpec, seed: int = 0) -> AdapterUpdate:
    rng = np.random.default_rng(seed)
    update = AdapterUpdate.zeros(spec)
    for view in update.views().values():
        rows, columns = view.shape
        strong = rng.standard_normal((rows, 1)) * rng.standard_normal((1, columns))
        view[...] = 1e-3 * np.tanh(strong + 0.7 * rng.standard_normal((rows, columns)))
    return update


def line(row: dict[str, Any]) -> str:
    head = f"{row['model']:<28}{row['codec']:<9}{row.get('bpp', ''):<6}"
    if "refused" in row:
        return f"{head}refused: {row['refused']}"
    snr = "exact" if row["snr_db"] is None else f"{row['snr_db']:.2f} dB"
    return (
        f"{head}{row['bits_per_parameter']:8.4f} bpp {snr:>9}"
        f"  encode {row['encode_ms']['median']:7.1f} ms, {row['encode_peak']:5.2f} x"
        f"  decode {row['decode_ms']['median']:7.1f} ms, {row['decode_peak']:5.2f} x"
    )


if __name__ == "__main__":
    main()
