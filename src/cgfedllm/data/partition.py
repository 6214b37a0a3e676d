"""Which client gets which rows.

Every procedure gives each row to one client at most, draws from a generator of its own, and keeps
rows in the order they were read. Clients come sorted by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cgfedllm.config import DataConfig, PartitionConfig
from cgfedllm.data.names import did_you_mean, numbered_names, safe_names
from cgfedllm.data.rows import Row
from cgfedllm.errors import DataError
from cgfedllm.seeding import generator

_TRIES = 1000

Float64Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@dataclass(frozen=True)
class Partition:
    """Row numbers of each client.

    Parameters
    ----------
    clients : dict of str to list of int
        Sorted by name; row numbers ascending. Names are distinct and safe as file names.
    clients_left_out : int
        Clients beyond `partition.clients`, the smallest ones.
    rows_left_out : int
        Rows of those clients, and rows beyond `max_rows`.
    """

    clients: dict[str, list[int]]
    clients_left_out: int
    rows_left_out: int


def partition_rows(
    rows: Sequence[Row], files: Sequence[str], config: DataConfig, seed: int
) -> Partition:
    """Give rows to clients as `config.partition` says.

    Parameters
    ----------
    rows : sequence of Row
        All rows.
    files : sequence of str
        Name of the file each row came from (used by kind "files").
    config : DataConfig
        `partition` and `max_rows` are used.
    seed : int
        Seed of the run.

    Raises
    ------
    DataError
        If the column is missing or empty somewhere, there are fewer rows or clients than asked
        for, or a client would get fewer than `partition.min_rows` rows.
    """
    settings = config.partition
    if settings.kind == "natural":
        groups = _by_value(_column(rows, settings, "natural"))
    elif settings.kind == "files":
        groups = _by_value(files)
    else:
        groups = _synthetic(rows, settings, seed)
    left_out = 0
    if settings.kind in ("natural", "files") and settings.clients is not None:
        found = len(groups)
        groups = _largest(groups, settings)
        left_out = found - len(groups)
    _check_sizes(groups, settings)
    names = safe_names(list(groups))
    clients = {
        name: _draw(numbers, config.max_rows, seed, name)
        for name, numbers in zip(names, groups.values(), strict=True)
    }
    clients = dict(sorted(clients.items()))
    return Partition(clients, left_out, len(rows) - sum(map(len, clients.values())))


def _by_value(values: Sequence[str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for number, value in enumerate(values):
        groups.setdefault(value, []).append(number)
    return dict(sorted(groups.items()))


def _column(rows: Sequence[Row], settings: PartitionConfig, kind: str) -> list[str]:
    column = settings.column
    values = [row.get(column) for row in rows]
    missing = [number for number, value in enumerate(values) if value is None or value == ""]
    if len(missing) == len(rows):
        present = sorted({name for row in rows for name in row})
        raise DataError(
            f"partition kind {kind!r} needs the column {column!r}, which the rows do not have; "
            f"the columns are {', '.join(present)}.{did_you_mean(column, present)} "
            "Set data.partition.column, or data.partition.kind"
        )
    if missing:
        raise DataError(
            f"{len(missing)} of {len(rows)} rows have no value in column {column!r} (the first is "
            f"row {missing[0] + 1}), so partition kind {kind!r} cannot place them; fill or remove "
            "them, or set another data.partition.column"
        )
    return [str(value) for value in values]


def _synthetic(rows: Sequence[Row], settings: PartitionConfig, seed: int) -> dict[str, list[int]]:
    count = settings.clients
    assert count is not None  # PartitionConfig has checked it
    if len(rows) < count * settings.min_rows:
        raise DataError(
            f"{len(rows)} rows cannot give {count} clients {settings.min_rows} rows each; lower "
            "data.partition.clients or data.partition.min_rows"
        )
    rng = generator(seed, "partition", settings.kind)
    if settings.kind == "iid":
        parts = np.array_split(rng.permutation(len(rows)), count)
    elif settings.kind == "quantity":
        parts = _quantity(len(rows), count, settings, rng)
    else:
        parts = _dirichlet(_column(rows, settings, "dirichlet"), count, settings, rng)
    return {
        name: sorted(map(int, part))
        for name, part in zip(numbered_names(count), parts, strict=True)
    }


def _quantity(
    total: int, count: int, settings: PartitionConfig, rng: np.random.Generator
) -> list[np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """Sizes of `min_rows` each, and the remaining rows in shares drawn from Dirichlet(alpha)."""
    shares = _draw_shares(settings.alpha, count, rng)
    cuts = _cuts(shares, total - count * settings.min_rows)
    return np.split(
        rng.permutation(total), cuts + settings.min_rows * np.arange(1, count, dtype=np.int64)
    )


def _dirichlet(
    labels: list[str], count: int, settings: PartitionConfig, rng: np.random.Generator
) -> list[np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """Label skew: the rows of each label go to the clients in shares from Dirichlet(alpha).

    Hsu et al., arXiv 1909.06335, in the form of Yurochkin et al., arXiv 1905.12022, which most
    libraries use: drawn anew until every client has `min_rows`.
    """
    by_label = [np.array(numbers, dtype=np.int64) for numbers in _by_value(labels).values()]
    for _ in range(_TRIES):
        parts: list[list[np.ndarray[tuple[int], np.dtype[np.int64]]]] = [[] for _ in range(count)]
        for numbers in by_label:
            cuts = _cuts(_draw_shares(settings.alpha, count, rng), len(numbers))
            for part, piece in zip(parts, np.split(rng.permutation(numbers), cuts), strict=True):
                part.append(piece)
        joined = [np.concatenate(part) for part in parts]
        if min(map(len, joined)) >= settings.min_rows:
            return joined
    raise DataError(
        f"no draw of {_TRIES} gave each of {count} clients {settings.min_rows} rows of "
        f"{len(labels)} with {len(by_label)} labels and alpha {settings.alpha}; raise "
        "data.partition.alpha, or lower data.partition.clients or data.partition.min_rows"
    )


def _draw_shares(alpha: float, count: int, rng: np.random.Generator) -> Float64Array:
    shares = rng.dirichlet(np.full(count, alpha))
    # a vanishing alpha underflows; its limit is everything to one
    return shares if np.isfinite(shares).all() else np.eye(count)[rng.integers(count)]


def _cuts(shares: Float64Array, total: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Where to cut `total` things so that the pieces have these shares."""
    return np.minimum(np.round(np.cumsum(shares)[:-1] * total), total).astype(np.int64)


def _largest(groups: dict[str, list[int]], settings: PartitionConfig) -> dict[str, list[int]]:
    count = settings.clients
    assert count is not None
    if len(groups) < count:
        what = f"values in column {settings.column!r}" if settings.kind == "natural" else "files"
        raise DataError(
            f"data.partition.clients asks for {count} clients, but there are {len(groups)} {what}; "
            f"set it to {len(groups)} or leave it out"
        )
    kept = sorted(groups, key=lambda name: (-len(groups[name]), name))[:count]
    return {name: groups[name] for name in sorted(kept)}


def _check_sizes(groups: dict[str, list[int]], settings: PartitionConfig) -> None:
    small = [name for name, numbers in groups.items() if len(numbers) < settings.min_rows]
    if not small:
        return
    enough = len(groups) - len(small)
    keep = f", set data.partition.clients = {enough} to keep only the larger ones" if enough else ""
    raise DataError(
        f"client {small[0]!r} has {len(groups[small[0]])} rows, fewer than "
        f"data.partition.min_rows = {settings.min_rows} ({len(small)} of {len(groups)} clients are "
        f"that small); lower min_rows{keep}, or choose another data.partition"
    )


def _draw(numbers: list[int], limit: int | None, seed: int, client: str) -> list[int]:
    if limit is None or len(numbers) <= limit:
        return numbers
    # named by the client, so that its draw does not change when other clients come or go
    chosen = generator(seed, "max rows", client).choice(len(numbers), size=limit, replace=False)
    return [numbers[position] for position in sorted(chosen)]
