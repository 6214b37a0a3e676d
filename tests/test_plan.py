"""Plans: counts that can be checked by hand, sizes against real packets."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.architectures import architecture
from cgfedllm.codecs import CodecContext, CodecOptions, CodecState, base, make_codec
from cgfedllm.codecs.learning import LearnedCodec
from cgfedllm.config import load_config
from cgfedllm.errors import CodecStateError, ConfigError, ModelError
from cgfedllm.federation.codec_state import CodecBroadcaster, pack_whole
from cgfedllm.federation.downlink import Broadcaster
from cgfedllm.lora import specs_from_config
from cgfedllm.plan import Link, Plan, make_plan
from cgfedllm.reproduce.scales import experiment_config, find_scale
from cgfedllm.tgap.codec_file import save_codec_file

CONFIGS = Path(__file__).parents[1] / "configs"


def plan(*overrides: str, **kwargs: Any) -> Plan:
    return make_plan(load_config(None, overrides), **kwargs)


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """Folder of a model with two small layers: config.json alone, no weights."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 100,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return f"model.id={tmp_path}"


@pytest.mark.parametrize(
    ("model", "parameters"),
    [  # as published
        ("huggyllama/llama-7b", 6_738_415_616),
        ("meta-llama/Meta-Llama-3-8B", 8_030_261_248),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("mistralai/Mistral-7B-v0.1", 7_241_732_096),
        ("Qwen/Qwen1.5-1.8B", 1_836_828_672),
        ("Qwen/Qwen2.5-0.5B", 494_032_768),
        ("embedded", 134_515_008),
    ],
)
def test_known_architectures(model: str, parameters: int) -> None:
    assert plan(f"model.id={model}").model.parameters == parameters


def test_llama_7b_as_in_the_paper() -> None:
    result = make_plan(experiment_config(find_scale("paper"), "llama-dolly"))
    assert result.model.trained == 8_388_608
    assert result.model.tensors == 256
    assert (result.clients, result.sampled, result.rounds) == (100, 5, 20)
    assert result.uplink.packet == 4 * 8_388_608 + 52
    assert result.uplink.packets == 100
    assert result.uplink.total == 100 * (4 * 8_388_608 + 52)


def test_a_tiny_model_by_hand(tiny: str) -> None:
    result = plan(
        tiny, "lora.rank=2", "lora.target_modules=['q_proj', 'v_proj']", "model.device=cpu"
    )
    # embeddings and head, q and o, k and v, three of the mlp, norms
    layer = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24 + 2 * 16
    assert result.model.parameters == 2 * 100 * 16 + 2 * layer + 16
    assert result.model.linear_parameters == 2 * (layer - 32)
    per_layer = 2 * (16 + 16) + 2 * (16 + 8)
    assert result.model.trained == 2 * per_layer
    assert result.memory.base == 4 * result.model.parameters
    assert result.memory.gradients == result.memory.adapter == 4 * result.model.trained
    assert result.memory.optimizer == 8 * result.model.trained
    assert result.memory.residual == 0
    assert result.memory.logits == 3 * 4 * 8 * 512 * 100
    assert result.memory.activations == 8 * 512 * 4 * 2 * (8 * 16 + 16 + 2 * 8 + 4 * 24)


def test_memory_follows_the_config(tiny: str) -> None:
    cpu, gpu = plan(tiny, "model.device=cpu"), plan(tiny, "model.device=cuda")
    assert gpu.memory.base * 2 == cpu.memory.base
    four = plan(tiny, "model.device=cuda", "model.quantization=4bit")
    assert four.memory.base < gpu.memory.base
    sgd = plan(tiny, "training.optimizer=sgd")
    assert sgd.memory.optimizer == 0
    assert plan(tiny, "uplink.name=int8").memory.residual == 4 * cpu.model.trained
    lean = plan(tiny, "model.gradient_checkpointing=true", "model.device=cpu")
    assert lean.memory.activations < cpu.memory.activations
    micro = plan(tiny, "training.micro_batch_size=1", "model.device=cpu")
    assert micro.memory.activations * 8 == cpu.memory.activations
    adam = plan(tiny, "federation.strategy.name=fedadam")
    assert adam.memory.server > cpu.memory.server
    assert cpu.memory.client == sum(
        getattr(cpu.memory, part)
        for part in (
            "base",
            "adapter",
            "gradients",
            "optimizer",
            "residual",
            "activations",
            "logits",
        )
    )


def test_frozen_a_is_not_sent(tiny: str) -> None:
    both, only_b = plan(tiny), plan(tiny, "lora.freeze_a=true")
    assert only_b.model.adapter == both.model.trained
    assert only_b.model.trained < both.model.trained
    assert f"of {both.model.trained:,}" in dict(only_b.rows())["adapter"]


@pytest.mark.parametrize("name", ["raw", "bf16", "int8"])
def test_packet_is_as_long_as_a_real_one(tiny: str, name: str) -> None:
    result = plan(tiny, f"uplink.name={name}")
    config = load_config(None, [tiny])
    spec, _ = specs_from_config(make_transformers_config(config.model.id), config.lora)
    blob = make_codec(name).encode(
        AdapterUpdate(spec, np.arange(spec.size, dtype=np.float32)), CodecContext(spec, 1)
    )
    assert result.uplink.packet == len(blob)


def make_transformers_config(folder: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def test_transfer_time(tiny: str) -> None:
    result = plan(tiny, "data.partition.clients=3", link=Link(up_mbit=1, down_mbit=8))
    assert result.uplink.packet is not None
    assert result.uplink.seconds == pytest.approx(8 * result.uplink.packet / 1e6)
    assert result.downlink.seconds == pytest.approx(result.downlink.whole_packet / 1e6)
    assert result.round_seconds == pytest.approx(result.uplink.seconds + result.downlink.seconds)


@pytest.mark.parametrize("codec", ["raw", "int8"])
@pytest.mark.parametrize("every", [0, 1, 2])
@pytest.mark.parametrize("clients_evaluate", ["true", "false"])
def test_downlink_is_what_the_broadcaster_sends(
    tiny: str, codec: str, every: int, clients_evaluate: str
) -> None:
    rounds, clients = 5, 4
    result = plan(
        tiny,
        f"downlink.name={codec}",
        f"evaluation.every={every}",
        f"evaluation.clients={clients_evaluate}",
        f"federation.rounds={rounds}",
        clients=clients,
    )
    spec = AdapterSpec.from_shapes({"x": (result.model.trained,)})
    broadcaster = Broadcaster(spec, make_codec(codec), seed=0)
    sent = []
    for version in range(rounds + 1):
        broadcaster.advance(AdapterUpdate.zeros(spec), version)
        evaluating = version in (0, rounds) or (every and version % every == 0)
        if clients_evaluate == "true" and evaluating:
            sent += [broadcaster.broadcast(str(client)) for client in range(clients)]
        if version < rounds:
            sent += [broadcaster.broadcast(str(client)) for client in range(clients)]
    sent = [broadcast for broadcast in sent if broadcast.blob]
    assert result.downlink.packets + result.downlink.whole_packets == len(sent)
    whole = [broadcast for broadcast in sent if broadcast.kind == "full"]
    if codec == "int8":
        assert result.downlink.whole_packets == len(whole)
        assert len(whole[0].blob) == result.downlink.whole_packet


def test_number_of_clients_may_be_unknown(tiny: str) -> None:
    assert plan(tiny).clients_assumed
    assert "assumed" in dict(plan(tiny).rows())["clients"]
    given = plan(tiny, clients=7)
    assert (given.clients, given.clients_assumed) == (7, False)
    assert not plan(tiny, "data.partition.clients=3").clients_assumed
    with pytest.raises(ConfigError, match="at least 1"):
        plan(tiny, clients=0)


@pytest.mark.parametrize(
    ("clients", "fraction", "least", "sampled"),
    [(100, 0.05, 1, 5), (3, 0.5, 1, 1), (3, 0.1, 2, 2), (10, 0.99, 1, 9), (2, 1.0, 1, 2)],
)
def test_sampled_clients(clients: int, fraction: float, least: int, sampled: int) -> None:
    overrides = [f"federation.fraction_train={fraction}", f"federation.min_clients={least}"]
    assert load_config(None, overrides).federation.sampled(clients) == sampled


@pytest.mark.parametrize("speed", [0.0, -1.0, float("nan"), float("inf")])
def test_links_need_a_speed(speed: float) -> None:
    with pytest.raises(ConfigError, match="uplink speed"):
        Link(up_mbit=speed)


def test_codec_whose_size_depends_on_the_values(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(make_codec("int8")), "payload_size", lambda self, spec: None)
    result = plan(tiny, "uplink.name=int8")
    assert (result.uplink.packet, result.uplink.total, result.round_seconds) == (None, None, None)
    assert "depends on the values" in dict(result.rows())["uplink packet"]


def test_rows_and_json(tiny: str) -> None:
    result = plan(tiny, "uplink.name=int8", "downlink.name=bf16")
    rows = result.rows()
    assert all(isinstance(label, str) and isinstance(text, str) for label, text in rows)
    tree = json.loads(json.dumps(result.to_dict()))
    assert tree["uplink"]["total"] == result.uplink.total
    assert tree["memory"]["client"] == result.memory.client


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.toml")))
def test_every_shipped_config_has_a_plan(name: str) -> None:
    assert make_plan(load_config(CONFIGS / f"{name}.toml")).model.trained > 0


def test_targets_that_match_nothing(tiny: str) -> None:
    with pytest.raises(ModelError, match="q_proj"):
        plan(tiny, "lora.target_modules=['c_attn']")


def test_folder_that_is_not_there() -> None:
    with pytest.raises(ModelError, match="does not exist"):
        plan("model.id=./no-such-folder")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_seven_billion_parameters_take_no_memory() -> None:
    # VmHWM, not ru_maxrss: the latter starts from the size of the process that started this one
    code = (
        "from pathlib import Path\n"
        "from cgfedllm.config import load_config\n"
        "from cgfedllm.plan import make_plan\n"
        "make_plan(load_config(None, ['model.id=huggyllama/llama-7b']))\n"
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=240, capture_output=True, text=True
    )
    assert int(done.stdout) < 1_500_000  # KiB


def test_unknown_architectures_are_none() -> None:
    assert architecture("nobody/nothing") is None


# ---- what goes around the rounds ----------------------------------------------------------------


def test_stateless_clients_are_sent_the_whole_adapter_each_time(tiny: str) -> None:
    settings = ("federation.rounds=5", "federation.fraction_train=0.1", "evaluation.every=0")
    for codec in ("raw", "int8"):
        result = plan(
            tiny, *settings, f"downlink.name={codec}", "federation.stateless=true", clients=40
        )
        down = result.downlink
        # 4 train in each of 5 rounds; all evaluate at the start and at the end
        assert down.packets + down.whole_packets == 5 * 4 + 2 * 40
        assert down.total == (5 * 4 + 2 * 40) * down.whole_packet
    assert plan(tiny, "uplink.name=int8", "federation.stateless=true").memory.residual == 0


def test_a_flush_is_charged_for_all_who_took_part(tiny: str) -> None:
    settings = (tiny, "uplink.name=int8", "downlink.name=int8", "federation.rounds=3")
    without = plan(*settings, clients=4)
    flushed = plan(*settings, "uplink.flush=bf16", clients=4)
    packet = make_codec("bf16").packet_size(
        AdapterSpec.from_shapes({"x": (flushed.model.trained,)})
    )
    assert (flushed.uplink.flush_packet, flushed.uplink.flush_packets) == (packet, 4)
    assert flushed.uplink.total == without.uplink.total + 4 * packet
    assert flushed.uplink.total_fp32 == without.uplink.total_fp32 * 4 // 3
    assert flushed.uplink.seconds == without.uplink.seconds
    # evaluated once more, after it
    assert flushed.downlink.packets == without.downlink.packets + 4
    assert "4 residuals" in dict(flushed.rows())["uplink total"]
    few = plan(*settings, "uplink.flush=bf16", "federation.fraction_train=0.01", clients=100)
    assert 1 <= few.uplink.flush_packets <= 3


def test_a_codec_with_a_bit_budget_is_planned_by_it(
    tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Options(CodecOptions):
        bpp: float = 0.5

    int8 = type(make_codec("int8"))
    monkeypatch.setattr(int8, "payload_size", lambda self, spec: None)
    monkeypatch.setattr(int8, "Options", Options)
    result = plan(tiny, "uplink.name=int8", "uplink.options.bpp=0.25", clients=3)
    assert result.uplink.packet == -(-result.model.trained // 32)
    assert not result.uplink.exact
    assert result.uplink.total == 30 * result.uplink.packet
    assert f"about {result.uplink.packet:,} bytes" in dict(result.rows())["uplink packet"]


# ---- codecs that learn --------------------------------------------------------------------------


class Learning(LearnedCodec):
    """int8 with a state of four numbers."""

    name = "test-learning"

    def initial_state(self, spec: AdapterSpec, seed: int = 0) -> CodecState:
        return CodecState.of({"values": np.zeros(4, np.float32)})

    def payload_size(self, spec: AdapterSpec) -> int:
        return spec.size

    def adapt(self, state: CodecState, *args: Any, **kwargs: Any) -> CodecState:
        return CodecState.of(state.tensors, state.version + 1)

    fit = _encode = _decode = None  # type: ignore[assignment]


@pytest.fixture
def learning(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(base._REGISTRY, Learning.name, Learning)
    return f"uplink.name={Learning.name}"


@pytest.mark.parametrize("every", [0, 1, 2, 4])
@pytest.mark.parametrize("stateless", [False, True])
def test_codec_state_is_what_the_broadcaster_sends(
    tiny: str, learning: str, every: int, stateless: bool
) -> None:
    rounds, clients = 6, 3
    result = plan(
        tiny,
        learning,
        f"uplink.adapt_every={every}",
        f"federation.rounds={rounds}",
        f"federation.stateless={str(stateless).lower()}",
        clients=clients,
    )
    spec = AdapterSpec.from_shapes({"x": (result.model.trained,)})
    codec = make_codec(Learning.name)
    assert isinstance(codec, LearnedCodec)
    state = codec.initial_state(spec)
    server = CodecBroadcaster(spec, codec, state, held=True, stateless=stateless)
    sent = []
    for round_ in range(1, rounds + 1):
        sent += [server.broadcast(str(client)).blob for client in range(clients)]
        if every and round_ % every == 0:
            server.adapt([], round=round_, seed=0)
    planned = result.codec_state
    assert planned is not None
    assert planned.state == len(pack_whole(codec, state))
    assert planned.sent == sum(bool(blob) for blob in sent)
    # an increment may be shorter than the whole that is planned for it
    assert sum(map(len, sent)) <= planned.total == planned.sent * planned.state
    assert sum(map(len, sent)) == planned.total or not stateless


def test_pre_training_is_named(tiny: str, learning: str, tmp_path: Path) -> None:
    cold = plan(tiny, learning, clients=3)
    assert cold.codec_state.sent == 0
    rows = dict(cold.rows())
    assert rows["codec state, down"].startswith("at most 0 B: 0 times")
    assert "pre-training" not in rows
    codec = make_codec(Learning.name)
    assert isinstance(codec, LearnedCodec)
    path = tmp_path / "codec.safetensors"
    config = load_config(None, [tiny])
    spec, _ = specs_from_config(make_transformers_config(config.model.id), config.lora)
    card = {"cost": {"uplink_bytes": 2**20, "downlink_bytes": 2**21}}
    state = CodecState.of({"values": np.arange(4, dtype=np.float32)}, 10)
    save_codec_file(path, codec, state, spec, card)
    found = plan(tiny, learning, f"uplink.state={path}", clients=3)
    assert found.codec_state.state == len(pack_whole(codec, state))
    assert (found.codec_state.sent, found.codec_state.tgap_uplink) == (3, 2**20)
    assert dict(found.rows())["pre-training"] == "1.00 MiB up and 2.00 MiB down, before this run"
    assert found.to_dict()["codec_state"]["tgap_downlink"] == 2**21
    held = (f"uplink.state={path}", "uplink.clients_hold_state=true")
    assert plan(tiny, learning, *held, clients=3).codec_state.sent == 0
    with pytest.raises(CodecStateError, match="of another adapter"):
        plan(tiny, learning, f"uplink.state={path}", "lora.rank=2")


def test_codecs_that_learn_nothing_have_no_such_rows(tiny: str) -> None:
    result = plan(tiny, "uplink.name=int8")
    assert result.codec_state is None
    assert not any("codec state" in label for label, _ in result.rows())
