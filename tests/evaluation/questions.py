"""Invented questions in the layout that data sets have on the hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

LETTERS = "ABCD"
Answers = Callable[[str, int], int]


def write_hub(
    hub: Path,
    *,
    ceval: Mapping[str, int] | None = None,
    mmlu: Mapping[str, int] | None = None,
    gsm8k: int = 0,
    answer: Answers = lambda subject, number: (number * 7 + len(subject)) % 4,
) -> Path:
    """A folder with so many questions a subject; `answer` says which option is right."""
    if ceval:
        _write_choices(hub / "ceval/ceval-exam", ceval, "val", _ceval_row, answer)
    if mmlu:
        _write_choices(hub / "cais/mmlu", mmlu, "test", _mmlu_row, answer)
    if gsm8k:
        folder = hub / "openai/gsm8k"
        for split in ("train", "test"):
            _write_rows(folder / f"{split}.jsonl", [_sum(split, n) for n in range(gsm8k)])
        _write_readme(folder, {"main": {"train": "train.jsonl", "test": "test.jsonl"}})
    return hub


def question(subject: str, number: int) -> str:
    return f"which of these is thing {number} of {subject}?"


def _write_choices(
    folder: Path,
    subjects: Mapping[str, int],
    split: str,
    row: Callable[[str, int, int], dict[str, Any]],
    answer: Answers,
) -> None:
    for subject, count in subjects.items():
        rows = [row(subject, n, answer(subject, n)) for n in range(count)]
        _write_rows(folder / split / f"{subject}.jsonl", rows)
        worked = [row(f"old {subject}", n, n % 4) for n in range(5)]
        _write_rows(folder / "dev" / f"{subject}.jsonl", worked)
    _write_readme(
        folder,
        {name: {part: f"{part}/{name}.jsonl" for part in ("dev", split)} for name in subjects},
    )


def _mmlu_row(subject: str, number: int, right: int) -> dict[str, Any]:
    # of unlike length, so that batches have something to sort
    options = [f"{word} {number * 3}" for word in ("one", "two or so", "three", "four in all")]
    text = question(subject, number) + " well?" * (number % 5)
    return {"question": text, "subject": subject, "choices": options, "answer": right}


def _ceval_row(subject: str, number: int, right: int) -> dict[str, Any]:
    row = _mmlu_row(subject, number, right)
    options = dict(zip(LETTERS, row["choices"], strict=True))
    return {"id": number, "question": row["question"], **options, "answer": LETTERS[right]}


def _sum(split: str, number: int) -> dict[str, str]:
    return {
        "question": f"what is {number} and {len(split)}?",
        "answer": f"{number} and {len(split)} are the sum.\n#### {number + len(split)}",
    }


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_readme(folder: Path, configs: Mapping[str, Mapping[str, str]]) -> None:
    lines = ["---", "configs:"]
    for name, files in configs.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        for split, path in files.items():
            lines += [f"  - split: {split}", f"    path: {path}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
