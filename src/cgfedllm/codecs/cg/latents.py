"""Latents as bytes: floats as they are, or integers through the range coder."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cgfedllm.adapter import Float32Array
from cgfedllm.codecs.bf16 import from_bfloat16, to_bfloat16
from cgfedllm.codecs.entropy import (
    MAX_LEVEL,
    Int32Array,
    SymbolReader,
    SymbolWriter,
    bits_of_levels,
)
from cgfedllm.errors import PacketError

LatentType = Literal["float32", "bfloat16"]
Shapes = Sequence[tuple[int, ...]]
Change = Callable[[Float32Array], Float32Array]
"""Takes the numbers of all latents, end to end, and gives as many."""

BYTES: dict[LatentType, int] = {"float32": 4, "bfloat16": 2}
"""Bytes of one number."""

_LARGEST = float(np.finfo(np.float32).max)
# channels whose mean level differs by less than an octave share a table
_CLASSES = 8


def pack_floats(latents: Sequence[Float32Array], dtype: LatentType) -> bytes:
    """Latents one after the other, each in C order; what is not finite becomes finite."""
    flat = np.concatenate([latent.reshape(-1) for latent in latents])
    flat = np.nan_to_num(flat, nan=0.0, posinf=_LARGEST, neginf=-_LARGEST)
    return to_bfloat16(flat).tobytes() if dtype == "bfloat16" else flat.astype("<f4").tobytes()


def unpack_floats(payload: bytes, shapes: Shapes, dtype: LatentType) -> list[Float32Array]:
    """Inverse of `pack_floats`, from a payload of the right length.

    Raises
    ------
    PacketError
        If a number is NaN or infinite.
    """
    if dtype == "bfloat16":
        flat = from_bfloat16(np.frombuffer(payload, "<u2"))
    else:
        flat = np.frombuffer(payload, "<f4").astype(np.float32)
    if not np.isfinite(flat).all():
        raise PacketError("the latent holds NaN or infinity")
    return _cut(flat, shapes)


def changed(latents: list[Float32Array], change: Change | None) -> list[Float32Array]:
    """What a function makes of all their numbers, end to end; they themselves without one."""
    if change is None:
        return latents
    flat = change(np.concatenate([latent.reshape(-1) for latent in latents]))
    return _cut(flat, [latent.shape for latent in latents])


def quantised(latents: Sequence[Float32Array], step: float) -> list[Int32Array]:
    """Nearest multiples of the step, as integers."""
    return [_levels(latent / np.float32(step)) for latent in latents]


def dequantised(levels: Sequence[Int32Array], step: float) -> list[Float32Array]:
    """The values that levels stand for."""
    return [own.astype(np.float32) * np.float32(step) for own in levels]


def write_latents(writer: SymbolWriter, levels: Sequence[Int32Array]) -> None:
    """Write the class of every channel, then the levels of each class."""
    channels = [channel.reshape(-1) for latent in levels for channel in latent]
    classes = _classes(channels)
    writer.symbols(classes, _CLASSES)
    for which in np.unique(classes):
        writer.levels(_members(channels, classes, which))


def read_latents(reader: SymbolReader, shapes: Shapes) -> list[Int32Array]:
    """Inverse of `write_latents`.

    Raises
    ------
    PacketError
        If the bytes cannot be levels.
    """
    sizes = [math.prod(shape[1:]) for shape in shapes for _ in range(shape[0])]
    classes = reader.symbols(_CLASSES, len(sizes))
    found: list[Int32Array] = [np.zeros(0, np.int32)] * len(sizes)
    for which in np.unique(classes):
        own = np.flatnonzero(classes == which)
        levels = reader.levels(sum(sizes[at] for at in own))
        start = 0
        for at in own:
            found[at] = levels[start : start + sizes[at]]
            start += sizes[at]
    return _cut(np.concatenate(found), shapes)


def _levels(values: Float32Array) -> Int32Array:
    finite = np.nan_to_num(values, nan=0.0, posinf=_LARGEST, neginf=-_LARGEST)
    return np.clip(np.rint(finite), -MAX_LEVEL, MAX_LEVEL).astype(np.int32)


def _classes(channels: Sequence[Int32Array]) -> NDArray[np.int64]:
    """Channels of like mean magnitude together, where that saves more than its tables cost."""
    one = np.zeros(len(channels), np.int64)
    means = np.array([np.abs(channel).mean(dtype=np.float64) for channel in channels])
    if not means.any():
        return one
    octaves = np.log2(means.max() / np.maximum(means, 1e-9))
    several = np.minimum(np.rint(octaves), _CLASSES - 1).astype(np.int64)
    return several if _bits(channels, several) < _bits(channels, one) else one


def _bits(channels: Sequence[Int32Array], classes: NDArray[np.int64]) -> float:
    counts = np.bincount(classes)
    counts = counts[counts > 0]
    told = float((counts * np.log2(counts.sum() / counts)).sum())
    members = (_members(channels, classes, which) for which in np.unique(classes))
    return told + sum(bits_of_levels(own) for own in members)


def _members(
    channels: Sequence[NDArray[Any]], classes: NDArray[np.int64], which: int
) -> Int32Array:
    return np.concatenate(
        [channel for channel, own in zip(channels, classes, strict=True) if own == which]
    )


def _cut(flat: NDArray[Any], shapes: Shapes) -> list[Any]:
    """One array after the other, in their shapes."""
    parts, start = [], 0
    for shape in shapes:
        size = math.prod(shape)
        parts.append(flat[start : start + size].reshape(shape))
        start += size
    return parts
