"""`int8`: symmetric 8-bit quantisation with one float32 scale per row of each factor.

::

    payload = scales float32[rows of all factors] | values int8[parameters]

A row is the long axis: row i of an A factor (r, in), column i of a B factor (out, r). Each holds
one direction of the adapter and has its own magnitude (cf. LLM.int8, arXiv 2208.07339, which
scales by row and column).
"""

from __future__ import annotations

import numpy as np

from cgfedllm.adapter import AdapterSpec, AdapterUpdate, Factor, Float32Array
from cgfedllm.codecs.base import Codec, CodecContext, register
from cgfedllm.errors import PacketError

_LEVELS = np.float32(127)


@register
class Int8(Codec):
    """8 bits a parameter and a scale a row; error at most half a step of the row's largest."""

    name = "int8"
    summary = "8-bit integers with one float32 scale a row: a little over 8 bits a parameter"

    def _encode(self, update: AdapterUpdate, context: CodecContext) -> bytes:
        scales: list[Float32Array] = []
        values = np.empty(context.spec.size, np.int8)
        views = update.views()
        for factor in context.spec:
            rows = _rows(views[factor.name], factor)
            scale = np.abs(rows).max(axis=1) / _LEVELS
            # a row of zeros, or one so small that its scale underflows, is sent as zeros
            safe = np.where(scale > 0, scale, np.float32(1))
            quantised = np.rint(rows / safe[:, None]).clip(-127, 127).astype(np.int8)
            values[context.spec.slices[factor.name]] = quantised.reshape(-1)
            scales.append(scale)
        return np.concatenate(scales).astype("<f4").tobytes() + values.tobytes()

    def _decode(self, payload: bytes, context: CodecContext) -> Float32Array:
        n_scales = count_rows(context.spec)
        expected = 4 * n_scales + context.spec.size
        if len(payload) != expected:
            raise PacketError(f"int8 payload is {len(payload)} bytes, {expected} are needed")
        scales = np.frombuffer(payload, "<f4", count=n_scales).astype(np.float32)
        values = np.frombuffer(payload, np.int8, offset=4 * n_scales)
        vector = np.empty(context.spec.size, np.float32)
        start = 0
        with np.errstate(over="ignore", invalid="ignore"):  # the caller refuses non-finite values
            for factor in context.spec:
                where = context.spec.slices[factor.name]
                n_rows = _row_count(factor)
                rows = values[where].reshape(n_rows, -1) * scales[start : start + n_rows, None]
                start += n_rows
                vector[where] = (rows.T if factor.kind == "B" else rows).reshape(-1)
        return vector


def count_rows(spec: AdapterSpec) -> int:
    """Number of scales an update of this spec needs."""
    return sum(_row_count(factor) for factor in spec)


def _row_count(factor: Factor) -> int:
    if len(factor.shape) < 2:
        return 1
    return factor.shape[1] if factor.kind == "B" else factor.shape[0]


def _rows(array: Float32Array, factor: Factor) -> Float32Array:
    return (array.T if factor.kind == "B" else array).reshape(_row_count(factor), -1)
