"""Figures are there, are pictures, and are the same every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.image as mpimg
import pytest

from cgfedllm.report.figures.closed_loop import draw_closed_loop, plot_closed_loop
from cgfedllm.report.figures.style import colour_of, styles_of


def results(labels: dict[str, float], seeds: tuple[int, ...] = (0, 1)) -> dict[str, Any]:
    """Cells that end at a loss, each label a tenth of the bytes of the one before."""
    cells = []
    for number, (label, end) in enumerate(labels.items()):
        for seed in seeds:
            sent = 0 if label == "centralised" else 10 ** (8 - number)
            curve = [
                {
                    "round": r,
                    "heldout_nll": 3.0 + 0.02 * seed - (3.0 - end) * r / 4,
                    "uplink_bytes": sent * r,
                    "total_bytes": 2 * sent * r,
                }
                for r in range(5)
            ]
            cells.append({"candidate": label, "seed": seed, "curve": curve})
    return {
        "candidates": [{"label": label} for label in labels],
        "cells": cells,
        "seeds": list(seeds),
        "what": {
            "model": "tiny", "data": "rows.jsonl", "clients": 3, "rounds": 4, "local_steps": 2,
            "local_epochs": None, "fraction_train": 1.0,
        },
    }  # fmt: skip


LABELS = {"raw": 2.0, "int8": 2.01, "topk:bpp=0.05": 2.1, "centralised": 1.9}


def test_files(tmp_path: Path) -> None:
    files = plot_closed_loop(results(LABELS), tmp_path / "f.loop")
    assert [path.name for path in files] == ["f.loop.png", "f.loop.svg"]
    height, width, _ = mpimg.imread(files[0]).shape
    assert width > 1000
    assert height > 500
    again = plot_closed_loop(results(LABELS), tmp_path / "again")
    assert [p.read_bytes() for p in files] == [p.read_bytes() for p in again]


def test_what_is_said() -> None:
    figure = draw_closed_loop(results(LABELS))
    left, right = figure.axes
    assert figure.get_suptitle() == (
        "tiny on rows.jsonl: 3 clients, 4 rounds of 2 local steps; mean and range over seeds 0, 1"
    )
    assert left.get_ylabel() == "held-out NLL (nats per label token)"
    assert "uplink" in left.get_xlabel()
    assert "downlink" in right.get_xlabel()
    assert left.get_xscale() == "log"
    texts = {text.get_text() for text in left.texts}
    legend = {t.get_text() for found in figure.legends for t in found.get_texts()}
    assert {"raw", "int8", "topk:bpp=0.05"} <= texts | legend
    assert {"before training", "centralised"} <= texts


def test_missing_cells_are_told() -> None:
    partial = results(LABELS)
    partial["cells"] = [c for c in partial["cells"] if (c["candidate"], c["seed"]) != ("int8", 1)]
    figure = draw_closed_loop(partial)
    said = {t.get_text() for found in figure.legends for t in found.get_texts()}
    said |= {text.get_text() for text in figure.axes[0].texts}
    assert "int8 (1 of 2 seeds)" in said


@pytest.mark.parametrize("labels", [{}, {"raw": 2.0}])
def test_little_to_show(labels: dict[str, float], tmp_path: Path) -> None:
    assert all(path.stat().st_size for path in plot_closed_loop(results(labels), tmp_path / "f"))


def test_labels_that_would_collide_go_into_a_legend() -> None:
    crowded = {f"topk:bpp={n}": 2.0 for n in range(3)}
    content = results(crowded)
    for cell in content["cells"]:
        for point in cell["curve"]:
            point["uplink_bytes"] = point["total_bytes"] = 1000 * point["round"]
    figure = draw_closed_loop(content)
    assert [t.get_text() for t in figure.legends[0].get_texts()] == list(crowded)
    assert not {t.get_text() for t in figure.axes[0].texts} & crowded.keys()


def test_styles() -> None:
    labels = ["raw", "topk:bpp=0.1", "topk:bpp=0.2", "unheard-of"]
    styles = styles_of(labels)
    assert len(set(styles.values())) == 4
    assert styles["topk:bpp=0.1"].colour == styles["topk:bpp=0.2"].colour == colour_of("topk")
    assert colour_of("unheard-of") == colour_of("unheard-of:x=1")


def test_a_variant_has_the_colour_of_the_codec_it_begins_with() -> None:
    assert colour_of("learned 0.02") == colour_of("learned:bpp=0.02") == colour_of("learned")
    styles = styles_of(["learned 0.02", "learned 0.064", "learning less"])
    assert styles["learned 0.02"].dashes != styles["learned 0.064"].dashes
    assert styles["learning less"].colour != styles["learned 0.02"].colour
