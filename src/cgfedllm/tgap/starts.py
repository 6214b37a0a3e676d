"""Where the adapter stood before a round: not in a recording, but it follows from it.

The start is drawn from the seed, and every round added its aggregate.
"""

from __future__ import annotations

from collections.abc import Iterable

from cgfedllm.adapter import AdapterUpdate
from cgfedllm.codecs import Start
from cgfedllm.lora import initial_adapter
from cgfedllm.tgap.recording import Recording


def adapter_states(recording: Recording, rounds: Iterable[int]) -> dict[int, AdapterUpdate]:
    """The global adapter before each of some rounds.

    Start and changes are added up in float32, as the server does but for the order of roundings.

    Parameters
    ----------
    recording : Recording
        One that `why_no_states` has nothing against.
    rounds : iterable of int
        Rounds asked for.

    Raises
    ------
    RecordingError
        If an update cannot be read.
    """
    config = recording.config
    rate = 1.0 if recording.kind == "centralised" else config.federation.server_lr
    wanted = set(rounds)
    state = initial_adapter(recording.spec, config.seed)
    states = {}
    for number in range(1, max(wanted, default=0) + 1):
        if number in wanted:
            states[number] = state
        state = state + recording.aggregate(number).scaled(rate)
    return states


def starts_of(recording: Recording, rounds: Iterable[int]) -> dict[int, Start]:
    """What a codec is told of where updates of some rounds start from; empty if it is unknown.

    Raises
    ------
    RecordingError
        If an update cannot be read.
    """
    if why_no_states(recording):
        return {}
    origin = initial_adapter(recording.spec, recording.config.seed).vector
    states = adapter_states(recording, rounds)
    return {number: Start(state.vector, origin) for number, state in states.items()}


def why_no_states(recording: Recording) -> str | None:
    """Why the adapter before a round does not follow from a recording; None if it does."""
    config, rounds = recording.config, recording.rounds()
    if not recording.spec.pairs():
        return "the adapter has no pairs of A and B"
    if recording.kind == "local-only":
        return "its clients share no adapter"
    if rounds != list(range(1, len(rounds) + 1)):
        return "it does not hold every round from the first"
    strategy = config.federation.strategy.name
    if recording.kind == "federated" and (
        strategy not in ("fedavg", "fedprox") or config.federation.aggregation != "factors"
    ):
        rule = f"{strategy}, {config.federation.aggregation}"
        return f"the server did more than add the mean ({rule})"
    return None
