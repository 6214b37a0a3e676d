"""Entropy-coded scalar quantisation of every element: what structure-blind coding can reach.

::

    update -> classes of factors of like scale -> a share of the values, or all of them
           -> one dead-zone quantiser -> a table a class -> range coder

One step serves the whole update, which is what minimises its squared error at a given rate; a
factor's class only chooses the table of probabilities. Step and dead zone are searched for the
least error at the rate asked for, or for the least ``error + lambda * bits``. Where coding a
random share of the values beats coding all of them (see `design_for_bits`), that is done; the
share is drawn anew for each packet, so that error feedback reaches every value. Chou, Lookabaugh
and Gray, IEEE Trans. ASSP 37(1), 1989; Sullivan, IEEE Trans. IT 42(5), 1996.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from cgfedllm.adapter import AdapterUpdate, Float32Array
from cgfedllm.codecs.base import Codec, CodecContext, CodecOptions, register
from cgfedllm.codecs.entropy import Int32Array, SymbolReader, SymbolWriter
from cgfedllm.codecs.parts.deadzone import (
    Histogram,
    design_for_bits,
    design_for_slope,
    read_levels,
    write_levels,
)
from cgfedllm.codecs.parts.draws import random_order
from cgfedllm.codecs.rate import payload_bits
from cgfedllm.errors import PacketError
from cgfedllm.seeding import generator

# classes are two to an octave of a factor's root mean square
_CLASSES = 8
# a share of the values is a share of their runs of this length, in 65,535ths
_RUN = 32
_WHOLE = (1 << 16) - 1
# step, share and draw
_HEAD_BITS = 64
_TABLE_BITS = 6 * _CLASSES


class EcsqOptions(CodecOptions):
    """Rate, by bits or by slope."""

    bpp: float | None = Field(
        default=None,
        gt=0,
        le=16,
        allow_inf_nan=False,
        description="Bits per parameter of the whole packet, header included; 0.1 if neither this "
        "nor lam is set.",
    )
    lam: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Instead of bpp: what a bit may cost, as a share of one parameter's mean "
        "square. Smaller is finer; updates that are harder to code get more bits.",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_of_them(cls, values: Any) -> Any:
        if isinstance(values, dict):
            given = {key for key in ("bpp", "lam") if values.get(key) is not None}
            if len(given) == 2:
                raise ValueError("set either bpp or lam, not both")
            if not given:
                return {**values, "bpp": 0.1}
        return values


@register
class Ecsq(Codec):
    """Dead-zone quantiser, rate-distortion optimised, range coded."""

    name = "ecsq"
    kind = "element-wise"
    rates = "0.005 to 16 bits"
    summary = "dead-zone quantiser of every element, rate-distortion optimised and range coded"
    paper = "Chou, Lookabaugh, Gray 1989; Sullivan 1996"
    Options = EcsqOptions

    options: EcsqOptions

    def _encode(self, update: AdapterUpdate, context: CodecContext) -> bytes:
        classes = _classes(update)
        members = [_members(update, classes, which) for which in np.unique(classes)]
        histogram = Histogram(members)
        if self.options.lam is not None:
            slope = self.options.lam * histogram.energy / context.spec.size
            design = design_for_slope(histogram, slope)
        else:
            assert self.options.bpp is not None
            budget = payload_bits(context.spec, self.options.bpp) - _HEAD_BITS
            if len(members) > 1:
                budget -= _class_bits(classes)
            design = design_for_bits(histogram, budget)
        if design is None:
            return b""
        share = min(int(np.rint(design.share * _WHOLE)), _WHOLE)
        draw = zlib.crc32(update.vector.data) & 0xFFFF if share < _WHOLE else 0
        writer = SymbolWriter()
        writer.float32(design.quantiser.step)
        writer.uniform(np.array([share, draw]), _WHOLE + 1)
        writer.symbols(classes, _CLASSES)
        for which, values in enumerate(members):
            chosen = values[_chosen(context, which, values.size, share, draw)]
            levels = design.quantiser.levels(chosen)
            write_levels(writer, chosen, levels, design.quantiser.step)
        return writer.finish()

    def _decode(self, payload: bytes, context: CodecContext) -> Float32Array:
        vector = np.zeros(context.spec.size, np.float32)
        if not payload:
            return vector
        reader = SymbolReader(payload)
        step = reader.float32(1)[0]
        if not np.isfinite(step) or step <= 0:
            raise PacketError(f"{self.name}: the step is {step}, not a positive number")
        share, draw = reader.uniform(_WHOLE + 1, 2)
        classes = reader.symbols(_CLASSES, len(context.spec))
        for which, label in enumerate(np.unique(classes)):
            own = [f for f, c in zip(context.spec, classes, strict=True) if c == label]
            size = sum(factor.size for factor in own)
            chosen = _chosen(context, which, size, int(share), int(draw))
            if isinstance(chosen, slice):
                values = read_levels(reader, size, step)
            else:
                values = np.zeros(size, np.float32)
                values[chosen] = read_levels(reader, int(np.count_nonzero(chosen)), step)
            start = 0
            for factor in own:
                vector[context.spec.slices[factor.name]] = values[start : start + factor.size]
                start += factor.size
        reader.finish()
        return vector


def _chosen(
    context: CodecContext, which: int, size: int, share: int, draw: int
) -> NDArray[np.bool_] | slice:
    """Which values of one class are sent; both ends draw the same ones."""
    if share >= _WHOLE:
        return slice(None)
    rng = generator(context.seed, "ecsq", context.round, draw, which)
    runs = -(-size // _RUN)
    sent = np.zeros((runs, _RUN), bool)
    sent[random_order(rng, runs)[: round(runs * share / _WHOLE)]] = True
    return sent.reshape(-1)[:size]


def _classes(update: AdapterUpdate) -> Int32Array:
    """Class of each factor, by its root mean square below the largest one's."""
    largest = float(np.abs(update.vector).max())
    if not largest:
        return np.zeros(len(update.spec), np.int32)
    squares = [
        np.square(view / np.float32(largest), dtype=np.float32).mean(dtype=np.float64)
        for view in update.views().values()
    ]
    octaves = -0.5 * np.log2(np.maximum(squares, 1e-30))
    classes: Int32Array = np.rint(2 * (octaves - octaves.min())).astype(np.int32)
    return np.minimum(classes, _CLASSES - 1)


def _members(update: AdapterUpdate, classes: Int32Array, which: int) -> Float32Array:
    slices = update.spec.slices
    own = [f.name for f, c in zip(update.spec, classes, strict=True) if c == which]
    return np.concatenate([update.vector[slices[name]] for name in own])


def _class_bits(classes: Int32Array) -> float:
    counts = np.bincount(classes)
    counts = counts[counts > 0]
    return float((counts * np.log2(counts.sum() / counts)).sum()) + _TABLE_BITS
