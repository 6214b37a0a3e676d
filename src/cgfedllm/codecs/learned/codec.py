r"""`learned`: the flagship.

::

    update --axes of the adapter (`axes`)--> coefficient rows --a mode a row--> packet
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import zstandard
from pydantic import Field

from cgfedllm.adapter import AdapterSpec, AdapterUpdate, Float32Array
from cgfedllm.codecs.base import CodecContext, CodecState, register
from cgfedllm.codecs.entropy import SymbolReader, SymbolWriter
from cgfedllm.codecs.learned.allocation import Allocation, Choice, IntArray
from cgfedllm.codecs.learned.axes import Metric, axes_of
from cgfedllm.codecs.learned.directions import (
    ENERGIES,
    WEIGHTS,
    learn,
    missed,
    orthonormal,
    unknown,
)
from cgfedllm.codecs.learned.kinds import Axes
from cgfedllm.codecs.learning import (
    FitProgress,
    FitSettings,
    LearnedCodec,
    OnEpoch,
    Updates,
)
from cgfedllm.codecs.parts.exponent import (
    EXPONENT_BITS,
    LOWEST_EXPONENT,
    exponent_of,
    read_exponent,
    scaled_back,
    write_exponent,
)
from cgfedllm.codecs.parts.frames import FrameError, open_frame
from cgfedllm.codecs.parts.judging import Judged, judge
from cgfedllm.codecs.parts.vectors import MODES, read_vectors, write_vectors
from cgfedllm.codecs.rate import RateOptions, payload_bits
from cgfedllm.errors import CodecStateError, PacketError

# how the axes are found; with _GROWN, also from how the adapter has changed
_PLAIN, _PARAMETERS, _EFFECT = range(3)
_GROWN = 4
_HOW_BITS = 3
# lowest scale, their span, and bits lost to whole bytes
_RANGE_BITS = 26
# expected bits of a scale
_SCALE_BITS = 3.2
_TRIES = 8
# of energies and weights: far beyond any that are learned, and no product of them overflows
_BOUND = 40
# more of them gain nothing here, and are most of an encoder's time
_DEAD_ZONES = (0.001, 0.6, 1.0)
_LEVEL = 19  # of zstd; slow to pack, which is done once a run
_JUDGED = 8
# dead-zone quantised rows take what is left of the budget; so much over it they still can
_ABSORBED = 0.05


class LearnedOptions(RateOptions):
    """Rate, metric and what a state holds."""

    directions: int = Field(
        default=32,
        ge=1,
        le=64,
        description="Directions of the long axis that a state knows of each factor.",
    )
    metric: Metric = Field(
        default="effect",
        description='What errors are weighted by: "effect" is what they do to outputs, '
        '"parameters" leaves them as they are.',
    )
    grown: bool = Field(
        default=True,
        description="Also code along the directions in which the adapter has grown so far.",
    )


@register
class Learned(LearnedCodec):
    """Coefficients of known directions and rows, chosen over all of it by worth per bit."""

    name = "learned"
    rates = "0.002 to 16 bits"
    summary = "along directions that both ends know, weighted by what a change does"
    uses_start = True
    learns_gradients = True
    Options = LearnedOptions

    options: LearnedOptions

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

    def _encode(self, update: AdapterUpdate, context: CodecContext) -> bytes:
        budget = payload_bits(context.spec, self.options.bpp)
        how = _PLAIN
        if context.start is not None:
            how = _EFFECT if self.options.metric == "effect" else _PARAMETERS
            if self.options.grown and context.start.origin is not None:
                how |= _GROWN
        axes = _axes(context, how)
        # first, so that sums stay finite
        scale = exponent_of(update.vector)
        rows, coefficients = axes.into(np.ldexp(update.vector, -scale))
        if budget < 8 or not any(own.any() for own in [*rows, coefficients]):
            return b""
        exponent = max(scale + exponent_of(*rows, coefficients), LOWEST_EXPONENT)
        rows = [np.ldexp(own, scale - exponent) for own in rows]
        coefficients = np.ldexp(coefficients, scale - exponent)
        loose = [coefficients[axes.loose == which] for which in np.unique(axes.loose)]
        modes = _settle(rows, loose, axes, budget - EXPONENT_BITS - _HOW_BITS - _RANGE_BITS).modes
        writer = SymbolWriter()
        writer.bits(how, _HOW_BITS)
        write_exponent(writer, exponent)
        _write_modes(writer, modes, axes)
        sent = [own[mode > 0] for own, mode in zip(rows, modes, strict=True)]
        chosen = [mode[mode > 0] for mode in modes]
        if not write_vectors(writer, sent, chosen, budget, loose, _DEAD_ZONES):
            return b""
        return writer.finish()

    def _decode(self, payload: bytes, context: CodecContext) -> Float32Array:
        if not payload:
            return np.zeros(context.spec.size, np.float32)
        reader = SymbolReader(payload)
        how = int(reader.bits(_HOW_BITS, 1)[0])
        if how not in (_PLAIN, _PARAMETERS, _EFFECT, _PARAMETERS | _GROWN, _EFFECT | _GROWN):
            raise PacketError(f"learned: there are no axes number {how}")
        if how != _PLAIN and context.start is None:
            raise PacketError("learned: the packet needs the adapter it changes, which is not held")
        if how & _GROWN and (context.start is None or context.start.origin is None):
            raise PacketError(
                "learned: the packet needs what the run began with, which is not held"
            )
        axes = _axes(context, how)
        exponent = read_exponent(reader)
        modes = _read_modes(reader, axes)
        lengths = [kind.shape[1] for kind in axes.kinds]
        classes = axes.loose
        present, counts = np.unique(classes, return_counts=True)
        sent, loose = read_vectors(
            reader, [mode[mode > 0] for mode in modes], lengths, counts.tolist()
        )
        reader.finish()
        coefficients = np.zeros(len(classes), np.float32)
        for which, own in zip(present, loose, strict=True):
            coefficients[classes == which] = own
        rows = []
        for kind, mode, own in zip(axes.kinds, modes, sent, strict=True):
            full = np.zeros(kind.shape, np.float32)
            full[mode > 0] = own
            rows.append(full)
        return scaled_back(axes.back(rows, coefficients), exponent)


def _spread(updates: Updates) -> Iterator[Judged]:
    """At most so many of them, evenly, each with the adapter it changes."""
    count = min(len(updates), _JUDGED)
    for at in range(count):
        index = at * len(updates) // count
        yield updates[index], updates.start(index)


def _axes(context: CodecContext, how: int) -> Axes:
    start = None if how == _PLAIN else context.start
    if start is not None and not how & _GROWN:
        start = replace(start, origin=None)
    metric: Metric = "effect" if how & _EFFECT else "parameters"
    return axes_of(replace(context, start=start), metric)


def _settle(
    rows: list[Float32Array], loose: list[Float32Array], axes: Axes, budget: float
) -> Allocation:
    """Modes that fill a budget.

    What goes beside entries is known only once it is written, so modes are chosen again until it
    costs what was expected of it.
    """
    target = budget
    choice = Choice(rows, loose)
    for _ in range(_TRIES):
        allocation = choice.within(target)
        scratch = SymbolWriter()
        _write_modes(scratch, allocation.modes, axes)
        predicted = scratch.spent + _SCALE_BITS * allocation.count + allocation.bits
        if abs(predicted - budget) <= max(0.005 * budget, _ABSORBED * allocation.absorbing):
            break
        target = max(target + budget - predicted, 0.0)
    return allocation


def _write_modes(writer: SymbolWriter, modes: list[IntArray], axes: Axes) -> None:
    """The highest mode of each class of foretold energy, and a table up to it."""
    classes = np.concatenate([kind.classes for kind in axes.kinds])
    values = np.concatenate(modes)
    for which in np.unique(classes):
        own = values[classes == which]
        highest = int(own.max())
        writer.uniform(highest, MODES)
        if highest:
            writer.symbols(own, highest + 1)


def _read_modes(reader: SymbolReader, axes: Axes) -> list[IntArray]:
    classes = np.concatenate([kind.classes for kind in axes.kinds])
    values = np.zeros(len(classes), np.int64)
    for which in np.unique(classes):
        at = classes == which
        highest = int(reader.uniform(MODES, 1)[0])
        if highest:
            values[at] = reader.symbols(highest + 1, int(np.count_nonzero(at)))
    return np.split(values, np.cumsum([kind.shape[0] for kind in axes.kinds])[:-1])
