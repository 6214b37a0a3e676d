"""Accuracies, their errors and their averages, against arithmetic done here."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from cgfedllm.errors import ConfigError, DataError
from cgfedllm.evaluation.catalogue import CEVAL, GSM8K, MMLU, Benchmark, find_benchmark
from cgfedllm.evaluation.scores import BenchmarkResult, Outcomes, Score, mean_and_error
from cgfedllm.evaluation.tasks import members_of


def outcomes(subject: str, correct: str, available: int | None = None) -> Outcomes:
    values = tuple(map(int, correct))
    return Outcomes(
        subject, tuple(range(len(values))), available or len(values), {"accuracy": values}
    )


def result(benchmark: Benchmark, *answered: Outcomes, adapter: str = "mine") -> BenchmarkResult:
    return BenchmarkResult(benchmark, adapter, 0, None, 0, members_of(benchmark), answered)


def by_name(scores: list[Score]) -> dict[str, Score]:
    return {score.name: score for score in scores}


# ---- groups -------------------------------------------------------------------------------------


def test_c_eval_has_52_subjects_in_four_categories_and_eight_hard_ones() -> None:
    members = members_of(CEVAL)
    assert {name: len(found) for name, found in members.items()} == {
        "STEM": 20,
        "Social Science": 10,
        "Humanities": 11,
        "Other": 11,
        "Hard": 8,
        "average": 52,
    }
    categories = [members[name] for name in ("STEM", "Social Science", "Humanities", "Other")]
    assert len({subject for found in categories for subject in found}) == 52
    assert set(members["Hard"]) < set(members["STEM"])


def test_mmlu_has_57_subjects_in_four_groups() -> None:
    members = members_of(MMLU)
    assert {name: len(found) for name, found in members.items()} == {
        "STEM": 19,
        "Humanities": 13,
        "Social Sciences": 12,
        "Other": 13,
        "average": 57,
        "average of subjects": 57,
    }
    groups = [members[name] for name in ("STEM", "Humanities", "Social Sciences", "Other")]
    assert len({subject for found in groups for subject in found}) == 57


@pytest.mark.parametrize(
    ("benchmark", "folder"), [(CEVAL, "ceval"), (MMLU, "mmlu/default"), (GSM8K, "gsm8k")]
)
def test_every_subject_is_a_task_that_lm_eval_has(benchmark: Benchmark, folder: str) -> None:
    from pathlib import Path

    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent / folder
    stock = set(lm_eval.tasks.TaskManager(include_defaults=False, include_path=[root]).all_subtasks)
    ours = {benchmark.prefix + s for found in members_of(benchmark).values() for s in found}
    assert ours <= stock
    if benchmark is not GSM8K:  # whose folder holds other prompts too
        assert ours == stock


def test_a_benchmark_nobody_has() -> None:
    with pytest.raises(ConfigError, match=r"ceval, mmlu, gsm8k.*mean 'mmlu'"):
        find_benchmark("mmul")


# ---- means and errors ---------------------------------------------------------------------------


def test_error_of_zeros_and_ones() -> None:
    mean, error = mean_and_error([1, 1, 1, 0, 0, 0, 0, 0, 0, 0])
    assert mean == pytest.approx(0.3)
    assert error == pytest.approx(math.sqrt(0.3 * 0.7 / 9))
    assert mean_and_error([1]) == (1.0, None)


def test_it_is_the_error_that_lm_eval_reports() -> None:
    from lm_eval.api.metrics import mean_stderr

    values = [1, 0, 0, 1, 1, 0, 1]
    assert mean_and_error(values)[1] == pytest.approx(mean_stderr(values))


def test_subjects_are_listed_as_they_were_asked() -> None:
    scores = result(MMLU, outcomes("anatomy", "1100"), outcomes("virology", "1")).subjects()
    assert [(s.name, s.questions, s.value) for s in scores] == [
        ("anatomy", 4, 0.5),
        ("virology", 1, 1.0),
    ]
    assert scores[0].standard_error == pytest.approx(math.sqrt(0.25 / 3))
    assert scores[1].standard_error is None


def test_c_eval_groups_are_means_over_subjects() -> None:
    asked = result(
        CEVAL,
        outcomes("computer_network", "1111100000"),
        outcomes("college_physics", "10"),
        outcomes("law", "1100"),
    )
    found = by_name(asked.groups())
    # groups of which nothing was asked are left out
    assert list(found) == ["STEM", "Humanities", "Hard", "average"]
    assert found["STEM"].value == pytest.approx((0.5 + 0.5) / 2)
    network, physics, law = 0.25 / 9, 0.25 / 1, 0.25 / 3
    assert found["STEM"].standard_error == pytest.approx(math.sqrt(network + physics) / 2)
    assert found["Hard"].standard_error == pytest.approx(math.sqrt(physics))
    assert found["average"].standard_error == pytest.approx(math.sqrt(network + physics + law) / 3)
    assert (found["average"].subjects, found["average"].questions) == (3, 16)


def test_mmlu_groups_are_means_over_questions_and_both_averages_are_given() -> None:
    found = by_name(
        result(MMLU, outcomes("anatomy", "11"), outcomes("virology", "100000")).groups()
    )
    assert found["average"].value == pytest.approx(3 / 8)
    assert found["average of subjects"].value == pytest.approx((1 + 1 / 6) / 2)
    virology = math.sqrt(1 / 6 * 5 / 6 / 5)
    assert found["average"].standard_error == pytest.approx(6 / 8 * virology)
    assert found["average of subjects"].standard_error == pytest.approx(virology / 2)


def test_in_a_sample_a_subject_weighs_as_many_questions_as_it_has() -> None:
    big, small = outcomes("anatomy", "1110", 300), outcomes("virology", "1000", 100)
    found = by_name(result(MMLU, big, small).groups())
    assert found["average"].value == pytest.approx(0.75 * 0.75 + 0.25 * 0.25)
    assert found["average"].standard_error == pytest.approx(
        math.hypot(0.75, 0.25) * math.sqrt(0.75 * 0.25 / 3)
    )
    assert (found["average"].questions, found["average"].available) == (8, 400)


def test_an_error_that_one_subject_lacks_is_not_made_up() -> None:
    found = by_name(result(MMLU, outcomes("anatomy", "1"), outcomes("virology", "10")).groups())
    assert found["STEM"].standard_error is None
    assert found["average"].standard_error is None


def test_the_error_is_about_what_many_draws_of_questions_show() -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    truth = {"anatomy": 0.3, "virology": 0.6, "philosophy": 0.5}
    values, errors = [], []
    for _ in range(400):
        drawn = [
            outcomes(s, "".join(map(str, (rng.random(20) < p).astype(int))), 200)
            for s, p in truth.items()
        ]
        score = by_name(result(MMLU, *drawn).groups())["average of subjects"]
        values.append(score.value)
        errors.append(score.standard_error)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.1)


# ---- differences --------------------------------------------------------------------------------


def test_differences_are_paired_by_question() -> None:
    base = result(MMLU, outcomes("anatomy", "110000"), adapter="base")
    mine = result(MMLU, outcomes("anatomy", "111000"))
    found = by_name(mine.differences(base))["STEM"]
    assert found.value == pytest.approx(1 / 6)
    assert found.standard_error == pytest.approx(math.sqrt(1 / 6 * 5 / 6 / 5))
    both = [by_name(each.groups())["STEM"].standard_error for each in (base, mine)]
    assert found.standard_error < math.hypot(*both)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"questions": (1, 2)}, {"subject": "virology"}])
def test_answers_to_other_questions_are_not_compared(change: dict[str, object]) -> None:
    base = result(MMLU, outcomes("anatomy", "10"), adapter="base")
    other = result(MMLU, replace(outcomes("anatomy", "10"), **change))
    with pytest.raises(DataError, match="same questions"):
        other.differences(base)


def test_a_model_that_names_one_letter_is_seen_through() -> None:
    chosen = replace(outcomes("anatomy", "0110"), chosen=(0, 0, 0, 2))
    assert result(MMLU, chosen).choices() == [0.75, 0.0, 0.25]
    assert result(MMLU, outcomes("anatomy", "0110")).choices() == []


def test_a_result_as_plain_types() -> None:
    import json

    base = result(MMLU, outcomes("anatomy", "110000"), adapter="base")
    told = json.loads(json.dumps(result(MMLU, outcomes("anatomy", "111000")).to_dict(base)))
    assert (told["data"], told["split"], told["chance"]) == ("cais/mmlu", "test", 0.25)
    assert told["groups"][0]["value"] == 0.5
    assert told["differences_to_base"][0]["value"] == pytest.approx(1 / 6)
    assert base.to_dict()["differences_to_base"] == []
