"""Client names that are safe as file names, and unique."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches

_UNSAFE = re.compile(r"[^\w.+-]+")
_LONGEST = 64
# of a name and of the number behind it
_LONGEST_NUMBERED = _LONGEST + 11


def safe_names(values: Sequence[str]) -> list[str]:
    """File-safe, distinct names for `values`, in the same order.

    Letters of any script, digits and ``. _ + -`` are kept, everything else becomes ``-``. Names
    that fall together (also when only their case differs, since some file systems ignore it)
    get ``-2``, ``-3``, ... in the order given.
    """
    taken: set[str] = set()
    names = []
    for value in values:
        base = _UNSAFE.sub("-", value).strip("-.")[:_LONGEST] or "client"
        name, number = base, 1
        while name.casefold() in taken:
            number += 1
            name = f"{base}-{number}"
        taken.add(name.casefold())
        names.append(name)
    return names


def is_safe_name(name: str) -> bool:
    """Whether `safe_names` can have made this name."""
    return (
        0 < len(name) <= _LONGEST_NUMBERED and not _UNSAFE.search(name) and name == name.strip("-.")
    )


def numbered_names(count: int) -> list[str]:
    """``client-00``, ``client-01``, ...: names that sort in the order of their numbers."""
    width = max(2, len(str(count - 1)))
    return [f"client-{number:0{width}d}" for number in range(count)]


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """A sentence that names the nearest known word, or nothing."""
    near = get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""
