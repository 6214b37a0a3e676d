"""Memory that codecs take beside an update as large as that of a 7B model's LoRA."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import CodecContext, make_codec

RATED = ("ecsq", "topk", "eden", "qsgd", "dct", "lowrank", "sketch")
CASES = [(name, {"bpp": bpp}) for name in RATED for bpp in (0.05, 0.2, 1.0, 2.5, 4.0)]
CASES = [case for case in CASES if case != ("topk", {"bpp": 4.0})]
CASES += [(name, {}) for name in ("raw", "bf16", "int8", "int4", "sign", "zstd")]
CASES += [("ecsq", {"bpp": 16.0}), ("qsgd", {"bpp": 16.0}), ("qsgd", {"bpp": 4.0, "bucket": 512})]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def update(
    lora_spec: Callable[[int, int], AdapterSpec],
    realistic: Callable[[AdapterSpec, int], AdapterUpdate],
) -> AdapterUpdate:
    return realistic(lora_spec(64, 4096), 0)


def peak(call: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_four_times_the_update_at_most(
    name: str, options: dict[str, float], update: AdapterUpdate
) -> None:
    codec = make_codec(name, options)
    context = CodecContext(update.spec, round=1)
    blobs: list[bytes] = []
    assert peak(lambda: blobs.append(codec.encode(update, context))) < 4 * update.vector.nbytes
    assert peak(lambda: codec.decode(blobs[0], context)) < 4 * update.vector.nbytes
    assert np.isfinite(codec.decode(blobs[0], context).vector).all()
