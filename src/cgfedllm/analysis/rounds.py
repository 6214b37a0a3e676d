"""Fidelity over rounds: of updates, of what is new in them, and of what they do to the product.

::

    level      client      one client's update
               aggregate   the weighted mean of a round's measured clients
    quantity   update      x against x_hat
               innovation  x - p against x_hat - p, with p the aggregate of the round before
               product     the effective change (`product.py`)

The innovation is what is new against the last aggregate. Its error is that of the update, its
energy is what a guess by the last aggregate leaves open: a codec whose SNR of the innovation is
negative says less than the guess would, which costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cgfedllm.adapter import AdapterSpec, AdapterUpdate, Float32Array
from cgfedllm.analysis.coding import Coded, aggregates
from cgfedllm.analysis.fidelity import Fidelity, ModuleFidelity
from cgfedllm.analysis.product import ProductFidelity

Level = Literal["client", "aggregate"]
Quantity = Literal["update", "innovation", "product"]
ALL = "all"
"""Module name of all modules together."""


@dataclass(frozen=True)
class FidelityRow:
    """One number pair of one codec.

    Parameters
    ----------
    recording, codec, options : str
        As in `OpenLoopRow`.
    round : int or None
        None: over all rounds; what the codec was fitted on is not in it.
    level, quantity : str
        See the module.
    module : str
        Kind of factor (``q_proj.A``; ``q_proj`` for the product), or "all".
    updates : int
        Client updates it is about.
    seen : int
        How many of them the codec was fitted on.
    snr_db, cosine : float
        Pooled: sums over sums.
    """

    recording: str
    codec: str
    options: str
    round: int | None
    level: Level
    quantity: Quantity
    module: str
    updates: int
    seen: int
    snr_db: float
    cosine: float


class RoundFidelity:
    """Collects what one codec does on one recording.

    Parameters
    ----------
    spec : AdapterSpec
        Of the updates.
    states : mapping of int to AdapterUpdate
        The adapter before each round; empty where it is not known, and then nothing is said of
        products.
    """

    def __init__(self, spec: AdapterSpec, states: Mapping[int, AdapterUpdate]) -> None:
        self._spec = spec
        self._states = states
        # by round; within it by level and quantity, within that by kind of module
        self._rounds: dict[int, dict[tuple[Level, Quantity], dict[str, Fidelity]]] = {}
        self._updates: dict[int, int] = {}
        self._seen: set[int] = set()

    def add(self, group: Sequence[Coded], *, seen: bool = False) -> None:
        """Take in one round.

        Parameters
        ----------
        group : sequence of Coded
            A round's updates, from one.
        seen : bool
            Whether the codec was fitted on them.
        """
        number = group[0].sample.round
        own = self._rounds.setdefault(number, {})
        known = group[0].sample.context.previous
        for one in group:
            self._add(own, number, "client", known, one.sample.update, one.decoded)
        self._add(own, number, "aggregate", known, *aggregates(group))
        self._updates[number] = len(group)
        if seen:
            self._seen.add(number)

    def rows(self, recording: str, codec: str, options: str) -> list[FidelityRow]:
        """What was collected: round by round, then over all rounds."""
        unseen = [number for number in self._rounds if number not in self._seen]
        parts: list[tuple[int | None, list[int]]] = [(number, [number]) for number in self._rounds]
        return [
            FidelityRow(
                recording=recording,
                codec=codec,
                options=options,
                round=number,
                level=level,
                quantity=quantity,
                module=module,
                updates=sum(self._updates[n] for n in members),
                seen=sum(self._updates[n] for n in self._seen.intersection(members)),
                snr_db=fidelity.snr_db,
                cosine=fidelity.cosine,
            )
            for number, members in [*parts, (None, unseen)]
            for (level, quantity), kinds in self._pooled(members).items()
            for module, fidelity in {ALL: sum(kinds.values(), Fidelity()), **kinds}.items()
        ]

    def _pooled(self, rounds: Iterable[int]) -> dict[tuple[Level, Quantity], dict[str, Fidelity]]:
        total: dict[tuple[Level, Quantity], dict[str, Fidelity]] = {}
        for number in rounds:
            for place, kinds in self._rounds[number].items():
                _add_kinds(total.setdefault(place, {}), kinds)
        return total

    def _add(
        self,
        own: dict[tuple[Level, Quantity], dict[str, Fidelity]],
        number: int,
        level: Level,
        known: Float32Array | None,
        true: AdapterUpdate,
        decoded: AdapterUpdate,
    ) -> None:
        update = ModuleFidelity(self._spec)
        update.add(true, decoded)
        _add_kinds(own.setdefault((level, "update"), {}), update.kinds)
        if known is not None:
            guess = AdapterUpdate(self._spec, known)
            innovation = ModuleFidelity(self._spec)
            innovation.add(true - guess, decoded - guess)
            _add_kinds(own.setdefault((level, "innovation"), {}), innovation.kinds)
        if number in self._states:
            product = ProductFidelity(self._spec)
            product.add(self._states[number], true, decoded)
            _add_kinds(own.setdefault((level, "product"), {}), product.kinds)


def _add_kinds(total: dict[str, Fidelity], kinds: Mapping[str, Fidelity]) -> None:
    for kind, fidelity in kinds.items():
        total[kind] = total.get(kind, Fidelity()) + fidelity
