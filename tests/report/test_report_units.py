"""Human units."""

from __future__ import annotations

import math

import pytest

from cgfedllm.report.units import count_of, human_bytes, human_ratio, human_seconds


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (10 * 1024, "10.0 KiB"),
        (999 * 1024, "999 KiB"),
        (1000 * 1024, "0.98 MiB"),
        (3_686_400, "3.52 MiB"),
        (5 * 1024**3, "5.00 GiB"),
        (2 * 1024**4, "2.00 TiB"),
        (5000 * 1024**4, "5,000 TiB"),
    ],
)
def test_human_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.00 s"),
        (9.994, "9.99 s"),
        (9.996, "10.0 s"),
        (59.96, "1:00 min"),
        (61, "1:01 min"),
        (3599.4, "59:59 min"),
        (3599.6, "1:00:00 h"),
        (100_000, "27:46:40 h"),
        (math.inf, "?"),
    ],
)
def test_human_seconds(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(None, "-"), (math.nan, "-"), (1.0, "1.00x"), (39.96, "40.0x"), (1234.5, "1,234x")],
)
def test_human_ratio(ratio: float | None, text: str) -> None:
    assert human_ratio(ratio) == text


def test_count_of() -> None:
    assert [count_of(n, "reply", "replies") for n in (0, 1, 2)] == [
        "0 replies", "1 reply", "2 replies",
    ]  # fmt: skip
    assert count_of(1200, "round") == "1,200 rounds"
