"""Which updates of a recording are measured, and what both ends know when each is coded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cgfedllm.adapter import AdapterUpdate
from cgfedllm.codecs import CodecContext
from cgfedllm.errors import RecordingError
from cgfedllm.tgap.starts import starts_of

if TYPE_CHECKING:
    from cgfedllm.tgap.recording import Recording

UPDATES = 16
"""Updates measured of each recording."""
LEARNING_SHARE = 0.5
"""Share of a recording's rounds that is left to codecs that learn."""


@dataclass(frozen=True)
class Sample:
    """One update to be coded, with what both ends know."""

    round: int
    client: str
    weight: float
    update: AdapterUpdate
    context: CodecContext


def choose(recording: Recording, limit: int, *, later: bool = True) -> dict[int, list[int]]:
    """Entries to measure, by round: whole rounds, or nearly, spread evenly.

    An aggregate needs its round's clients, so few rounds are taken with all of theirs rather
    than many with one; what exceeds the limit is left out of every round evenly.

    Parameters
    ----------
    limit : int
        Most updates, from 1.
    later : bool
        Take them from the later part only, and leave the earlier to codecs that learn.

    Raises
    ------
    RecordingError
        If the recording has fewer than two rounds.
    """
    rounds = recording.rounds()
    if len(rounds) < 2:
        raise RecordingError(
            f"{recording.path} holds one round only; what is measured has a round before it, which "
            "both ends may know or learn from, so it needs two at least: record more"
        )
    evaluated = set(rounds)
    if later:
        evaluated = set(recording.split_by_round(LEARNING_SHARE)[1].rounds())
    members: dict[int, list[int]] = {}
    for index, entry in enumerate(recording.entries):
        if entry.round in evaluated:
            members.setdefault(entry.round, []).append(index)
    numbers = sorted(members)
    size = max(len(indices) for indices in members.values())
    kept = [numbers[i] for i in spread(len(numbers), max(1, round(limit / size)))]
    each = limit // len(kept)
    return {r: [members[r][i] for i in spread(len(members[r]), each)] for r in kept}


def spread(n: int, limit: int) -> list[int]:
    """At most `limit` of the indices below `n`, evenly spread, first and last among them."""
    if limit >= n:
        return list(range(n))
    if limit == 1:
        return [n // 2]
    return [round(i * (n - 1) / (limit - 1)) for i in range(limit)]


def load_samples(
    recording: Recording, members: dict[int, list[int]], *, seed: int = 0, starts: bool = False
) -> dict[int, list[Sample]]:
    """Read the chosen updates, by round, each with the context it is coded in.

    Where updates start from takes all earlier rounds to find out, so only `starts` asks for it.
    """
    known = set(recording.rounds())
    known_starts = starts_of(recording, members) if starts else {}
    samples = {}
    for number, indices in members.items():
        before = recording.aggregate(number - 1).vector if number - 1 in known else None
        context = CodecContext(
            recording.spec, number, seed, previous=before, start=known_starts.get(number)
        )
        entries = [recording.entries[index] for index in indices]
        samples[number] = [
            Sample(number, entry.client, entry.weight, recording.update(index), context)
            for index, entry in zip(indices, entries, strict=True)
        ]
    return samples


def count_updates(recording: Recording, limit: int = UPDATES) -> int:
    """How many updates `measure` will code for each trial.

    Raises
    ------
    RecordingError
        As `choose`.
    """
    return sum(len(indices) for indices in choose(recording, limit).values())
