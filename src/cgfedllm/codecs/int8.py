"""`int8`: symmetric 8-bit quantisation with one float32 scale per row of each factor.

::

    payload = scales float32[rows of all factors] | values int8[parameters]

A row is the long axis of a factor (`parts/rows.py`); cf. LLM.int8, arXiv 2208.07339, which scales
by row and column.
"""

from __future__ import annotations

import numpy as np

from cgfedllm.adapter import AdapterSpec, AdapterUpdate, Float32Array
from cgfedllm.codecs.base import Codec, CodecContext, register
from cgfedllm.codecs.parts.rows import count_rows, from_rows, row_count, to_rows

_LEVELS = np.float32(127)
# 2^-126, the smallest normal float32: below it a scale would lose its own precision, and machines
# that flush denormals to zero would decode other values
_SMALLEST_SCALE = np.finfo(np.float32).tiny
# 127 times a greater scale would round to infinity
_LARGEST_SCALE = np.nextafter(np.finfo(np.float32).max / _LEVELS, np.float32(0))


@register
class Int8(Codec):
    """8 bits a parameter and a scale a row.

    The error is at most half a step, a step being the row's largest magnitude / 127 (and at least
    2^-126).
    """

    name = "int8"
    kind = "control"
    rates = "8 bits"
    summary = "8-bit integers with one float32 scale a row: a little over 8 bits a parameter"
    paper = "Dettmers et al., arXiv 2208.07339"

    def payload_size(self, spec: AdapterSpec) -> int:
        """One byte a parameter and four a row."""
        return spec.size + 4 * count_rows(spec)

    def _encode(self, update: AdapterUpdate, context: CodecContext) -> bytes:
        scales: list[Float32Array] = []
        values = np.empty(context.spec.size, np.int8)
        views = update.views()
        for factor in context.spec:
            rows = to_rows(views[factor.name], factor)
            scale = (np.abs(rows).max(axis=1) / _LEVELS).clip(_SMALLEST_SCALE, _LARGEST_SCALE)
            quantised = np.rint(rows / scale[:, None]).clip(-_LEVELS, _LEVELS).astype(np.int8)
            values[context.spec.slices[factor.name]] = quantised.reshape(-1)
            scales.append(scale)
        return np.concatenate(scales).astype("<f4").tobytes() + values.tobytes()

    def _decode(self, payload: bytes, context: CodecContext) -> Float32Array:
        n_scales = count_rows(context.spec)
        scales = np.frombuffer(payload, "<f4", count=n_scales).astype(np.float32)
        values = np.frombuffer(payload, np.int8, offset=4 * n_scales)
        vector = np.empty(context.spec.size, np.float32)
        start = 0
        with np.errstate(over="ignore", invalid="ignore"):  # the caller refuses non-finite values
            for factor in context.spec:
                where = context.spec.slices[factor.name]
                n_rows = row_count(factor)
                rows = values[where].reshape(n_rows, -1) * scales[start : start + n_rows, None]
                start += n_rows
                vector[where] = from_rows(rows, factor)
        return vector
