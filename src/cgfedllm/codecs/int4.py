"""`int4`: symmetric 4-bit quantisation with a bfloat16 scale for every group of values in a row.

::

    payload = scales bfloat16[groups of all factors] | values 4 bits[parameters], low half first

Rows are those of `parts/rows.py`; a row is cut into groups of 64, its last one may be shorter.
Groups are what makes 4 bits usable (cf. QLoRA, arXiv 2305.14314); bfloat16 keeps huge and tiny
scales.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cgfedllm.adapter import AdapterSpec, AdapterUpdate, Factor, Float32Array
from cgfedllm.codecs.base import Codec, CodecContext, CodecOptions, register
from cgfedllm.codecs.bf16 import bfloat16_above, from_bfloat16
from cgfedllm.codecs.parts.rows import from_rows, row_count, to_rows

T = TypeVar("T", bound=np.generic)

_LEVELS = np.float32(7)
# values are sent plus 8: 1 to 15
_OFFSET = 8
# 2^-126: machines that flush denormals to zero would decode other values
_SMALLEST_SCALE = np.finfo(np.float32).tiny
# the largest bfloat16 whose product with 7 is finite
_LARGEST_SCALE = np.array([0x7E12], np.uint16)


class Int4Options(CodecOptions):
    """Size of the groups."""

    group: int = Field(
        default=64,
        ge=1,
        le=2**20,
        description="Values that share a scale; 16 bits a group are sent for it.",
    )


@register
class Int4(Codec):
    """4 bits a parameter and a scale a group.

    The error is at most half a step, a step being the group's largest magnitude / 7, rounded up
    to a bfloat16 (at most 2^-7 of itself more, and at least 2^-126).
    """

    name = "int4"
    kind = "control"
    rates = "4.25 bits"
    summary = "4-bit integers with one bfloat16 scale for 64 values: 4.25 bits a parameter"
    paper = "Dettmers and Zettlemoyer, arXiv 2212.09720"
    Options = Int4Options

    options: Int4Options

    def payload_size(self, spec: AdapterSpec) -> int:
        """Half a byte a parameter and two a group."""
        return (spec.size + 1) // 2 + 2 * sum(self._group_count(factor) for factor in spec)

    def _encode(self, update: AdapterUpdate, context: CodecContext) -> bytes:
        scales: list[NDArray[np.uint16]] = []
        # one more where the number is odd: the unused half of the last byte
        values = np.full(context.spec.size + context.spec.size % 2, _OFFSET, np.uint8)
        views = update.views()
        for factor in context.spec:
            rows = to_rows(views[factor.name], factor)
            groups = self._grouped(rows)
            largest = np.maximum(np.abs(groups).max(axis=2) / _LEVELS, _SMALLEST_SCALE)
            bits = np.minimum(bfloat16_above(largest), _LARGEST_SCALE)
            quantised = np.rint(groups / from_bfloat16(bits)[:, :, None]).clip(-_LEVELS, _LEVELS)
            codes = (quantised + np.float32(_OFFSET)).astype(np.uint8)
            row_codes = codes.reshape(len(rows), -1)[:, : rows.shape[1]]
            values[context.spec.slices[factor.name]] = row_codes.reshape(-1)
            scales.append(bits.reshape(-1))
        packed = values[0::2] | (values[1::2] << np.uint8(4))
        return np.concatenate(scales).astype("<u2").tobytes() + packed.tobytes()

    def _decode(self, payload: bytes, context: CodecContext) -> Float32Array:
        n_scales = sum(self._group_count(factor) for factor in context.spec)
        scales = from_bfloat16(np.frombuffer(payload, "<u2", count=n_scales))
        packed = np.frombuffer(payload, np.uint8, offset=2 * n_scales)
        values: NDArray[np.int8] = np.empty(2 * packed.size, np.int8)
        values[0::2] = packed & 15
        values[1::2] = packed >> 4
        values -= _OFFSET
        vector = np.empty(context.spec.size, np.float32)
        start = 0
        with np.errstate(over="ignore", invalid="ignore"):  # the caller refuses non-finite values
            for factor in context.spec:
                where = context.spec.slices[factor.name]
                rows = values[where].reshape(row_count(factor), -1)
                groups = self._grouped(rows)
                own = scales[start : start + groups.shape[0] * groups.shape[1]]
                start += own.size
                decoded = groups * own.reshape(groups.shape[0], -1, 1)
                decoded = decoded.reshape(len(rows), -1)[:, : rows.shape[1]]
                vector[where] = from_rows(decoded, factor)
        return vector

    def _group_count(self, factor: Factor) -> int:
        rows = row_count(factor)
        return rows * -(-(factor.size // rows) // self.options.group)

    def _grouped(self, rows: NDArray[T]) -> NDArray[T]:
        """Rows cut into groups, zeros after the last: (rows, groups, group)."""
        length = rows.shape[1]
        # no larger than it need be: a short row is one group of its own length
        group = min(self.options.group, length)
        missing = -length % group
        if missing:
            rows = np.pad(rows, ((0, 0), (0, missing)))
        return rows.reshape(len(rows), -1, group)
