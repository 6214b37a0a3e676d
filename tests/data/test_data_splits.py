"""Splits: every row once, nothing on two sides, each client's draw its own."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cgfedllm.config import DataConfig, SplitConfig
from cgfedllm.data.formats import parse_row
from cgfedllm.data.splits import Split, content_key, divide_training, draw_order, split_rows

SHARES = st.sampled_from([0.0, 0.05, 0.2, 0.3])
LIMITS = st.sampled_from([0, 1, 5])


@st.composite
def federations(draw):
    """Clients with rows whose contents repeat within and across clients."""
    contents = draw(st.lists(st.integers(0, 60), min_size=1, max_size=120))
    owners = draw(st.lists(st.sampled_from("abc"), min_size=len(contents), max_size=len(contents)))
    clients: dict[str, list[int]] = {}
    for number, owner in enumerate(owners):
        clients.setdefault(owner, []).append(number)
    return dict(sorted(clients.items())), [bytes([content]) for content in contents]


CONFIGS = st.builds(
    SplitConfig,
    validation=SHARES,
    test=SHARES,
    heldout=SHARES,
    max_validation_rows=LIMITS,
    max_heldout_rows=LIMITS,
)


def parts_of(split: Split) -> dict[str, list[int]]:
    return {
        "heldout": split.heldout,
        "test": [n for parts in split.clients.values() for n in parts.test],
        "validation": [n for parts in split.clients.values() for n in parts.validation],
        "train": [n for parts in split.clients.values() for n in parts.train],
    }


@given(federations(), CONFIGS, st.integers(0, 2**32), st.booleans())
@settings(max_examples=150)
def test_every_row_once_and_no_content_on_two_sides(federation, config, seed, external):
    clients, keys = federation
    reserved = {bytes([content]) for content in range(10)} if external else None
    split = split_rows(clients, keys, config, seed, reserved=reserved)
    parts = parts_of(split)
    used = [number for numbers in parts.values() for number in numbers]
    assert len(set(used)) == len(used)
    assert len(used) + split.copies + split.reserved == len(keys)

    contents = {part: {keys[number] for number in numbers} for part, numbers in parts.items()}
    seen: set[bytes] = set(reserved or ())
    for part in ("heldout", "test", "validation", "train"):
        assert not contents[part] & seen
        seen |= contents[part]
    # only copies and reserved rows are dropped: every content is still somewhere
    assert seen == set(keys) | set(reserved or ())

    for name, own in split.clients.items():
        assert set(own.train + own.validation + own.test) <= set(clients[name])
        assert len({keys[n] for n in own.validation}) == len(own.validation)
        if config.max_validation_rows:
            assert len(own.validation) <= config.max_validation_rows
    assert max(Counter(keys[n] for n in split.heldout).values(), default=1) == 1
    if config.max_heldout_rows:
        assert len(split.heldout) <= config.max_heldout_rows
    if external or not config.heldout:
        assert split.heldout == []
    assert split == split_rows(clients, keys, config, seed, reserved=reserved)


DISTINCT = [number.to_bytes(2) for number in range(600)]


def split_distinct(clients: dict[str, list[int]], seed: int = 0, **config: object) -> Split:
    return split_rows(clients, DISTINCT, SplitConfig(**config), seed)


def test_shares_are_exact():
    split = split_distinct({"a": list(range(100))}, validation=0.1, test=0.2, heldout=0.05)
    own = split.clients["a"]
    assert (len(own.train), len(own.validation), len(own.test)) == (65, 10, 20)
    assert len(split.heldout) == 5


def test_a_small_client_still_gives_one_row_to_each_part_and_keeps_one_for_training():
    split = split_distinct({"a": [0, 1, 2], "b": [3]}, validation=0.1, test=0.0, heldout=0.1)
    assert [len(split.clients["a"].train), len(split.clients["a"].validation)] == [1, 1]
    assert split.clients["b"].train == [3]


def test_a_clients_parts_do_not_depend_on_other_clients():
    a, b = list(range(100)), list(range(100, 300))
    config = {"validation": 0.1, "test": 0.1, "heldout": 0.1, "max_heldout_rows": 0}
    together = split_distinct({"a": a, "b": b}, **config)
    assert together.clients["a"] == split_distinct({"a": a}, **config).clients["a"]


def test_rows_beyond_the_limits_go_to_training():
    clients = {"a": list(range(400)), "b": list(range(400, 600))}
    split = split_distinct(
        clients, validation=0.5, heldout=0.2, max_validation_rows=7, max_heldout_rows=30
    )
    assert [len(parts.validation) for parts in split.clients.values()] == [7, 7]
    assert [sum(n in range(400) for n in split.heldout), len(split.heldout)] == [20, 30]
    assert sum(len(parts.train) for parts in split.clients.values()) == 600 - 44


def test_seeds_make_different_splits():
    clients = {"a": list(range(100))}
    assert split_distinct(clients, 0) != split_distinct(clients, 1)


def test_a_copy_at_another_client_leaves_the_training_rows():
    keys = [b"same", b"same", *DISTINCT[:40]]
    clients = {"a": [0, *range(2, 22)], "b": [1, *range(22, 42)]}
    config = SplitConfig(validation=0.5, heldout=0.3)
    for seed in range(20):
        split = split_rows(clients, keys, config, seed)
        places = [part for part, numbers in parts_of(split).items() for n in numbers if n < 2]
        assert len(set(places)) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"question": "Why  is\nit?", "answer": " So. "},
        {"prompt": "Why is it?", "completion": "So."},
        {"instruction": "Why is it?", "output": "So.", "id": 7},
    ],
)
def test_rows_that_say_the_same_up_to_white_space_have_one_key(other):
    config = DataConfig()
    first = parse_row({"question": "Why is it?", "answer": "So."}, config)
    assert content_key(first) == content_key(parse_row(other, config))


def test_other_words_or_other_speakers_have_another_key():
    rows = [
        {"question": "Why is it?", "answer": "So."},
        {"question": "Why is it? So.", "answer": "So."},
        {"question": "why is it?", "answer": "So."},
        {"text": "Why is it? So."},
        {"text": "Whyisit?So."},
    ]
    assert len({content_key(parse_row(row, DataConfig())) for row in rows}) == len(rows)


def test_shares_that_leave_nothing_for_training_are_refused():
    with pytest.raises(ValidationError, match="must leave rows for training"):
        SplitConfig(validation=0.5, test=0.3, heldout=0.2)


@given(federations(), st.floats(0.01, 1.0), st.integers(0, 2**32))
@settings(max_examples=100)
def test_d1_and_d2_share_no_content_anywhere(federation, share, seed):
    clients, keys = federation
    divided = divide_training(clients, keys, share, seed)
    first = {keys[n] for d1, _ in divided.values() for n in d1}
    second = {keys[n] for _, d2 in divided.values() for n in d2}
    assert not first & second
    for name, (d1, d2) in divided.items():
        assert sorted(d1 + d2) == clients[name]
        if len({keys[n] for n in clients[name]}) > 1:
            assert d1
    assert divided == divide_training(clients, keys, share, seed)


def test_d1_is_the_first_share_in_the_order_of_the_splits():
    a, b = list(range(40)), list(range(40, 50))
    divided = divide_training({"a": a, "b": b}, DISTINCT, 0.3, seed=5)
    assert [(len(d1), len(d2)) for d1, d2 in divided.values()] == [(12, 28), (3, 7)]
    order = draw_order([DISTINCT[n] for n in a], 5)
    assert divided["a"][0] == sorted(order[:12])
    assert divided["a"] == divide_training({"a": a}, DISTINCT, 0.3, seed=5)["a"]
    assert divided != divide_training({"a": a, "b": b}, DISTINCT, 0.3, seed=6)


@pytest.mark.parametrize("share", [0.001, 1.0])
def test_each_side_of_two_rows_or_more_has_one(share):
    (d1, d2), alone = divide_training({"a": [0, 1, 2], "b": [3]}, DISTINCT, share, 0).values()
    assert min(len(d1), len(d2)) == 1
    assert alone == ([], [3])


def test_copies_follow_a_row_into_d1():
    keys = [b"same", b"same", b"same", *DISTINCT[:40]]
    clients = {"a": [0, 1, *range(3, 23)], "b": [2, *range(23, 43)]}
    sides = set()
    for seed in range(20):
        divided = divide_training(clients, keys, 0.3, seed)
        first = {n for d1, _ in divided.values() for n in d1 if n < 3}
        assert first in (set(), {0, 1, 2})
        sides.add(len(first))
    assert sides == {0, 3}
