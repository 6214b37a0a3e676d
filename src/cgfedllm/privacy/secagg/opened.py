"""Whose sum was opened in which round: kept by the server and by every client, each for itself.

::

    secagg-rounds.json   {"format", "version", "rounds": {"3": ["north", "south"], ...}}

A client that repeats a round after a crash sends the same update again. The sum of another set of
clients would then differ from the first by somebody's update, in the clear. So in one round only
one set is ever opened; the same set again tells nothing new.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cgfedllm.errors import CheckpointError, SecureAggregationError
from cgfedllm.storage import read_json, write_json

FILE = "secagg-rounds.json"
_FORMAT, _VERSION = "cgfedllm-secagg-rounds", 1


class OpenedRounds:
    """The sets of one owner in one run.

    Parameters
    ----------
    folder : Path
        The owner's.

    Raises
    ------
    SecureAggregationError
        If the file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._rounds: dict[int, list[str]] = {}
        if self._path.exists():
            self._read()

    def members(self, round: int) -> list[str] | None:
        """The set of a round; None if none was opened."""
        return self._rounds.get(round)

    def note(self, round: int, names: Sequence[str]) -> None:
        """Write a set down, before anything is done to open it.

        Raises
        ------
        SecureAggregationError
            If another one was opened in this round.
        StorageError
            If it cannot be written.
        """
        names = sorted(names)
        before = self._rounds.get(round)
        if before == names:
            return
        if before is not None:
            raise SecureAggregationError(
                f"round {round} was opened before for {', '.join(before)}; the sum of another set "
                "would give single updates away. Go on when the same clients are there, or start "
                "a new run"
            )
        self._rounds[round] = names
        rounds = {str(number): members for number, members in sorted(self._rounds.items())}
        tree = {"format": _FORMAT, "version": _VERSION, "rounds": rounds}
        write_json(self._path, tree, private=True)

    def _read(self) -> None:
        try:
            tree = read_json(self._path)
            if (tree["format"], tree["version"]) != (_FORMAT, _VERSION):
                raise ValueError("another format")
            self._rounds = {
                int(number): [str(name) for name in names]
                for number, names in tree["rounds"].items()
            }
        except (CheckpointError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise SecureAggregationError(
                f"{self._path} is damaged ({error}), so whose sums were opened is unknown; start "
                "a new run"
            ) from None
