"""What a run tells those who watch it. Publishing costs nothing when nobody listens.

The federated program publishes; consoles and trackers subscribe. Events stay in their process:
on a remote client they reach only listeners there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from cgfedllm.adapter import AdapterUpdate
from cgfedllm.metrics import RoundRecord


@dataclass(frozen=True)
class RunStarted:
    """The federation is set up; training starts (or goes on after `resumed_from` rounds)."""

    name: str
    rounds: int
    """The flush after the last round included, if there is one."""
    clients: tuple[str, ...]
    parameters: int
    """Values in one adapter update."""
    uplink_codec: str
    downlink_codec: str
    resumed_from: int = 0


@dataclass(frozen=True)
class RoundStarted:
    """A round (or the evaluation before the first, round 0) begins."""

    round: int
    clients: int
    """How many clients were sampled."""


@dataclass(frozen=True)
class ClientStarted:
    """A client in this process begins its local training."""

    client: str
    round: int
    steps: int


@dataclass(frozen=True)
class StepFinished:
    """One optimiser step of local or central training."""

    client: str
    step: int
    """From 1."""
    loss: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class ClientFinished:
    """A client in this process has trained (or flushed) and encoded."""

    client: str
    round: int
    loss: float
    """0 in the flush after the last round, in which nobody trains."""
    uplink_bytes: int


@dataclass(frozen=True, eq=False)
class UpdateReceived:
    """A usable update, as the server decoded it, before it is added to the global adapter.

    If the round is tried again, another `RoundStarted` comes and these updates do not count.
    """

    client: str
    round: int
    update: AdapterUpdate
    weight: float
    """In the average of the round."""
    metrics: Mapping[str, float]
    """What the client reported: num-examples, steps, tokens, train-loss, ..."""


@dataclass(frozen=True)
class RoundAggregated:
    """A round's updates are all in and count; the run writes it down next.

    What a listener keeps of the round it keeps now: after a kill between this and
    `RoundFinished` the round is done again, never skipped.
    """

    round: int


@dataclass(frozen=True)
class EvaluationProgress:
    """Batches evaluated so far on one set of rows."""

    what: str
    done: int
    total: int


@dataclass(frozen=True)
class RoundFinished:
    """A round is aggregated, evaluated and safe on disk."""

    record: RoundRecord


@dataclass(frozen=True)
class FitStarted:
    """A codec begins to learn from recorded updates (or goes on after `resumed_from` epochs)."""

    codec: str
    epochs: int
    """The most it takes; it may stop earlier."""
    updates: int
    """In a pass over the training updates."""
    validation: int
    """Updates it is judged by after every epoch."""
    resumed_from: int = 0


@dataclass(frozen=True)
class FitEpoch:
    """An epoch of a fit is over and safe on disk."""

    row: Mapping[str, float]
    """As a row of `FitProgress.curve`."""
    best: int
    """Epoch that is the best so far."""


@dataclass(frozen=True)
class Notice:
    """Something a person should know: a failed client, a retry, rows cut short."""

    text: str
    level: str = "info"
    """"info" or "warning"."""


Event = (
    RunStarted
    | RoundStarted
    | ClientStarted
    | StepFinished
    | ClientFinished
    | UpdateReceived
    | RoundAggregated
    | EvaluationProgress
    | RoundFinished
    | FitStarted
    | FitEpoch
    | Notice
)
Listener = Callable[[Event], None]

_listeners: list[Listener] = []


def anyone_listens() -> bool:
    """Whether an event that takes work to make is worth making."""
    return bool(_listeners)


def publish(event: Event) -> None:
    """Hand an event to every listener of this process."""
    for listener in _listeners:
        listener(event)


@contextmanager
def listening(*listeners: Listener) -> Iterator[None]:
    """Listeners hear events inside this block."""
    _listeners.extend(listeners)
    try:
        yield
    finally:
        for listener in listeners:
            _listeners.remove(listener)
