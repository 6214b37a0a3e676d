"""What packets keep of updates, for codecs that learn to see how far they are."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from cgfedllm.adapter import AdapterUpdate
from cgfedllm.codecs.base import Codec, CodecContext, CodecState, Start

Judged = tuple[AdapterUpdate, Start | None]
"""An update, and where it starts from, if that is known."""


def judge(codec: Codec, state: CodecState, updates: Iterable[Judged]) -> dict[str, float]:
    """Fidelity and rate of real packets, sums over sums; as a row of a fit's curve has them."""
    signal = error = inner = decoded = size = parameters = 0.0
    for update, start in updates:
        context = CodecContext(update.spec, 0, state=state, start=start)
        packet = codec.encode(update, context)
        x = update.vector.astype(np.float64)
        y = codec.decode(packet, context).vector.astype(np.float64)
        signal += float(x @ x)
        decoded += float(y @ y)
        inner += float(x @ y)
        error += float(np.square(x - y).sum())
        size += len(packet)
        parameters += update.spec.size
    norms = math.sqrt(signal * decoded)
    return {
        "validation_snr_db": 10 * math.log10(signal / error) if error else math.inf,
        "validation_cosine": inner / norms if norms else 0.0,
        "validation_bpp": 8 * size / parameters,
    }
