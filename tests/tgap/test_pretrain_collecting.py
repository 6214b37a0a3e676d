"""`cgfedllm pretrain` from nothing: updates are collected on D1, a codec is fitted on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from cgfedllm import api
from cgfedllm.adapter import AdapterUpdate
from cgfedllm.cli import app
from cgfedllm.codecs import Codec
from cgfedllm.codecs.learning import LearnedCodec
from cgfedllm.config import Config, load_config
from cgfedllm.data import load_federated_data
from cgfedllm.errors import (
    ConfigError,
    DataError,
    FederationError,
    PrivacyError,
    RecordingError,
    RunInterrupted,
)
from cgfedllm.federation import client_app
from cgfedllm.federation.codec_state import pack_whole
from cgfedllm.pretraining import Pretraining, learned_codec
from cgfedllm.report.figures import pretraining as pretraining_figures
from cgfedllm.runs import RunFolder
from cgfedllm.tgap.codec_file import CodecFile, load_codec_file
from cgfedllm.tgap.recording import Recording


def learned(file: CodecFile) -> LearnedCodec:
    codec = file.codec()
    assert isinstance(codec, LearnedCodec)
    return codec


MakeConfig = Callable[..., Config]
SMALL = ("training.local_steps=1", "federation.rounds=3", "tgap.rounds=2", "tgap.epochs=2")


@pytest.fixture(autouse=True)
def figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretraining_figures, "plot_fit", lambda *_: [])


def cli(*args: object) -> Any:
    return CliRunner().invoke(app, ["pretrain", *map(str, args)])


def test_from_a_configuration_to_a_codec_file(
    pca: str, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    # that of the run that comes after: on D2, with the codec file that is not there yet
    config = tiny_config(
        *SMALL, "data.part=d2", f"uplink.name={pca}", "uplink.options={components = 1}",
        f'uplink.state="{tmp_path / "not-yet"}"', "uplink.adapt_every=1",
    )  # fmt: skip
    (tmp_path / "c.toml").write_text(config.to_toml())
    result = cli(pca, tmp_path / "c.toml")
    assert result.exit_code == 0, result.output
    run = RunFolder(config.run_dir.with_name("tiny-tgap"))
    path = run.path / "codec.safetensors"
    rows = dict(line.split("  ", 1) for line in result.stdout.splitlines())
    assert rows["codec file"].strip() == str(path)
    recording = Recording.open(run.recording_dir)
    assert (recording.rounds(), len(recording.clients())) == ([1, 2], 3)
    d1 = load_federated_data(config.data.model_copy(update={"part": "d1"}), config.seed)
    examples = {entry.client: entry.examples for entry in recording.entries}
    assert examples == {client.name: len(client.train) for client in d1.clients}
    file = load_codec_file(path)
    file.check(recording.spec)
    assert file.options["components"] == 1  # the configuration's own
    last = run.records()[-1]
    assert last.uplink_bytes_total > recording.nbytes  # raw packets, headers too
    cost = file.card["cost"]
    assert cost["uplink_bytes"] == last.uplink_bytes_total
    assert cost["downlink_bytes"] == last.downlink_bytes_total > 0
    assert cost["collect_seconds"] > 0
    assert "metrics.jsonl" in cost["basis"]
    # once more: nothing is trained, nothing is fitted
    before = path.read_bytes()
    again = json.loads(cli(pca, tmp_path / "c.toml", "--json").stdout)
    assert (again["codec_file"], path.read_bytes()) == (str(path), before)
    # another codec on the same updates, quietly
    other = cli(
        f"{pca}:components=3", tmp_path / "c.toml", "-r", run.recording_dir, "--quiet",
        "--to", tmp_path / "three.safetensors",
    )  # fmt: skip
    assert other.stdout == f"{tmp_path / 'three.safetensors'}\n"
    charged = load_codec_file(tmp_path / "three.safetensors").card["cost"]
    assert charged["uplink_bytes"] == cost["uplink_bytes"]


def test_from_each_clients_own_training(pca: str, tiny_config: MakeConfig) -> None:
    config = tiny_config(*SMALL, "tgap.collect=local-only", "tgap.rounds=4", "tgap.span=2",
                         "tgap.validation_rounds=0.5")  # fmt: skip
    result = api.pretrain(config, pca)
    card = result.file.card
    assert card["recordings"][0]["kind"] == "local-only"
    assert card["recordings"][0]["data"]["part"] == "d1"
    assert card["splits"]["train"]["rounds"] == [[1, 2]]
    recording = Recording.open(config.run_dir.with_name("tiny-tgap-local-only") / "recording")
    assert card["cost"]["uplink_bytes"] == recording.nbytes


@pytest.mark.parametrize(
    ("codec", "asked", "optimizer"),
    [
        ("learned", "auto", "sgd"),
        ("learned", "run", "adamw"),
        ("cg_resnet", "auto", "adamw"),
        ("cg_resnet", "sgd", "sgd"),
    ],
)
def test_updates_are_collected_with_the_optimiser_that_teaches_most(
    tiny_config: MakeConfig, codec: str, asked: str, optimizer: str
) -> None:
    config = tiny_config(
        f"tgap.optimizer={asked}", "training.max_grad_norm=0", "tgap.rounds=4",
        "training.schedule=cosine", "federation.server_lr=2",
    )  # fmt: skip
    collecting = Pretraining(config, codec, collects=True).collecting
    training = collecting.training
    assert training.optimizer == optimizer
    if optimizer == "sgd":
        assert (training.lr, training.momentum, training.max_grad_norm) == (1.0, 0.0, 1.0)
        assert (training.schedule, collecting.federation.server_lr) == ("constant", 1.0)
    else:
        assert training == config.training


@pytest.mark.parametrize(
    ("codec", "settings", "collected"),
    [
        # directions of gradients show in few packets of few bits
        ("learned", (), ("int4", 4)),
        ("learned", ("tgap.rounds=9", "tgap.codec=raw"), ("raw", 9)),
        ("learned", ("tgap.optimizer=run",), ("raw", 6)),
        ("learned", ("tgap.collect=centralised",), ("raw", 4)),
        # an auto-encoder learns what it is to code, to the last bit
        ("cg_resnet", (), ("raw", 6)),
        ("cg_resnet", ("tgap.optimizer=sgd",), ("raw", 6)),
        ("cg_resnet", ("tgap.codec=int8",), ("int8", 6)),
    ],
)
def test_as_many_packets_are_collected_as_it_takes(
    tiny_config: MakeConfig, codec: str, settings: tuple[str, ...], collected: tuple[str, int]
) -> None:
    config = tiny_config("federation.rounds=6", *settings)
    made = Pretraining(config, codec, collects=True).collecting
    assert (made.uplink.name, made.federation.rounds) == collected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["tgap.codec=learned"], r"tgap\.codec.*'learned' has to learn first"),
        (["tgap.codec=nope"], r"tgap\.codec.*nope"),
        (["tgap.codec=int4", "tgap.collect=local-only"], r"tgap.*'int4' is for.*'federated'"),
    ],
)
def test_what_updates_cannot_be_collected_with(
    tiny_config: MakeConfig, settings: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(*settings)


def test_what_packets_left_of_the_updates_is_in_the_card(tiny_config: MakeConfig) -> None:
    result = api.pretrain(tiny_config(*SMALL), "learned")
    card = result.file.card
    assert "updates are as decoded from packets of int4" in card["notes"]
    recording = Recording.open(tiny_config().run_dir.with_name("tiny-tgap") / "recording")
    assert card["cost"]["uplink_bytes"] < recording.nbytes / 4


def test_a_codec_that_learns_gradients_is_fitted_and_used(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    path = tmp_path / "learned.safetensors"
    longer = tiny_config(*SMALL, "tgap.rounds=3")  # in the first of all, A has no gradient
    result = api.pretrain(longer, "learned:bpp=1.0,directions=2", to=path)
    assert result.file.card["fit"]["epochs_run"] == 1
    assert '[training]\nsubspace = "A"' in result.card_path.read_text()
    config = tiny_config(*SMALL, "data.part=d2", "uplink.name=learned", f'uplink.state="{path}"')
    first, *_, last = api.run(config).records
    assert not last.failures
    assert last.codec_bytes_total == first.codec_bytes_total + 3 * len(
        pack_whole(result.file.codec(), result.file.state)
    )


@pytest.mark.parametrize("kinds", ["A", "AB"])
def test_what_is_trained_along_its_directions_is_what_it_codes(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kinds: str
) -> None:
    path = tmp_path / "learned.safetensors"
    longer = tiny_config(*SMALL, "tgap.rounds=3")  # in the first of all, A has no gradient
    file = api.pretrain(longer, "learned:directions=2", to=path).file
    sent: list[AdapterUpdate] = []
    encode = client_app.encode_with_feedback

    def watched(codec: Codec, update: AdapterUpdate, *args: Any, **kwargs: Any) -> Any:
        sent.append(update)
        return encode(codec, update, *args, **kwargs)

    monkeypatch.setattr(client_app, "encode_with_feedback", watched)
    config = tiny_config(
        *SMALL, "data.part=d2", "uplink.name=learned", f'uplink.state="{path}"',
        f"training.subspace={kinds}", "uplink.error_feedback=false",
    )  # fmt: skip
    api.run(config)
    directions = learned(file).directions(file.state, file.spec)
    assert len(sent) == 9
    for update in sent:
        views = update.views()
        for name in directions:  # A has no gradient before B has grown
            view = views[name]
            rows = view if "lora_A" in name else view.T
            left = np.abs(rows - rows @ directions[name].T @ directions[name]).max()
            if "lora_A" in name or "B" in kinds:
                assert left <= 1e-4 * np.abs(rows).max()
            else:
                assert left > 0.1 * np.abs(rows).max()


def test_a_state_that_knows_no_directions_cannot_be_trained_along(
    pca: str, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    path = tmp_path / "pca.safetensors"
    api.pretrain(tiny_config(*SMALL), pca, to=path)
    config = tiny_config(
        *SMALL, f"uplink.name={pca}", f'uplink.state="{path}"', "training.subspace=A"
    )
    with pytest.raises(FederationError, match="knows no directions to train along"):
        api.run(config)


def test_a_client_too_small_for_d1_is_named(
    pca: str, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    rows = [{"client": c, "question": f"what {n}", "answer": "so"} for c, n in
            [("big", n) for n in range(20)] + [("small", 99)]]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny_config(*SMALL, f'data.source="{tmp_path / "rows.jsonl"}"',
                         "data.partition.min_rows=1")  # fmt: skip
    with pytest.raises(DataError, match="client 'small' has no row for d1"):
        api.pretrain(config, pca)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (["tgap.rounds=1"], RecordingError, r"tgap\.rounds = 1.*too few to split"),
        (["tgap.span=2", "tgap.rounds=8"], ConfigError, r"span = 2.*'federated'"),
        (["privacy.mechanism=central", "federation.weighting=uniform"], PrivacyError, "central"),
        (
            ["privacy.mechanism=local", "tgap.collect=local-only"],
            PrivacyError,
            "before any noise, and what a codec learns from them goes to all clients",
        ),
        (
            [
                "privacy.secagg.enabled=true",
                "federation.weighting=uniform",
                "uplink.name=sketch",
                "uplink.options={scale_exponent=-12}",
            ],
            ConfigError,
            "pre-training collects them",
        ),
    ],
)
def test_what_cannot_end_well_is_refused_before_anything_is_trained(
    pca: str,
    tiny_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    changes: list[str],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.setattr(api, "record", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(error, match=message):
        api.pretrain(tiny_config(*SMALL, *changes), pca)


def test_the_configuration_may_be_that_of_the_run_with_sums_only(tiny_config: MakeConfig) -> None:
    """What a state is for is there already; that it is not fitted yet is no obstacle."""
    config = tiny_config(
        *SMALL, "uplink.name=learned", "uplink.options={bits=6, scale_exponent=-9}",
        'uplink.state="not/yet.safetensors"', "training.subspace=AB",
        "privacy.secagg.enabled=true", "federation.weighting=uniform",
    )  # fmt: skip
    for text, exponent in (("learned", -9), ("learned:directions=8", None)):
        options = learned_codec(config, text).options.model_dump()
        assert options["scale_exponent"] == exponent


@pytest.mark.parametrize(("kind", "what"), [("federated", "goes on"), ("centralised", "collects")])
def test_stopped_while_collecting(
    pca: str, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, kind: str, what: str
) -> None:
    asked: list[Any] = []

    def record(config: Config, *options: Any) -> api.RecordingResult:
        asked.append((config, options))
        run = api.RunResult(config.run_dir, config.run_dir / "adapter", [], interrupted=True)
        return api.RecordingResult(run, config.run_dir / "recording")

    monkeypatch.setattr(api, "_record", record)
    with pytest.raises(RunInterrupted, match=f"the same command {what}"):
        api.pretrain(tiny_config(*SMALL, f"tgap.collect={kind}"), pca)
    ((config, (_, collected, *_)),) = asked
    assert (collected, config.name, config.uplink.name) == (kind, "tiny-tgap", "raw")
    assert (config.evaluation.heldout, config.evaluation.clients) == (False, False)


# ---- the command --------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    heard: list[Any] = []

    def pretrain(config: Config, codec: str, **options: Any) -> None:
        heard.append((config, codec, options))
        raise RunInterrupted("stopped; the same command goes on")

    monkeypatch.setattr(api, "pretrain", pretrain)
    return heard


def test_options(pca: str, calls: list[Any], tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[tgap]\nepochs = 7\n")
    result = cli(
        f"{pca}:components=3", tmp_path / "c.toml", "--set", "tgap.span=2", "--name", "n",
        "--output", tmp_path, "-r", "one", "--recording", "two", "--to", "x.safetensors",
        "--overwrite",
    )  # fmt: skip
    assert result.exit_code == 130
    assert "the same command goes on" in result.stderr
    ((config, codec, options),) = calls
    assert (config.tgap.epochs, config.tgap.span, config.run_dir) == (7, 2, tmp_path / "n")
    assert codec == f"{pca}:components=3"
    assert options == {
        "recordings": [Path("one"), Path("two")], "to": Path("x.safetensors"), "overwrite": True,
    }  # fmt: skip


def test_without_a_configuration_a_recording_gives_the_name(
    pca: str, calls: list[Any], write: Callable[..., Path]
) -> None:
    cli(pca, "-r", write("r", config=load_config(None, ["name=medquad"])))
    assert calls[0][0].name == "medquad"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["int8"], "learns nothing"),
        (["test-pc"], "did you mean 'test-pca'"),
        (["test-pca", "--quiet", "--json"], "exclude each other"),
        (["test-pca", "--set", "tgap.sampling=steps"], "tgap.sampling"),
        (["test-pca", "--set", "tgap.validation_rounds=1.0"], "tgap.validation_rounds"),
    ],
)
def test_usage_errors(pca: str, calls: list[Any], args: list[str], message: str) -> None:
    result = cli(*args)
    assert result.exit_code == 2
    assert message in result.stderr
    assert calls == []
