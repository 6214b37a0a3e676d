"""Run a benchmark on several adapters of one loaded model, all asked the same questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cgfedllm import events
from cgfedllm.adapter import AdapterUpdate
from cgfedllm.errors import ConfigError
from cgfedllm.evaluation.answers import Answers, Key, model_digest
from cgfedllm.evaluation.catalogue import Benchmark, find_benchmark
from cgfedllm.evaluation.scores import BenchmarkResult, Outcomes
from cgfedllm.evaluation.tasks import (
    Subject,
    check_subjects,
    load_subjects,
    members_of,
    quiet,
)
from cgfedllm.model import AdaptedModel

if TYPE_CHECKING:
    from cgfedllm.evaluation.scorer import Scorer


def run_benchmark(
    model: AdaptedModel,
    adapters: Mapping[str, AdapterUpdate],
    benchmark: str,
    *,
    shots: int = 0,
    per_subject: int | None = None,
    seed: int = 0,
    subjects: Sequence[str] = (),
    hub: Path | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 256,
    answers: Path | None = None,
) -> list[BenchmarkResult]:
    """Ask every adapter the same questions of a benchmark.

    Subjects are the outer loop, so that a stopped evaluation leaves whole comparisons.

    Parameters
    ----------
    model : AdaptedModel
        Its adapter values are overwritten.
    adapters : mapping of str to AdapterUpdate
        Values to try, by label, on the model's spec or full spec.
    benchmark : str
        "ceval", "mmlu" or "gsm8k".
    shots : int
        Worked examples in each prompt.
    per_subject : int, optional
        Most questions asked of a subject, a random sample that depends on the seed and the
        subject alone; by default all.
    seed : int
        Of that sample.
    subjects : sequence of str
        Only these; by default all.
    hub : Path, optional
        Folder that holds data sets under their hub ids (``HUB/cais/mmlu``); by default they are
        read from the hub or its cache.
    batch_size : int
        Prompts in one forward pass.
    max_new_tokens : int
        Most tokens of an answer in words (GSM8K).
    answers : Path, optional
        File in which outcomes are kept; what is in it already is not asked again.

    Returns
    -------
    list of BenchmarkResult
        One an adapter, in the order given.

    Raises
    ------
    ConfigError
        If the benchmark or a subject is unknown, or a number cannot be used.
    DataError
        If the questions cannot be read; the message says what is expected where.
    MissingExtraError
        If lm-eval is not installed.
    """
    found = find_benchmark(benchmark)
    _check_numbers(shots, per_subject)
    if found.in_words:
        _check_room(model, max_new_tokens)
    members = members_of(found)
    every = list(dict.fromkeys(name for names in members.values() for name in names))
    check_subjects(found, subjects, every)
    asked = load_subjects(
        found,
        [name for name in every if not subjects or name in subjects],
        shots=shots,
        per_subject=per_subject,
        seed=seed,
        hub=hub,
    )
    outcomes = _ask(model, adapters, found, asked, shots, batch_size, max_new_tokens, answers)
    return [
        BenchmarkResult(found, label, shots, per_subject, seed, members, tuple(outcomes[label]))
        for label in adapters
    ]


def _ask(
    model: AdaptedModel,
    adapters: Mapping[str, AdapterUpdate],
    benchmark: Benchmark,
    asked: Sequence[Subject],
    shots: int,
    batch_size: int,
    max_new_tokens: int,
    path: Path | None,
) -> dict[str, list[Outcomes]]:
    from cgfedllm.evaluation.scorer import Scorer  # loads lm-eval's models

    with quiet():
        scorer = Scorer(model, batch_size=batch_size, max_new_tokens=max_new_tokens)
    kept, judge = Answers(path), _judge(benchmark, max_new_tokens)
    digests: dict[str, str] = {}
    for label, adapter in adapters.items():
        model.set_adapter(adapter)
        digests[label] = model_digest(model)
    outcomes: dict[str, list[Outcomes]] = {label: [] for label in adapters}
    progress = _Progress(len(adapters) * sum(len(subject.questions) for subject in asked))
    for subject in asked:
        requests = subject.requests()
        digest = subject.digest(requests)
        for label, adapter in adapters.items():
            progress.start(f"{benchmark.title}: {subject.name} ({label})", len(subject.questions))
            key = Key(benchmark.name, subject.name, shots, digest, digests[label], judge)
            outcome = kept.find(key)
            if outcome is None:
                model.set_adapter(adapter)
                scorer.told = progress.part_of(len(requests))
                outcome = _answer(scorer, benchmark, subject, requests)
                kept.keep(key, outcome)
            outcomes[label].append(outcome)
            progress.finish()
    return outcomes


def _answer(
    scorer: Scorer, benchmark: Benchmark, subject: Subject, requests: Sequence[Any]
) -> Outcomes:
    """One subject's questions under the adapter that the model holds, judged by lm-eval."""
    task = subject.task
    with quiet():
        replies = getattr(scorer, requests[0].request_type)(requests, disable_tqdm=True)
    for request, reply in zip(requests, replies, strict=True):
        request.resps, request.filtered_resps = [reply], {}
    task.apply_filters()
    correct: dict[str, list[int]] = {name: [] for name in benchmark.measures}
    chosen = []
    for _, group in groupby(requests, attrgetter("doc_id")):
        options = list(group)
        for name, measure in benchmark.measures.items():
            replies = [option.filtered_resps[measure.filter] for option in options]
            correct[name].append(int(task.process_results(options[0].doc, replies)[measure.metric]))
        if not benchmark.in_words:
            likelihoods = [option.resps[0][0] for option in options]
            chosen.append(likelihoods.index(max(likelihoods)))
    return Outcomes(
        subject=subject.name,
        questions=subject.questions,
        available=subject.available,
        correct={name: tuple(values) for name, values in correct.items()},
        chosen=tuple(chosen),
    )


def _judge(benchmark: Benchmark, max_new_tokens: int) -> str:
    """What besides questions and model decides about an answer."""
    judge = f"lm-eval {metadata.version('lm-eval')}"
    return f"{judge}, {max_new_tokens} new tokens" if benchmark.in_words else judge


class _Progress:
    """Tells how many questions are done, over all subjects and adapters."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._before = 0
        self._questions = 0
        self._requests = 0
        self._what = ""

    def start(self, what: str, questions: int) -> None:
        """A subject under an adapter begins."""
        self._what, self._questions, self._requests = what, questions, 0
        self._publish(0)

    def part_of(self, requests: int) -> Callable[[int], None]:
        """What to call with the number of requests answered, of so many."""

        def told(answered: int) -> None:
            self._requests += answered
            self._publish(self._questions * self._requests // requests)

        return told

    def finish(self) -> None:
        """It has ended."""
        self._before += self._questions
        self._publish(0)

    def _publish(self, done: int) -> None:
        events.publish(events.EvaluationProgress(self._what, self._before + done, self._total))


def _check_numbers(shots: int, per_subject: int | None) -> None:
    if shots < 0:
        raise ConfigError(f"--shots is a number of worked examples, 0 or more; got {shots}")
    if per_subject is not None and per_subject < 1:
        raise ConfigError(f"--per-subject is a number of questions, 1 or more; got {per_subject}")


def _check_room(model: AdaptedModel, max_new_tokens: int) -> None:
    positions = model.max_positions
    if max_new_tokens < 1 or (positions is not None and max_new_tokens >= positions):
        raise ConfigError(
            "--max-new-tokens is at least 1 and leaves room for the question in the "
            f"{positions} positions of this model; got {max_new_tokens}"
        )
