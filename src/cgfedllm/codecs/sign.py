"""`sign`: one bit a parameter, and each row's mean magnitude.

::

    payload = scales float32[rows of all factors] | bits [parameters], 1 where negative

Rows are those of `parts/rows.py`; bits are in the order of the update's vector, first one highest
in its byte. With error feedback around it this is EF-signSGD, which converges where plain sign
compression need not.
"""

from __future__ import annotations

import numpy as np

from cgfedllm.adapter import AdapterSpec, AdapterUpdate, Float32Array
from cgfedllm.codecs.base import Codec, CodecContext, register
from cgfedllm.codecs.parts.rows import count_rows, from_rows, row_count, to_rows


@register
class Sign(Codec):
    """Signs and a scale a row: the best of all two-valued codes of a row with equal signs."""

    name = "sign"
    kind = "element-wise"
    rates = "1 bit"
    summary = "signs and one float32 mean magnitude a row: a little over 1 bit a parameter"
    paper = "Karimireddy et al., arXiv 1901.09847"

    def payload_size(self, spec: AdapterSpec) -> int:
        """One bit a parameter and four bytes a row."""
        return (spec.size + 7) // 8 + 4 * count_rows(spec)

    def _encode(self, update: AdapterUpdate, context: CodecContext) -> bytes:
        views = update.views()
        scales = [
            # float64: a sum of float32 values can overflow
            np.abs(to_rows(views[factor.name], factor)).mean(axis=1, dtype=np.float64)
            for factor in context.spec
        ]
        # -0.0 counts as positive
        bits = np.packbits(update.vector < 0)
        return np.concatenate(scales).astype("<f4").tobytes() + bits.tobytes()

    def _decode(self, payload: bytes, context: CodecContext) -> Float32Array:
        n_scales = count_rows(context.spec)
        scales = np.frombuffer(payload, "<f4", count=n_scales).astype(np.float32)
        bits = np.frombuffer(payload, np.uint8, offset=4 * n_scales)
        # no arithmetic: only the sign bit is set, so that denormal scales arrive everywhere
        signs = np.unpackbits(bits, count=context.spec.size).astype(np.uint32)
        signs <<= np.uint32(31)
        start = 0
        for factor in context.spec:
            where = context.spec.slices[factor.name]
            n_rows = row_count(factor)
            rows = scales[start : start + n_rows, None].view(np.uint32)
            start += n_rows
            signs[where] ^= from_rows(
                np.broadcast_to(rows, (n_rows, factor.size // n_rows)), factor
            )
        return signs.view(np.float32)
