"""Partitions: every row to one client, every client with enough, equal seeds equal clients."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cgfedllm.config import DataConfig
from cgfedllm.data.names import numbered_names, safe_names
from cgfedllm.data.partition import partition_rows
from cgfedllm.errors import DataError


def rows_of(labels: list[str]) -> list[dict[str, object]]:
    return [{"label": label, "text": str(number)} for number, label in enumerate(labels)]


def divide(labels: list[str], seed: int = 0, *, max_rows: int | None = None, **partition: object):
    config = DataConfig(
        max_rows=max_rows, partition={"column": "label", "min_rows": 1, **partition}
    )
    return partition_rows(rows_of(labels), labels, config, seed)


LABELS = st.lists(st.sampled_from(["a", "b", "c d", "E"]), min_size=40, max_size=200)
KINDS = st.sampled_from(["natural", "files", "iid", "dirichlet", "quantity"])


@given(LABELS, KINDS, st.integers(0, 2**32), st.sampled_from([0.05, 0.5, 100.0]))
@settings(max_examples=60)
def test_every_row_goes_to_exactly_one_client(labels, kind, seed, alpha):
    options = {} if kind in ("natural", "files") else {"clients": 3}
    partition = divide(labels, seed, kind=kind, alpha=alpha, **options)
    numbers = [number for part in partition.clients.values() for number in part]
    assert sorted(numbers) == list(range(len(labels)))
    assert list(partition.clients) == sorted(partition.clients)
    assert all(part == sorted(part) for part in partition.clients.values())
    assert partition == divide(labels, seed, kind=kind, alpha=alpha, **options)
    assert partition.rows_left_out == partition.clients_left_out == 0


@given(st.integers(1, 12), st.integers(1, 9), KINDS, st.integers(0, 999))
@settings(max_examples=60)
def test_min_rows_holds_or_there_is_an_error(clients, min_rows, kind, seed):
    labels = ["x", "y", "y", "z"] * 15
    options = {} if kind in ("natural", "files") else {"clients": clients}
    # a dirichlet draw may also fail where an equal share would do
    must_work = kind != "dirichlet" and (not options or clients * min_rows <= len(labels))
    try:
        sizes = [
            len(p)
            for p in divide(labels, seed, kind=kind, min_rows=min_rows, **options).clients.values()
        ]
    except DataError:
        assert not must_work
    else:
        assert min(sizes) >= min_rows


def test_natural_has_one_client_a_value_sorted_by_name():
    partition = divide(["b", "a", "b", "c/d"], kind="natural")
    assert partition.clients == {"a": [1], "b": [0, 2], "c-d": [3]}


def test_natural_may_be_limited_to_the_largest_clients():
    partition = divide(["a", "b", "b", "c", "c", "d"], kind="natural", clients=3)
    assert list(partition.clients) == ["a", "b", "c"]
    assert (partition.clients_left_out, partition.rows_left_out) == (1, 1)


def test_iid_shares_differ_by_one_row_at_most():
    sizes = [len(part) for part in divide(["a"] * 10, kind="iid", clients=4).clients.values()]
    assert sorted(sizes) == [2, 2, 3, 3]


def test_dirichlet_skews_labels_more_for_a_smaller_alpha():
    labels = ["a", "b", "c", "d"] * 250

    def largest_share(alpha: float) -> float:
        parts = divide(labels, kind="dirichlet", clients=8, alpha=alpha, min_rows=8).clients
        shares = [
            max(sum(labels[n] == label for n in part) for label in "abcd") / len(part)
            for part in parts.values()
        ]
        return sum(shares) / len(shares)

    assert largest_share(0.05) > 0.7
    assert largest_share(1000.0) < 0.32


def test_quantity_skews_sizes_more_for_a_smaller_alpha():
    def sizes(alpha: float) -> list[int]:
        parts = divide(["a"] * 1000, kind="quantity", clients=10, alpha=alpha, min_rows=5).clients
        return sorted(len(part) for part in parts.values())

    assert sizes(0.05)[0] == 5
    assert sizes(0.05)[-1] > 400
    assert sizes(1e6)[-1] - sizes(1e6)[0] < 10


def test_a_vanishing_alpha_still_works():
    for kind in ("dirichlet", "quantity"):
        assert divide(["a", "b"] * 20, kind=kind, clients=2, alpha=1e-300, min_rows=1).clients


def test_seeds_make_different_partitions():
    first, second = (divide(["a"] * 50, seed, kind="iid", clients=2).clients for seed in (0, 1))
    assert first != second


def test_max_rows_draws_for_each_client_by_itself():
    labels = ["a"] * 50 + ["b"] * 50 + ["c"] * 3
    partition = divide(labels, kind="natural", max_rows=10)
    assert [len(part) for part in partition.clients.values()] == [10, 10, 3]
    assert partition.rows_left_out == 80
    without_b = divide(["a"] * 50, kind="natural", max_rows=10)
    assert without_b.clients["a"] == partition.clients["a"]


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (
            ["a"] * 9 + ["b"] * 2,
            {"kind": "natural", "min_rows": 3},
            r"client 'b' has 2 rows, fewer than data\.partition\.min_rows = 3 .*"
            r"data\.partition\.clients = 1",
        ),
        (["a"] * 4, {"kind": "natural", "clients": 2}, r"asks for 2 clients, but there are 1"),
        (["a"] * 4, {"kind": "files", "clients": 2}, r"but there are 1 files"),
        (["a"] * 9, {"kind": "iid", "clients": 5, "min_rows": 2}, r"9 rows cannot give 5 clients"),
        (
            ["a"] * 40,
            {"kind": "dirichlet", "clients": 10, "min_rows": 4, "alpha": 0.01},
            r"no draw of \d+ gave each of 10 clients 4 rows .*raise data\.partition\.alpha",
        ),
        (
            ["a"] * 9,
            {"kind": "natural", "column": "lable"},
            r"needs the column 'lable'.*the columns are label, text\. Did you mean 'label'",
        ),
        (["a", "", "b"], {"kind": "natural"}, r"1 of 3 rows have no value .* row 2"),
    ],
)
def test_what_cannot_be_done_says_why_and_what_to_set(labels, options, message):
    with pytest.raises(DataError, match=message):
        divide(labels, **options)


@given(st.lists(st.text(max_size=80), max_size=20))
def test_client_names_are_safe_and_unique(values):
    names = safe_names(values)
    assert len({name.casefold() for name in names}) == len(values)
    for name in names:
        assert name
        assert not set(name) & set('/\\:*?"<>| \n\0')
        assert not name.startswith(".")


def test_names_stay_readable():
    assert safe_names(["St. Mary's / A", "a", "A", "../x", "Köln", ""]) == [
        "St.-Mary-s-A",
        "a",
        "A-2",
        "x",
        "Köln",
        "client",
    ]
    assert numbered_names(2) == ["client-00", "client-01"]
    assert numbered_names(101)[-1] == "client-100"
