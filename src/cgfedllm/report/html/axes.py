"""Axes of the report's charts: where values lie and what is written at the ticks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

from cgfedllm.report.units import human_bytes, human_seconds

_MOST_TICKS = 5
_LARGEST = 1e18
_BYTE_UNITS = ((1024**4, "TiB"), (1024**3, "GiB"), (1024**2, "MiB"), (1024, "KiB"), (1, "bytes"))
_TIME_UNITS = ((3600, "hours"), (60, "minutes"), (1, "seconds"))


@dataclass(frozen=True)
class Axis:
    """A scale from `low` to `high`.

    Parameters
    ----------
    label : str
        What is measured, with its unit.
    low, high : float
        The ends, in the unit of the data.
    ticks : tuple of (float, str)
        Values and their texts.
    say : callable
        A value as people are told of it, in a tooltip.
    log : bool
        Whether equal ratios are equal distances.
    """

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    say: Callable[[float], str]
    log: bool = False

    def at(self, value: float) -> float:
        """Position between 0 (the low end) and 1."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def drawable(value: float | None) -> bool:
    """Whether a chart can show it: a number, not absurdly large."""
    return value is not None and math.isfinite(value) and abs(value) < _LARGEST


def rounds_axis(last: int) -> Axis:
    """Rounds from 0."""
    high = max(1, last)
    places = MaxNLocator(_MOST_TICKS, integer=True, steps=[1, 2, 5, 10]).tick_values(0, high)
    ticks = tuple((float(t), f"{t:.0f}") for t in places if 0 <= t <= high)
    return Axis("round", 0.0, float(high), ticks, lambda value: f"round {value:.0f}")


def number_axis(label: str, values: Iterable[float], form: str, *, zero: bool = False) -> Axis:
    """Plain numbers.

    Parameters
    ----------
    label : str
        What they are.
    values : iterable of float
        All that is to be shown.
    form : str
        Format specification of a value in a tooltip.
    zero : bool
        Begin at 0.
    """
    low, high, ticks = _linear(values, 1.0, zero)
    return Axis(label, low, high, ticks, lambda value: format(value, form))


def bytes_axis(label: str, values: Iterable[float]) -> Axis:
    """Bytes from 0, in the unit that fits the largest."""
    return _in_units(label, values, _BYTE_UNITS, human_bytes)


def seconds_axis(label: str, values: Iterable[float]) -> Axis:
    """Durations from 0, in the unit that fits the longest."""
    return _in_units(label, values, _TIME_UNITS, human_seconds)


def log_bytes_axis(label: str, values: Iterable[float]) -> Axis:
    """Bytes above 0 by their logarithm; ticks at powers of two."""
    found = list(values)
    first, last = math.floor(math.log2(min(found))), math.ceil(math.log2(max(found)))
    last = max(last, first + 1)
    step = next(s for s in (1, 2, 5, 10, 20) if (last - first) / s <= _MOST_TICKS)
    exponents = [e for e in range(first, last + 1) if e % step == 0]
    ticks = tuple((2.0**e, _short_bytes(2**e)) for e in exponents)
    return Axis(label, 2.0**first, 2.0**last, ticks, human_bytes, log=True)


def _in_units(
    label: str,
    values: Iterable[float],
    units: tuple[tuple[int, str], ...],
    say: Callable[[float], str],
) -> Axis:
    found = list(values)
    top = max(found, default=0.0)
    size, unit = next(((s, u) for s, u in units if top >= s), units[-1])
    low, high, ticks = _linear(found, float(size), zero=True)
    return Axis(f"{label} ({unit})", low, high, ticks, say)


def _linear(
    values: Iterable[float], unit: float, zero: bool
) -> tuple[float, float, tuple[tuple[float, str], ...]]:
    """Round numbers around the values; the outermost are the ends."""
    found = [value / unit for value in values] or [0.0]
    low, high = min(found), max(found)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        low, high = (low, low + 1.0) if zero else (low - 0.5, low + 0.5)
    locator = MaxNLocator(_MOST_TICKS, steps=[1, 2, 2.5, 5, 10])
    places = [float(place) for place in locator.tick_values(low, high)]
    form = _form(places[1] - places[0])
    ticks = tuple((unit * place, format(place, form).replace("-", "−")) for place in places)
    return unit * places[0], unit * places[-1], ticks


def _form(step: float) -> str:
    """Format that tells ticks so far apart from each other."""
    digits = next((d for d in range(7) if abs(round(step, d) - step) < 1e-6 * step), None)
    return ".3g" if digits is None else f",.{digits}f"


def _short_bytes(count: int) -> str:
    """A power of two without decimals."""
    size, unit = next((s, u) for s, u in _BYTE_UNITS if count >= s)
    return f"{count // size} {'B' if unit == 'bytes' else unit}"
