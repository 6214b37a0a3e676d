"""Arithmetic on curves, by hand."""

from __future__ import annotations

import pytest

from cgfedllm.analysis.curves import (
    Point,
    area_between,
    bytes_to_share,
    curve_of,
    gain,
    gain_kept,
    gain_kept_by_round,
    total,
)
from cgfedllm.metrics import RoundRecord

RAW = [Point(0, 3.0, 0, 50), Point(1, 2.5, 1000, 150), Point(2, 2.0, 2000, 250)]
SMALL = [Point(0, 3.0, 0, 50), Point(1, 2.6, 10, 150), Point(2, 2.04, 20, 250)]


def test_only_evaluated_rounds_are_points() -> None:
    records = [RoundRecord(0, heldout_nll=3.0), RoundRecord(1), RoundRecord(2, heldout_nll=2.0)]
    records[2].uplink_bytes_total, records[2].downlink_bytes_total = 5, 7
    assert curve_of(records) == [Point(0, 3.0, 0, 0), Point(2, 2.0, 5, 7)]
    assert curve_of(records)[1].total == 12


def test_codec_state_counts_in_the_total_and_pre_training_does_not() -> None:
    record = RoundRecord(1, heldout_nll=2.0, uplink_bytes_total=5, downlink_bytes_total=7)
    record.codec_bytes_total, record.tgap_uplink_bytes = 11, 1000
    (point,) = curve_of([record])
    assert (point.uplink, point.downlink, point.codec, total(point)) == (5, 7, 11, 23)


def test_gain_kept() -> None:
    assert gain(RAW) == 1.0
    assert gain_kept(SMALL, RAW) == pytest.approx(0.96)
    assert gain_kept_by_round(SMALL, RAW) == pytest.approx({1: 0.8, 2: 0.96})
    assert gain(RAW[:1]) is None


def test_nothing_gained_is_nothing_to_keep() -> None:
    worse = [Point(0, 3.0, 0, 0), Point(1, 3.1, 10, 0)]
    assert gain_kept(SMALL, worse) is None
    assert gain_kept_by_round(SMALL, worse) == {}
    assert bytes_to_share(SMALL, worse, 0.95) is None


def test_rounds_that_only_one_has_are_not_matched() -> None:
    fewer = [Point(0, 3.0, 0, 0), Point(2, 2.5, 10, 0), Point(4, 2.0, 20, 0)]
    assert gain_kept_by_round(fewer, RAW) == pytest.approx({2: 0.5})


def test_bytes_to_a_share_are_of_whole_evaluated_rounds() -> None:
    assert bytes_to_share(SMALL, RAW, 0.95) == 20
    assert bytes_to_share(SMALL, RAW, 0.4) == 10
    assert bytes_to_share(SMALL, RAW, 0.99) is None, "never reached"
    assert bytes_to_share(RAW, RAW, 0.99) == 2000
    assert bytes_to_share(SMALL, RAW, 0.95, total) == 270


def test_area_between_steps() -> None:
    # two decades lie between them; the small one's steps at 10 and 20, raw's at 1000 and 2000
    two = 0.30103
    expected = (
        two * (3.0 - 2.6)  # 10 to 20: raw has bought nothing
        + (2 - two) * (3.0 - 2.04)  # 20 to 1000
        + two * (2.5 - 2.04)  # 1000 to 2000
    )
    assert area_between(SMALL, RAW) == pytest.approx(expected, abs=1e-4)
    assert area_between(RAW, SMALL) == pytest.approx(-expected, abs=1e-4)
    assert area_between(RAW, RAW) == 0.0


def test_what_is_sent_before_training_buys_nothing() -> None:
    # total bytes of round 0 are those of an evaluation; both start at their first round
    assert area_between(SMALL, RAW, total) == pytest.approx(
        # 160, 270 for the small one; 1150, 2250 for raw
        0.22724 * (3.0 - 2.6) + 0.62933 * (3.0 - 2.04) + 0.29148 * (2.5 - 2.04),
        abs=1e-3,
    )


def test_no_area_without_bytes() -> None:
    reference = [Point(0, 3.0, 0, 0), Point(1, 2.0, 0, 0)]
    assert area_between(reference, RAW) is None
