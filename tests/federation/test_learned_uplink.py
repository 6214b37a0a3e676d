"""FAF: federated rounds through a codec that learns, as it is or adapting to what is decoded."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict

import cgfedllm
from cgfedllm import events
from cgfedllm.adapter import AdapterUpdate
from cgfedllm.codecs import CodecState, make_codec
from cgfedllm.codecs.learning import LearnedCodec
from cgfedllm.config import Config, other_uplink
from cgfedllm.errors import CheckpointError, CodecStateError, ConfigError
from cgfedllm.federation.checkpoint import latest_checkpoint
from cgfedllm.federation.client_app import make_client_app
from cgfedllm.federation.client_state import ClientState
from cgfedllm.federation.codec_state import pack_whole
from cgfedllm.federation.inprocess import InProcessGrid
from cgfedllm.federation.messages import CODEC, CONFIG, SERVER_ROUND, codec_state_record
from cgfedllm.federation.server_app import Server
from cgfedllm.metrics import RoundRecord
from cgfedllm.runs import RunFolder
from cgfedllm.tgap.codec_file import CodecFile, load_codec_file, save_codec_file
from cgfedllm.workspace import Workspace, workspace_for

MakeConfig = Callable[..., Config]
Outcome = Callable[[Path], dict[str, Any]]
FAST = ("evaluation.clients=false", "training.local_steps=1")
CLIENTS = ("north", "south", "west")


@pytest.fixture
def mean(learned: ModuleType) -> tuple[str, ...]:
    """Settings of a run over the codec whose packets depend on what it has learned."""
    return (*FAST, f"uplink.name={learned.MEAN}")


@pytest.fixture
def pretrained(tiny_config: MakeConfig, learned: ModuleType, tmp_path: Path) -> CodecFile:
    """A codec file of the tiny adapter, with options that are not the default."""
    spec, codec = spec_of(tiny_config()), make_codec(learned.MEAN, {"levels": 60})
    assert isinstance(codec, LearnedCodec)
    start = codec.initial_state(spec, seed=99)
    values = np.random.default_rng(1).standard_normal(spec.size) * 1e-3
    state = CodecState.of({**start.tensors, "mean": values.astype(np.float32)})
    card = {"cost": {"uplink_bytes": 1234, "downlink_bytes": 567}}
    return save_codec_file(tmp_path / "codec.safetensors", codec, state, spec, card)


@pytest.fixture
def from_file(mean: tuple[str, ...], pretrained: CodecFile, tmp_path: Path) -> tuple[str, ...]:
    return (*mean, f'uplink.state="{tmp_path / "codec.safetensors"}"')


@pytest.fixture
def told() -> Iterator[list[events.Event]]:
    heard: list[events.Event] = []
    with events.listening(heard.append):
        yield heard


def spec_of(config: Config) -> Any:
    return Workspace(config, Path()).spec


def whole_size(file: CodecFile) -> int:
    return len(pack_whole(file.codec(), file.state))


def serve_from_elsewhere(config: Config, **node: str) -> list[RoundRecord]:
    """A run whose clients have a configuration with a path to nothing, as on other machines."""
    far = config.with_overrides({"uplink.state": "/nowhere/codec.safetensors"})
    with RunFolder.create(config) as folder:
        contexts = {
            number: Context(
                run_id=1,
                node_id=number,
                node_config={"partition-id": number - 2, "num-partitions": 3, **node},
                state=RecordDict(),
                run_config={"config": far.to_toml(), "run-dir": str(config.run_dir)},
            )
            for number in (2, 3, 4)
        }
        grid = InProcessGrid(make_client_app(), contexts)
        Server(grid, workspace_for(config.to_toml(), str(config.run_dir))).run()
        return folder.records()


def sent(result: Any) -> list[int]:
    return [record.codec_bytes for record in result.records]


# ---- the same as without ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("uplink.adapt_every=1", "federation.fraction_train=0.7", "federation.rounds=4"),
        ("uplink.adapt_every=2", "federation.stateless=true"),
        ("federation.aggregation=sum", "federation.server_lr=0.5"),
    ],
)
def test_a_perfect_codec_equals_fedavg_bit_for_bit(
    tiny_config: MakeConfig, learned: ModuleType, outcome: Outcome, settings: tuple[str, ...]
) -> None:
    plain = [s for s in settings if "adapt_every" not in s]
    fedavg = cgfedllm.run(tiny_config(*FAST, *plain, "name=fedavg"))
    faf = cgfedllm.run(tiny_config(*FAST, *settings, f"uplink.name={learned.EXACT}", "name=faf"))
    assert outcome(faf.run_dir)["adapter"] == outcome(fedavg.run_dir)["adapter"]
    losses = [[record.heldout_nll for record in run.records] for run in (fedavg, faf)]
    assert losses[0] == losses[1]
    assert not any(record.failures for record in faf.records)
    assert any(sent(faf)) == (len(plain) < len(settings))


# ---- what is sent -------------------------------------------------------------------------------


def test_a_cold_start_that_stays_as_it_is_sends_no_state(
    tiny_config: MakeConfig, mean: tuple[str, ...]
) -> None:
    result = cgfedllm.run(tiny_config(*mean))
    assert sent(result) == [0] * 4
    assert not any(record.failures for record in result.records)
    assert result.records[-1].heldout_nll < result.records[0].heldout_nll
    assert (result.records[0].tgap_uplink_bytes, result.records[0].tgap_downlink_bytes) == (0, 0)


def test_a_pretrained_codec_is_sent_once_to_each_client_and_charged_apart(
    tiny_config: MakeConfig, from_file: tuple[str, ...], pretrained: CodecFile
) -> None:
    config = tiny_config(*from_file, "evaluation.clients=true", "downlink.name=int8")
    result = cgfedllm.run(config)
    size = whole_size(pretrained)
    assert sent(result) == [0, 3 * size, 0, 0]
    assert [record.codec_bytes_total for record in result.records] == [0] + [3 * size] * 3
    assert [client.codec_bytes for client in result.records[1].clients] == [size] * 3
    spec = spec_of(config)
    increment, whole = (make_codec(name).packet_size(spec) for name in ("int8", "raw"))
    # as without such a codec: what clients hold from an evaluation is not sent again
    assert [r.downlink_bytes for r in result.records] == [3 * whole] + [3 * increment] * 3
    charged = [(r.tgap_uplink_bytes, r.tgap_downlink_bytes) for r in result.records]
    assert charged == [(1234, 567)] + [(0, 0)] * 3


def test_clients_need_no_file_and_take_its_options(
    tiny_config: MakeConfig, from_file: tuple[str, ...], outcome: Outcome
) -> None:
    usual = cgfedllm.run(tiny_config(*from_file, "name=usual"))
    config = tiny_config(*from_file, "name=elsewhere")
    records = serve_from_elsewhere(config)
    assert not any(record.failures for record in records)
    assert outcome(config.run_dir) == outcome(usual.run_dir)


# ---- clients that have the file -----------------------------------------------------------------


@pytest.mark.parametrize("stateless", ["false", "true"])
def test_nothing_is_sent_to_clients_that_hold_the_state(
    tiny_config: MakeConfig, from_file: tuple[str, ...], outcome: Outcome, stateless: str
) -> None:
    settings = (*from_file, f"federation.stateless={stateless}")
    sent_whole = cgfedllm.run(tiny_config(*settings, "name=sent"))
    held = cgfedllm.run(tiny_config(*settings, "uplink.clients_hold_state=true", "name=held"))
    assert sent(held) == [0] * 4
    assert not any(record.failures for record in held.records)
    assert outcome(held.run_dir)["adapter"] == outcome(sent_whole.run_dir)["adapter"]


def test_a_node_says_where_its_copy_is(
    tiny_config: MakeConfig, from_file: tuple[str, ...], outcome: Outcome, tmp_path: Path
) -> None:
    usual = cgfedllm.run(tiny_config(*from_file, "name=usual"))
    config = tiny_config(*from_file, "uplink.clients_hold_state=true", "name=copies")
    copy = shutil.copy(tmp_path / "codec.safetensors", tmp_path / "copy.safetensors")
    records = serve_from_elsewhere(config, codec=str(copy))
    assert not any(record.codec_bytes or record.failures for record in records)
    assert outcome(config.run_dir)["adapter"] == outcome(usual.run_dir)["adapter"]


@pytest.mark.parametrize("holds", ["nothing", "another", "damaged"])
def test_a_node_that_lacks_the_file_is_sent_the_state_all_the_same(
    tiny_config: MakeConfig,
    from_file: tuple[str, ...],
    pretrained: CodecFile,
    outcome: Outcome,
    tmp_path: Path,
    told: list[events.Event],
    holds: str,
) -> None:
    usual = cgfedllm.run(tiny_config(*from_file, "name=usual"))
    config = tiny_config(*from_file, "uplink.clients_hold_state=true", "name=lacking")
    path = tmp_path / "held.safetensors"
    if holds == "another":
        spec, codec = spec_of(config), pretrained.codec()
        save_codec_file(path, codec, codec.initial_state(spec, seed=5), spec, {})
    elif holds == "damaged":
        path.write_bytes((tmp_path / "codec.safetensors").read_bytes()[:-1])
    records = serve_from_elsewhere(config, codec=str(path))
    assert [record.codec_bytes for record in records] == [0, 3 * whole_size(pretrained), 0, 0]
    assert not any(record.failures for record in records)
    assert outcome(config.run_dir)["adapter"] == outcome(usual.run_dir)["adapter"]
    warned = any(
        "asked for the codec state" in e.text for e in told if isinstance(e, events.Notice)
    )
    assert warned == (holds != "another")


def test_what_is_learned_is_sent_every_so_many_rounds_and_counted(
    tiny_config: MakeConfig, mean: tuple[str, ...], learned: ModuleType
) -> None:
    config = tiny_config(*mean, "uplink.adapt_every=2", "federation.rounds=5")
    result = cgfedllm.run(config)
    size = learned.increment_size(spec_of(config))
    # learned after rounds 2 and 4, used from rounds 3 and 5
    assert sent(result) == [0, 0, 0, 3 * size, 0, 3 * size]
    assert result.records[-1].codec_bytes_total == 6 * size
    assert not any(record.failures for record in result.records)


def test_evaluation_carries_no_state(
    tiny_config: MakeConfig, from_file: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    carried: set[tuple[str, bool]] = set()
    deliver = InProcessGrid._deliver

    def noting(self: InProcessGrid, message: Message) -> Message:
        carried.add((message.metadata.message_type, CODEC in message.content.array_records))
        return deliver(self, message)

    monkeypatch.setattr(InProcessGrid, "_deliver", noting)
    result = cgfedllm.run(tiny_config(*from_file, "evaluation.clients=true", "federation.rounds=1"))
    assert carried == {("query", False), ("evaluate", False), ("train", True)}
    assert sent(result)[0] == 0


def test_clients_that_were_away_catch_up(
    tiny_config: MakeConfig, mean: tuple[str, ...], learned: ModuleType
) -> None:
    config = tiny_config(
        *mean, "uplink.adapt_every=1", "federation.fraction_train=0.7", "federation.rounds=6"
    )
    result = cgfedllm.run(config)
    codec = make_codec(learned.MEAN)
    assert isinstance(codec, LearnedCodec)
    spec = spec_of(config)
    sizes = {1: learned.increment_size(spec), 0: 0}
    whole = len(pack_whole(codec, codec.initial_state(spec)))
    held: dict[str, int] = {}
    for record in result.records[1:]:
        version = record.round - 1
        for client in record.clients:
            behind = version - held.get(client.client, 0)
            assert client.codec_bytes == sizes.get(behind, whole)
            held[client.client] = version
    assert whole in {client.codec_bytes for r in result.records for client in r.clients}
    assert not any(record.failures for record in result.records)


def test_stateless_clients_are_sent_all_of_it_each_time(
    tiny_config: MakeConfig, from_file: tuple[str, ...], pretrained: CodecFile
) -> None:
    config = tiny_config(*from_file, "federation.stateless=true", "uplink.adapt_every=1")
    result = cgfedllm.run(config)
    assert sent(result) == [0] + [3 * whole_size(pretrained)] * 3
    assert not (config.run_dir / "clients").exists()
    assert not any(record.failures for record in result.records)


@pytest.mark.parametrize("preset", ["printed", "fair"])
def test_the_papers_auto_encoder_adapting_from_a_cold_start(
    tiny_config: MakeConfig, preset: str
) -> None:
    config = tiny_config(
        *FAST,
        "uplink.name=cg_cnn",
        f"uplink.options.preset={preset}",
        "uplink.options.stages=3",
        "uplink.adapt_every=1",
        "federation.rounds=2",
    )
    result = cgfedllm.run(config)
    assert not any(record.failures for record in result.records)
    left = load_codec_file(RunFolder(config.run_dir).codec_path)
    assert left.state.version == 2
    increment = left.codec().pack_state(left.state)
    # as long whatever the version is
    assert sent(result) == [0, 0, 3 * len(increment)]


# ---- what is learned ----------------------------------------------------------------------------


def test_a_codec_learns_from_what_the_server_decoded_in_the_order_of_names(
    tiny_config: MakeConfig,
    mean: tuple[str, ...],
    learned: ModuleType,
    told: list[events.Event],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapt = learned.MeanCodec.adapt
    seen: list[tuple[int, list[bytes]]] = []

    def noting(
        self: Any, state: CodecState, updates: list[AdapterUpdate], *, round: int, seed: int
    ) -> CodecState:
        seen.append((round, [update.vector.tobytes() for update in updates]))
        return adapt(self, state, updates, round=round, seed=seed)

    monkeypatch.setattr(learned.MeanCodec, "adapt", noting)
    config = tiny_config(*mean, "uplink.adapt_every=2", "federation.rounds=4", "uplink.flush=int8")
    cgfedllm.run(config)
    decoded = [event for event in told if isinstance(event, events.UpdateReceived)]
    expected = [
        (round_, [e.update.vector.tobytes() for e in decoded if e.round == round_])
        for round_ in (2, 4)
    ]
    assert seen == expected
    assert [e.client for e in decoded if e.round == 2] == list(CLIENTS)


def test_adapting_bears_on_what_is_decoded(tiny_config: MakeConfig, mean: tuple[str, ...]) -> None:
    frozen, adapting = (
        cgfedllm.run(
            tiny_config(*mean, f"uplink.adapt_every={every}", f"name=every-{every}")
        ).records
        for every in (0, 1)
    )
    same = [a.heldout_nll == b.heldout_nll for a, b in zip(frozen, adapting, strict=True)]
    assert same == [True, True, False, False]


def test_with_error_feedback_and_without(tiny_config: MakeConfig, mean: tuple[str, ...]) -> None:
    runs = {
        on: cgfedllm.run(
            tiny_config(
                *mean,
                "uplink.adapt_every=1",
                f"uplink.error_feedback={on}",
                "uplink.options.levels=2",
                f"name=ef-{on}",
            )
        )
        for on in ("true", "false")
    }
    losses = {on: [record.heldout_nll for record in run.records] for on, run in runs.items()}
    assert losses["true"][:2] == losses["false"][:2]
    assert losses["true"][2] != losses["false"][2]
    memories = {on: list(run.run_dir.glob("clients/*/memory-*")) for on, run in runs.items()}
    assert memories["false"] == []
    assert len(memories["true"]) == 9


def test_a_codec_that_cannot_adapt_stays_as_it_is_with_a_word(
    tiny_config: MakeConfig,
    mean: tuple[str, ...],
    learned: ModuleType,
    told: list[events.Event],
    monkeypatch: pytest.MonkeyPatch,
    outcome: Outcome,
) -> None:
    adapt = learned.MeanCodec.adapt

    def diverging(self: Any, state: CodecState, *args: Any, **kwargs: Any) -> CodecState:
        made = adapt(self, state, *args, **kwargs)
        return CodecState.of({**made.tensors, "mean": made.tensors["mean"] * np.inf}, made.version)

    frozen = cgfedllm.run(tiny_config(*mean, "name=frozen"))
    monkeypatch.setattr(learned.MeanCodec, "adapt", diverging)
    result = cgfedllm.run(tiny_config(*mean, "uplink.adapt_every=2"))
    warnings = [e.text for e in told if isinstance(e, events.Notice) and e.level == "warning"]
    assert len(warnings) == 1
    assert "round 2: the uplink codec stays as it is" in warnings[0]
    assert "'mean' holds NaN or infinity" in warnings[0]
    assert outcome(result.run_dir)["adapter"] == outcome(frozen.run_dir)["adapter"]


# ---- what goes wrong ----------------------------------------------------------------------------


def harm_after(round_: int, harm: Callable[[], None]) -> Callable[[events.Event], None]:
    def listen(event: events.Event) -> None:
        if isinstance(event, events.RoundFinished) and event.record.round == round_:
            harm()

    return listen


@pytest.mark.parametrize(("downlink", "harm"), [("raw", "damaged"), ("int8", "lost")])
def test_a_client_without_its_copy_is_served_the_whole_in_the_same_round(
    tiny_config: MakeConfig,
    from_file: tuple[str, ...],
    pretrained: CodecFile,
    learned: ModuleType,
    outcome: Outcome,
    downlink: str,
    harm: str,
) -> None:
    """And its copy of the adapter with it, where it lost that too."""
    settings = (*from_file, "uplink.adapt_every=1", f"downlink.name={downlink}")
    config = tiny_config(*settings)

    def forget() -> None:
        for file in (config.run_dir / "clients" / "south").glob("[cr]*-*"):
            if harm == "lost":
                file.unlink()
            else:
                file.write_bytes(file.read_bytes()[:-1])

    unharmed = cgfedllm.run(tiny_config(*settings, "name=unharmed"))
    harmed = cgfedllm.run(config, listeners=[harm_after(1, forget)])
    assert outcome(harmed.run_dir)["adapter"] == outcome(unharmed.run_dir)["adapter"]
    increment, whole = learned.increment_size(spec_of(config)), whole_size(pretrained)
    second = harmed.records[2]
    # the increment was sent in vain
    assert [c.codec_bytes for c in second.clients] == [increment, increment + whole, increment]
    assert sent(harmed)[3] == 3 * increment
    assert second.failures == []


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda blob: blob[:-1] + b"?", "does not match its checksum"),
        (lambda blob: blob[:6], "it is cut off"),
        (lambda blob: blob + bytes(10_000_000), "does not match its checksum"),
        (None, "does not carry the codec state"),
    ],
)
def test_a_state_harmed_on_its_way_costs_that_client_the_round_and_nothing_else(
    tiny_config: MakeConfig,
    from_file: tuple[str, ...],
    pretrained: CodecFile,
    monkeypatch: pytest.MonkeyPatch,
    harm: Callable[[bytes], bytes] | None,
    reason: str,
) -> None:
    deliver = InProcessGrid._deliver

    def harming(self: InProcessGrid, message: Message) -> Message:
        content = message.content
        first = content.config_records[CONFIG].get(SERVER_ROUND) == 1
        if first and message.metadata.dst_node_id == 3:
            blob = content.array_records[CODEC]["state"].data
            if harm is None:
                del content[CODEC]
            else:
                content[CODEC] = codec_state_record(harm(blob))
        return deliver(self, message)

    monkeypatch.setattr(InProcessGrid, "_deliver", harming)
    result = cgfedllm.run(tiny_config(*from_file, "federation.rounds=2"))
    first, second = result.records[1:]
    assert [c.client for c in first.clients] == ["north", "west"]
    assert [f.client for f in first.failures] == ["south"]
    assert reason in first.failures[0].reason
    # the server took it to hold what it was sent; it says that it does not
    size = whole_size(pretrained)
    assert [c.codec_bytes for c in second.clients] == [0, size, 0]
    assert sent(result) == [0, 3 * size, size]
    assert second.failures == []


def test_a_codec_file_of_another_adapter_or_codec_stops_the_run_before_it_starts(
    tiny_config: MakeConfig, from_file: tuple[str, ...], learned: ModuleType
) -> None:
    for setting in ("lora.rank=2", f"uplink.name={learned.EXACT}"):
        config = tiny_config(*from_file, setting)
        with pytest.raises(CodecStateError):
            cgfedllm.run(config)
        assert RunFolder(config.run_dir).records() == []
        assert not list(config.run_dir.glob("checkpoints/*"))


# ---- going on -----------------------------------------------------------------------------------


class Stop(Exception):
    pass


def stop_after(round_: int) -> Callable[[events.Event], None]:
    def stop() -> None:
        raise Stop

    return harm_after(round_, stop)


def test_a_stopped_run_goes_on_to_the_same_result(
    tiny_config: MakeConfig, from_file: tuple[str, ...], outcome: Outcome
) -> None:
    settings = (
        *from_file,
        "uplink.adapt_every=1",
        "federation.fraction_train=0.7",
        "federation.rounds=5",
        "uplink.flush=int8",
    )
    unbroken = cgfedllm.run(tiny_config(*settings, "name=unbroken"))
    config = tiny_config(*settings)
    with pytest.raises(Stop):
        cgfedllm.run(config, listeners=[stop_after(0)])
    for round_ in (2, 3):
        with pytest.raises(Stop):
            cgfedllm.resume(config.run_dir, listeners=[stop_after(round_)])
    resumed = cgfedllm.resume(config.run_dir)
    assert outcome(resumed.run_dir) == outcome(unbroken.run_dir)
    left = [load_codec_file(RunFolder(r.run_dir).codec_path).state for r in (resumed, unbroken)]
    assert left[0].version == 5
    assert left[0].hash == left[1].hash


def test_a_checkpoint_holds_the_codec_and_who_holds_it(
    tiny_config: MakeConfig, mean: tuple[str, ...]
) -> None:
    config = tiny_config(*mean, "uplink.adapt_every=2")
    result = cgfedllm.run(config)
    checkpoint = latest_checkpoint(result.run_dir / "checkpoints", spec_of(config), config)
    assert checkpoint is not None
    assert checkpoint.codec is not None
    assert checkpoint.codec.state.version == 1
    assert dict(checkpoint.codec.held) == dict.fromkeys(CLIENTS, 1)
    client = ClientState(result.run_dir / "clients" / "north", spec_of(config))
    assert client.codec(1).state.hash == checkpoint.codec.state.hash


def test_a_run_does_not_go_on_with_another_codec_file(
    tiny_config: MakeConfig,
    from_file: tuple[str, ...],
    pretrained: CodecFile,
    tmp_path: Path,
    learned: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny_config(*from_file)
    with pytest.raises(Stop):
        cgfedllm.run(config, listeners=[stop_after(1)])
    workspace_for.cache_clear()

    def other(self: Any, spec: Any, seed: int = 0) -> CodecState:
        return CodecState.of({"table": np.zeros(4, np.float32)})

    monkeypatch.setattr(learned.MeanCodec, "initial_state", other)
    codec = pretrained.codec()
    save_codec_file(tmp_path / "codec.safetensors", codec, other(codec, None), pretrained.spec, {})
    with pytest.raises(CheckpointError, match="put the codec file back that the run began with"):
        cgfedllm.resume(config.run_dir)


# ---- the codec file at the end ------------------------------------------------------------------


def test_a_run_leaves_its_codec_for_others_to_begin_with(
    tiny_config: MakeConfig, from_file: tuple[str, ...], learned: ModuleType
) -> None:
    config = tiny_config(*from_file, "uplink.adapt_every=2", "federation.rounds=4")
    result = cgfedllm.run(config)
    left = load_codec_file(RunFolder(config.run_dir).codec_path)
    assert (left.name, left.options, left.state.version) == (learned.MEAN, {"levels": 60}, 2)
    last = result.records[-1]
    cost = left.card["cost"]
    assert cost["uplink_bytes"] == 1234 + last.uplink_bytes_total
    assert cost["downlink_bytes"] == 567 + last.downlink_bytes_total + last.codec_bytes_total
    assert "Federated run tiny" in cost["basis"]
    assert left.card["federated"] == [
        {"run": "tiny", "rounds": 4, "adapt_every": 2, "state_version": 2}
    ]
    state = f'uplink.state="{RunFolder(config.run_dir).codec_path}"'
    again = cgfedllm.run(tiny_config(*from_file, state, "federation.rounds=1", "name=again"))
    assert again.records[0].tgap_uplink_bytes == cost["uplink_bytes"]
    assert sent(again) == [0, 3 * whole_size(left)]


def test_a_codec_that_stayed_as_it_was_costs_no_more(
    tiny_config: MakeConfig, from_file: tuple[str, ...], pretrained: CodecFile
) -> None:
    config = tiny_config(*from_file, "federation.rounds=1")
    cgfedllm.run(config)
    left = load_codec_file(RunFolder(config.run_dir).codec_path)
    assert left.state.hash == pretrained.state.hash
    assert left.card["cost"] == pretrained.card["cost"]


def test_a_codec_that_does_not_learn_leaves_no_file(tiny_config: MakeConfig) -> None:
    config = tiny_config(*FAST, "uplink.name=int8", "federation.rounds=1")
    cgfedllm.run(config)
    assert not RunFolder(config.run_dir).codec_path.exists()


# ---- configuration ------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["uplink.state=codec.safetensors", "uplink.adapt_every=2"])
def test_only_a_codec_that_learns_has_a_state(tiny_config: MakeConfig, setting: str) -> None:
    key = setting.split("=")[0].removeprefix("uplink.")
    with pytest.raises(ConfigError, match=rf"uplink.*{key} is for codecs that learn.*'int8' does"):
        tiny_config("uplink.name=int8", setting)


def test_what_clients_hold_is_a_file(tiny_config: MakeConfig, mean: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"clients_hold_state.*uplink\.state, which names none"):
        tiny_config(*mean, "uplink.clients_hold_state=true")


def test_it_is_for_the_uplink_alone(tiny_config: MakeConfig, learned: ModuleType) -> None:
    with pytest.raises(ConfigError, match=r"downlink\.name = 'test-mean' learns.*only uplink"):
        tiny_config(f"downlink.name={learned.MEAN}")
    with pytest.raises(ConfigError, match=r"uplink\.flush: 'test-mean' learns.*after all learning"):
        tiny_config("uplink.name=int8", f"uplink.flush={learned.MEAN}")


def test_another_uplink_codec_leaves_the_state_behind(
    tiny_config: MakeConfig, from_file: tuple[str, ...], learned: ModuleType
) -> None:
    config = tiny_config(*from_file, "uplink.adapt_every=3", "uplink.clients_hold_state=true")
    plain = config.with_overrides(other_uplink("int8")).uplink
    assert (plain.state, plain.clients_hold_state) == (None, False)
    exact = config.with_overrides(other_uplink(learned.EXACT)).uplink
    assert (exact.state, exact.adapt_every) == (None, 0)
