"""What was answered so far, on disk: an evaluation that was stopped goes on where it was.

One JSON object a line, one line for a subject under an adapter. A line is found again by what went
into it (base model, adapter values, prompts, right answers, lm-eval's release), so it is never used
for something else, whatever became of the files it came from. It holds no text of a question.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cgfedllm.evaluation.scores import Outcomes
from cgfedllm.model import AdaptedModel
from cgfedllm.storage import append_line

_SAMPLED_VALUES = 64


@dataclass(frozen=True)
class Key:
    """All that an outcome depends on.

    Parameters
    ----------
    benchmark, subject : str
        What was asked.
    shots : int
        Worked examples in each prompt.
    asked : str
        Digest of prompts and right answers.
    model : str
        Digest of the base model and the adapter's values.
    judge : str
        Release of lm-eval, and limits of generation.
    """

    benchmark: str
    subject: str
    shots: int
    asked: str
    model: str
    judge: str


class Answers:
    """Outcomes kept in a file; without a path they are not kept.

    Parameters
    ----------
    path : Path or None
        The file; lines that cannot be read (a crash, another release) are passed over.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[Key, Outcomes] = {}
        if path is not None and path.is_file():
            for line in path.read_bytes().split(b"\n"):
                try:
                    key, outcomes = _parse(json.loads(line))
                except (ValueError, KeyError, TypeError, AttributeError):
                    continue
                self._known[key] = outcomes

    def find(self, key: Key) -> Outcomes | None:
        """What was answered, if it was."""
        return self._known.get(key)

    def keep(self, key: Key, outcomes: Outcomes) -> None:
        """Write an outcome down.

        Raises
        ------
        StorageError
            If the disk refuses; earlier lines are untouched.
        """
        self._known[key] = outcomes
        if self._path is not None:
            append_line(self._path, json.dumps(_line(key, outcomes)))


def model_digest(model: AdaptedModel) -> str:
    """Digest of base model, LoRA settings and current adapter values, in 32 hex digits.

    Of the frozen weights a few values each are looked at: enough to tell models apart.
    """
    digest = hashlib.sha256(model.get_adapter(model.full_spec).vector.tobytes())
    for config in model.model.peft_config.values():
        text = f"{config.r} {config.lora_alpha} {config.rank_pattern} {config.alpha_pattern}"
        digest.update(text.encode())
    for name, parameter in model.model.named_parameters():
        if ".lora_" not in name:
            some = parameter.detach().flatten()[:_SAMPLED_VALUES].to("cpu")
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            digest.update(some.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _line(key: Key, outcomes: Outcomes) -> dict[str, Any]:
    return {
        **vars(key),
        "questions": list(outcomes.questions),
        "available": outcomes.available,
        "correct": {name: _digits(values) for name, values in outcomes.correct.items()},
        "chosen": _digits(outcomes.chosen),
    }


def _parse(line: dict[str, Any]) -> tuple[Key, Outcomes]:
    fields = {name: line.pop(name) for name in Key.__dataclass_fields__}
    return Key(**fields), Outcomes(
        subject=fields["subject"],
        questions=tuple(line["questions"]),
        available=line["available"],
        correct={name: _numbers(text) for name, text in line["correct"].items()},
        chosen=_numbers(line["chosen"]),
    )


def _digits(values: tuple[int, ...]) -> str:
    return "".join(map(str, values))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text))
