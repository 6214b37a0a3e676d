"""From right and wrong answers to accuracies, their standard errors, and paired differences.

Questions are taken as a sample of all one could ask of a subject, and subjects as given: a standard
error tells how far another set of questions on the same subjects would move the number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cgfedllm.errors import DataError
from cgfedllm.evaluation.catalogue import Average, Benchmark


@dataclass(frozen=True)
class Outcomes:
    """What became of one subject's questions under one adapter.

    Parameters
    ----------
    subject : str
        Its name.
    questions : tuple of int
        Which were asked: their places in the split, ascending.
    available : int
        How many the split has.
    correct : mapping of str to tuple of int
        For every measure of the benchmark, 1 or 0 a question.
    chosen : tuple of int
        The option chosen in each question; empty where answers are in words.
    """

    subject: str
    questions: tuple[int, ...]
    available: int
    correct: Mapping[str, tuple[int, ...]]
    chosen: tuple[int, ...] = ()


@dataclass(frozen=True)
class Score:
    """An accuracy, or a difference of two.

    Parameters
    ----------
    name : str
        Subject or group.
    subjects, questions : int
        What it was averaged over.
    available : int
        How many questions those subjects have in all.
    average : str
        "questions" or "subjects": which of them count alike.
    value : float
        Share of right answers, 0 to 1; for a difference -1 to 1.
    standard_error : float or None
        Of the value; None where a subject has only one question.
    """

    name: str
    subjects: int
    questions: int
    available: int
    average: Average
    value: float
    standard_error: float | None


@dataclass(frozen=True)
class BenchmarkResult:
    """One benchmark under one adapter.

    Parameters
    ----------
    benchmark : Benchmark
        What was asked.
    adapter : str
        Label of the adapter.
    shots : int
        Worked examples in each prompt.
    per_subject : int or None
        Most questions asked of a subject; None is all of them.
    seed : int
        What the questions were drawn with.
    members : mapping of str to tuple of str
        Subjects of every group, those not asked included.
    outcomes : tuple of Outcomes
        A subject each.
    """

    benchmark: Benchmark
    adapter: str
    shots: int
    per_subject: int | None
    seed: int
    members: Mapping[str, tuple[str, ...]]
    outcomes: tuple[Outcomes, ...]

    def subjects(self) -> list[Score]:
        """A score for every subject, by the benchmark's main measure."""
        return [
            _score(o.subject, [o], [o.correct[self.benchmark.main_measure]], "questions")
            for o in self.outcomes
        ]

    def groups(self) -> list[Score]:
        """The benchmark's summary; groups of which no subject was asked are left out."""
        return self._groups(
            {(o.subject, m): tuple(v) for o in self.outcomes for m, v in o.correct.items()}
        )

    def choices(self) -> list[float]:
        """How often each option was chosen, as shares; empty where answers are in words.

        A model that knows nothing often names one letter whatever is asked. Its accuracy is then
        the share of questions whose answer happens to be that letter.
        """
        chosen = [option for o in self.outcomes for option in o.chosen]
        counts = [chosen.count(option) for option in range(max(chosen, default=-1) + 1)]
        return [count / len(chosen) for count in counts]

    def to_dict(self, base: BenchmarkResult | None = None) -> dict[str, Any]:
        """Plain types, ready for JSON; with the differences to `base` if it is given."""
        return {
            "benchmark": self.benchmark.name,
            "data": self.benchmark.data,
            "split": self.benchmark.split,
            "adapter": self.adapter,
            "shots": self.shots,
            "per_subject": self.per_subject,
            "seed": self.seed,
            "chance": self.benchmark.chance,
            "choices": self.choices(),
            "groups": [asdict(score) for score in self.groups()],
            "subjects": [asdict(score) for score in self.subjects()],
            "differences_to_base": [asdict(s) for s in self.differences(base)] if base else [],
        }

    def differences(self, other: BenchmarkResult) -> list[Score]:
        """By how much this adapter does better than another one, group by group.

        Both answered the same questions, so the standard error is that of the mean of paired
        differences, which is smaller than what the two accuracies' own errors suggest.

        Raises
        ------
        DataError
            If the two were not asked the same.
        """
        if not self._asked_the_same(other):
            raise DataError(
                f"{self.adapter!r} and {other.adapter!r} were not asked the same questions; "
                "evaluate both with equal settings to compare them"
            )
        return self._groups(
            {
                (mine.subject, measure): tuple(
                    a - b
                    for a, b in zip(mine.correct[measure], theirs.correct[measure], strict=True)
                )
                for mine, theirs in zip(self.outcomes, other.outcomes, strict=True)
                for measure in mine.correct
            }
        )

    def _groups(self, values: Mapping[tuple[str, str], tuple[int, ...]]) -> list[Score]:
        scores = []
        for group in self.benchmark.groups:
            asked = [o for o in self.outcomes if o.subject in self.members[group.name]]
            if asked:
                parts = [values[o.subject, group.measure] for o in asked]
                scores.append(_score(group.name, asked, parts, group.average))
        return scores

    def _asked_the_same(self, other: BenchmarkResult) -> bool:
        return (self.benchmark.name, self.shots) == (other.benchmark.name, other.shots) and [
            (o.subject, o.questions) for o in self.outcomes
        ] == [(o.subject, o.questions) for o in other.outcomes]


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and its standard error from the sample's own spread (n - 1 in the denominator).

    For zeros and ones the error is ``sqrt(p (1 - p) / (n - 1))``, which is lm-eval's too.
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (count - 1) / count)


def _score(
    name: str, asked: Sequence[Outcomes], parts: Sequence[Sequence[int]], average: Average
) -> Score:
    """Mean over subjects, each with its weight; errors of subjects are independent.

    Over questions a subject weighs as many as it has, whether all of them were asked or some:
    a sample of equal size from each subject then stands for the whole benchmark.
    """
    weights = [o.available if average == "questions" else 1 for o in asked]
    total = sum(weights)
    means, errors = zip(*map(mean_and_error, parts), strict=True)
    error = None
    if None not in errors:
        error = math.sqrt(
            math.fsum((w * e) ** 2 for w, e in zip(weights, errors, strict=True))
        ) / total  # fmt: skip
    return Score(
        name=name,
        subjects=len(asked),
        questions=sum(len(o.questions) for o in asked),
        available=sum(o.available for o in asked),
        average=average,
        value=math.fsum(w * m for w, m in zip(weights, means, strict=True)) / total,
        standard_error=error,
    )
