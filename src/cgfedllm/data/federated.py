"""From the configuration to every client's rows: the one call the rest of the program makes.

::

    sources --> blank rows out --> partition --> splits --> D1 or D2 --> ClientData x N + held-out
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from cgfedllm.config import DEMO_DATA, NODE_DATA, DataConfig
from cgfedllm.data.formats import parse_row
from cgfedllm.data.partition import partition_rows
from cgfedllm.data.rows import Row, SourceFile
from cgfedllm.data.sources import load_sources
from cgfedllm.data.splits import Parts, content_key, divide_training, draw_order, split_rows
from cgfedllm.errors import DataError


@dataclass(frozen=True)
class ClientData:
    """One client's rows.

    Parameters
    ----------
    name : str
        Safe as a file name, unique in the federation.
    train, validation, test : list of Row
        Rows as they were read; no row is in two of them.
    """

    name: str
    train: list[Row]
    validation: list[Row]
    test: list[Row]


class ClientSizes(NamedTuple):
    """One line of the table of clients."""

    client: str
    train: int
    validation: int
    test: int


@dataclass(frozen=True)
class FederatedData:
    """All clients' rows, and the held-out rows nobody trains on.

    Parameters
    ----------
    clients : tuple of ClientData
        Sorted by name.
    heldout : list of Row
        Distinct rows that are in no part of any client.
    notes : tuple of str
        What happened on the way that a reader of results should know, one sentence each.
    """

    clients: tuple[ClientData, ...]
    heldout: list[Row]
    notes: tuple[str, ...]

    def describe(self) -> list[ClientSizes]:
        """Numbers of rows, a line a client."""
        return [
            ClientSizes(c.name, len(c.train), len(c.validation), len(c.test)) for c in self.clients
        ]


def load_federated_data(config: DataConfig, seed: int) -> FederatedData:
    """Read, clean, partition and split the data of a run.

    With the source "node" there are no clients here: each node loads its own (`load_own_data`).

    Parameters
    ----------
    config : DataConfig
        Where rows come from and who gets them.
    seed : int
        Seed of the run, unless the configuration has one for the data; equal seeds and files give
        equal data.

    Raises
    ------
    DataError
        If the source cannot be read, rows do not have the columns of the format, the partition
        cannot be made, or a client is left without a training row (of D1 or D2, if one of them is
        asked for).
    """
    if config.heldout_source in (DEMO_DATA, NODE_DATA):
        raise DataError(f"data.heldout_source cannot be {config.heldout_source!r}; leave it out")
    seed = seed if config.seed is None else config.seed
    notes: list[str] = []
    if config.source == NODE_DATA:
        heldout, _ = _external_heldout(config, seed, notes)
        return FederatedData((), heldout or [], tuple(notes))
    rows, files, keys = _usable(load_sources(config), config, notes)
    heldout, reserved = _external_heldout(config, seed, notes)
    return _divided(rows, files, keys, config, seed, heldout, reserved, notes)


def load_own_data(config: DataConfig, seed: int, source: str, name: str) -> FederatedData:
    """Read, clean and split the rows of one client, as `load_federated_data` would among others.

    Nothing is held out globally: those rows the server never sees, so they may as well train.

    Parameters
    ----------
    config : DataConfig
        The run's, with the source "node".
    seed : int
        As for `load_federated_data`.
    source : str
        This client's file, glob, folder or hub id.
    name : str
        This client's name; made safe as a file name.

    Raises
    ------
    DataError
        As `load_federated_data`.
    """
    tree = config.model_dump() | {"source": source, "heldout_source": None}
    tree["splits"]["heldout"] = 0.0
    tree["partition"] = {"kind": "files", "min_rows": config.partition.min_rows}
    own = DataConfig.model_validate(tree)
    seed = seed if config.seed is None else config.seed
    notes: list[str] = []
    rows, _, keys = _usable(load_sources(own), own, notes)
    return _divided(rows, [name] * len(rows), keys, own, seed, None, None, notes)


def _divided(
    rows: Sequence[Row],
    files: Sequence[str],
    keys: Sequence[bytes],
    config: DataConfig,
    seed: int,
    heldout: list[Row] | None,
    reserved: frozenset[bytes] | None,
    notes: list[str],
) -> FederatedData:
    """Who gets which rows, and what for."""
    partition = partition_rows(rows, files, config, seed)
    if partition.clients_left_out:
        notes.append(
            f"{partition.clients_left_out} smaller clients left out (data.partition.clients)"
        )
    if partition.rows_left_out:
        notes.append(f"{partition.rows_left_out} rows left out by those limits")
    split = split_rows(partition.clients, keys, config.splits, seed, reserved=reserved)
    if split.copies:
        notes.append(f"{split.copies} rows dropped: copies of rows kept for evaluation")
    if split.reserved:
        notes.append(f"{split.reserved} rows dropped: they are in data.heldout_source")
    empty = [name for name, parts in split.clients.items() if not parts.train]
    if empty:
        raise DataError(
            f"client {empty[0]!r} has no training rows left of "
            f"{len(partition.clients[empty[0]])}: the others are kept for evaluation somewhere or "
            "are copies of such rows; give it more distinct rows or lower data.splits"
        )
    parted = split.clients
    if config.part != "all":
        parted = _part_of_training(parted, keys, config, seed, notes)
    clients = tuple(
        ClientData(
            name,
            train=[rows[number] for number in parts.train],
            validation=[rows[number] for number in parts.validation],
            test=[rows[number] for number in parts.test],
        )
        for name, parts in parted.items()
    )
    if heldout is None:
        heldout = [rows[number] for number in split.heldout]
    return FederatedData(clients, heldout, tuple(notes))


def _part_of_training(
    clients: Mapping[str, Parts],
    keys: Sequence[bytes],
    config: DataConfig,
    seed: int,
    notes: list[str],
) -> dict[str, Parts]:
    """The clients with only the training rows that `config.part` names; all else as it was."""
    divided = divide_training(
        {name: parts.train for name, parts in clients.items()}, keys, config.d1_share, seed
    )
    for name, (d1, d2) in divided.items():
        if not d1 or not d2:
            raise DataError(
                f"client {name!r} has no row for {'d2' if d1 else 'd1'}: its "
                f"{len(clients[name].train)} training rows are too few distinct ones, or other "
                "clients hold copies of them in d1. Give it more rows, leave it out "
                "(data.partition.min_rows, data.partition.clients), or set data.part = 'all'"
            )
    chosen = {
        name: replace(clients[name], train=d1 if config.part == "d1" else d2)
        for name, (d1, d2) in divided.items()
    }
    used = sum(len(parts.train) for parts in chosen.values())
    notes.append(
        f"{used} of {sum(len(parts.train) for parts in clients.values())} training rows used: "
        f"data.part = {config.part}, data.d1_share = {config.d1_share:g}"
    )
    return chosen


def _usable(
    files: Sequence[SourceFile], config: DataConfig, notes: list[str]
) -> tuple[list[Row], list[str], list[bytes]]:
    """Rows that say something, the stem of each one's file, and its content key."""
    rows, stems, keys = [], [], []
    for file in files:
        for number, row in enumerate(file.rows, start=1):
            try:
                content = parse_row(row, config)
            except DataError as error:
                raise DataError(f"{file.name}, row {number}: {error}") from None
            if content is not None:
                rows.append(row)
                stems.append(file.stem)
                keys.append(content_key(content))
    blank = sum(len(file.rows) for file in files) - len(rows)
    if blank:
        notes.append(f"{blank} rows dropped: prompt, answer or text is blank")
    if not rows:
        raise DataError(f"every row of {files[0].name} is blank; check data.columns")
    return rows, stems, keys


def _external_heldout(
    config: DataConfig, seed: int, notes: list[str]
) -> tuple[list[Row] | None, frozenset[bytes] | None]:
    """Rows of `heldout_source` within the limit, and the keys of all of them."""
    if config.heldout_source is None:
        return None, None
    files = load_sources(config, source=config.heldout_source, split=config.heldout_split)
    rows, _, keys = _usable(files, config, notes)
    distinct = list({key: number for number, key in reversed(list(enumerate(keys)))}.values())
    distinct.sort()
    limit = config.splits.max_heldout_rows or len(distinct)
    order = draw_order([keys[number] for number in distinct], seed)[:limit]
    if len(order) < len(rows):
        notes.append(
            f"{len(order)} of {len(rows)} rows of data.heldout_source used "
            "(distinct ones, up to data.splits.max_heldout_rows)"
        )
    return [rows[distinct[position]] for position in sorted(order)], frozenset(keys)
