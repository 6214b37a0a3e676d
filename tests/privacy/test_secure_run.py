"""Whole runs in which the server sees sums only: the same outcome, whoever falls out when."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

import cgfedllm
from cgfedllm import api, events
from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.analysis.curves import curve_of
from cgfedllm.codecs import CodecContext, CodecState, make_codec
from cgfedllm.codecs.learned import Learned
from cgfedllm.codecs.learned.fitting import learn
from cgfedllm.codecs.packet import HEADER_SIZE, Packet
from cgfedllm.config import Config
from cgfedllm.errors import CodecError, ConfigError, FederationError, SecureAggregationError
from cgfedllm.federation import client_app, secure, secure_client
from cgfedllm.federation.messages import CONFIG
from cgfedllm.metrics import RoundRecord
from cgfedllm.peft_format import load_adapter
from cgfedllm.plan import make_plan
from cgfedllm.privacy.secagg.collector import traffic
from cgfedllm.privacy.secagg.member import Member
from cgfedllm.report.trackers import scalars
from cgfedllm.runs import RunFolder
from cgfedllm.tgap.codec_file import save_codec_file
from cgfedllm.workspace import Workspace

MakeConfig = Callable[..., Config]

FAST = (
    "federation.rounds=2", "training.local_steps=1", "evaluation.heldout=false",
    "evaluation.clients=false", "federation.weighting=uniform", "uplink.name=sketch",
    "uplink.options={bpp=8.5, bits=8, scale_exponent=-14}",
)  # fmt: skip
SECURE = (*FAST, "privacy.secagg.enabled=true")
CLIENTS = ["north", "south", "west"]


class Stop(Exception):
    pass


class FailAt:
    """Makes some clients fail in one of the three queries or in training, from then on or once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plan: list[tuple[str, str]] = []
        self.seen: list[tuple[str, str]] = []
        honest, train = secure_client.answer, client_app.masked

        def answer(action: str, content: Any, member: Member, config: Config) -> Any:
            self._fail(member._name, action)
            return honest(action, content, member, config)

        def masked(packet: bytes, request: Any, member: Member, *rest: Any) -> bytes:
            self._fail(member._name, "train")
            return train(packet, request, member, *rest)

        monkeypatch.setattr(client_app, "answer", answer)
        monkeypatch.setattr(client_app, "masked", masked)

    def _fail(self, name: str, phase: str) -> None:
        self.seen.append((name, phase))
        if (name, phase) in self.plan:
            self.plan.remove((name, phase))
            raise RuntimeError(f"{name} fell out")


@pytest.fixture
def fail_at(monkeypatch: pytest.MonkeyPatch) -> FailAt:
    return FailAt(monkeypatch)


def adapter(result: Any) -> np.ndarray:
    return load_adapter(result.adapter_dir).vector


@pytest.fixture(scope="module")
def outcomes() -> dict[str, np.ndarray]:
    return {}


@pytest.fixture
def in_the_clear(
    tiny_config: MakeConfig, outcomes: dict[str, np.ndarray]
) -> Callable[..., np.ndarray]:
    """The adapter of the same run without masks, made once."""

    def make(*settings: str) -> np.ndarray:
        key = " ".join(settings)
        if key not in outcomes:
            outcomes[key] = adapter(cgfedllm.run(tiny_config(*FAST, *settings, "name=clear")))
        return outcomes[key]

    return make


def test_the_outcome_is_that_of_the_same_run_in_the_clear(
    tiny_config: MakeConfig, in_the_clear: Callable[..., np.ndarray]
) -> None:
    told: list[events.Event] = []
    result = cgfedllm.run(tiny_config(*SECURE), listeners=[told.append])
    # sums of whole numbers are exact; what is left is one float32 rounding of adapter plus mean
    np.testing.assert_allclose(adapter(result), in_the_clear(), rtol=0, atol=1e-6)
    assert not any(isinstance(event, events.UpdateReceived) for event in told)
    notices = [event.text for event in told if isinstance(event, events.Notice)]
    assert any("sums of 2 to 3 updates and none alone" in text for text in notices)
    for record in result.records[1:]:
        assert [client.client for client in record.clients] == CLIENTS
        for client in record.clients:
            # of each alone: that it took part and how many rows it has
            assert (client.train_loss, client.tokens, client.update_norm) == (0, 0, 0)
            assert client.examples > 0
    for name in CLIENTS:
        folder = result.run_dir / "clients" / name
        assert not (folder / "secagg-session.json").exists()
        rounds = json.loads((folder / "secagg-rounds.json").read_text())["rounds"]
        assert rounds == {"1": CLIENTS, "2": CLIENTS}


def test_what_goes_over_the_wire_shows_nobody(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same client's packet of two runs, bit for bit alike but for the masks."""

    def packets(name: str) -> dict[str, bytes]:
        seen: dict[str, bytes] = {}
        take = secure.SecureStrategy._take

        def look(self: Any, server_round: int, reply: Message) -> bool:
            client = self._name(reply.metadata.src_node_id)
            seen[client] = reply.content.array_records["arrays"]["packet"].data
            assert set(reply.content.metric_records["metrics"]) == {
                "num-examples", "steps", "train-seconds", "encode-seconds", "decode-seconds",
            }  # fmt: skip
            return take(self, server_round, reply)

        with monkeypatch.context() as patch:
            patch.setattr(secure.SecureStrategy, "_take", look)
            cgfedllm.run(tiny_config(*SECURE, "federation.rounds=1", f"name={name}"))
        return seen

    first, again = packets("first"), packets("again")
    for name in CLIENTS:
        assert len(first[name]) == len(again[name])
        assert Packet.from_bytes(first[name]).codec == "masked"
        a, b = (np.frombuffer(run[name], np.uint8)[HEADER_SIZE + 16 :] for run in (first, again))
        # numbers within 127 of zero would have equal high bits nearly everywhere
        assert np.mean(a == b) == pytest.approx(1 / 256, abs=0.004)
        for bits in (np.unpackbits(a), np.unpackbits(b)):
            assert bits.mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("phase", ["advertise", "share", "train", "unmask"])
def test_a_client_that_falls_out_costs_its_own_share(
    tiny_config: MakeConfig, fail_at: FailAt, phase: str
) -> None:
    fail_at.plan = [("south", phase)]
    result = cgfedllm.run(tiny_config(*SECURE, "federation.rounds=1"))
    record = result.records[1]
    assert record.attempts == 1
    assert [(f.client, f.reason) for f in record.failures] == [
        ("south", "RuntimeError: south fell out")
    ]
    # who falls out after sending is in the sum all the same
    in_sum = CLIENTS if phase == "unmask" else ["north", "west"]
    assert [client.client for client in record.clients] == in_sum
    opened = json.loads((result.run_dir / "secagg-rounds.json").read_text())["rounds"]
    assert opened == {"1": in_sum}
    assert 0 < record.update_norm < 1


@pytest.mark.parametrize(
    "phase", ["advertise", pytest.param("share", marks=pytest.mark.slow), "train"]
)
def test_with_too_few_the_round_begins_anew_with_fresh_keys(
    tiny_config: MakeConfig,
    fail_at: FailAt,
    phase: str,
    in_the_clear: Callable[..., np.ndarray],
) -> None:
    fail_at.plan = [("south", phase), ("west", phase)]
    result = cgfedllm.run(tiny_config(*SECURE))
    record = result.records[1]
    assert (record.attempts, len(record.clients)) == (2, 3)
    reasons = {failure.client: failure.reason for failure in record.failures}
    assert "1 of" in reasons["secure aggregation"] or "1 clients" in reasons["secure aggregation"]
    assert fail_at.seen.count(("north", "advertise")) == 3  # two attempts, and round 2
    np.testing.assert_allclose(adapter(result), in_the_clear(), rtol=0, atol=1e-6)


def test_a_sum_that_could_not_be_opened_is_made_again_of_the_same_clients(
    tiny_config: MakeConfig, fail_at: FailAt
) -> None:
    fail_at.plan = [("north", "train"), ("south", "unmask")]
    result = cgfedllm.run(tiny_config(*SECURE, "federation.rounds=1"))
    record = result.records[1]
    assert record.attempts == 2
    # north is back, and may not come in: the two sums would differ by its update
    assert [client.client for client in record.clients] == ["south", "west"]


def test_too_few_again_and_again_stop_the_run_which_can_be_resumed(
    tiny_config: MakeConfig, fail_at: FailAt, in_the_clear: Callable[..., np.ndarray]
) -> None:
    fail_at.plan = 3 * [("south", "share"), ("west", "share")]
    config = tiny_config(*SECURE)
    with pytest.raises(FederationError, match=r"1 of 3 clients shared their keys; 2 are needed"):
        cgfedllm.run(config)
    result = cgfedllm.resume(config.run_dir)
    np.testing.assert_allclose(adapter(result), in_the_clear(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("action", ["advertise", "share", "unmask"])
@pytest.mark.parametrize("before", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_server_that_is_killed_between_phases_ends_at_the_same_adapter(
    tiny_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    in_the_clear: Callable[..., np.ndarray],
    action: str,
    before: bool,
) -> None:
    config = tiny_config(*SECURE)
    ask = secure.SecureStrategy._ask

    def killed(self: Any, now: str, *rest: Any) -> dict[str, bytes]:
        second = json.loads(
            (config.run_dir / "metrics.jsonl").read_text().splitlines()[-1]
        )["round"]  # fmt: skip
        if now == action and second == 1 and before:
            raise Stop
        answers = ask(self, now, *rest)
        if now == action and second == 1:
            raise Stop
        return answers

    with monkeypatch.context() as patch:
        patch.setattr(secure.SecureStrategy, "_ask", killed)
        with pytest.raises(Stop):
            cgfedllm.run(config)
    result = cgfedllm.resume(config.run_dir)
    np.testing.assert_allclose(adapter(result), in_the_clear(), rtol=0, atol=1e-6)


def test_a_killed_run_goes_on_with_the_same_clients_or_not_at_all(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, fail_at: FailAt
) -> None:
    config = tiny_config(*SECURE)

    def stop(event: events.Event) -> None:
        if isinstance(event, events.RoundAggregated) and event.round == 1:
            raise Stop

    fail_at.plan = [("north", "train")]
    with pytest.raises(Stop):
        cgfedllm.run(config, listeners=[stop])
    fail_at.plan = [("west", "advertise")] * 3
    with pytest.raises(FederationError, match="secure aggregation"):
        cgfedllm.resume(config.run_dir)
    # a server that lost its note asks all three, and the clients refuse
    (config.run_dir / "secagg-rounds.json").unlink()
    with pytest.raises(FederationError, match="opened before for south, west"):
        cgfedllm.resume(config.run_dir)
    (config.run_dir / "secagg-rounds.json").unlink()
    fail_at.plan = [("north", "train")]
    result = cgfedllm.resume(config.run_dir)
    assert [client.client for client in result.records[1].clients] == ["south", "west"]
    assert len(result.records[2].clients) == 3


def test_a_client_sends_nothing_in_the_clear(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    agreed = secure.SecureStrategy._agreed

    def forget(self: Any, server_round: int, messages: list[Message]) -> list[Message]:
        messages = agreed(self, server_round, messages)
        for message in messages:
            del message.content.config_records[CONFIG]["secagg-session"]
        return messages

    monkeypatch.setattr(secure.SecureStrategy, "_agreed", forget)
    with pytest.raises(FederationError, match="lacks secagg-session"):
        cgfedllm.run(tiny_config(*SECURE))


def curve_total(record: RoundRecord) -> int:
    (point,) = curve_of([replace(record, heldout_nll=1.0)])
    return point.total


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        pytest.param(lambda packet: packet[:-1], "truncated", marks=pytest.mark.slow),
        (lambda packet: packet[:80] + b"?" + packet[81:], "checksum"),
        pytest.param(lambda packet: b"", "too short", marks=pytest.mark.slow),
    ],
)
def test_a_packet_that_is_damaged_costs_its_own_share(
    tiny_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[bytes], bytes],
    reason: str,
) -> None:
    whole = client_app.masked

    def damaged(packet: bytes, request: Any, member: Member, *rest: Any) -> bytes:
        blob = whole(packet, request, member, *rest)
        return spoil(blob) if member._name == "south" else blob

    monkeypatch.setattr(client_app, "masked", damaged)
    record = cgfedllm.run(tiny_config(*SECURE, "federation.rounds=1")).records[1]
    assert [client.client for client in record.clients] == ["north", "west"]
    (failure,) = record.failures
    assert failure.client == "south"
    assert reason in failure.reason


def test_a_reply_of_another_session_or_without_its_rows_is_not_added(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = secure.SecureStrategy._take

    def spoil(self: Any, server_round: int, reply: Message) -> bool:
        client = self._name(reply.metadata.src_node_id)
        if client == "south":
            reply.content.metric_records["metrics"]["num-examples"] = 0
        if client == "west" and self.attempt == 1:
            monkeypatch.setattr(self._collector, "session", bytes(16))
        return take(self, server_round, reply)

    monkeypatch.setattr(secure.SecureStrategy, "_take", spoil)
    record = cgfedllm.run(tiny_config(*SECURE, "federation.rounds=1")).records[1]
    reasons = [failure.reason for failure in record.failures]
    assert "num-examples is 0" in reasons[0]
    assert "another session" in reasons[1]
    assert record.attempts == 2


def test_bytes_are_counted_in_columns_of_their_own(tiny_config: MakeConfig) -> None:
    result = cgfedllm.run(tiny_config(*SECURE))
    first, second = result.records[1:]
    names = len("\n".join(CLIENTS))
    # keys 64, sealed shares 92 a peer, shares 32 a member; sessions 16 and places 2 each
    assert first.secagg_uplink_bytes == 3 * (64 + 2 * 92 + 3 * 32)
    assert first.secagg_downlink_bytes == 3 * (
        16 + (16 + names + 3 * 64) + (16 + 3 * 2 + 2 * 92) + (16 + 3 * 2)
    )
    assert (first.secagg_uplink_bytes, first.secagg_downlink_bytes) == traffic(3, names)
    assert second.secagg_uplink_bytes_total == 2 * first.secagg_uplink_bytes
    assert second.secagg_downlink_bytes_total == 2 * first.secagg_downlink_bytes
    # 8 bits become 10 in a ring that holds the sum of three, and a session's name goes along
    clear = cgfedllm.run(tiny_config(*FAST, "name=clear")).records[1]
    assert clear.secagg_uplink_bytes == 0
    numbers = clear.clients[0].uplink_bytes - 52 - 3
    assert first.clients[0].uplink_bytes == 52 + 16 + -(-numbers * 10 // 8)
    planned = make_plan(tiny_config(*SECURE), clients=3)
    assert planned.uplink.total == second.uplink_bytes_total
    assert planned.secagg is not None
    assert planned.secagg.uplink == second.secagg_uplink_bytes_total
    assert "secure aggregation" in dict(planned.rows())
    assert scalars(second)["bytes/secagg_uplink_total"] == second.secagg_uplink_bytes_total
    assert curve_total(second) == sum(
        getattr(second, f"{name}_bytes_total")
        for name in ("uplink", "downlink", "secagg_uplink", "secagg_downlink")
    )


def test_older_metrics_are_read(tiny_config: MakeConfig) -> None:
    row = RoundRecord(3).to_dict()
    for key in [key for key in row if key.startswith("secagg") or key == "clip"]:
        row.pop(key)
    assert RoundRecord.from_dict(row) == RoundRecord(3)


def test_error_feedback_and_server_optimisers_go_with_it(
    tiny_config: MakeConfig, in_the_clear: Callable[..., np.ndarray]
) -> None:
    coarse = (
        "uplink.options={bpp=2.0, bits=4, scale_exponent=-11}",
        "federation.strategy.name=fedavgm",
    )
    result = cgfedllm.run(tiny_config(*SECURE, *coarse))
    np.testing.assert_allclose(adapter(result), in_the_clear(*coarse), rtol=0, atol=1e-6)
    assert list((result.run_dir / "clients" / "north").glob("memory-*"))


@pytest.mark.parametrize(
    "settings",
    [
        ("federation.fraction_train=0.7",),  # two of three
        ("federation.stateless=true",),
        pytest.param(
            ("federation.strategy.name=fedadam", "federation.server_lr=0.5"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_it_goes_with_sampling_stateless_clients_and_any_mean(
    tiny_config: MakeConfig, in_the_clear: Callable[..., np.ndarray], settings: tuple[str, ...]
) -> None:
    result = cgfedllm.run(tiny_config(*SECURE, *settings))
    # fedadam divides by the size of a change, rounding included
    far = 1e-5 if "adam" in settings[0] else 1e-6
    np.testing.assert_allclose(adapter(result), in_the_clear(*settings), rtol=0, atol=far)


def test_a_client_that_lost_its_copy_of_the_adapter_is_sent_it_within_the_session(
    tiny_config: MakeConfig, in_the_clear: Callable[..., np.ndarray]
) -> None:
    config = tiny_config(*SECURE, "downlink.name=int8")

    def lose(event: events.Event) -> None:
        if isinstance(event, events.RoundFinished) and event.record.round == 1:
            for path in (config.run_dir / "clients" / "south").glob("reference-*"):
                path.unlink()

    result = cgfedllm.run(config, listeners=[lose])
    record = result.records[2]
    assert (record.attempts, record.failures, len(record.clients)) == (1, [], 3)
    np.testing.assert_allclose(
        adapter(result), in_the_clear("downlink.name=int8"), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
    ("exponent", "said"), [(4, "all numbers of an update round to zero"), (-30, "are cut off")]
)
def test_a_step_that_does_not_suit_is_told(
    tiny_config: MakeConfig, exponent: int, said: str
) -> None:
    told: list[events.Event] = []
    options = f"uplink.options={{bpp=8.5, bits=8, scale_exponent={exponent}}}"
    cgfedllm.run(tiny_config(*SECURE, options, "federation.rounds=1"), listeners=[told.append])
    warnings = [e.text for e in told if isinstance(e, events.Notice) and e.level == "warning"]
    assert any(said in text for text in warnings)


# ---- with `learned` -----------------------------------------------------------------------------

DIRECTIONS = 5


@pytest.fixture
def pretrained(tiny_config: MakeConfig, tmp_path: Path) -> tuple[str, ...]:
    """A codec file whose options are not the defaults, and settings of runs that use it.

    Clients of a run know these options from what the server sends them, and from nowhere else.
    """
    spec = Workspace(tiny_config(*FAST), tmp_path).spec
    rng = np.random.default_rng(3)
    updates = [
        AdapterUpdate(spec, rng.standard_normal(spec.size).astype(np.float32)) for _ in range(3)
    ]
    codec = make_codec("learned", {"directions": DIRECTIONS, "bits": 10, "bpp": 6.0})
    assert isinstance(codec, Learned)
    path = tmp_path / "codec.safetensors"
    save_codec_file(path, codec, CodecState.of(learn(spec, updates, DIRECTIONS)), spec, {})
    return (
        "uplink.name=learned", "uplink.options={scale_exponent=-12}", f'uplink.state="{path}"',
        "training.subspace=AB", "federation.rounds=3",
    )  # fmt: skip


def test_learned_in_its_linear_mode(
    tiny_config: MakeConfig,
    in_the_clear: Callable[..., np.ndarray],
    pretrained: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sums: list[np.ndarray] = []
    opened = secure.Collector.open

    def look(self: Any, answers: Any) -> Any:
        sums.append(opened(self, answers))
        return sums[-1]

    monkeypatch.setattr(secure.Collector, "open", look)
    told: list[events.Event] = []
    result = cgfedllm.run(tiny_config(*SECURE, *pretrained), listeners=[told.append])
    np.testing.assert_allclose(adapter(result), in_the_clear(*pretrained), rtol=0, atol=1e-6)
    # a step that suits: no warning, no round in which nothing is said
    assert not [e for e in told if isinstance(e, events.Notice) and e.level == "warning"]
    assert all(total.any() for total in sums)
    spec = load_adapter(result.adapter_dir).spec
    ranks = sum(min(factor.shape) for factor in spec)
    assert {total.size for total in sums} == {ranks * DIRECTIONS}
    # 10 bits a number, as the file has it, and 2 for the sum of three
    packed = 52 + 16 + -(-ranks * DIRECTIONS * 12 // 8)
    assert {c.uplink_bytes for r in result.records[1:] for c in r.clients} == {packed}
    planned = make_plan(tiny_config(*SECURE, *pretrained), clients=3)
    assert planned.uplink.total == result.records[-1].uplink_bytes_total


def test_learned_when_a_client_falls_out(
    tiny_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    fail_at: FailAt,
    pretrained: tuple[str, ...],
) -> None:
    """What is opened is the sum of the packets of those who stayed, and decodes to theirs."""
    packets: dict[tuple[str, int], bytes] = {}
    decoded: list[np.ndarray] = []
    mask, open_ = client_app.masked, secure.SecureStrategy._opened

    def masked(packet: bytes, request: Any, member: Member, context: Any, codec: Any) -> bytes:
        packets[member._name, context.round] = packet
        return mask(packet, request, member, context, codec)

    def opened(self: Any, server_round: int, collector: Any) -> AdapterUpdate:
        total = open_(self, server_round, collector)
        context = self._context(server_round)
        own = [packets[name, server_round] for name in ("north", "west")]
        wanted = sum(self._uplink.decode(packet, context).vector for packet in own)
        np.testing.assert_allclose(total.vector, wanted, rtol=0, atol=1e-6)
        decoded.append(total.vector)
        return total

    monkeypatch.setattr(client_app, "masked", masked)
    monkeypatch.setattr(secure.SecureStrategy, "_opened", opened)
    fail_at.plan = [("south", "train"), ("south", "advertise")]
    result = cgfedllm.run(tiny_config(*SECURE, *pretrained, "federation.rounds=2"))
    assert [len(record.clients) for record in result.records[1:]] == [2, 2]
    assert len(decoded) == 2
    assert all(np.abs(own).max() > 1e-4 for own in decoded)


@pytest.mark.parametrize(
    ("codec", "reason"), [("int8", "do not add up"), ("learned", "a step of its own")]
)
def test_a_client_masks_what_adds_up_and_nothing_else(
    tmp_path: Path, codec: str, reason: str
) -> None:
    """Whatever options the server sends with a codec's state."""
    made, spec = make_codec(codec, {}), AdapterSpec.from_shapes({"x": (3,)})
    request = ConfigRecord({"secagg-session": bytes(16)})
    context = CodecContext(spec, 1, state=made.initial_state(spec))
    packet = made.encode(AdapterUpdate.zeros(spec), context)
    with pytest.raises(CodecError, match=reason):
        secure_client.masked(packet, request, Member(tmp_path, "north"), context, made)


def test_sums_as_printed(tiny_config: MakeConfig, in_the_clear: Callable[..., np.ndarray]) -> None:
    settings = ("federation.aggregation=sum", "federation.rounds=1")
    result = cgfedllm.run(tiny_config(*SECURE, *settings))
    np.testing.assert_allclose(adapter(result), in_the_clear(*settings), rtol=0, atol=1e-6)


# ---- with differential privacy ------------------------------------------------------------------

DP = ("privacy.delta=1e-5", "uplink.error_feedback=false", "privacy.repeatable=true")


def test_local_noise_is_in_the_sum(
    tiny_config: MakeConfig, in_the_clear: Callable[..., np.ndarray]
) -> None:
    local = (*DP, "privacy.mechanism=local", "federation.rounds=1",
             "uplink.options={bpp=16.0, bits=16, scale_exponent=-6}")  # fmt: skip
    result = cgfedllm.run(tiny_config(*SECURE, *local))
    np.testing.assert_allclose(adapter(result), in_the_clear(*local), rtol=0, atol=1e-4)
    assert result.records[1].epsilon is not None


def test_central_noise_is_added_to_the_sum_of_what_clients_clipped(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: list[float] = []
    within = client_app.encode_within

    def look(*args: Any) -> Any:
        encoded = within(*args)
        norms.append(encoded.decoded.norm())
        return encoded

    monkeypatch.setattr(client_app, "encode_within", look)
    config = tiny_config(
        *SECURE, *DP, "privacy.mechanism=central", "privacy.clip=0.05", "federation.rounds=1",
        "uplink.options={bpp=8.5, bits=8, scale_exponent=-12}",
    )  # fmt: skip
    result = cgfedllm.run(config)
    # the server cannot clip, so what decodes is within the norm before it leaves
    assert len(norms) == 3
    assert all(0.04 < norm <= 0.05 for norm in norms)
    plan = Workspace(config, result.run_dir).privacy
    assert plan is not None
    size = load_adapter(result.adapter_dir).spec.size
    assert result.records[1].update_norm == pytest.approx(
        plan.noise_std / 3 * np.sqrt(size), rel=0.1
    )


# ---- configuration ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            ["uplink.name=int8", "uplink.options={}"],
            r"those of 'int8' do not add up; .* 'sketch', or 'learned' with a codec file",
        ),
        (["uplink.name=raw", "uplink.options={}"], "those of 'raw' do not add up"),
        (
            ["uplink.name=learned", "uplink.options={}"],
            "privacy.secagg: learned: each packet has a step of its own; set .* scale_exponent",
        ),
        (
            ["uplink.name=learned", "uplink.options={scale_exponent=-8}"],
            r"learned nothing; name a codec file in uplink\.state",
        ),
        (["uplink.options={bpp=1.0}"], "set the option scale_exponent"),
        (["federation.weighting=examples"], r"set federation\.weighting = 'uniform'"),
        (["federation.strategy.name=median"], r"federation\.strategy\.name = 'fedavg' or"),
        (["federation.strategy.name=krum"], r"federation\.strategy\.name = 'fedavg' or"),
        (["federation.strategy.name=trimmed_mean"], r"federation\.strategy\.name"),
        (["federation.aggregation=product"], r"federation\.aggregation = 'factors' or 'sum'"),
        (["uplink.flush=int8"], r"uplink\.flush = ''"),
        ([*DP, "privacy.mechanism=central", "federation.fraction_train=0.5"], "fraction_train"),
        (
            [*DP, "privacy.mechanism=central", "privacy.adaptive_clip.enabled=true"],
            "adaptive_clip",
        ),
        (["privacy.secagg.threshold=1"], "threshold"),
    ],
)
def test_what_needs_single_updates_is_refused(
    tiny_config: MakeConfig, settings: list[str], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        tiny_config(*SECURE, *settings)


def test_recordings_are_refused(tiny_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"privacy\.secagg"):
        api.record(tiny_config(*SECURE))


@pytest.mark.parametrize("wanted", [4, 9])
def test_a_threshold_that_cannot_be_is_told_before_the_first_round(
    tiny_config: MakeConfig, wanted: int
) -> None:
    config = tiny_config(*SECURE, f"privacy.secagg.threshold={wanted}")
    with pytest.raises(SecureAggregationError, match=f"3 clients .*, {wanted} are needed"):
        cgfedllm.run(config)
    assert not RunFolder(config.run_dir).records()


def test_a_run_without_it_answers_none_of_its_queries(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    content = RecordDict({CONFIG: ConfigRecord({"secagg-session": bytes(16)})})
    with pytest.raises(SecureAggregationError, match="has no secure aggregation"):
        secure_client.answer("advertise", content, Member(tmp_path, "north"), tiny_config(*FAST))
    with pytest.raises(SecureAggregationError, match="lacks secagg-session"):
        secure_client.answer(
            "unmask", RecordDict(), Member(tmp_path, "north"), tiny_config(*SECURE)
        )
