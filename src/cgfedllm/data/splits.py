"""Training, validation, test and held-out rows, without a row on two sides.

::

    one client's distinct rows, in an order drawn from (seed, content):
    [ held-out | test | validation | training ................................ ]

Rows count as the same if they say the same up to white space. A row that is in an evaluation part
anywhere is in no weaker part of any client (held-out over test over validation over training):
its further copies are dropped and counted. Since the order is drawn from the content, copies at
several clients tend to fall on the same side anyway.

The training rows may be divided once more, in the same order, for codecs that are pre-trained:
[ D1 | D2 ]. Then a row that is in D1 anywhere is in D1 wherever it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from cgfedllm.config import SplitConfig
from cgfedllm.data.formats import Dialogue, PlainText


@dataclass(frozen=True)
class Parts:
    """Row numbers of one client's parts, each ascending."""

    train: list[int]
    validation: list[int]
    test: list[int]


@dataclass(frozen=True)
class Split:
    """Row numbers of every part.

    Parameters
    ----------
    clients : dict of str to Parts
        In the order given.
    heldout : list of int
        The global held-out rows, by client, each ascending; all distinct in content.
    copies : int
        Rows dropped because a copy of them is in an evaluation part.
    reserved : int
        Rows dropped because their content was reserved.
    """

    clients: dict[str, Parts]
    heldout: list[int]
    copies: int
    reserved: int


def content_key(content: Dialogue | PlainText) -> bytes:
    """Equal for rows that say the same up to white space, shape (16,) bytes."""
    if isinstance(content, PlainText):
        pieces = ["", content.text]
    else:
        pieces = [text for m in content.messages for text in (m.role, m.content)]
    text = "\x1f".join(" ".join(piece.split()) for piece in pieces)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def draw_order(keys: Sequence[bytes], seed: int) -> list[int]:
    """Positions of `keys` in an order that depends on each key and the seed, nothing else."""
    salt = f"split\x1f{seed}\x1f".encode()
    ranks = [hashlib.blake2b(salt + key, digest_size=8).digest() for key in keys]
    return sorted(range(len(keys)), key=lambda position: (ranks[position], position))


def split_rows(
    clients: Mapping[str, Sequence[int]],
    keys: Sequence[bytes],
    config: SplitConfig,
    seed: int,
    *,
    reserved: AbstractSet[bytes] | None = None,
) -> Split:
    """Divide each client's rows.

    A share above 0 gives at least one row while one is left for training. Which rows a client
    gives to its parts does not depend on other clients, save for copies and `max_heldout_rows`.

    Parameters
    ----------
    clients : mapping of str to sequence of int
        Row numbers of each client.
    keys : sequence of bytes
        Content key of every row, by row number.
    config : SplitConfig
        Shares and limits.
    seed : int
        Seed of the run.
    reserved : set of bytes, optional
        Keys of a held-out set from elsewhere: rows with one of them are dropped, and clients
        give no held-out rows of their own.
    """
    taken = reserved or set()
    drawn = {
        name: _draw(
            [number for number in numbers if keys[number] not in taken],
            keys,
            config,
            seed,
            heldout=0.0 if reserved is not None else config.heldout,
        )
        for name, numbers in clients.items()
    }
    _limit_heldout(drawn, config.max_heldout_rows)
    heldout: list[int] = []
    heldout_keys: set[bytes] = set()
    for parts in drawn.values():
        for number in sorted(parts.heldout):
            if keys[number] not in heldout_keys:
                heldout_keys.add(keys[number])
                heldout.append(number)
    above_validation = heldout_keys | {keys[n] for parts in drawn.values() for n in parts.test}
    above_train = above_validation | {keys[n] for p in drawn.values() for n in p.validation}
    result = {}
    for name, parts in drawn.items():
        result[name] = Parts(
            train=[n for n in clients[name] if keys[n] not in above_train | taken],
            validation=sorted(n for n in parts.validation if keys[n] not in above_validation),
            test=sorted(n for n in parts.test if keys[n] not in heldout_keys),
        )
    total = sum(map(len, clients.values()))
    dropped = sum(keys[n] in taken for numbers in clients.values() for n in numbers)
    used = len(heldout) + sum(
        len(parts.train) + len(parts.validation) + len(parts.test) for parts in result.values()
    )
    return Split(result, heldout, copies=total - dropped - used, reserved=dropped)


def divide_training(
    clients: Mapping[str, Sequence[int]], keys: Sequence[bytes], share: float, seed: int
) -> dict[str, tuple[list[int], list[int]]]:
    """Divide each client's training rows into D1 and D2, in the order `split_rows` draws.

    A client with two or more distinct rows draws at least one for D1 and leaves at least one for
    D2. Whatever one client draws for D1 is D1 for all: its copies elsewhere change sides.

    Parameters
    ----------
    clients : mapping of str to sequence of int
        Numbers of each client's training rows.
    keys : sequence of bytes
        Content key of every row, by row number.
    share : float
        Of a client's distinct rows, that it draws for D1.
    seed : int
        Seed of the splits.

    Returns
    -------
    dict of str to (list of int, list of int)
        D1 and D2 of each client, each in the order given; either may be empty.
    """
    first: set[bytes] = set()
    for numbers in clients.values():
        distinct = list(dict.fromkeys(keys[number] for number in numbers))
        count = min(max(1, round(share * len(distinct))), len(distinct) - 1)
        first |= {distinct[position] for position in draw_order(distinct, seed)[: max(0, count)]}
    return {
        name: (
            [number for number in numbers if keys[number] in first],
            [number for number in numbers if keys[number] not in first],
        )
        for name, numbers in clients.items()
    }


@dataclass
class _Drawn:
    heldout: list[int]
    test: list[int]
    validation: list[int]


def _draw(
    numbers: Sequence[int],
    keys: Sequence[bytes],
    config: SplitConfig,
    seed: int,
    *,
    heldout: float,
) -> _Drawn:
    first: dict[bytes, int] = {}
    for number in numbers:
        first.setdefault(keys[number], number)
    distinct = list(first.values())
    order = [distinct[position] for position in draw_order([keys[n] for n in distinct], seed)]
    parts = []
    start = 0
    for share, limit in (
        (heldout, 0),
        (config.test, 0),
        (config.validation, config.max_validation_rows),
    ):
        count = max(1, round(share * len(order))) if share else 0
        count = min(count, limit or count, max(0, len(order) - 1 - start))
        parts.append(order[start : start + count])
        start += count
    return _Drawn(*parts)


def _limit_heldout(drawn: Mapping[str, _Drawn], limit: int) -> None:
    """Cut the pool to `limit` rows, every client's part in proportion (largest remainder)."""
    sizes = {name: len(parts.heldout) for name, parts in drawn.items()}
    total = sum(sizes.values())
    if not limit or total <= limit:
        return
    quotas = {name: size * limit // total for name, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda name: (-(sizes[name] * limit % total), name))
    for name in by_remainder[: limit - sum(quotas.values())]:
        quotas[name] += 1
    for name, parts in drawn.items():
        del parts.heldout[quotas[name] :]
