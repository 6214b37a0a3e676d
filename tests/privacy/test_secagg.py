"""Sums come out exactly, whoever falls out where, and nothing else; clients refuse the rest."""

from __future__ import annotations

import json
import secrets
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from cgfedllm.codecs.parts.bitpack import pack, packed_size, unpack
from cgfedllm.errors import SecureAggregationError
from cgfedllm.privacy.secagg.collector import Collector
from cgfedllm.privacy.secagg.member import FILE, SEALED_BYTES, Member
from cgfedllm.privacy.secagg.opened import OpenedRounds
from cgfedllm.privacy.secagg.primitives import (
    KEY_BYTES,
    agree,
    combine,
    mask,
    new_secret,
    public_key,
    seal,
    split,
    unseal,
)  # fmt: skip
from cgfedllm.privacy.secagg.rules import Roster, from_ring, threshold_of, to_ring, width_of

REACH = 127


class Round:
    """One session of some clients, as a server would run it; who is named falls out there."""

    def __init__(self, folder: Path, clients: int, *, count: int = 40, round: int = 1) -> None:
        self.names = [f"client-{number:02d}" for number in range(clients)]
        self.members = {name: Member(folder / name, name) for name in self.names}
        rng = np.random.default_rng(clients)
        self.levels = {
            name: rng.integers(-REACH, REACH + 1, count).astype(np.int32) for name in self.names
        }
        self.session = secrets.token_bytes(16)
        self.count = count
        self.round = round
        self.sent: dict[str, bytes] = {}

    def advertise(
        self, out: Iterable[int] = (), *, wanted: int | None = None, least: int = 1
    ) -> Collector:
        keys = {name: self.members[name].advertise(self.session, self.round) for name in self.names}
        kept = {name: key for name, key in keys.items() if self.names.index(name) not in out}
        self.collector = Collector(
            self.session,
            kept,
            threshold=lambda n: threshold_of(n, wanted=wanted, least=least),
            count=self.count,
            reach=REACH,
        )
        return self.collector

    def share(self, out: Iterable[int] = ()) -> None:
        for name in self.collector.roster.names:
            if self.names.index(name) not in out:
                shared = self.members[name].share(
                    self.session, self.collector.roster, self.collector.threshold
                )
                self.collector.share(name, shared)
        self.collector.close_sharing()

    def mask(self, out: Iterable[int] = ()) -> list[str]:
        for place in self.collector.present:
            name = self.collector.roster.names[place]
            self.sent[name] = self.members[name].mask(
                self.session,
                self.collector.present,
                self.collector.sealed_for(name),
                self.levels[name],
                REACH,
            )
            if self.names.index(name) not in out:
                self.collector.add(name, self.sent[name])
        return self.collector.close_sum()

    def unmask(self, out: Iterable[int] = ()) -> np.ndarray:
        answers = {}
        for place in self.collector.survivors:
            name = self.collector.roster.names[place]
            if self.names.index(name) not in out:
                answers[name] = self.members[name].unmask(self.session, self.collector.survivors)
        self.answers = answers
        return self.collector.open(answers)

    def plain(self, names: Iterable[str]) -> np.ndarray:
        return sum(self.levels[name].astype(np.int64) for name in names)


# ---- the sum ------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(st.data())
def test_the_sum_is_exact_whoever_falls_out_where(data: st.DataObject) -> None:
    clients = data.draw(st.integers(2, 7), "clients")
    threshold = data.draw(st.integers(max(2, clients // 2 + 1), clients), "threshold")
    may_go = st.lists(st.integers(0, clients - 1), unique=True, max_size=clients - threshold)
    gone = data.draw(may_go, "gone")
    phase = {client: data.draw(st.integers(0, 3), f"phase of {client}") for client in gone}
    by_phase = [[client for client in gone if phase[client] == at] for at in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        one = Round(Path(folder), clients)
        one.advertise(by_phase[0], wanted=threshold)
        one.share(by_phase[1])
        survivors = one.mask(by_phase[2])
        total = one.unmask(by_phase[3])
    assert survivors == [name for at, name in enumerate(one.names) if phase.get(at, 3) == 3]
    np.testing.assert_array_equal(total, one.plain(survivors))


@pytest.mark.parametrize("phase", range(4))
def test_too_few_at_any_phase_is_an_error_and_opens_nothing(tmp_path: Path, phase: int) -> None:
    out: list[list[int]] = [[], [], [], []]
    out[phase] = [0, 3]
    one = Round(tmp_path, 5)

    def whole() -> None:
        # four of five must see it through
        one.advertise(out[0], wanted=4)
        one.share(out[1])
        one.mask(out[2])
        one.unmask(out[3])

    with pytest.raises(SecureAggregationError, match=r"[43] clients|3 of 5 clients"):
        whole()


def test_extremes_do_not_wrap(tmp_path: Path) -> None:
    one = Round(tmp_path, 4)
    for sign in (-1, 1):
        one.session = secrets.token_bytes(16)
        one.round += 1
        for name in one.names:
            one.levels[name][:] = sign * REACH
        one.advertise()
        one.share()
        one.mask()
        np.testing.assert_array_equal(one.unmask(), np.full(one.count, 4 * sign * REACH))


def test_no_numbers_at_all(tmp_path: Path) -> None:
    one = Round(tmp_path, 3, count=0)
    one.advertise()
    one.share()
    one.mask()
    assert one.unmask().size == 0


# ---- what the server gets -----------------------------------------------------------------------


def test_what_a_client_sends_is_uniform_whatever_it_hides(tmp_path: Path) -> None:
    one = Round(tmp_path, 3, count=60_000)
    for name in one.names:
        one.levels[name][:] = 5  # as far from uniform as it gets
    one.advertise()
    one.share()
    one.mask()
    width = width_of(3, REACH)
    for name in one.names:
        numbers = unpack(np.frombuffer(one.sent[name], np.uint8), one.count, width)
        assert not np.array_equal(numbers, to_ring(one.levels[name], width))
        counts = np.bincount(numbers, minlength=1 << width)
        assert chisquare(counts).pvalue > 1e-4
        # nor does one number tell of the next
        pairs = (numbers[::2] >> (width - 4)) * 16 + (numbers[1::2] >> (width - 4))
        assert chisquare(np.bincount(pairs, minlength=256)).pvalue > 1e-4


def test_two_updates_give_messages_that_cannot_be_told_apart(tmp_path: Path) -> None:
    """All the server holds of one client, before and after unmasking, but for the sum."""
    width = width_of(3, REACH)
    differences = []
    for value in (REACH, -REACH):
        one = Round(tmp_path / str(value), 3, count=20_000)
        one.levels[one.names[0]][:] = value
        one.levels[one.names[1]][:] = -value  # so that the sum is the same
        one.levels[one.names[2]][:] = 0
        one.advertise()
        one.share()
        one.mask()
        assert not one.unmask().any()
        # the server now knows every self mask; the pairwise ones still hide each client
        numbers = unpack(np.frombuffer(one.sent[one.names[0]], np.uint8), one.count, width)
        differences.append(float(from_ring(numbers, width).mean()))
        bare = numbers - mask(opened(one, 0), one.session, one.count, width)
        counts = np.bincount(bare & np.uint32((1 << width) - 1), minlength=1 << width)
        assert chisquare(counts).pvalue > 1e-4
    spread = (1 << width) / np.sqrt(12 * 20_000)
    assert abs(differences[0] - differences[1]) < 5 * spread


def opened(one: Round, place: int) -> bytes:
    """A client's seed or masking key, as the server works it out of what it is answered."""
    part = slice(place * KEY_BYTES, (place + 1) * KEY_BYTES)
    helpers = list(one.answers)[: one.collector.threshold]
    return combine({one.names.index(name): one.answers[name][part] for name in helpers})


def test_a_late_message_of_one_who_fell_out_stays_hidden(tmp_path: Path) -> None:
    """The server removes its pairwise masks from the sum; its own mask still hides it."""
    one = Round(tmp_path, 4, count=20_000)
    one.levels[one.names[1]][:] = 3
    one.advertise()
    one.share()
    one.mask(out=[1])
    one.unmask()
    with pytest.raises(SecureAggregationError, match="not waited for"):
        one.collector.add(one.names[0], one.sent[one.names[0]])
    with pytest.raises(SecureAggregationError, match="'somebody' is not one of"):
        one.collector.add("somebody", one.sent[one.names[1]])
    width, roster, key = width_of(4, REACH), one.collector.roster, opened(one, 1)
    numbers = unpack(np.frombuffer(one.sent[one.names[1]], np.uint8), one.count, width)
    for peer in (0, 2, 3):
        agreed = agree(key, roster.masking_key(peer), one.session, "mask")
        stream = mask(agreed, one.session, one.count, width)
        numbers = numbers - stream if peer > 1 else numbers + stream
    bare = numbers & np.uint32((1 << width) - 1)
    assert chisquare(np.bincount(bare, minlength=1 << width)).pvalue > 1e-4
    # no survivor has a share of its seed to give any more
    for name in (one.names[0], one.names[2], one.names[3]):
        with pytest.raises(SecureAggregationError, match="no session"):
            one.members[name].unmask(one.session, [0, 1, 2, 3])


def test_a_second_session_has_masks_of_its_own(tmp_path: Path) -> None:
    sent = []
    for _ in range(2):
        one = Round(tmp_path, 3)
        one.advertise()
        one.share()
        one.mask()
        sent.append(one.sent[one.names[0]])
    assert sent[0] != sent[1]


# ---- what clients refuse ------------------------------------------------------------------------


def test_each_phase_is_done_once_and_in_order(tmp_path: Path) -> None:
    one = Round(tmp_path, 3)
    first = one.members[one.names[0]]
    collector = one.advertise()
    with pytest.raises(SecureAggregationError, match="done once"):
        first.unmask(one.session, [0, 1, 2])
    one.share()
    with pytest.raises(SecureAggregationError, match="done once"):
        first.share(one.session, collector.roster, collector.threshold)
    with pytest.raises(SecureAggregationError, match="done once"):
        first.ready(secrets.token_bytes(16))  # another session
    one.mask()
    with pytest.raises(SecureAggregationError, match="done once"):
        # two updates under the same masks would give their difference away
        first.mask(
            one.session, [0, 1, 2], collector.sealed_for(one.names[0]), one.levels[one.names[0]],
            REACH,
        )  # fmt: skip
    first.unmask(one.session, [0, 1, 2])
    # never both kinds of share of one client, so never a second answer
    with pytest.raises(SecureAggregationError, match="no session"):
        first.unmask(one.session, [0, 1])


def test_a_roster_is_looked_at(tmp_path: Path) -> None:
    one = Round(tmp_path, 3)
    roster = one.advertise().roster
    member = one.members[one.names[0]]
    names, keys = list(roster.names), list(roster.keys)
    with pytest.raises(SecureAggregationError, match="more than once"):
        Roster.of(names, keys[0] + keys[1] + keys[1])
    with pytest.raises(SecureAggregationError, match="more than once"):
        Roster.of(names, keys[0] + keys[1] + keys[2][:KEY_BYTES] + keys[0][:KEY_BYTES])
    with pytest.raises(SecureAggregationError, match="repeat"):
        Roster.of([names[0], names[0], names[2]], b"".join(keys))
    with pytest.raises(SecureAggregationError, match="bytes of keys"):
        Roster.of(names, keys[0])
    with pytest.raises(SecureAggregationError, match="other keys"):
        member.share(one.session, Roster.of(names, keys[1] + keys[0] + keys[2]), 2)
    with pytest.raises(SecureAggregationError, match="'client-00' is not one of"):
        member.share(one.session, Roster.of(names[1:], keys[1] + keys[2]), 2)
    weak = Roster.of(names, keys[0] + bytes(KEY_BYTES) + keys[1][KEY_BYTES:] + keys[2])
    with pytest.raises(SecureAggregationError, match="cannot be used"):
        member.share(one.session, weak, 2)


def test_too_few_peers_or_damaged_shares_are_refused(tmp_path: Path) -> None:
    one = Round(tmp_path, 4)
    one.advertise(wanted=3)
    one.share()
    member, levels = one.members[one.names[0]], one.levels[one.names[0]]
    sealed = one.collector.sealed_for(one.names[0])
    with pytest.raises(SecureAggregationError, match="1 peers shared with this client; 2"):
        member.mask(one.session, [0, 1], sealed[:SEALED_BYTES], levels, REACH)
    with pytest.raises(SecureAggregationError, match="bytes of shares"):
        member.mask(one.session, [0, 1, 2, 3], sealed[:-1], levels, REACH)
    damaged = bytes([sealed[0] ^ 1]) + sealed[1:]
    with pytest.raises(SecureAggregationError, match="not what it sealed"):
        member.mask(one.session, [0, 1, 2, 3], damaged, levels, REACH)
    swapped = sealed[SEALED_BYTES:] + sealed[:SEALED_BYTES]  # in each other's place
    with pytest.raises(SecureAggregationError, match="not what it sealed"):
        member.mask(one.session, [0, 1, 2, 3], swapped, levels, REACH)
    with pytest.raises(SecureAggregationError, match="names others"):
        member.mask(one.session, [0, 1, 2, 9], sealed, levels, REACH)
    with pytest.raises(SecureAggregationError, match="larger than 127"):
        member.mask(one.session, [0, 1, 2, 3], sealed, levels + 300, REACH)


def test_only_sums_of_enough_clients_are_opened(tmp_path: Path) -> None:
    one = Round(tmp_path, 4)
    one.advertise(wanted=3)
    one.share()
    one.mask()
    member = one.members[one.names[0]]
    for survivors in ([0, 1], [0], [1, 2, 3], []):
        with pytest.raises(SecureAggregationError, match="is not opened; 3"):
            member.unmask(one.session, survivors)
    for survivors in ([0, 1, 2, 7], [0, 1, 1, 2], [2, 1, 0]):
        with pytest.raises(SecureAggregationError, match="names others, or some twice"):
            member.unmask(one.session, survivors)


def test_in_one_round_only_one_set_is_opened(tmp_path: Path) -> None:
    one = Round(tmp_path, 4, round=7)
    one.advertise(wanted=3)
    one.share()
    one.mask()
    one.unmask()

    def again(round: int, out: list[int]) -> np.ndarray:
        other = Round(tmp_path, 4, round=round)
        other.advertise(wanted=3)
        other.share()
        other.mask(out)
        return other.unmask()

    # a server that was killed repeats the round with the same clients, but not with others
    np.testing.assert_array_equal(again(7, []), one.plain(one.names))
    with pytest.raises(SecureAggregationError, match="round 7 was opened before for client-00"):
        again(7, [2])
    again(8, [2])


def test_a_client_that_lies_spoils_the_sum_and_is_noticed(tmp_path: Path) -> None:
    one = Round(tmp_path, 3, count=500)
    one.advertise()
    one.share()
    one.mask()
    answers = {name: one.members[name].unmask(one.session, [0, 1, 2]) for name in one.names}
    answers[one.names[0]] = bytes(len(answers[one.names[0]]))
    with pytest.raises(SecureAggregationError, match="did not keep to the protocol"):
        one.collector.open(answers)


def test_a_wrong_share_of_a_key_is_noticed(tmp_path: Path) -> None:
    one = Round(tmp_path, 4)
    one.advertise(wanted=3)
    one.share()
    one.mask(out=[3])
    answers = {name: one.members[name].unmask(one.session, [0, 1, 2]) for name in one.names[:3]}
    answers[one.names[0]] = answers[one.names[0]][: 3 * KEY_BYTES] + bytes(KEY_BYTES)
    with pytest.raises(SecureAggregationError, match=r"client-03.*do not fit its public key"):
        one.collector.open(answers)


# ---- what is kept -------------------------------------------------------------------------------


def test_secrets_are_their_owners_alone_and_gone_after_the_round(tmp_path: Path) -> None:
    one = Round(tmp_path, 3)
    path = tmp_path / one.names[0] / FILE

    def kept() -> dict[str, object]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        return json.loads(path.read_text())

    one.advertise()
    assert {"sealing", "masking"} <= kept().keys()
    one.share()
    assert "seed" in kept()
    one.mask()
    assert not {"sealing", "masking", "seed"} & kept().keys()
    one.unmask()
    assert not path.exists()
    assert OpenedRounds(tmp_path / one.names[0]).members(1) == one.names


def test_a_new_session_forgets_the_one_before(tmp_path: Path) -> None:
    one = Round(tmp_path, 3)
    one.advertise()
    one.share()
    Member(tmp_path / one.names[0], one.names[0]).advertise(secrets.token_bytes(16), 1)
    with pytest.raises(SecureAggregationError, match="done once"):
        one.mask()


@pytest.mark.parametrize("damage", ["", "{}", "[1]", '{"format": "cgfedllm-secagg-session"}'])
def test_a_damaged_session_is_none(tmp_path: Path, damage: str) -> None:
    (tmp_path / FILE).write_text(damage)
    with pytest.raises(SecureAggregationError, match="has to begin anew"):
        Member(tmp_path, "a").ready(bytes(16))


@pytest.mark.parametrize("damage", ["", "{}", "[1]", '{"format": "cgfedllm-secagg-rounds"}'])
def test_a_damaged_list_of_rounds_stops_everything(tmp_path: Path, damage: str) -> None:
    (tmp_path / "secagg-rounds.json").write_text(damage)
    with pytest.raises(SecureAggregationError, match="unknown"):
        OpenedRounds(tmp_path)


# ---- parts --------------------------------------------------------------------------------------


def test_thresholds() -> None:
    assert [threshold_of(n, wanted=None, least=1) for n in (2, 3, 4, 6, 10)] == [2, 2, 3, 4, 7]
    assert threshold_of(10, wanted=None, least=9) == 9
    assert threshold_of(10, wanted=6, least=1) == 6
    with pytest.raises(SecureAggregationError, match="1 clients for secure aggregation, 2"):
        threshold_of(1, wanted=None, least=1)
    with pytest.raises(SecureAggregationError, match="not more than half of 10"):
        threshold_of(10, wanted=5, least=1)


def test_the_ring_is_as_wide_as_the_sum_needs() -> None:
    assert width_of(3, 127) == 10
    assert width_of(2, 1) == 3
    for width, most in ((10, 3 * 127), (32, 2**31 - 1)):
        numbers = np.array([-most, -1, 0, 1, most], np.int32)
        np.testing.assert_array_equal(from_ring(to_ring(numbers, width), width), numbers)
    with pytest.raises(SecureAggregationError, match="33 bits"):
        width_of(2**17, 2**15 - 1)


@given(st.integers(1, 32), st.integers(0, 50))
def test_packing(width: int, count: int) -> None:
    values = np.random.default_rng(count).integers(0, 1 << width, count, dtype=np.uint32)
    packed = pack(values, width)
    assert len(packed) == packed_size(count, width)
    np.testing.assert_array_equal(unpack(np.frombuffer(packed, np.uint8), count, width), values)


def test_both_ends_agree_on_a_key_and_nobody_else() -> None:
    a, b, c = (new_secret() for _ in range(3))
    session = secrets.token_bytes(16)
    key = agree(a, public_key(b), session, "mask")
    assert key == agree(b, public_key(a), session, "mask")
    others = [
        agree(a, public_key(b), session, "seal"),
        agree(a, public_key(b), secrets.token_bytes(16), "mask"),
        agree(a, public_key(c), session, "mask"),
    ]
    assert key not in others
    assert unseal(key, seal(key, b"text", b"about"), b"about") == b"text"
    with pytest.raises(SecureAggregationError, match="not what it sealed"):
        unseal(key, seal(key, b"text", b"about"), b"other")


def test_masks_are_as_the_wire_format_says() -> None:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    session, count, width = bytes(range(16)), 50, 11
    a, b = X25519PrivateKey.generate(), X25519PrivateKey.generate()

    def derive(secret: bytes, info: bytes) -> bytes:
        return HKDF(SHA256(), 32, salt=session, info=b"cgfedllm secagg mask" + info).derive(secret)

    publics = sorted(key.public_key().public_bytes_raw() for key in (a, b))
    secret = derive(a.exchange(b.public_key()), publics[0] + publics[1])
    cipher = Cipher(algorithms.AES256(derive(secret, b"")), modes.CTR(bytes(16)))
    stream = cipher.encryptor().update(bytes(4 * count))
    wanted = [
        int.from_bytes(stream[at : at + 4], "little") % 2**width for at in range(0, 4 * count, 4)
    ]
    key = agree(b.private_bytes_raw(), a.public_key().public_bytes_raw(), session, "mask")
    assert mask(key, session, count, width).tolist() == wanted


@given(st.integers(2, 6), st.data())
@settings(max_examples=20)
def test_any_threshold_of_shares_gives_the_secret_and_fewer_do_not(
    count: int, data: st.DataObject
) -> None:
    threshold = data.draw(st.integers(2, count))
    secret = new_secret()
    shares = dict(enumerate(split(secret, threshold, count)))
    places = data.draw(st.permutations(range(count)))[:threshold]
    assert combine({place: shares[place] for place in places}) == secret
    assert combine({place: shares[place] for place in places[1:]}) != secret
