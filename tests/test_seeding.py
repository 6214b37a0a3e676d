"""Every random choice has a seed of its own, the same on every machine."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cgfedllm.seeding import derive_seed, generator


def test_seeds_do_not_change_between_releases():
    # a resumed run and a run on another machine must draw the same numbers
    assert derive_seed(0, "row order", "north", 3) == 5899017291455435258
    assert generator(7, "x").integers(0, 1000, 4).tolist() == [680, 370, 102, 204]


@given(st.integers(0, 2**62), st.integers(0, 2**62), st.text(), st.text())
def test_other_seed_or_other_name_is_another_choice(seed, other_seed, name, other_name):
    same = (seed, name) == (other_seed, other_name)
    assert (derive_seed(seed, name) == derive_seed(other_seed, other_name)) == same


def test_names_are_not_run_together():
    assert derive_seed(0, "ab", "c") != derive_seed(0, "a", "bc")


@given(st.integers(0, 2**62), st.text())
def test_seeds_fit_where_libraries_take_them(seed, name):
    assert 0 <= derive_seed(seed, name) < 2**63
