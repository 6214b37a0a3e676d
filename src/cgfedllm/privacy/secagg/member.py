"""A client's side of secure aggregation, one message at a time.

::

    secagg-session.json   keys, seed, and shares of peers; from `advertise` to `unmask`

Each message may reach another process, so what the next phase needs is on the client's disk before
an answer leaves. Phases go forwards only, and each is done once: masking two updates with the same
masks would give their difference away, sharing the same secrets twice could give the secrets away.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cgfedllm.codecs.parts.bitpack import pack
from cgfedllm.errors import CheckpointError, SecureAggregationError
from cgfedllm.privacy.secagg.opened import OpenedRounds
from cgfedllm.privacy.secagg.primitives import (
    KEY_BYTES,
    agree,
    mask,
    new_secret,
    public_key,
    seal,
    sealed_size,
    split,
    unseal,
)
from cgfedllm.privacy.secagg.rules import SESSION_BYTES, Roster, to_ring, width_of
from cgfedllm.storage import read_json, write_json

FILE = "secagg-session.json"
_FORMAT, _VERSION = "cgfedllm-secagg-session", 1
_SHARES = 2 * KEY_BYTES

SEALED_BYTES = sealed_size(_SHARES)
"""Of one peer's shares, sealed."""


class Member:
    """One client in the rounds of one run.

    Parameters
    ----------
    folder : Path
        The client's own.
    name : str
        Under which the roster has it.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._path = folder / FILE
        self._name = name

    def advertise(self, session: bytes, round: int) -> bytes:
        """Begin a session with fresh keys; what was kept of an earlier one is gone.

        Returns
        -------
        bytes
            Two public keys, `PUBLIC_BYTES`.

        Raises
        ------
        SecureAggregationError
            If the session's name is none.
        StorageError
            If the keys cannot be kept.
        """
        if len(session) != SESSION_BYTES:
            raise SecureAggregationError(f"a session is named by {SESSION_BYTES} bytes")
        sealing, masking = new_secret(), new_secret()
        self._write(
            {
                "phase": "advertised",
                "session": session.hex(),
                "round": round,
                "sealing": sealing.hex(),
                "masking": masking.hex(),
            }
        )
        return public_key(sealing) + public_key(masking)

    def share(self, session: bytes, roster: Roster, threshold: int) -> bytes:
        """Share this session's secrets out.

        Parameters
        ----------
        roster : Roster
            All members, this one included.
        threshold : int
            What this client takes it to be (`rules.threshold_of`).

        Returns
        -------
        bytes
            `SEALED_BYTES` for each peer, in the roster's order, this client left out.

        Raises
        ------
        SecureAggregationError
            If there is no such session in this phase, or the roster has other keys of this client.
        """
        own = self._read(session, "advertised")
        sealing, masking = bytes.fromhex(own["sealing"]), bytes.fromhex(own["masking"])
        place = roster.place(self._name)
        if roster.keys[place] != public_key(sealing) + public_key(masking):
            raise SecureAggregationError("the server tells peers other keys than this client's own")
        seed = new_secret()
        shares = [
            of_seed + of_key
            for of_seed, of_key in zip(
                split(seed, threshold, len(roster)),
                split(masking, threshold, len(roster)),
                strict=True,
            )
        ]
        keys = [
            b"" if peer == place else agree(sealing, roster.sealing_key(peer), session, "seal")
            for peer in range(len(roster))
        ]
        self._write(
            {
                **own,
                "phase": "shared",
                "threshold": threshold,
                "names": list(roster.names),
                "keys": b"".join(roster.keys).hex(),
                "seed": seed.hex(),
                "share": shares[place].hex(),
            }
        )
        return b"".join(
            seal(keys[peer], shares[peer], _from_to(place, peer))
            for peer in range(len(roster))
            if peer != place
        )

    def ready(self, session: bytes) -> None:
        """Refuse to begin what could not be sent.

        Raises
        ------
        SecureAggregationError
            If there is no such session, or it is not time to mask.
        """
        self._read(session, "shared")

    def mask(
        self,
        session: bytes,
        present: Sequence[int],
        sealed: bytes,
        levels: NDArray[np.int32],
        reach: int,
    ) -> bytes:
        """Hide numbers.

        Parameters
        ----------
        present : sequence of int
            Places of those who shared; masks are agreed with each of them.
        sealed : bytes
            What they sealed for this client, in that order, this client left out.
        levels : ndarray of int32
            What is to be added up.
        reach : int
            Largest magnitude that any of them may have.

        Returns
        -------
        bytes
            The masked numbers, packed.

        Raises
        ------
        SecureAggregationError
            If there is no such session in this phase, too few are present, their shares cannot
            be read, or a number is out of reach.
        """
        own = self._read(session, "shared")
        roster, place = self._roster(own)
        present = roster.check(present)
        peers = [peer for peer in present if peer != place]
        if len(present) < own["threshold"] or place not in present:
            raise SecureAggregationError(
                f"{len(peers)} peers shared with this client; "
                f"{own['threshold'] - 1} are needed at least"
            )
        if len(sealed) != SEALED_BYTES * len(peers):
            raise SecureAggregationError(f"{len(sealed)} bytes of shares of {len(peers)} peers")
        if levels.size and int(np.abs(levels).max()) > reach:
            raise SecureAggregationError(f"a number is larger than {reach}, the most there may be")
        sealing, masking = bytes.fromhex(own["sealing"]), bytes.fromhex(own["masking"])
        width = width_of(len(roster), reach)
        total = to_ring(levels, width)
        total += mask(bytes.fromhex(own["seed"]), session, levels.size, width)
        shares = {str(place): own["share"]}
        for at, peer in enumerate(peers):
            blob = sealed[at * SEALED_BYTES : (at + 1) * SEALED_BYTES]
            key = agree(sealing, roster.sealing_key(peer), session, "seal")
            shares[str(peer)] = unseal(key, blob, _from_to(peer, place)).hex()
            key = agree(masking, roster.masking_key(peer), session, "mask")
            numbers = mask(key, session, levels.size, width)
            total = total + numbers if place < peer else total - numbers
        # of the secrets only shares are needed from here on
        kept = {k: own[k] for k in ("session", "round", "threshold", "names", "keys")}
        self._write({**kept, "phase": "masked", "shares": shares})
        return pack(total & np.uint32((1 << width) - 1), width)

    def unmask(self, session: bytes, survivors: Sequence[int]) -> bytes:
        """Help to open the sum, once; the session is over then.

        Parameters
        ----------
        survivors : sequence of int
            Places of those whose numbers are in the sum.

        Returns
        -------
        bytes
            A share a place that was present when this client masked: of the seed of those who
            survived, of the masking key of the others. Never both of one.

        Raises
        ------
        SecureAggregationError
            If there is no such session in this phase, they are too few or not those who could
            have sent, or another set was opened in this round.
        """
        own = self._read(session, "masked")
        roster, place = self._roster(own)
        shares = {int(peer): bytes.fromhex(share) for peer, share in own["shares"].items()}
        survivors = roster.check(survivors, among=list(shares))
        if len(survivors) < own["threshold"] or place not in survivors:
            raise SecureAggregationError(
                f"a sum of {len(survivors)} clients is not opened; {own['threshold']} at least"
            )
        names = [roster.names[survivor] for survivor in survivors]
        OpenedRounds(self._folder).note(own["round"], names)
        self._path.unlink(missing_ok=True)
        return b"".join(
            shares[peer][:KEY_BYTES] if peer in survivors else shares[peer][KEY_BYTES:]
            for peer in sorted(shares)
        )

    def _roster(self, own: dict[str, Any]) -> tuple[Roster, int]:
        roster = Roster.of(own["names"], bytes.fromhex(own["keys"]))
        return roster, roster.place(self._name)

    def _read(self, session: bytes, phase: str) -> dict[str, Any]:
        """What is kept of a session, if it has just come to this phase."""
        try:
            tree: dict[str, Any] = read_json(self._path)
            if (tree["format"], tree["version"]) != (_FORMAT, _VERSION):
                raise ValueError("another format")
            found = bytes.fromhex(tree["session"]), str(tree["phase"])
        except (CheckpointError, KeyError, TypeError, ValueError):
            raise SecureAggregationError(
                f"{self._name} holds no session of secure aggregation; the round has to begin anew"
            ) from None
        if found != (session, phase):
            raise SecureAggregationError(
                f"{self._name} is asked to go on from {phase!r} in a session, and is not there: "
                "each phase is done once"
            )
        return tree

    def _write(self, tree: dict[str, Any]) -> None:
        write_json(self._path, {"format": _FORMAT, "version": _VERSION, **tree}, private=True)


def _from_to(sender: int, receiver: int) -> bytes:
    return sender.to_bytes(4, "little") + receiver.to_bytes(4, "little")
