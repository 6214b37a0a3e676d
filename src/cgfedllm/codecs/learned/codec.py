r"""`learned`: the flagship.

::

    update --axes of the adapter (`axes`)--> coefficients of known directions, and what is left
    what is left --a mode a row (`rows`)--> packet          at few bits
                 --rank-one pieces (`pieces`)--> packet     at more

With the option `scale_exponent`, packets add up instead (`linear`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import zstandard
from numpy.typing import NDArray

from cgfedllm.adapter import AdapterSpec, AdapterUpdate, Float32Array
from cgfedllm.codecs.base import CodecContext, CodecState, register
from cgfedllm.codecs.entropy import Int32Array, SymbolReader, SymbolWriter
from cgfedllm.codecs.learned.axes import Metric, axes_of
from cgfedllm.codecs.learned.directions import (
    ENERGIES,
    WEIGHTS,
    lies_along,
    missed,
    orthonormal,
    unknown,
)
from cgfedllm.codecs.learned.fitting import learn
from cgfedllm.codecs.learned.kinds import Axes
from cgfedllm.codecs.learned.linear import (
    MARK_BYTES,
    coefficient_count,
    gathered,
    is_linear,
    marked,
    scattered,
    unmarked,
)
from cgfedllm.codecs.learned.options import LearnedOptions
from cgfedllm.codecs.learned.pieces import apart, are_possible, read_left, write_left
from cgfedllm.codecs.learned.rows import (
    read_coefficients,
    read_rows,
    write_coefficients,
    write_rows,
)
from cgfedllm.codecs.learning import (
    FitProgress,
    FitSettings,
    LearnedCodec,
    OnEpoch,
    Updates,
)
from cgfedllm.codecs.linear import LinearCodec
from cgfedllm.codecs.packet import HEADER_SIZE
from cgfedllm.codecs.parts.exponent import (
    EXPONENT_BITS,
    LOWEST_EXPONENT,
    exponent_of,
    read_exponent,
    scaled_back,
    write_exponent,
)
from cgfedllm.codecs.parts.frames import FrameError, open_frame
from cgfedllm.codecs.parts.integers import rounded, size_of
from cgfedllm.codecs.parts.judging import Judged, judge
from cgfedllm.codecs.rate import payload_bits
from cgfedllm.errors import CodecStateError, PacketError

# how the axes are found: with _ALONE more, for coefficients of the state's directions alone; with
# _GROWN more, also from how the adapter has changed
_PLAIN, _PARAMETERS, _EFFECT = range(3)
_ALONE, _GROWN = 2, 4
_UNGROWN = _PLAIN, _PARAMETERS, _EFFECT
_ALONE_AXES = _PARAMETERS + _ALONE, _EFFECT + _ALONE
_GROWN_AXES = _PARAMETERS + _GROWN, _EFFECT + _GROWN
_ALL_AXES = *_UNGROWN, *_ALONE_AXES, *_GROWN_AXES
_WEIGHED = _EFFECT, _EFFECT + _ALONE, _EFFECT + _GROWN
_HOW_BITS = 3
# of energies and weights: far beyond any that are learned, and no product of them overflows
_BOUND = 40
# more of them gain nothing here, and are most of an encoder's time
_DEAD_ZONES = (0.001, 0.6, 1.0)
_LEVEL = 19  # of zstd; slow to pack, which is done once a run
_JUDGED = 8


@register
class Learned(LearnedCodec, LinearCodec):
    """Coefficients of known directions and rows, chosen over all of it by worth per bit.

    In linear mode: a fixed choice of coefficients of the state's directions, as whole numbers.
    """

    name = "learned"
    rates = "0.002 to 16 bits"
    summary = "along directions that both ends know, weighted by what a change does"
    uses_start = True
    learns_gradients = True
    Options = LearnedOptions
    pieces_from: ClassVar[float] = 0.25
    """Bits a parameter from which on what is left is sent in pieces."""
    alike_from: ClassVar[float] = 2.0
    """The same from which on all errors count alike: little is left out then."""

    options: LearnedOptions

    @property
    def needs_state(self) -> bool:
        """In linear mode, which sends coefficients of the state's directions and nothing else."""
        return self._linear

    def numbers(self, spec: AdapterSpec) -> int:
        """See `LinearCodec.numbers`."""
        return min(
            self._room(spec, beside=MARK_BYTES), coefficient_count(spec, self.options.directions)
        )

    def expected_size(self, spec: AdapterSpec) -> int | None:
        """See `Codec.expected_size`."""
        if not self._linear:
            return super().expected_size(spec)
        size = size_of(self.numbers(spec), self.options.bits)
        return HEADER_SIZE + (MARK_BYTES + size if size else 0)

    def initial_state(self, spec: AdapterSpec, seed: int = 0) -> CodecState:
        """A state that knows nothing."""
        return CodecState.of(unknown(spec, self.options.directions))

    def directions(self, state: CodecState, spec: AdapterSpec) -> dict[str, Float32Array]:
        """See `LearnedCodec.directions`."""
        return orthonormal(spec, state)

    def check_state(self, state: CodecState, spec: AdapterSpec) -> None:
        """See `LearnedCodec.check_state`; energies and weights are also kept within bounds.

        Raises
        ------
        CodecStateError
            If the state is not of this codec, these options and this adapter, or is damaged.
        """
        super().check_state(state, spec)
        for name in (ENERGIES, WEIGHTS):
            own = state.tensors[name]
            if not ((own >= 2.0**-_BOUND) & (own <= 2.0**_BOUND)).all():
                bounds = f"2^-{_BOUND} to 2^{_BOUND}"
                raise CodecStateError(f"the state is damaged: {name!r} is not from {bounds}")

    def fit(
        self,
        train: Updates,
        validation: Updates,
        settings: FitSettings,
        *,
        resume: FitProgress | None = None,
        on_epoch: OnEpoch = lambda progress: None,
    ) -> CodecState:
        """Learn directions in one pass; see `LearnedCodec.fit`."""
        if not len(train) or not len(validation):
            what = "learn from" if not len(train) else "validate with"
            raise CodecStateError(f"{self.name}: there is no update to {what}")
        if resume is not None:
            return CodecState.of(resume.tensors)
        began = time.perf_counter()
        state = CodecState.of(learn(train.spec, train, self.options.directions))
        if not orthonormal(train.spec, state):
            raise CodecStateError(
                f"{self.name}: there are no directions to learn: the adapter has no pairs of "
                "matrices (lora.freeze_a leaves none), or all updates are zero"
            )
        row = {
            "epoch": 1,
            "train_loss": missed(state.tensors),
            **judge(self, state, _spread(validation)),
            "seconds": time.perf_counter() - began,
        }
        on_epoch(FitProgress((row,), 1, dict(state.tensors)))
        return state

    def adapt(
        self, state: CodecState, updates: Sequence[AdapterUpdate], *, round: int, seed: int
    ) -> CodecState:
        """Nothing to send: what was decoded is in the adapter, and `grown` learns from that."""
        return state

    def pack_state(self, state: CodecState, base: CodecState | None = None) -> bytes:
        """See `LearnedCodec.pack_state`: small integers, so a third or a half of their size."""
        return zstandard.ZstdCompressor(level=_LEVEL).compress(super().pack_state(state))

    def unpack_state(
        self, blob: bytes, spec: AdapterSpec, base: CodecState | None = None
    ) -> CodecState:
        """Inverse of `pack_state`; see `LearnedCodec.unpack_state`."""
        try:
            whole = open_frame(blob, least=0, most=self.state_limit(spec))
        except FrameError as error:
            raise CodecStateError(f"the state is damaged: {error}") from None
        return super().unpack_state(whole, spec, base)

    @property
    def _linear(self) -> bool:
        return self.options.scale_exponent is not None

    def _encode(self, update: AdapterUpdate, context: CodecContext) -> bytes:
        if self.options.scale_exponent is not None:
            return self._encode_linear(update, context, self.options.scale_exponent)
        budget = payload_bits(context.spec, self.options.bpp)
        # first, so that sums stay finite
        scale = exponent_of(update.vector)
        vector = np.ldexp(update.vector, -scale)
        how = self._how_for(vector, context)
        axes = _axes(context, how)
        alone = how in _ALONE_AXES
        in_pieces = budget >= self.pieces_from * context.spec.size and are_possible(axes)
        axes = apart(axes) if in_pieces and not alone else axes
        rows, coefficients = axes.into(vector)
        rows = [] if alone else rows
        if budget < 8 or not any(own.any() for own in [*rows, coefficients]):
            return b""
        exponent = max(scale + exponent_of(*rows, coefficients), LOWEST_EXPONENT)
        rows = [np.ldexp(own, scale - exponent) for own in rows]
        coefficients = np.ldexp(coefficients, scale - exponent)
        loose = [coefficients[axes.loose == which] for which in np.unique(axes.loose)]
        writer = SymbolWriter()
        writer.bits(how, _HOW_BITS)
        if alone:
            write_exponent(writer, exponent)
            sent = write_coefficients(writer, loose, budget, _DEAD_ZONES)
        else:
            writer.bits(int(in_pieces), 1)
            write_exponent(writer, exponent)
            write = write_left if in_pieces else write_rows
            before = _HOW_BITS + 1 + EXPONENT_BITS
            sent = write(writer, axes, rows, loose, budget, before, _DEAD_ZONES)
        return writer.finish() if sent else b""

    def _decode(self, payload: bytes, context: CodecContext) -> Float32Array:
        if self._linear:
            return self._decode_linear(payload, context)
        if not payload:
            return np.zeros(context.spec.size, np.float32)
        if is_linear(payload):
            raise PacketError(
                "learned: the packet is of linear mode, and the option scale_exponent is not set "
                "here; set it on both ends or on none"
            )
        reader = SymbolReader(payload)
        how = int(reader.bits(_HOW_BITS, 1)[0])
        axes = _agreed_axes(context, how, _ALL_AXES)
        alone = how in _ALONE_AXES
        in_pieces = not alone and bool(reader.bits(1, 1)[0])
        if in_pieces and not are_possible(axes):
            raise PacketError("learned: pieces of factors that are too high for them")
        axes = apart(axes) if in_pieces else axes
        exponent = read_exponent(reader)
        present, counts = np.unique(axes.loose, return_counts=True)
        if alone:
            rows, loose = axes.no_rows(), read_coefficients(reader, counts.tolist())
        else:
            read = read_left if in_pieces else read_rows
            rows, loose = read(reader, axes, counts.tolist())
        reader.finish()
        coefficients = np.zeros(len(axes.loose), np.float32)
        for which, own in zip(present, loose, strict=True):
            coefficients[axes.loose == which] = own
        return scaled_back(axes.back(rows, coefficients), exponent)

    def _encode_linear(self, update: AdapterUpdate, context: CodecContext, step: int) -> bytes:
        count = self.numbers(context.spec)
        if not count:
            return b""
        axes = _axes(context, self._how(context), alone=True)
        scale = exponent_of(update.vector)
        _, coefficients = axes.into(np.ldexp(update.vector, -scale))
        levels = rounded(gathered(axes, coefficients, count), scale - step, self._top)
        return self._of_integers(levels, step, context)

    def _decode_linear(self, payload: bytes, context: CodecContext) -> Float32Array:
        levels, exponent = self._integers(payload, context)
        if not levels.size:
            return np.zeros(context.spec.size, np.float32)
        axes = _agreed_axes(context, unmarked(payload)[0], _UNGROWN, alone=True)
        coefficients, scale = scattered(axes, levels)
        return scaled_back(axes.back(axes.no_rows(), coefficients), exponent + scale)

    def _of_integers(self, levels: NDArray[Any], exponent: int, context: CodecContext) -> bytes:
        integers = super()._of_integers(levels, exponent, context)
        return marked(self._how(context), integers) if integers else b""

    def _integers(self, payload: bytes, context: CodecContext) -> tuple[Int32Array, int]:
        needed = payload or self.numbers(context.spec)
        return super()._integers(unmarked(payload)[1] if needed else b"", context)

    def _how_for(self, vector: Float32Array, context: CodecContext) -> int:
        """As `_how`, and whether coefficients of the state's directions are all there is."""
        spec, state, how = context.spec, context.state, self._how(context)
        # of the most bits, some are for what float32 has rounded
        most = payload_bits(spec, self.options.bpp) >= self.alike_from * spec.size
        if how == _PLAIN or not state.tensors or most:
            return how
        if not lies_along(vector, spec, orthonormal(spec, state)):
            return how
        return (_EFFECT if how in _WEIGHED else _PARAMETERS) + _ALONE

    def _how(self, context: CodecContext) -> int:
        """How the axes of a client's update are found."""
        if context.start is None:
            return _PLAIN
        alike = payload_bits(context.spec, self.options.bpp) >= self.alike_from * context.spec.size
        weighs = self.options.metric == "effect" and (self._linear or not alike)
        how = _EFFECT if weighs else _PARAMETERS
        if self.options.grown and context.start.origin is not None and not self._linear:
            how += _GROWN
        return how


def _spread(updates: Updates) -> Iterator[Judged]:
    """At most so many of them, evenly, each with the adapter it changes."""
    count = min(len(updates), _JUDGED)
    for at in range(count):
        index = at * len(updates) // count
        yield updates[index], updates.start(index)


def _agreed_axes(
    context: CodecContext, how: int, among: tuple[int, ...], *, alone: bool = False
) -> Axes:
    """The axes that a packet asks for."""
    if how not in among:
        raise PacketError(f"learned: there are no axes number {how}")
    if how != _PLAIN and context.start is None:
        raise PacketError("learned: the packet needs the adapter it changes, which is not held")
    if how in _GROWN_AXES and (context.start is None or context.start.origin is None):
        raise PacketError("learned: the packet needs what the run began with, which is not held")
    return _axes(context, how, alone=alone)


def _axes(context: CodecContext, how: int, *, alone: bool = False) -> Axes:
    """The axes of a number; with `alone`, as those that serve coefficients only."""
    start = None if how == _PLAIN else context.start
    if start is not None and how not in _GROWN_AXES:
        start = replace(start, origin=None)
    metric: Metric = "effect" if how in _WEIGHED else "parameters"
    alone = alone or how in _ALONE_AXES
    return axes_of(replace(context, start=start), metric, alone=alone)
