"""What people see of a pre-training: progress, the curve, the card, `inspect` of the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import StringIO
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from cgfedllm import events
from cgfedllm.adapter import AdapterSpec
from cgfedllm.codecs import CodecState
from cgfedllm.errors import CodecStateError
from cgfedllm.metrics import RoundRecord
from cgfedllm.report.figures.pretraining import draw_fit, plot_fit
from cgfedllm.report.inspection import inspect
from cgfedllm.report.model_card import card_markdown
from cgfedllm.report.pretrain_progress import PretrainProgress
from cgfedllm.storage import save_tensors
from cgfedllm.tgap.codec_file import CodecFile

SPEC = AdapterSpec.from_shapes(
    {
        "base_model.model.layers.0.q_proj.lora_A.weight": (2, 6),
        "base_model.model.layers.0.q_proj.lora_B.weight": (4, 2),
    }
)
CARD: dict[str, Any] = {
    "made_by": "cgfedllm 0.1.0",
    "recordings": [
        {
            "kind": "federated",
            "fingerprint": "ab" * 16,
            "updates": 48,
            "rounds": 8,
            "clients": 6,
            "steps": [4],
            "model": "embedded",
            "lora": {"rank": 2},
            "data": {
                "source": "medquad.jsonl", "partition": "natural", "part": "d1", "d1_share": 0.3,
                "split_seed": 5,
            },
            "training": {"optimizer": "adamw", "lr": 5e-4, "batch_size": 8},
            "seed": 5,
        }
    ],
    "splits": {
        "train": {"updates": 30, "samples_in_a_pass": 30, "rounds": [[1, 2, 6]], "clients": 5},
        "unseen_rounds": {"updates": 10, "samples_in_a_pass": 10, "rounds": [[7]], "clients": 5},
    },
    "fit": {
        "sampling": "uniform", "stride": 1, "span": 1, "seed": 5, "epochs": 200, "patience": 20,
        "epochs_run": 61, "best_epoch": 41,
    },
    "fidelity": {
        "train": {"updates": 30, "snr_db": 2.5, "cosine": 0.66, "bpp": 0.05},
        "unseen_rounds": {"updates": 10, "snr_db": None, "cosine": 0.5, "bpp": 0.05},
    },
    "cost": {
        "uplink_bytes": 2048, "downlink_bytes": 4096, "collect_seconds": None, "fit_seconds": 61.0,
        "basis": "Counted.",
    },
    "notes": ["one thing"],
}  # fmt: skip


@pytest.fixture
def file() -> CodecFile:
    state = CodecState.of({"w": np.zeros(5, np.float32)})
    return CodecFile("some_codec", 1, {"bpp": 0.05}, SPEC, state, CARD)


def write(path: Path, file: CodecFile, **changes: str) -> Path:
    metadata = {
        "format": "cgfedllm-codec", "version": "1", "codec": file.name, "codec_version": "1",
        "options": json.dumps(file.options), "spec": file.spec.to_json(), "state_version": "0",
        "state_hash": file.state.hash.hex(), "card": json.dumps(file.card),
    }  # fmt: skip
    save_tensors(path, file.state.tensors, metadata | changes)
    return path


# ---- inspect ------------------------------------------------------------------------------------


def test_inspect_of_a_codec_file(file: CodecFile, tmp_path: Path) -> None:
    found = inspect(write(tmp_path / "c.safetensors", file))
    assert found.kind == "codec"
    facts = found.facts
    assert facts["codec"] == "some_codec, version 1 (not known to this installation)"
    assert facts["options"] == "bpp=0.05"
    assert facts["adapter"] == "20 parameters in 2 factors"
    assert facts["adapter spec hash"] == SPEC.hash.hex()
    assert facts["state"] == "version 0, 5 values in 1 tensor"
    assert facts["recording 1"] == (
        "federated, 48 updates of 6 clients, embedded on medquad.jsonl (d1)"
    )
    assert facts["trained on"].startswith("SNR 2.50 dB, cosine 0.660, 0.05 bits per parameter")
    assert facts["cost"] == (
        "uplink 2.00 KiB, downlink 4.00 KiB, collecting unknown, fitting 1:01 min"
    )


def test_inspect_of_a_codec_file_without_a_card(file: CodecFile, tmp_path: Path) -> None:
    facts = inspect(write(tmp_path / "c.safetensors", file, card="{}")).facts
    assert "cost" not in facts
    assert facts["codec state hash"] == file.state.hash.hex()


@pytest.mark.parametrize("card", ['{"recordings": [3]}', '{"fidelity": []}', '{"cost": 1}'])
def test_inspect_of_a_codec_file_whose_card_is_nonsense(
    file: CodecFile, tmp_path: Path, card: str
) -> None:
    with pytest.raises(CodecStateError, match=r"its card is damaged|damaged: .*the card's cost"):
        inspect(write(tmp_path / "c.safetensors", file, card=card))


# ---- the card -----------------------------------------------------------------------------------


def test_the_card_as_markdown(file: CodecFile) -> None:
    text = card_markdown(file, "c.safetensors")
    assert text.startswith("# Codec `some_codec`, pre-trained\n")
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Adapter", "## Learned from", "## Fidelity", "## Cost", "## Use", "## Notes",
    ]  # fmt: skip
    assert "rank 2 on q_proj" in text
    assert "48 updates of 6 clients over 8 rounds, 4 local steps each" in text
    assert "| trained on | 30 | 5 | 1 to 6 |" in text
    assert "| unseen rounds (judged by while fitting) | - | 0.500 | 0.05 | 10 |" in text
    assert "61 epochs of at most 200, the state after epoch 41 was kept" in text
    assert 'part = "d2"\nd1_share = 0.3\nseed = 5' in text
    assert text.endswith("## Notes\n\n- One thing.\n")


def test_a_card_of_a_codec_that_no_pre_training_made(file: CodecFile) -> None:
    bare = CodecFile(file.name, 1, {}, SPEC, file.state, {})
    assert "## Use" in card_markdown(bare, "c.safetensors")


# ---- the curve ----------------------------------------------------------------------------------

CURVE = [
    {
        "epoch": epoch, "train_loss": 1 / epoch, "validation_snr_db": 2 - 1 / epoch,
        "validation_cosine": 0.5, "validation_bpp": 0.1, "seconds": 0.1 * epoch,
    }
    for epoch in range(1, 31)
]  # fmt: skip


def test_the_curve_shows_loss_fidelity_and_what_was_kept(tmp_path: Path) -> None:
    figure = draw_fit(CURVE, 25, "some_codec")
    loss, fidelity = figure.axes
    assert list(loss.lines[0].get_ydata()) == [row["train_loss"] for row in CURVE]
    assert list(fidelity.lines[0].get_ydata()) == [row["validation_snr_db"] for row in CURVE]
    assert fidelity.lines[1].get_xdata()[0] == 25
    assert "best after epoch 25 of 30" in figure.get_suptitle()
    assert not [text for text in fidelity.texts if text.get_text() == "predicting zero"]
    written = plot_fit(CURVE[:1], 1, "some_codec", tmp_path / "curve")
    assert [path.name for path in written] == ["curve.png", "curve.svg"]


def test_a_curve_near_nothing_shows_where_nothing_is() -> None:
    low = [{**row, "validation_snr_db": 0.2} for row in CURVE]
    assert [text.get_text() for text in draw_fit(low, 1, "c").axes[1].texts] == ["predicting zero"]


# ---- progress -----------------------------------------------------------------------------------


def epochs(number: int) -> Iterator[events.Event]:
    yield events.FitStarted("some_codec", 200, 30, 1, resumed_from=2)
    for epoch in range(3, 3 + number):
        yield events.FitEpoch({"epoch": epoch, "validation_snr_db": 1.25}, best=epoch - 1)


def told(
    *heard: events.Event, terminal: bool = False, mode: Any = "auto", pause: float = 0.0
) -> str:
    """What is printed, if the clock goes on by `pause` seconds whenever it is looked at."""
    out = StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, color_system=None)
    ticks = count(0.0, pause)
    with PretrainProgress(mode, console, clock=lambda: next(ticks)) as progress:
        for event in heard:
            progress(event)
    return out.getvalue()


def test_lines_of_a_fit() -> None:
    lines = told(events.Notice("careful", "warning"), *epochs(4), pause=10.0).splitlines()
    assert lines == [
        "warning: careful",
        "fitting some_codec on 30 updates, judged by 1 other, at most 200 epochs, going on after "
        "epoch 2",
        # a line now and then, not one an epoch
        "epoch 4/200: validation SNR 1.25 dB, best after epoch 3",
        "epoch 6/200: validation SNR 1.25 dB, best after epoch 5",
    ]


def test_the_run_is_watched_first_then_the_fit() -> None:
    run = [
        events.RunStarted("exp-tgap", 2, ("a", "b"), 20, "raw", "raw"),
        events.Notice("note of the run"),
        events.RoundFinished(RoundRecord(1, seconds={"total": 1.0})),
    ]
    text = told(*run, *epochs(1), events.EvaluationProgress("trained on", 1, 2))
    order = ["exp-tgap: 2 clients", "note of the run", "round 1/2", "fitting some_codec"]
    assert [text.index(part) for part in order] == sorted(text.index(part) for part in order)
    assert "evaluating" not in text.lower()


def test_a_bar_on_a_terminal() -> None:
    text = told(*epochs(3), events.EvaluationProgress("unseen rounds", 1, 2), terminal=True)
    assert "fitting some_codec" in text
    assert "5/200" in text or "coding" in text


def test_quiet_says_nothing() -> None:
    assert told(*epochs(3), mode="quiet") == ""
