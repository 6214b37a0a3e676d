"""Benchmarks on a tiny model and invented questions: who is asked what, and who is right."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cgfedllm import events
from cgfedllm.adapter import AdapterUpdate
from cgfedllm.errors import ConfigError, DataError, MissingExtraError
from cgfedllm.evaluation import scorer as scorer_module
from cgfedllm.evaluation.answers import model_digest
from cgfedllm.evaluation.benchmarks import run_benchmark
from cgfedllm.evaluation.catalogue import find_benchmark
from cgfedllm.evaluation.scorer import Scorer
from cgfedllm.evaluation.tasks import load_subjects
from cgfedllm.model import AdaptedModel

from .questions import write_hub

Adapters = dict[str, AdapterUpdate]
MMLU = ["anatomy", "philosophy", "virology"]
CEVAL = ["computer_network", "law"]


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many requests each call of the model was asked, in order."""
    counts: list[int] = []
    inner = Scorer._loglikelihood_tokens

    def counting(self: Scorer, requests: list[Any], **options: Any) -> list[tuple[float, bool]]:
        counts.append(len(requests))
        return inner(self, requests, **options)

    monkeypatch.setattr(Scorer, "_loglikelihood_tokens", counting)
    return counts


# ---- the scorer ---------------------------------------------------------------------------------


def requests_of(hub: Path, subject: str, shots: int) -> list[Any]:
    [found] = load_subjects(
        find_benchmark("mmlu"), [subject], shots=shots, per_subject=4, seed=0, hub=hub
    )
    return found.requests()


@pytest.fixture(scope="module")
def requests(hub: Path) -> list[Any]:
    """Four prompts that are longer than the model, and four that begin alike."""
    return requests_of(hub, "anatomy", shots=2) + requests_of(hub, "philosophy", shots=0)


@pytest.mark.parametrize("packed", [True, False])
def test_likelihoods_are_those_of_lm_eval_itself(
    model: AdaptedModel,
    adapters: Adapters,
    requests: list[Any],
    packed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setattr(scorer_module, "supports_packing", lambda model, length: packed)
    model.set_adapter(adapters["first"])
    theirs = HFLM(pretrained=model.model, tokenizer=model.tokenizer, backend="causal", batch_size=1)
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    found = Scorer(model, batch_size=3).loglikelihood(requests, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [p for p, _ in found] == pytest.approx([p for p, _ in expected], abs=1e-4)
    assert len({round(p, 3) for p, _ in found}) > len(requests) // 2


def test_options_of_a_question_share_a_pass(model: AdaptedModel, requests: list[Any]) -> None:
    widths: list[int] = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, given: widths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        Scorer(model, batch_size=4).loglikelihood(requests[16:], disable_tqdm=True)
    finally:
        hook.remove()
    lengths = [len(model.tokenizer(r.args[0])["input_ids"]) for r in requests[16::4]]
    assert len(widths) == 1  # sixteen options, four questions
    # and what the four begin with alike, the description, is computed once
    description = "The following are multiple choice questions (with answers) about philosophy."
    shared = len(model.tokenizer(description)["input_ids"])
    assert 0 < widths[0] <= sum(lengths) + len(lengths) - 3 * shared


def test_the_model_is_left_as_it_was(model: AdaptedModel, requests: list[Any]) -> None:
    Scorer(model, batch_size=4).loglikelihood(requests[:4], disable_tqdm=True)
    assert model.model.config._attn_implementation == "sdpa"
    assert not model.model.training


# ---- right and wrong ----------------------------------------------------------------------------


def own_choice(model: AdaptedModel, prompt: str) -> int:
    """The likeliest letter after a prompt, by the plain model and nothing else."""
    head = model.tokenizer(prompt)["input_ids"]
    likelihoods = []
    for letter in "ABCD":
        whole = model.tokenizer(f"{prompt} {letter}")["input_ids"]
        with torch.no_grad():
            logits = model.model(input_ids=torch.tensor([whole])).logits[0]
        log_p = logits.double().log_softmax(-1)
        likelihoods.append(sum(log_p[at - 1, whole[at]] for at in range(len(head), len(whole))))
    return max(range(4), key=lambda option: float(likelihoods[option]))


@pytest.mark.parametrize(
    ("benchmark", "subject", "ending"),
    [("mmlu", "anatomy", "\nAnswer:"), ("ceval", "computer_network", "\n答案：")],
)
def test_a_question_is_right_where_the_likeliest_letter_is(
    benchmark: str,
    subject: str,
    ending: str,
    model: AdaptedModel,
    adapters: Adapters,
    hub: Path,
) -> None:
    prompts: list[str] = []
    inner = Scorer.loglikelihood

    def listening(self: Scorer, requests: list[Any], **options: Any) -> list[tuple[float, bool]]:
        prompts.extend(request.args[0] for request in requests[::4])
        return inner(self, requests, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scorer, "loglikelihood", listening)
        [result] = run_benchmark(
            model,
            {"first": adapters["first"]},
            benchmark,
            subjects=[subject],
            per_subject=5,
            hub=hub,
        )
    [outcomes] = result.outcomes
    model.set_adapter(adapters["first"])
    assert len(prompts) == 5
    assert all(prompt.endswith(ending) for prompt in prompts)
    assert outcomes.chosen == tuple(own_choice(model, prompt) for prompt in prompts)
    # the fixture's right answers, by the place of the question in its split
    right = [(number * 7 + len(subject)) % 4 for number in outcomes.questions]
    expected = tuple(int(a == b) for a, b in zip(outcomes.chosen, right, strict=True))
    assert outcomes.correct == {"accuracy": expected}


def test_who_knows_everything_scores_100_percent(
    model: AdaptedModel, adapters: Adapters, hub: Path, tmp_path: Path
) -> None:
    one = {"second": adapters["second"]}
    [first] = run_benchmark(model, one, "mmlu", subjects=["virology"], hub=hub)
    chosen = first.outcomes[0].chosen
    for shift, accuracy in ((0, 1.0), (1, 0.0)):
        right = tmp_path / f"shifted-by-{shift}"
        write_hub(
            right, mmlu={"virology": 9}, answer=lambda _, n, shift=shift: (chosen[n] + shift) % 4
        )
        [result] = run_benchmark(model, one, "mmlu", subjects=["virology"], hub=right)
        [score] = result.subjects()
        assert (score.value, score.standard_error) == (accuracy, 0.0)


# ---- which questions ----------------------------------------------------------------------------


def test_every_adapter_answers_the_same_random_questions(
    model: AdaptedModel, adapters: Adapters, hub: Path
) -> None:
    results = run_benchmark(model, adapters, "mmlu", subjects=MMLU, per_subject=7, seed=3, hub=hub)
    assert [result.adapter for result in results] == ["base", "first", "second"]
    asked = [[(o.subject, o.questions) for o in result.outcomes] for result in results]
    assert asked[0] == asked[1] == asked[2]
    numbers = dict(asked[0])
    assert list(numbers) == ["anatomy", "philosophy", "virology"]  # in the order of the groups
    assert [len(numbers[name]) for name in MMLU] == [7, 6, 7]
    assert numbers["anatomy"] != tuple(range(7))
    assert [o.available for o in results[0].outcomes if o.subject == "anatomy"] == [15]
    # an adapter on its own, or another subject beside, changes nothing
    [alone] = run_benchmark(
        model,
        {"second": adapters["second"]},
        "mmlu",
        subjects=["anatomy"],
        per_subject=7,
        seed=3,
        hub=hub,
    )
    assert alone.outcomes[0] == next(o for o in results[2].outcomes if o.subject == "anatomy")
    # and the adapters are not one and the same
    assert len({tuple(o.chosen for o in result.outcomes) for result in results}) > 1


def test_worked_examples_stand_in_the_prompt(
    model: AdaptedModel, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[str] = []

    def right(self: Scorer, requests: list[Any], **options: Any) -> list[tuple[float, bool]]:
        prompts.extend(request.args[0] for request in requests)
        return [(0.0, True)] * len(requests)

    monkeypatch.setattr(Scorer, "loglikelihood", right)
    zero = {"base": AdapterUpdate.zeros(model.spec)}
    for shots in (0, 5):
        run_benchmark(model, zero, "ceval", subjects=["law"], shots=shots, per_subject=1, hub=hub)
    assert [prompt.count("答案：") for prompt in prompts[::4]] == [1, 6]
    assert [prompt.count("of old law") for prompt in prompts[::4]] == [0, 5]


# ---- answers in words ---------------------------------------------------------------------------


def test_gsm8k_is_judged_strictly_and_flexibly(
    model: AdaptedModel, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reply(self: Scorer, requests: list[Any], **options: Any) -> list[str]:
        said = [" it is #### {}", " I say {}.", " #### 99", "no", " #### {}", "x"]
        sums = [int(r.doc["answer"].split("#### ")[1]) for r in requests]
        return [text.format(right) for text, right in zip(said, sums, strict=True)]

    monkeypatch.setattr(Scorer, "generate_until", reply)
    [result] = run_benchmark(
        model, {"base": AdapterUpdate.zeros(model.spec)}, "gsm8k", hub=hub, max_new_tokens=8
    )
    assert result.outcomes[0].correct == {
        "strict match": (1, 0, 0, 0, 1, 0),
        "flexible extract": (1, 1, 0, 0, 1, 0),
    }
    assert [(s.name, s.value) for s in result.groups()] == [
        ("strict match", pytest.approx(2 / 6)),
        ("flexible extract", pytest.approx(3 / 6)),
    ]
    assert result.choices() == []


def test_gsm8k_lets_the_model_write(model: AdaptedModel, adapters: Adapters, hub: Path) -> None:
    told: list[events.Event] = []
    with events.listening(told.append):
        [result] = run_benchmark(
            model,
            {"first": adapters["first"]},
            "gsm8k",
            shots=1,
            per_subject=3,
            hub=hub,
            batch_size=2,
            max_new_tokens=4,
        )
    assert [len(values) for values in result.outcomes[0].correct.values()] == [3, 3]
    progress = [e.done for e in told if isinstance(e, events.EvaluationProgress) and e.total == 3]
    assert progress == sorted(progress)
    assert {0, 2, 3} <= set(progress)


# ---- going on -----------------------------------------------------------------------------------


def test_a_stopped_evaluation_goes_on_where_it_was(
    model: AdaptedModel, adapters: Adapters, hub: Path, tmp_path: Path, answered: list[int]
) -> None:
    two = {name: adapters[name] for name in ("base", "first")}
    options: dict[str, Any] = {"subjects": MMLU, "per_subject": 4, "hub": hub}
    unbroken = run_benchmark(model, two, "mmlu", **options)
    assert answered == [16] * 6
    kept = tmp_path / "results" / "answers.jsonl"

    def stop(event: events.Event) -> None:
        if isinstance(event, events.EvaluationProgress) and event.done == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), events.listening(stop):
        run_benchmark(model, two, "mmlu", **options, answers=kept)
    with kept.open("a") as file:
        file.write('{"torn')  # a crash in the middle of a line
    answered.clear()
    resumed = run_benchmark(model, two, "mmlu", **options, answers=kept)
    assert 0 < len(answered) < 6
    assert resumed == unbroken
    answered.clear()
    assert run_benchmark(model, two, "mmlu", **options, answers=kept) == unbroken
    assert answered == []
    # not a word of a question is in it
    assert "thing" not in kept.read_text()


def test_what_was_answered_is_only_used_for_the_very_same(
    model: AdaptedModel, adapters: Adapters, hub: Path, tmp_path: Path, answered: list[int]
) -> None:
    kept = tmp_path / "answers.jsonl"

    def ask(**changes: Any) -> None:
        options = {"subjects": ["virology"], "hub": hub, "answers": kept} | changes
        run_benchmark(model, {"mine": changes.pop("adapter", adapters["first"])}, "mmlu",
                      **{k: v for k, v in options.items() if k != "adapter"})  # fmt: skip

    ask()
    answered.clear()
    other = write_hub(tmp_path / "hub", mmlu={"virology": 9}, answer=lambda _, n: n % 4)
    for changes in (
        {"adapter": adapters["second"]},
        {"shots": 1},
        {"per_subject": 3},
        {"hub": other},
    ):
        ask(**changes)
        assert len(answered) == 1, changes
        answered.clear()
    same = write_hub(tmp_path / "moved", mmlu={"virology": 9})
    ask(hub=same)
    assert answered == []


def test_a_model_is_known_by_its_values(model: AdaptedModel, adapters: Adapters) -> None:
    digests = []
    for adapter in adapters.values():
        model.set_adapter(adapter)
        digests.append(model_digest(model))
    assert len(set(digests)) == 3
    weight = model.model.get_base_model().model.layers[0].mlp.up_proj.weight
    before = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] += 1
        assert model_digest(model) != digests[-1]
        weight[0, 0] = before
    assert model_digest(model) == digests[-1]


# ---- progress -----------------------------------------------------------------------------------


def test_progress_counts_questions_over_subjects_and_adapters(
    model: AdaptedModel,
    adapters: Adapters,
    hub: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    told: list[events.EvaluationProgress] = []
    two = {name: adapters[name] for name in ("base", "first")}
    level = logging.getLogger("lm_eval").level
    capfd.readouterr()
    with events.listening(lambda e: told.append(e) if hasattr(e, "total") else None):
        run_benchmark(model, two, "ceval", subjects=CEVAL, per_subject=5, hub=hub, batch_size=2)
    assert [t for t in told if t.total == 2] == [
        events.EvaluationProgress("C-Eval: reading", done, 2) for done in (1, 2)
    ]
    asked = [t for t in told if t.total == 20]
    assert [t.done for t in asked] == sorted(t.done for t in asked)
    assert (asked[0].done, asked[-1].done) == (0, 20)
    assert {t.what for t in asked} == {
        f"C-Eval: {s} ({a})" for s in CEVAL for a in ("base", "first")
    }
    # lm-eval's and datasets' own bars and warnings are not mixed in
    assert "it/s" not in capfd.readouterr().err
    assert not [r for r in caplog.records if r.name.startswith("lm_eval")]
    assert logging.getLogger("lm_eval").level == level


# ---- what cannot be done ------------------------------------------------------------------------


Refused = Callable[..., None]


@pytest.fixture
def refused(model: AdaptedModel, hub: Path) -> Refused:
    def check(error: type[Exception], match: str, benchmark: str = "mmlu", **options: Any) -> None:
        zero = {"base": AdapterUpdate.zeros(model.spec)}
        with pytest.raises(error, match=match):
            run_benchmark(model, zero, benchmark, **{"hub": hub, **options})

    return check


def test_unknown_names_and_impossible_numbers(refused: Refused) -> None:
    refused(ConfigError, "no benchmark 'mlu'.*mean 'mmlu'", "mlu")
    refused(ConfigError, "MMLU has no subject 'anatomie'.*'anatomy'", subjects=["anatomie"])
    refused(ConfigError, "--shots is a number", shots=-1)
    refused(ConfigError, "6 worked examples.*there are 5", shots=6, subjects=["anatomy"])
    refused(ConfigError, "--per-subject is a number", per_subject=0)
    refused(ConfigError, "256 positions of this model; got 256", "gsm8k", max_new_tokens=256)


def test_a_folder_that_is_no_copy_of_the_hub(refused: Refused, tmp_path: Path) -> None:
    refused(DataError, r"none does not exist\n.*hf download cais/mmlu", hub=tmp_path / "none")
    refused(
        DataError,
        rf"holds no folder cais/mmlu\n.*under {tmp_path}/cais/mmlu: its README.md, whose `configs`",
        hub=tmp_path,
    )
    write_hub(tmp_path, mmlu={"virology": 3})
    refused(DataError, "MMLU, abstract_algebra: .*not found", hub=tmp_path)
    (tmp_path / "cais/mmlu/README.md").unlink()
    refused(
        DataError,
        rf"MMLU, virology: (.|\n)*--local-dir {tmp_path}/cais/mmlu`, then --hub {tmp_path}",
        hub=tmp_path,
        subjects=["virology"],
    )


def test_without_a_network_and_without_a_copy(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(
        DataError,
        r"MMLU, anatomy: the data set cais/mmlu cannot be read from the hub(.|\n)*then --hub HUB",
        hub=None,
        subjects=["anatomy"],
    )


def test_without_lm_eval(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "lm_eval" else found(name)
    )
    refused(MissingExtraError, r"pip install 'cgfedllm\[eval\]'")


# ---- the real thing -----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_real_benchmarks(model: AdaptedModel, adapters: Adapters) -> None:
    import os

    folder = os.environ.get("CGFEDLLM_LM_EVAL_HUB")
    if not folder:
        pytest.skip("CGFEDLLM_LM_EVAL_HUB names no local copy of the data sets")
    for name, subjects in (("ceval", 52), ("mmlu", 57), ("gsm8k", 1)):
        [result] = run_benchmark(
            model,
            {"first": adapters["first"]},
            name,
            per_subject=1,
            hub=Path(folder),
            max_new_tokens=2,
        )
        assert len(result.outcomes) == subjects
        assert json.dumps(result.to_dict())
