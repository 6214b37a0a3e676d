"""The server's side of secure aggregation: passes keys and shares on, adds up, removes masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from cgfedllm.codecs.parts.bitpack import packed_size, unpack
from cgfedllm.errors import SecureAggregationError
from cgfedllm.privacy.secagg.member import SEALED_BYTES
from cgfedllm.privacy.secagg.primitives import KEY_BYTES, agree, combine, mask, public_key
from cgfedllm.privacy.secagg.rules import PUBLIC_BYTES, SESSION_BYTES, Roster, from_ring, width_of


class Collector:
    """One session. Of its members it keeps keys and shares, and one running sum.

    Parameters
    ----------
    session : bytes
        `SESSION_BYTES`, new for every attempt at a round.
    advertised : mapping of str to bytes
        Public keys by client.
    threshold : callable
        From the number of members (`rules.threshold_of`).
    count : int
        How many numbers each client sends.
    reach : int
        Largest magnitude of one of them.

    Raises
    ------
    SecureAggregationError
        If too few advertised, or their keys are none.
    """

    def __init__(
        self,
        session: bytes,
        advertised: Mapping[str, bytes],
        *,
        threshold: Callable[[int], int],
        count: int,
        reach: int,
    ) -> None:
        self.session = session
        self.threshold = threshold(len(advertised))
        names = sorted(advertised)
        self.roster = Roster.of(names, b"".join(advertised[name] for name in names))
        self.present: list[int] = []
        """Places of those who shared, in order."""
        self.survivors: list[int] = []
        """Places of those whose numbers are in the sum, in order."""
        self._reach = reach
        self._width = width_of(len(self.roster), reach)
        self._sealed: dict[int, bytes] = {}
        self._total = np.zeros(count, np.uint32)

    @property
    def payload_bytes(self) -> int:
        """Of one client's masked numbers."""
        return packed_size(self._total.size, self._width)

    def share(self, name: str, sealed: bytes) -> None:
        """Take in what a member sealed for its peers.

        Raises
        ------
        SecureAggregationError
            If it is of the wrong length, or from nobody on the roster.
        """
        expected = SEALED_BYTES * (len(self.roster) - 1)
        if len(sealed) != expected:
            raise SecureAggregationError(f"{len(sealed)} bytes of shares, {expected} were expected")
        self._sealed[self.roster.place(name)] = sealed

    def close_sharing(self) -> None:
        """From here on those who shared are present, and nobody else.

        Raises
        ------
        SecureAggregationError
            If they are too few.
        """
        self.present = sorted(self._sealed)
        self._enough(self.present, "shared their keys")

    def sealed_for(self, name: str) -> bytes:
        """What those present sealed for one of them, in order."""
        place = self.roster.place(name)
        parts = []
        for peer in self.present:
            if peer != place:
                at = place - (place > peer)  # a peer left itself out
                parts.append(self._sealed[peer][at * SEALED_BYTES : (at + 1) * SEALED_BYTES])
        return b"".join(parts)

    def add(self, name: str, payload: bytes) -> None:
        """Add a client's masked numbers.

        Raises
        ------
        SecureAggregationError
            If they are of the wrong length, or this client is not waited for.
        """
        place = self.roster.place(name)
        if place not in self.present or place in self.survivors:
            raise SecureAggregationError("its numbers are not waited for")
        if len(payload) != self.payload_bytes:
            raise SecureAggregationError(
                f"{len(payload)} bytes of masked numbers, {self.payload_bytes} were expected"
            )
        packed = np.frombuffer(payload, np.uint8)
        self._total += unpack(packed, self._total.size, self._width)
        self.survivors = sorted([*self.survivors, place])

    def close_sum(self) -> list[str]:
        """Names of those whose numbers are in the sum; nobody else's come into it any more.

        Raises
        ------
        SecureAggregationError
            If they are too few.
        """
        self._enough(self.survivors, "sent their numbers")
        return [self.roster.names[place] for place in self.survivors]

    def open(self, answers: Mapping[str, bytes]) -> NDArray[np.int64]:
        """Remove the masks.

        Parameters
        ----------
        answers : mapping of str to bytes
            What `Member.unmask` gave, of survivors.

        Returns
        -------
        ndarray of int64
            The sum of the survivors' numbers.

        Raises
        ------
        SecureAggregationError
            If answers are too few, or what is left is no sum of so many numbers: somebody did not
            keep to the protocol.
        """
        expected = KEY_BYTES * len(self.present)
        usable = {
            self.roster.place(name): answer
            for name, answer in sorted(answers.items())
            if len(answer) == expected
        }
        self._enough(list(usable), "helped to open the sum")
        helpers = sorted(usable)[: self.threshold]
        total = self._total
        for at, place in enumerate(self.present):
            part = slice(at * KEY_BYTES, (at + 1) * KEY_BYTES)
            secret = combine({helper: usable[helper][part] for helper in helpers})
            if place in self.survivors:
                total = total - self._mask(secret)
            else:
                total = self._without(place, secret, total)
        levels = from_ring(total & np.uint32((1 << self._width) - 1), self._width)
        if levels.size and int(np.abs(levels).max()) > self._reach * len(self.survivors):
            raise SecureAggregationError(
                "what is left without masks is no sum of clients' numbers; one of them did not "
                "keep to the protocol, and which one cannot be told"
            )
        return levels

    def _without(self, place: int, masking: bytes, total: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """A sum without the masks that its members agreed with one who fell out."""
        if public_key(masking) != self.roster.masking_key(place):
            raise SecureAggregationError(
                f"shares of the key of {self.roster.names[place]!r} do not fit its public key"
            )
        for peer in self.survivors:
            key = agree(masking, self.roster.masking_key(peer), self.session, "mask")
            numbers = self._mask(key)
            # the survivor added it if its place is the lower one
            total = total - numbers if peer < place else total + numbers
        return total

    def _mask(self, secret: bytes) -> NDArray[np.uint32]:
        return mask(secret, self.session, self._total.size, self._width)

    def _enough(self, places: list[int], what: str) -> None:
        if len(places) < self.threshold:
            raise SecureAggregationError(
                f"{len(places)} of {len(self.roster)} clients {what}; {self.threshold} are needed"
            )


def traffic(members: int, names: int) -> tuple[int, int]:
    """Bytes up and down of a round in which nobody falls out, masked packets apart.

    Parameters
    ----------
    members : int
        Clients of the round.
    names : int
        Bytes of all their names, with a byte between two.
    """
    peers = members - 1
    up = PUBLIC_BYTES + SEALED_BYTES * peers + KEY_BYTES * members
    # to each: a session's name four times, all keys, what was sealed for it, who is there and was
    down = 4 * SESSION_BYTES + names + PUBLIC_BYTES * members + SEALED_BYTES * peers + 4 * members
    return members * up, members * down


def check_public(keys: bytes) -> bytes:
    """A member's public keys, if they have the length of keys.

    Raises
    ------
    SecureAggregationError
        If not.
    """
    if len(keys) != PUBLIC_BYTES:
        raise SecureAggregationError(f"{len(keys)} bytes of keys; {PUBLIC_BYTES} were expected")
    return keys
