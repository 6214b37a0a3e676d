"""In what two adapters differ, told by the first factor that does."""

from __future__ import annotations

from cgfedllm.adapter import AdapterSpec, Factor


def first_difference(expected: AdapterSpec, found: AdapterSpec) -> str | None:
    """Name the first factor in which `found` is not what is expected; None if they are the same.

    Parameters
    ----------
    expected : AdapterSpec
        The adapter at hand.
    found : AdapterSpec
        The one a file or message was made for.
    """
    theirs = {factor.name: factor for factor in found}
    for factor in expected:
        other = theirs.get(factor.name)
        if other is None:
            return f"it has no factor {factor.name}"
        if other.shape != factor.shape:
            return f"{factor.name} is {other.shape} there, {factor.shape} here" + _rank(
                factor, other
            )
    ours = {factor.name for factor in expected}
    extra = next((factor.name for factor in found if factor.name not in ours), None)
    if extra is not None:
        return f"it has {extra}, which is not here"
    if found.hash != expected.hash:
        first = next(a.name for a, b in zip(expected, found, strict=True) if a.name != b.name)
        return f"its factors are in another order, from {first} on"
    return None


def _rank(ours: Factor, theirs: Factor) -> str:
    """The rank is an A's first and a B's last dimension."""
    if not ours.kind or not len(ours.shape) == len(theirs.shape) == 2:
        return ""
    at = 0 if ours.kind == "A" else 1
    if ours.shape[at] == theirs.shape[at] or ours.shape[1 - at] != theirs.shape[1 - at]:
        return ""
    return f" (rank {theirs.shape[at]}, not {ours.shape[at]})"
