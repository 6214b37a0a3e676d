"""What all parties of a round agree on beforehand: who counts, how many, in which ring.

Numbers are added modulo 2^width. The width is the least in which the sum of all members' numbers,
each of magnitude `reach` at most, keeps its sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cgfedllm.codecs.parts.bitpack import MOST_WIDTH
from cgfedllm.errors import SecureAggregationError
from cgfedllm.privacy.secagg.primitives import KEY_BYTES

SESSION_BYTES = 16
PUBLIC_BYTES = 2 * KEY_BYTES
"""A member's two public keys: the one shares are sealed with, the one masks are made with."""


def threshold_of(members: int, *, wanted: int | None, least: int) -> int:
    """How many must see a round through, and so how many at least are in a sum.

    Parameters
    ----------
    members : int
        Clients that begin the round together.
    wanted : int or None
        ``privacy.secagg.threshold``; None: two thirds of the members, rounded up.
    least : int
        ``federation.min_clients``.

    Raises
    ------
    SecureAggregationError
        If there are not that many, or so many more that two sums could be opened by different
        halves of them.
    """
    threshold = max(2, least, -(-2 * members // 3) if wanted is None else wanted)
    if members < threshold:
        raise SecureAggregationError(
            f"{members} clients for secure aggregation, {threshold} are needed "
            "(privacy.secagg.threshold, federation.min_clients)"
        )
    if 2 * threshold <= members:
        raise SecureAggregationError(
            f"privacy.secagg.threshold = {threshold} is not more than half of {members} clients, "
            "so two groups of them could open two sums; raise it, or leave it out"
        )
    return threshold


def width_of(members: int, reach: int) -> int:
    """Bits of the ring.

    Raises
    ------
    SecureAggregationError
        If the sum does not fit 32 bits.
    """
    width = (members * reach).bit_length() + 1
    if width > MOST_WIDTH:
        raise SecureAggregationError(
            f"the sum of {members} clients' numbers of magnitude {reach} needs {width} bits, more "
            f"than {MOST_WIDTH}; use fewer bits a number (uplink.options) or fewer clients a round"
        )
    return width


def to_ring(levels: NDArray[np.int32], width: int) -> NDArray[np.uint32]:
    """Signed numbers modulo 2^width."""
    return (levels.astype(np.int64) & ((1 << width) - 1)).astype(np.uint32)


def from_ring(numbers: NDArray[np.uint32], width: int) -> NDArray[np.int64]:
    """Inverse of `to_ring`."""
    signed = numbers.astype(np.int64)
    signed[signed >= 1 << (width - 1)] -= 1 << width
    return signed


@dataclass(frozen=True)
class Roster:
    """Members of a round in the order that places refer to, with their public keys.

    Parameters
    ----------
    names : tuple of str
        Sorted.
    keys : tuple of bytes
        `PUBLIC_BYTES` each.
    """

    names: tuple[str, ...]
    keys: tuple[bytes, ...]

    @classmethod
    def of(cls, names: Sequence[str], keys: bytes) -> Roster:
        """From what goes over the wire.

        Raises
        ------
        SecureAggregationError
            If names repeat or are out of order, their keys are not there, or one key is in it
            twice: who holds two places of a roster could open more than one member may.
        """
        if list(names) != sorted(set(names)):
            raise SecureAggregationError("the names of the round's clients repeat or are unsorted")
        if len(keys) != PUBLIC_BYTES * len(names):
            raise SecureAggregationError(f"{len(keys)} bytes of keys for {len(names)} clients")
        single = {keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)}
        if len(single) < 2 * len(names):
            raise SecureAggregationError("a public key is there more than once")
        parts = (keys[at : at + PUBLIC_BYTES] for at in range(0, len(keys), PUBLIC_BYTES))
        return cls(tuple(names), tuple(parts))

    def __len__(self) -> int:
        return len(self.names)

    def place(self, name: str) -> int:
        """Place of a member.

        Raises
        ------
        SecureAggregationError
            If it is none.
        """
        if name not in self.names:
            raise SecureAggregationError(f"{name!r} is not one of the round's clients")
        return self.names.index(name)

    def sealing_key(self, place: int) -> bytes:
        """Public key that a member's shares are sealed with."""
        return self.keys[place][:KEY_BYTES]

    def masking_key(self, place: int) -> bytes:
        """Public key that a member's masks are made with."""
        return self.keys[place][KEY_BYTES:]

    def check(self, places: Sequence[int], among: Sequence[int] | None = None) -> list[int]:
        """Places of some members, if they are that.

        Raises
        ------
        SecureAggregationError
            If they repeat, are out of order, or are not among those they must be among.
        """
        allowed = set(range(len(self)) if among is None else among)
        if list(places) != sorted(set(places)) or not allowed.issuperset(places):
            raise SecureAggregationError(
                "a list of the round's clients names others, or some twice"
            )
        return list(places)
