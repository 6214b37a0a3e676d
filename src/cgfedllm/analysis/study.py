"""What codecs do to one recording, seen from several sides: the paper's analyses.

Every update is coded once for fidelity, rate and swap test; noise needs encodings of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cgfedllm.adapter import AdapterUpdate
from cgfedllm.analysis.coding import Coded, Coder, code
from cgfedllm.analysis.distributions import DistributionRow, HistogramRow, distributions
from cgfedllm.analysis.noise import NoiseRow, noise_rows, one_a_round, steps, uncoded_rows
from cgfedllm.analysis.open_loop_rows import Refusal
from cgfedllm.analysis.rate import RateRow, rate_row
from cgfedllm.analysis.rounds import FidelityRow, RoundFidelity
from cgfedllm.analysis.samples import Sample, choose, load_samples
from cgfedllm.analysis.swap import SwapRow, SwapTest
from cgfedllm.analysis.trials import Trial
from cgfedllm.errors import CodecError, CodecStateError, ConfigError, RecordingError
from cgfedllm.tgap.starts import why_no_states

if TYPE_CHECKING:
    from cgfedllm.tgap.recording import Recording

PARTS = ("fidelity", "rate", "swap", "noise", "distributions")
UPDATES = 64
"""Updates taken of each recording."""

_CODED = frozenset({"fidelity", "rate", "swap"})

Tick = Callable[[str, int, int], None]
"""Told what is worked on, how many encodings are done, and of how many."""


@dataclass(frozen=True)
class Study:
    """Results on one recording; lists are empty for parts that were not asked for.

    Parameters
    ----------
    recording : str
        Its name.
    rounds : tuple of int
        Rounds the updates come from.
    notes : list of str
        What was left out, and why.
    refusals : list of Refusal
        Codecs that could not be measured.
    """

    recording: str
    rounds: tuple[int, ...]
    fidelity: list[FidelityRow] = field(default_factory=list)
    rate: list[RateRow] = field(default_factory=list)
    swap: list[SwapRow] = field(default_factory=list)
    noise: list[NoiseRow] = field(default_factory=list)
    distributions: list[DistributionRow] = field(default_factory=list)
    histograms: list[HistogramRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)


def read_parts(names: Sequence[str]) -> tuple[str, ...]:
    """The parts that are named, in their own order; all without a name.

    Raises
    ------
    ConfigError
        If there is no such part.
    """
    unknown = next((name for name in names if name not in PARTS), None)
    if unknown is not None:
        raise ConfigError(f"an analysis has the parts {', '.join(PARTS)}; got {unknown!r}")
    return tuple(part for part in PARTS if part in (names or PARTS))


def check_recording(recording: Recording, parts: Sequence[str]) -> None:
    """Refuse a recording that cannot answer what is asked.

    Parameters
    ----------
    parts : sequence of str
        Those that were asked for by name.

    Raises
    ------
    RecordingError
        If it has one round only, or no round with two clients for the swap test.
    """
    choose(recording, 1, later=False)
    if "swap" in parts and not _has_neighbours(recording):
        raise RecordingError(
            f"{recording.path} has one client a round, and a packet cannot be swapped for another "
            "client's; leave the part 'swap' out, or record a federation"
        )


def study(
    name: str,
    recording: Recording,
    trials: Sequence[Trial],
    *,
    parts: Sequence[str] = PARTS,
    updates: int = UPDATES,
    seed: int = 0,
    tick: Tick = lambda what, done, total: None,
) -> Study:
    """Analyse one recording.

    Parameters
    ----------
    name : str
        Of the recording, for the results.
    trials : sequence of Trial
        Codecs, at one rate each.
    parts : sequence of str
        Of `PARTS`.
    updates : int
        Most updates taken, in whole rounds or nearly, from first to last.
    seed : int
        Common seed of both ends, and of the noise.
    tick : callable
        Told how far it is.

    Returns
    -------
    Study
        A codec that refuses an update, or was fitted on all of them, is among the refusals.

    Raises
    ------
    RecordingError
        If the recording is too short or damaged.
    """
    starts = "fidelity" in parts or any(trial.uses_start for trial in trials)
    chosen = choose(recording, updates, later=False)
    groups = load_samples(recording, chosen, seed=seed, starts=starts)
    result = Study(name, tuple(groups))
    if "swap" in parts and not _has_neighbours(recording):
        parts = [part for part in parts if part != "swap"]
        result.notes.append("no swap test: it has one client a round")
    if "distributions" in parts:
        for number, group in groups.items():
            for row, bins in distributions(name, number, group):
                result.distributions.append(row)
                result.histograms.extend(bins)
    states: dict[int, AdapterUpdate] = {}
    if "fidelity" in parts:
        why = why_no_states(recording)
        if why is None:
            states = {number: _adapter(group[0]) for number, group in groups.items()}
        else:
            result.notes.append(f"no effective changes of products: {why}")
    if "noise" in parts:
        drawn = one_a_round(list(groups.values()))
        result.noise.extend(uncoded_rows(name, drawn, seed))
    if not set(parts) - {"distributions"}:
        return result
    ready = _coders(trials, recording, groups, seed, result)
    total = sum(_encodings(one, parts) for one in ready)
    done = 0
    for one in ready:

        def count(label: str = one.trial.label) -> None:
            nonlocal done
            done += 1
            tick(label, done, total)

        try:
            _measure(one, parts, states, result, seed, count)
        except CodecError as error:
            result.refusals.append(_refusal(name, one.trial, str(error)))
    return result


@dataclass(frozen=True)
class _Ready:
    """A codec that can start.

    Parameters
    ----------
    groups : dict of list
        Updates by round.
    seen : set of int
        Rounds it was fitted on.
    """

    trial: Trial
    coder: Coder
    groups: dict[int, list[Sample]]
    seen: set[int]

    def unseen(self) -> list[list[Sample]]:
        """The other rounds."""
        return [group for number, group in self.groups.items() if number not in self.seen]


def _coders(
    trials: Sequence[Trial],
    recording: Recording,
    groups: dict[int, list[Sample]],
    seed: int,
    result: Study,
) -> list[_Ready]:
    ready = []
    for trial in trials:
        try:
            known = trial.fitted.seen(recording) if trial.fitted else set()
            coder = trial.make(recording.spec, seed)
        except (CodecError, CodecStateError) as error:
            result.refusals.append(_refusal(result.recording, trial, str(error)))
            continue
        one = _Ready(trial, coder, groups, known & set(groups))
        if not one.unseen():
            reason = "it was fitted on every update that is measured here"
            result.refusals.append(_refusal(result.recording, trial, reason))
            continue
        ready.append(one)
        if one.seen:
            rounds = ", ".join(map(str, sorted(one.seen)))
            result.notes.append(
                f"{trial.label} was fitted on rounds {rounds}: marked where rounds are told one by "
                "one, left out of everything else"
            )
    return ready


def _encodings(one: _Ready, parts: Sequence[str]) -> int:
    count = sum(map(len, one.groups.values())) if _CODED & set(parts) else 0
    return count + (steps(one.coder) * len(one.unseen()) if "noise" in parts else 0)


def _measure(
    one: _Ready,
    parts: Sequence[str],
    states: dict[int, AdapterUpdate],
    result: Study,
    seed: int,
    count: Callable[[], None],
) -> None:
    spec = next(iter(one.groups.values()))[0].update.spec
    rounds, swap, sizes = RoundFidelity(spec, states), SwapTest(), list[int]()
    for number, group in one.groups.items() if _CODED & set(parts) else ():
        coded: list[Coded] = []
        for sample in group:
            coded.append(code(one.coder, sample))
            count()
        if "fidelity" in parts:
            rounds.add(coded, seen=number in one.seen)
        if number not in one.seen:
            swap.add(coded)
            sizes += [c.size for c in coded]
    where = result.recording, one.trial.codec, json.dumps(one.trial.described)
    noise: list[NoiseRow] = []
    if "noise" in parts:
        noise = list(noise_rows(*where, one.coder, one_a_round(one.unseen()), seed, count))
    # only now: a codec that refuses one of the updates is in none of the tables
    result.noise.extend(noise)
    result.fidelity.extend(rounds.rows(*where))
    if "swap" in parts:
        result.swap.append(swap.row(*where))
    if "rate" in parts:
        result.rate.append(rate_row(*where, one.coder, spec, sizes))


def _adapter(sample: Sample) -> AdapterUpdate:
    """What a sample starts from, where that is known."""
    assert sample.context.start is not None
    return AdapterUpdate(sample.context.spec, sample.context.start.adapter)


def _has_neighbours(recording: Recording) -> bool:
    rounds = [entry.round for entry in recording.entries]
    return len(set(rounds)) < len(rounds)


def _refusal(recording: str, trial: Trial, reason: str) -> Refusal:
    options: dict[str, Any] = trial.described
    return Refusal(recording, trial.codec, json.dumps(options), trial.asked_bpp, reason)
