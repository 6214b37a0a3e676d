r"""`lowrank`: rank-one pieces of every factor, the best ones of the whole update.

::

    factor X (r x n) --eigenvectors of X X^T--> U --quantised, orthonormalised--> U^
    Y = U^^T X : row k is piece k --a mode a piece, one Lagrangian for all--> Y^ --> X^ = U^ Y^

PowerSGD (Vogels et al., arXiv 1905.13727) finds its factors by one warm-started power iteration,
since its matrices are large both ways. Here one side is the LoRA rank, so the singular vectors are
exact, from the r x r Gram matrix, and there is nothing to warm-start. PowerSGD sends them in full
precision; here

- the short vectors are sent with a few levels an entry and made orthonormal again on both ends,
  so that pieces are independent and all r of them are complete: no rate is out of reach;
- a long vector is sent in one of the modes of `parts/vectors.py`: 1/8 to 1/2 bit an entry by a
  convolutional code, its signs, or dead-zone quantised with one step for all such pieces;
- which pieces are sent, and how, minimises ``squared error + lambda * bits`` over the update.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from cgfedllm.adapter import AdapterUpdate, Float32Array
from cgfedllm.codecs.base import Codec, CodecContext, register
from cgfedllm.codecs.entropy import SymbolReader, SymbolWriter
from cgfedllm.codecs.lowrank.choice import Stack
from cgfedllm.codecs.lowrank.coding import Shape, read_pieces, write_pieces
from cgfedllm.codecs.parts.exponent import (
    EXPONENT_BITS,
    exponent_of,
    read_exponent,
    scaled_back,
    write_exponent,
)
from cgfedllm.codecs.parts.matrices import MAX_ROWS, Batch, batches
from cgfedllm.codecs.rate import RateOptions, payload_bits
from cgfedllm.errors import CodecError

# of an entry of a long vector, with the finest step
_MOST_BITS = 16.0


class LowrankOptions(RateOptions):
    """Rate, and how many pieces a factor may have."""

    max_pieces: int | None = Field(
        default=None,
        ge=1,
        description="Most rank-one pieces of one factor; as many as its rank if not set.",
    )


@register
class Lowrank(Codec):
    """Rank-one pieces, chosen over all factors by energy per bit."""

    name = "lowrank"
    kind = "structured"
    rates = "0.01 to 16 bits"
    summary = "rank-one pieces of each factor, coarse vectors, chosen by energy per bit"
    paper = "PowerSGD, Vogels et al., arXiv 1905.13727"
    Options = LowrankOptions

    options: LowrankOptions

    def _encode(self, update: AdapterUpdate, context: CodecContext) -> bytes:
        budget = payload_bits(context.spec, self.options.bpp)
        groups = batches(context.spec)
        self._check_rate(groups, context)
        if budget < 8 or not update.vector.any():
            return b""
        exponent = exponent_of(update.vector)
        vector = np.ldexp(update.vector, -exponent)
        stacks = [Stack.of(group.gather(vector), self._depth(group)) for group in groups]
        del vector
        writer = SymbolWriter()
        write_exponent(writer, exponent)
        sent = write_pieces(writer, stacks, budget, before=EXPONENT_BITS)
        return writer.finish() if sent else b""

    def _decode(self, payload: bytes, context: CodecContext) -> Float32Array:
        vector = np.zeros(context.spec.size, np.float32)
        if not payload:
            return vector
        groups = batches(context.spec)
        shapes = [Shape(len(g.bands), self._depth(g), g.rows, g.columns) for g in groups]
        reader = SymbolReader(payload)
        exponent = read_exponent(reader)
        stacks, _ = read_pieces(reader, shapes)
        reader.finish()
        for group, matrices in zip(groups, stacks, strict=True):
            group.scatter(scaled_back(matrices, exponent), vector)
        return vector

    def _check_rate(self, groups: list[Batch], context: CodecContext) -> None:
        sent = sum(len(g.bands) * g.columns * self._depth(g) for g in groups)
        most = _MOST_BITS * sent / context.spec.size
        if self.options.bpp > most and context.spec.size > 10_000:
            raise CodecError(
                f"{self.name}: {self.options.bpp:g} bits per parameter are more than it can use; "
                f"the nearest is {most:.3g}"
            )

    def _depth(self, group: Batch) -> int:
        """Most pieces of a matrix."""
        return min(group.rows, self.options.max_pieces or MAX_ROWS)
