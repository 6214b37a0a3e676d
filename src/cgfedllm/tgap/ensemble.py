"""The temporal ensemble: which recorded updates a codec learns from, and which it never sees.

::

                     rounds --> earlier          | latest (validation_rounds)
    clients                                      |
    most                        train            | unseen_rounds
    ---------------------------------------------+----------------------------
    some (validation_clients)   unseen_clients   | unseen_both

`unseen_rounds` and `unseen_clients` say when to stop; `unseen_both` has no part even in that. A
sample is one recorded update (the change over a round's local steps), or the sum of one client's
updates over `span` rounds in a row, all of them on one side of the line.

After Wu et al., arXiv 2405.13746, section 3 (TGAP), which pools the updates over clients and time
and says neither how they are sampled nor what is held out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from cgfedllm.adapter import AdapterUpdate, Float32Array
from cgfedllm.codecs import Start
from cgfedllm.config import Config
from cgfedllm.errors import ConfigError, RecordingError
from cgfedllm.seeding import generator
from cgfedllm.tgap.index import RecordedUpdate
from cgfedllm.tgap.recording import Recording
from cgfedllm.tgap.spec_difference import first_difference
from cgfedllm.tgap.starts import starts_of

Sampling = Literal["uniform", "rounds", "clients"]
CACHE_BYTES = 256 * 2**20
"""Most memory for updates kept in case they are asked for again."""


@dataclass(frozen=True)
class EnsembleSettings:
    """What is sampled and what is held out; table ``[tgap]`` of the configuration says more.

    Parameters
    ----------
    sampling : str
        What has equal weight in a pass: every update ("uniform"), every round and in it every
        client ("rounds"), or every client and of it every round ("clients").
    stride : int
        Train on every so-many-th round of the earlier ones only.
    span : int
        Rounds a sample sums up.
    validation_rounds, validation_clients : float
        Shares held out; of rounds above 0, of clients 0 or above.
    seed : int
        Of the draw of clients, and of what is repeated where a pass is balanced.
    """

    sampling: Sampling = "uniform"
    stride: int = 1
    span: int = 1
    validation_rounds: float = 0.25
    validation_clients: float = 0.2
    seed: int = 0

    @classmethod
    def of(cls, config: Config) -> EnsembleSettings:
        """As a configuration says."""
        tgap = config.tgap
        return cls(
            sampling=tgap.sampling,
            stride=tgap.stride,
            span=tgap.span,
            validation_rounds=tgap.validation_rounds,
            validation_clients=tgap.validation_clients,
            seed=config.seed if tgap.seed is None else tgap.seed,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Sample:
    """One update of the ensemble.

    Parameters
    ----------
    recording : int
        Which of the recordings.
    entries : tuple of RecordedUpdate
        One client's updates over rounds in a row; the sample is their sum.
    """

    recording: int
    entries: tuple[RecordedUpdate, ...]

    @property
    def client(self) -> str:
        """Whose it is."""
        return self.entries[0].client

    @property
    def rounds(self) -> tuple[int, ...]:
        """Rounds it spans, ascending."""
        return tuple(entry.round for entry in self.entries)


class Ensemble:
    """Samples as `cgfedllm.codecs.learning.Updates`, read from the recordings when asked for.

    What is returned may be returned again: it is not to be changed in place.

    Parameters
    ----------
    reader : Reader
        Of the recordings; several ensembles share one.
    samples : sequence of Sample
        One pass: a sample that counts more is in it more than once.
    """

    def __init__(self, reader: Reader, samples: Sequence[Sample]) -> None:
        self._reader = reader
        self.samples = tuple(samples)
        self.spec = reader.spec

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int, /) -> AdapterUpdate:
        return self._reader.read(self.samples[index])

    def __iter__(self) -> Iterator[AdapterUpdate]:
        return (self._reader.read(sample) for sample in self.samples)

    def __add__(self, other: Ensemble) -> Ensemble:
        return Ensemble(self._reader, self.samples + other.samples)

    def previous(self, index: int) -> Float32Array | None:
        """The aggregate of the round before, which both ends of a federation hold; else None."""
        return self._reader.previous(self.samples[index])

    def start(self, index: int, /) -> Start | None:
        """Where a sample started from, if that follows from its recording."""
        return self._reader.start(self.samples[index])

    def distinct(self) -> int:
        """Number of different samples."""
        return len(set(self.samples))

    def clients(self) -> list[str]:
        """Clients with samples, by name."""
        return sorted({sample.client for sample in self.samples})

    def rounds(self) -> list[list[int]]:
        """Rounds with samples, ascending, of each recording."""
        found: list[set[int]] = [set() for _ in self._reader.recordings]
        for sample in self.samples:
            found[sample.recording] |= set(sample.rounds)
        return [sorted(rounds) for rounds in found]


@dataclass(frozen=True)
class Pools:
    """What a fit learns from, what it is judged by, and what is left for the last word.

    Parameters
    ----------
    train : Ensemble
        Earlier rounds of most clients.
    unseen_rounds : Ensemble
        Later rounds of the same clients.
    unseen_clients : Ensemble or None
        The earlier rounds of the other clients; None where no clients are held out.
    unseen_both : Ensemble or None
        The other clients in the later rounds: nothing was chosen by them.
    notes : tuple of str
        What a reader of results should know, one sentence each.
    """

    train: Ensemble
    unseen_rounds: Ensemble
    unseen_clients: Ensemble | None = None
    unseen_both: Ensemble | None = None
    notes: tuple[str, ...] = ()

    @property
    def validation(self) -> Ensemble:
        """What early stopping looks at: unseen rounds and unseen clients."""
        if self.unseen_clients is None:
            return self.unseen_rounds
        return self.unseen_rounds + self.unseen_clients

    def named(self) -> dict[str, Ensemble]:
        """The pools there are, by name."""
        every = {
            "train": self.train,
            "unseen_rounds": self.unseen_rounds,
            "unseen_clients": self.unseen_clients,
            "unseen_both": self.unseen_both,
        }
        return {name: pool for name, pool in every.items() if pool is not None}

    def describe(self) -> dict[str, dict[str, Any]]:
        """Which updates are in which pool: plain types, ready for JSON."""
        return {
            name: {
                "updates": pool.distinct(),
                "samples_in_a_pass": len(pool),
                "rounds": pool.rounds(),
                "clients": pool.clients(),
            }
            for name, pool in self.named().items()
        }


def draw_pools(
    recordings: Sequence[Recording], settings: EnsembleSettings, *, cache_bytes: int = CACHE_BYTES
) -> Pools:
    """Divide recorded updates by round and by client.

    A client is held out of every recording or of none. The later rounds are counted in each
    recording apart.

    Parameters
    ----------
    recordings : sequence of Recording
        Of one adapter; none twice.
    settings : EnsembleSettings
        Sampling and shares.
    cache_bytes : int
        Most memory for updates that were read.

    Raises
    ------
    RecordingError
        If there are none, they are of different adapters, one is there twice, or one is too short
        to be split.
    ConfigError
        If `settings` ask for what these recordings cannot give.
    """
    _check(recordings, settings)
    reader = Reader(recordings, cache_bytes)
    later = [_later(recording, settings) for recording in recordings]
    clients, notes = _held_out_clients(recordings, settings)
    pools: dict[tuple[bool, bool], list[Sample]] = {}
    for number, recording in enumerate(recordings):
        for is_later in (False, True):
            rounds = [r for r in recording.rounds() if (r in later[number]) == is_later]
            trained = set(rounds[:: settings.stride])
            for sample in _windows(number, recording, rounds, settings.span):
                pool = is_later, sample.client in clients
                # a stride is there to train faster; judged is by all there is
                if any(pool) or sample.rounds[0] in trained:
                    pools.setdefault(pool, []).append(sample)
    for is_later, what in ((False, "train on"), (True, "validate by")):
        if not pools.get((is_later, False)):
            raise RecordingError(
                f"{_names(recordings)} cannot be split: no update is left to {what}. Record more "
                "rounds or clients, or lower tgap.validation_rounds, tgap.validation_clients or "
                "tgap.span"
            )
    train = _pass(pools[False, False], settings)
    if len(train) > len(pools[False, False]):
        notes.append(
            f"a pass has {len(train)} samples, some of the {len(pools[False, False])} updates "
            f"more than once (tgap.sampling = {settings.sampling})"
        )

    def judged(is_later: bool) -> Ensemble | None:
        found = pools.get((is_later, True))
        return Ensemble(reader, found) if found else None

    return Pools(
        train=Ensemble(reader, train),
        unseen_rounds=Ensemble(reader, pools[True, False]),
        unseen_clients=judged(False),
        unseen_both=judged(True),
        notes=tuple(notes),
    )


def check_length(rounds: int, settings: EnsembleSettings, what: str) -> int:
    """Number of rounds, of so many, that are held out.

    Raises
    ------
    RecordingError
        If a sample does not fit on both sides.
    """
    held_out = min(max(1, round(settings.validation_rounds * rounds)), rounds - 1)
    if min(held_out, rounds - held_out) < settings.span:
        raise RecordingError(
            f"{what} has {rounds} round{'s' * (rounds != 1)}, too few to split: "
            f"{max(rounds - held_out, 0)} to train on and {max(held_out, 0)} to validate by, where "
            f"each needs {settings.span} (tgap.span); record more rounds"
        )
    return held_out


class Reader:
    """Reads samples from recordings and keeps the latest ones, as many as fit.

    Parameters
    ----------
    recordings : sequence of Recording
        Of one adapter.
    cache_bytes : int
        Most memory for what is kept.
    """

    def __init__(self, recordings: Sequence[Recording], cache_bytes: int = CACHE_BYTES) -> None:
        self.recordings = tuple(recordings)
        self.spec = recordings[0].spec
        self._room = cache_bytes // (4 * self.spec.size)
        self._kept: OrderedDict[Sample, AdapterUpdate] = OrderedDict()
        self._aggregate: tuple[tuple[int, int], Float32Array] | None = None
        self._starts: dict[int, dict[int, Start]] = {}

    def read(self, sample: Sample) -> AdapterUpdate:
        """One sample.

        Raises
        ------
        RecordingError
            If a file is gone or damaged.
        """
        if sample in self._kept:
            self._kept.move_to_end(sample)
            return self._kept[sample]
        update = self._sum(sample)
        if self._room:
            self._kept[sample] = update
            if len(self._kept) > self._room:
                self._kept.popitem(last=False)
        return update

    def previous(self, sample: Sample) -> Float32Array | None:
        """Aggregate of the round before a federated update; None where there is none."""
        recording, before = self.recordings[sample.recording], sample.rounds[0] - 1
        if recording.kind != "federated" or before not in recording.rounds():
            return None
        key = (sample.recording, before)
        if self._aggregate is None or self._aggregate[0] != key:
            self._aggregate = key, recording.aggregate(before).vector
        return self._aggregate[1]

    def start(self, sample: Sample) -> Start | None:
        """The global adapter before the first of a sample's rounds; None where it is unknown."""
        number = sample.recording
        if number not in self._starts:
            recording = self.recordings[number]
            self._starts[number] = starts_of(recording, recording.rounds())
        return self._starts[number].get(sample.rounds[0])

    def _sum(self, sample: Sample) -> AdapterUpdate:
        recording = self.recordings[sample.recording]
        if len(sample.entries) == 1:
            return recording.update(sample.entries[0])
        total = np.zeros(self.spec.size, np.float64)
        for entry in sample.entries:
            total += recording.update(entry).vector
        return AdapterUpdate(self.spec, total.astype(np.float32))


def _check(recordings: Sequence[Recording], settings: EnsembleSettings) -> None:
    if not recordings:
        raise RecordingError("no recording is given; make one with `cgfedllm record`")
    paths = [recording.path.resolve() for recording in recordings]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise RecordingError(f"{twice} is given twice")
    for recording in recordings[1:]:
        different = first_difference(recordings[0].spec, recording.spec)
        if different is not None:
            raise RecordingError(
                f"{recording.path} is of another adapter than {recordings[0].path}: {different}"
            )
    federated = next((r for r in recordings if r.kind == "federated"), None)
    if settings.span > 1 and federated is not None:
        raise ConfigError(
            f"tgap.span = {settings.span} sums up updates of several rounds, but in the federated "
            f"recording {federated.path} a client starts each round from the common adapter, so "
            "its updates are no path of its own; set tgap.span = 1, or collect centralised or "
            "local-only"
        )


def _later(recording: Recording, settings: EnsembleSettings) -> set[int]:
    rounds = recording.rounds()
    held_out = check_length(len(rounds), settings, str(recording.path))
    return set(rounds[len(rounds) - held_out :])


def _held_out_clients(
    recordings: Sequence[Recording], settings: EnsembleSettings
) -> tuple[set[str], list[str]]:
    """Names of the clients that are held out, and why there are none."""
    clients = sorted({client for recording in recordings for client in recording.clients()})
    if not settings.validation_clients:
        return set(), ["no clients are held out (tgap.validation_clients = 0)"]
    if any(recording.kind == "centralised" for recording in recordings):
        return set(), [
            "no clients are held out: a centralised recording is of all clients' rows together"
        ]
    if len(clients) == 1:
        return set(), [f"no clients are held out: {clients[0]!r} is the only one"]
    count = min(max(1, round(settings.validation_clients * len(clients))), len(clients) - 1)
    order = generator(settings.seed, "tgap", "clients").permutation(len(clients))
    return {clients[position] for position in order[:count]}, []


def _windows(
    number: int, recording: Recording, rounds: Sequence[int], span: int
) -> Iterator[Sample]:
    """Samples that lie in these rounds wholly, by first round, then by client."""
    wanted = set(rounds)
    inside = {(e.round, e.client): e for e in recording.entries if e.round in wanted}
    for start in rounds:
        for client in sorted(client for r, client in inside if r == start):
            entries = [inside.get((start + ahead, client)) for ahead in range(span)]
            found = tuple(entry for entry in entries if entry is not None)
            if len(found) == span:
                yield Sample(number, found)


def _pass(samples: Sequence[Sample], settings: EnsembleSettings) -> list[Sample]:
    """One pass in which every group has equal weight, and within it every member, or nearly.

    Groups are filled up to the size of the largest; whose turn it is to be repeated is drawn.
    """
    if settings.sampling == "uniform":
        return list(samples)
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        of_round = f"{sample.recording}:{sample.rounds[0]}"
        key = of_round if settings.sampling == "rounds" else sample.client
        groups.setdefault(key, []).append(sample)
    size = max(map(len, groups.values()))
    balanced: list[Sample] = []
    for key, members in groups.items():
        whole, rest = divmod(size, len(members))
        rng = generator(settings.seed, "tgap", settings.sampling, key)
        drawn = rng.permutation(len(members))[:rest]
        balanced += members * whole + [members[position] for position in sorted(drawn)]
    return balanced


def _names(recordings: Sequence[Recording]) -> str:
    return ", ".join(str(recording.path) for recording in recordings)
