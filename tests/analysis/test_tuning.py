"""The grid is the same for all, and what is chosen is the best on validation rows."""

from __future__ import annotations

import pytest

from cgfedllm.analysis.candidates import Candidate, candidates_of
from cgfedllm.analysis.tuning import Tuning, Verdict, choose, judge, parse_tuning
from cgfedllm.config import Config
from cgfedllm.errors import ConfigError
from cgfedllm.metrics import ClientRecord, RoundRecord

BASE = Config(name="x")
LR, DECAY = "federation.server_lr", "uplink.error_feedback_decay"
GRID = ["server_lr=0.7,1", "decay=1,0.9"]


def tuning(*texts: str, rounds: int | None = None, base: Config = BASE) -> Tuning:
    found = parse_tuning(texts, rounds, base, [0, 1])
    assert found is not None
    return found


def candidate(text: str, base: Config = BASE) -> Candidate:
    return candidates_of(base, [text])[0]


def test_every_candidate_gets_the_whole_grid() -> None:
    grid = tuning(*GRID)
    for name in ("raw", "int8", "topk:bpp=0.05"):
        trials = grid.trials(BASE, candidate(name))
        assert [t.setting for t in trials] == [
            {LR: 0.7, DECAY: 1},
            {LR: 0.7, DECAY: 0.9},
            {LR: 1, DECAY: 1},
            {LR: 1, DECAY: 0.9},
        ]


def test_a_lossless_codec_has_no_use_of_decay() -> None:
    trials = tuning(*GRID).trials(BASE, candidate("raw"))
    assert [t.used for t in trials] == [{LR: 0.7}, {LR: 0.7}, {LR: 1}, {LR: 1}]
    assert len({t.config.name for t in trials}) == 2
    choice = choose([Verdict(t, t.used[LR]) for t in trials], {LR: 1.0})
    rows = choice.to_dict()["trials"]
    assert [row.get("same_as") for row in rows] == [
        None, {LR: 0.7, DECAY: 1}, None, {LR: 1, DECAY: 1},
    ]  # fmt: skip


@pytest.mark.parametrize("without", ["uplink.error_feedback=false", "federation.stateless=true"])
def test_nor_has_a_codec_without_error_feedback(without: str) -> None:
    (_, variant) = candidates_of(BASE, ["raw"], [f"v:uplink.name=int8,{without}"])
    assert all(DECAY not in t.used for t in tuning(*GRID).trials(BASE, variant))


def test_an_option_is_tuned_only_where_the_codec_has_it() -> None:
    grid = tuning("uplink.options.bpp=0.05,0.1")
    assert [t.used for t in grid.trials(BASE, candidate("int8"))] == [{}, {}]
    trials = grid.trials(BASE, candidate("topk"))
    assert [t.config.uplink.options for t in trials] == [{"bpp": 0.05}, {"bpp": 0.1}]


def test_a_trial_is_a_short_run_that_looks_at_no_held_out_row() -> None:
    first = tuning(*GRID, rounds=3).trials(BASE, candidate("int8"))[1]
    config = first.config
    assert config.name == "x-int8-tune3-server_lr0.7-error_feedback_decay0.9"
    assert (config.federation.rounds, config.federation.server_lr) == (3, 0.7)
    assert config.seed not in (0, 1)
    assert config.data.seed == BASE.seed, "the split of the cells: their held-out rows stay unseen"
    evaluation = config.evaluation
    assert (evaluation.every, evaluation.clients, evaluation.heldout) == (1, True, False)
    longer = tuning(*GRID, rounds=12).trials(BASE, candidate("int8"))[1].config
    assert longer.evaluation.every == 3


def test_trials_end_equally_far_into_a_run() -> None:
    (_, variant) = candidates_of(BASE, ["raw"], ["few:federation.rounds=5"])
    assert BASE.federation.rounds == 10
    trials = tuning("server_lr=1,2", rounds=4).trials(BASE, variant)
    assert {t.config.federation.rounds for t in trials} == {2}


def test_the_trial_seed_is_none_of_the_compared() -> None:
    first = tuning(*GRID).seed
    other = parse_tuning(GRID, None, BASE, [first])
    assert other is not None
    assert other.seed != first


def test_judged_by_the_clients_own_rows_and_nothing_else() -> None:
    trial = tuning(*GRID).trials(BASE, candidate("int8"))[0]
    for heldout in (None, 0.1, 9.0):
        records = [
            RoundRecord(0, client_nll={"a": 9.0}),
            RoundRecord(2, client_nll={"a": 1.0, "b": 2.0}, heldout_nll=heldout),
        ]
        verdict = judge(trial, records)
        assert (verdict.nll, verdict.clients) == (1.5, 2)
    assert judge(trial, [RoundRecord(1, heldout_nll=1.0)]).nll is None


def trained_by(client: str, rows: int) -> ClientRecord:
    """A line of a round in which a client trained on so many rows."""
    return ClientRecord(client, rows, 4, 99, 2.0, 1.0, 8, 8, 4.0, 0.2, 0.1)


@pytest.mark.parametrize(("weighting", "expected"), [("examples", 2.75), ("uniform", 2.5)])
def test_clients_weigh_what_they_weigh_in_the_average(weighting: str, expected: float) -> None:
    base = BASE.with_overrides({"federation.weighting": weighting})
    trial = tuning(*GRID).trials(base, candidate("int8"))[0]
    trained = [trained_by("a", 10), trained_by("b", 30)]
    records = [
        RoundRecord(1, clients=trained, client_nll={"a": 9.0, "b": 9.0}),
        RoundRecord(2, client_nll={"a": 2.0, "b": 3.0}),
    ]
    assert judge(trial, records).nll == expected


def test_the_last_quarter_counts_and_unasked_clients_are_typical() -> None:
    trial = tuning(*GRID).trials(BASE, candidate("int8"))[0]
    nlls = {6: 9.0, 9: 2.0, 12: 4.0}
    records = [RoundRecord(at, client_nll={"a": nll}) for at, nll in nlls.items()]
    assert judge(trial, records).nll == 3.0
    trained = [trained_by("a", 10), trained_by("b", 30)]
    records = [RoundRecord(1, clients=trained, client_nll={"a": 1.0, "b": 1.0, "c": 4.0})]
    assert judge(trial, records).nll == 2.0
    assert judge(trial, [RoundRecord(1, client_nll={"a": float("nan")})]).nll is None


def test_the_best_is_chosen_and_of_equals_the_default() -> None:
    grid = tuning(*GRID)
    int8 = candidate("int8")
    trials, default = grid.trials(BASE, int8), grid.default(BASE, int8)
    assert default == {LR: 1.0, DECAY: 1.0}

    def chosen(*nlls: float | None) -> tuple[object, bool]:
        found = choose([Verdict(t, n) for t, n in zip(trials, nlls, strict=True)], default)
        return found.setting, found.is_default

    assert chosen(2.0, 1.0, 3.0, 3.0) == ({LR: 0.7, DECAY: 0.9}, False)
    assert chosen(2.0, 2.0, 2.0, 2.0) == ({LR: 1, DECAY: 1}, True)
    assert chosen(2.0, 2.0, 3.0, 3.0) == ({LR: 0.7, DECAY: 1}, False), "the first of the grid"
    assert chosen(None, 2.0, None, None) == ({LR: 0.7, DECAY: 0.9}, False)
    assert chosen(None, None, None, None) == (None, False)


@pytest.mark.parametrize(
    ("texts", "rounds", "message"),
    [
        (["server_lr"], None, "KEY=value"),
        (["server_lr="], None, "KEY=value"),
        (["server_lr=1,,2"], None, "KEY=value"),
        (["speed=1,2"], None, "server_lr, decay"),
        (["seed=1,2"], None, "no key"),
        (["data.max_length=5"], None, "keeps the same for all"),
        (["server_lr=1,1"], None, "a value twice"),
        (["server_lr=1", "federation.server_lr=2"], None, "a key twice"),
        ([], 3, "say with --tune"),
        (["server_lr=1,2"], 0, "at least 1"),
    ],
)
def test_grids_that_cannot_be(texts: list[str], rounds: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_tuning(texts, rounds, BASE, [0])


def test_a_value_the_configuration_refuses() -> None:
    with pytest.raises(ConfigError, match="server_lr"):
        tuning("server_lr=1,-1").trials(BASE, candidate("int8"))


def test_tuning_needs_validation_rows() -> None:
    base = BASE.with_overrides({"data.splits.validation": 0.0})
    with pytest.raises(ConfigError, match=r"data\.splits\.validation"):
        parse_tuning(GRID, None, base, [0])


def test_no_grid_no_tuning() -> None:
    assert parse_tuning([], None, BASE, [0]) is None
