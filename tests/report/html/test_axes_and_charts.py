"""Axes have round ticks around the data; charts place points where they belong."""

from __future__ import annotations

import math

import pytest

from cgfedllm.report.html.axes import (
    bytes_axis,
    drawable,
    log_bytes_axis,
    number_axis,
    rounds_axis,
    seconds_axis,
)
from cgfedllm.report.html.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Series,
    column_chart,
    line_chart,
    stacked,
    style_of,
)


def test_ticks_are_round_and_enclose_the_data() -> None:
    axis = number_axis("nats", [1.507, 2.277], ".4f")
    assert [text for _, text in axis.ticks] == ["1.4", "1.6", "1.8", "2.0", "2.2", "2.4"]
    assert axis.low <= 1.507
    assert axis.high >= 2.277
    assert axis.say(1.507) == "1.5070"


@pytest.mark.parametrize("values", [[], [0.0], [2.5], [1e-12, 2e-12], [-3e17, 3e17], [1e17] * 3])
def test_any_values_make_an_axis(values: list[float]) -> None:
    for axis in (number_axis("x", values, ".3f"), bytes_axis("x", [abs(v) for v in values])):
        assert axis.high > axis.low
        assert len(axis.ticks) >= 2
        assert len({text for _, text in axis.ticks}) == len(axis.ticks)
        assert all(0 <= axis.at(abs(v) if axis.low >= 0 else v) <= 1 for v in values)


def test_the_unit_is_in_the_label() -> None:
    assert bytes_axis("sent", [4.4 * 2**20]).label == "sent (MiB)"
    assert bytes_axis("sent", [300]).label == "sent (bytes)"
    assert seconds_axis("time", [30, 500]).label == "time (minutes)"
    assert [text for _, text in bytes_axis("sent", [0, 4 * 2**20]).ticks] == list("01234")


def test_rounds_are_whole() -> None:
    assert [text for _, text in rounds_axis(3).ticks] == ["0", "1", "2", "3"]
    assert [text for _, text in rounds_axis(30).ticks] == ["0", "10", "20", "30"]
    assert rounds_axis(0).high == 1


def test_log_ticks_are_powers_of_two() -> None:
    axis = log_bytes_axis("sent", [13_000, 995_342_040])
    assert [text for _, text in axis.ticks] == ["32 KiB", "1 MiB", "32 MiB", "1 GiB"]
    middle = math.sqrt(axis.low * axis.high)
    assert axis.at(middle) == pytest.approx(0.5)
    assert log_bytes_axis("sent", [64]).high == 128


def test_what_cannot_be_drawn() -> None:
    assert not any(map(drawable, (None, math.nan, math.inf, -1e200)))
    assert drawable(0.0)


def test_points_lie_between_the_margins() -> None:
    y = number_axis("nats", [1.0, 3.0], ".1f")
    chart = line_chart("k", "t", rounds_axis(2), y, [Series("a", [(0, 3.0), (2, 1.0)])])
    [series] = chart.series
    assert series.path == f"M{LEFT} {TOP}L{WIDTH - RIGHT} {HEIGHT - BOTTOM}"
    assert [mark.text for mark in series.marks] == ["round 0: 3.0", "round 2: 1.0"]


def test_steps_hold_until_the_next_point() -> None:
    y = number_axis("nats", [1.0, 3.0], ".1f")
    points = [(0.0, 3.0), (2.0, 1.0)]
    chart = line_chart("k", "t", rounds_axis(2), y, [Series("a", points, steps=True)])
    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM
    assert chart.series[0].path == f"M{LEFT} {TOP}L{right} {TOP}L{right} {floor}"


def test_many_points_have_no_dots() -> None:
    points = [(float(r), 1.0) for r in range(100)]
    axis = number_axis("nats", [1.0], ".1f")
    assert line_chart("k", "t", rounds_axis(99), axis, [Series("a", points)]).series[0].marks == []


def test_columns_keep_within_the_canvas() -> None:
    points = [(float(r), 10.0) for r in range(4)]
    chart = column_chart("k", "t", rounds_axis(3), bytes_axis("sent", [10]), points, flush=[3.0])
    assert chart.bars.count("M") == 3
    assert chart.flush_bars.count("M") == 1
    starts = [float(piece.split()[0]) for piece in (chart.bars + chart.flush_bars).split("M")[1:]]
    assert min(starts) >= LEFT
    assert chart.note


def test_thirty_series_look_different() -> None:
    assert len({style_of(number) for number in range(30)}) == 30


def test_pieces_of_a_bar_add_up() -> None:
    pieces = stacked([("train", 3.0), ("evaluate", 1.0)], 8.0, str)
    assert pieces == [(0.0, 37.5, "train: 3.0"), (37.5, 12.5, "evaluate: 1.0")]
