"""Numbers as people read them."""

from __future__ import annotations

import math


def human_bytes(count: float) -> str:
    """Byte count in binary units with three significant digits, e.g. ``3.52 MiB``."""
    if abs(count) < 1024:
        return f"{count:.0f} B"
    value = float(count)
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if abs(value) < 999.5:
            return f"{_three_digits(value)} {unit}"
    return f"{_three_digits(value / 1024)} TiB"


def human_seconds(seconds: float) -> str:
    """Duration, e.g. ``0.34 s``, ``12.3 s``, ``4:05 min``, ``1:02:03 h``."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} h"


def human_ratio(ratio: float | None) -> str:
    """How many times fewer, e.g. ``3.98x``, ``412x``; ``-`` where there is no ratio."""
    if ratio is None or not math.isfinite(ratio):
        return "-"
    return f"{_three_digits(ratio)}x"


def count_of(number: int, one: str, many: str = "") -> str:
    """Give a number with its noun, e.g. ``1 round``, ``3 rounds``, ``2 replies``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _three_digits(value: float) -> str:
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:,.{digits}f}"
