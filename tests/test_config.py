"""Configuration: what is refused and how, what is read back, what is not imported."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cgfedllm.config import Config, known_keys, load_config, parse_config
from cgfedllm.errors import ConfigError


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "key", "nearest"),
    [
        ("federation.round=3", "federation.round", "federation.rounds"),
        ("federatoin.rounds=3", "federatoin", "federation"),
        ("rounds=3", "rounds", "federation.rounds"),
        ("lr=0.1", "lr", "training.lr"),
        ("lora.r=4", "lora.r", "lora.rank"),
        ("training.learning_rate=1", "training.learning_rate", None),
        ("data.partition.client=3", "data.partition.client", "data.partition.clients"),
        ("federation.strategy.nam='x'", "federation.strategy.nam", "federation.strategy.name"),
        ("data.clients=3", "data.clients", "data.partition.clients"),
        ("completely_different=1", "completely_different", None),
    ],
)
def test_unknown_key_is_named_with_the_nearest(
    override: str, key: str, nearest: str | None
) -> None:
    message = refusal(override)
    assert f"{key}: unknown key" in message
    if nearest is not None:
        assert nearest in message


def test_without_a_near_key_the_tables_keys_are_listed() -> None:
    assert "lora.rank, lora.alpha" in refusal("lora.zzzzzzzzzz=1")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("lora.rank=0", "lora.rank"),
        ("lora.rank=-1", "lora.rank"),
        ("lora.rank=1.5", "lora.rank"),
        ("lora.rank='8'", "lora.rank"),
        ("lora.rank=true", "lora.rank"),
        ("lora.freeze_a=1", "lora.freeze_a"),
        ("lora.dropout=1.0", "lora.dropout"),
        ("lora.dropout=nan", "lora.dropout"),
        ("lora.alpha=inf", "lora.alpha"),
        ("lora.target_modules=q_proj", "lora.target_modules"),
        ("lora.target_modules=[]", "target_modules"),
        ("lora.target_modules=[1]", "lora.target_modules.0"),
        ("lora.rank_pattern.q_proj=0", "lora.rank_pattern.q_proj"),
        ("training.lr=nan", "training.lr"),
        ("training.lr=0", "training.lr"),
        ("training.betas=[0.9]", "training.betas"),
        ("training.betas=[0.9, 1.0]", "training.betas.1"),
        ("training.optimizer=adam", "training.optimizer"),
        ("federation.fraction_train=0", "federation.fraction_train"),
        ("federation.fraction_train=1.1", "federation.fraction_train"),
        ("federation.engine=ray", "federation.engine"),
        ("data.columns=3", "data.columns"),
        ("uplink.name=int9", "uplink.name"),
        ("uplink.options.levels=3", "uplink.options"),
        ("downlink.name=''", "downlink.name"),
        ("name=..", "name"),
        ("name=a/b", "name"),
        ("seed=-1", "seed"),
    ],
)
def test_bad_value_is_named_by_its_full_key(override: str, key: str) -> None:
    assert key in refusal(override)


def test_codec_is_named_with_the_nearest() -> None:
    assert "did you mean 'int8'" in refusal("uplink.name=int9")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["training.micro_batch_size=3"], "must divide"),
        (["data.partition.kind=iid"], "clients must be set"),
        (["data.partition.kind=dirichlet"], "clients must be set"),
        (["data.splits.validation=0.5", "data.splits.heldout=0.5"], "rows for training"),
        (["federation.aggregation=product", "federation.strategy.name=krum"], "'fedavg'"),
        (["federation.aggregation=product", "lora.freeze_a=true"], "lora.freeze_a"),
    ],
)
def test_contradictions(overrides: list[str], says: str) -> None:
    assert says in refusal(*overrides)


def test_steps_and_epochs_together_are_refused_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[training]\nlocal_steps = 2\nlocal_epochs = 1.0\n")
    with pytest.raises(ConfigError, match="local_steps or local_epochs"):
        load_config(path)


def test_setting_one_amount_of_training_replaces_the_other() -> None:
    config = load_config(None, ["training.local_epochs=2"])
    assert (config.training.local_steps, config.training.local_epochs) == (None, 2.0)
    again = config.with_overrides({"training.local_steps": 3})
    assert (again.training.local_steps, again.training.local_epochs) == (3, None)


def test_every_mistake_is_listed_at_once() -> None:
    message = refusal("lora.rank=0", "training.lr=-1", "federation.round=1")
    assert "lora.rank" in message
    assert "training.lr" in message
    assert "federation.rounds" in message


@pytest.mark.parametrize("item", ["", "=", "=3", "lora.rank"])
def test_malformed_override(item: str) -> None:
    assert "key=value" in refusal(item)


def test_override_below_a_value() -> None:
    assert "not a table" in refusal("seed=1", "seed.x=2")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"name = ", "not valid TOML"),
        (b"name = 'a'\nname = 'b'", "not valid TOML"),
        (b"\xff\xfe", "cannot be read"),
        (b"data = 3", "data"),
        (b"[data]\nsource = 3", "data.source"),
    ],
)
def test_bad_file(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        load_config(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


def test_override_values_are_toml_or_text() -> None:
    config = load_config(
        None,
        [
            "lora.rank = 4",
            "training.lr=1e-3",
            "lora.target_modules=['q_proj']",
            "model.id=org/model-7b#x",
            "data.columns.question=query text",
            "data.system_prompt=1\nseed = 9",
        ],
    )
    assert config.lora.rank == 4
    assert config.training.lr == 1e-3
    assert config.lora.target_modules == ["q_proj"]
    assert config.model.id == "org/model-7b#x"
    assert config.data.columns == {"question": "query text"}
    assert config.data.system_prompt == "1\nseed = 9"
    assert config.seed == 0


def test_paths_in_a_file_are_relative_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.jsonl").touch()
    (tmp_path / "demo").mkdir()
    path = tmp_path / "c.toml"
    monkeypatch.chdir("/")

    def source(value: str) -> str:
        path.write_text(f"data.source = '{value}'\n")
        return load_config(path).data.source

    assert source("rows/a.jsonl") == str(tmp_path / "rows" / "a.jsonl")
    assert source("rows/*.jsonl") == str(tmp_path / "rows" / "*.jsonl")
    assert source("./later.jsonl") == str(tmp_path / "later.jsonl")
    assert source("../x.jsonl") == str(tmp_path.parent / "x.jsonl")
    assert source("org/hub-id") == "org/hub-id"
    assert source("demo") == "demo"  # the built-in data, whatever lies there
    assert source("~/x.jsonl") == str(Path.home() / "x.jsonl")
    with pytest.raises(ConfigError, match=r"data\.source"):
        source("~nobody-of-that-name/x")


def test_paths_in_overrides_are_relative_to_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    config = load_config(None, ["data.source=a.jsonl", "model.id=org/model"])
    assert config.data.source == str(tmp_path / "a.jsonl")
    assert config.model.id == "org/model"


texts = st.text(max_size=20)
trees = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**31),
        "lora": st.fixed_dictionaries(
            {
                "rank": st.integers(1, 256),
                "target_modules": st.lists(texts, min_size=1, max_size=3),
                "rank_pattern": st.dictionaries(texts, st.integers(1, 64), max_size=3),
                "alpha_pattern": st.dictionaries(texts, st.floats(1e-3, 1e3), max_size=3),
            }
        ),
        "data": st.fixed_dictionaries(
            {
                "columns": st.dictionaries(texts, texts, max_size=3),
                "system_prompt": st.none() | texts,
            }
        ),
        "training": st.one_of(
            st.fixed_dictionaries({"local_steps": st.integers(1, 999)}),
            st.fixed_dictionaries({"local_epochs": st.floats(1e-3, 99)}),
        ),
        "uplink": st.fixed_dictionaries(
            {"name": st.sampled_from(["raw", "bf16", "int8"]), "error_feedback": st.booleans()}
        ),
    },
)


def read_back(config: Config, folder: Path) -> Config:
    path = folder / "config.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    return load_config(path)


@given(tree=trees, lr=st.floats(1e-9, 10))
def test_resolved_config_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any], lr: float
) -> None:
    config = parse_config(tree)
    folder = tmp_path_factory.getbasetemp()
    assert read_back(config, folder) == config
    changed = config.with_overrides({"training.lr": lr, "name": "other"})
    assert read_back(changed, folder) == changed
    assert changed.training.lr == lr


def test_known_keys_are_described() -> None:
    keys = known_keys()
    assert "federation.strategy.name" in keys
    assert [key for key, text in keys.items() if not text] == []


def test_importing_it_is_light() -> None:
    code = (
        "import sys, cgfedllm.config as c; c.load_config(None, ['uplink.name=int8'])\n"
        "heavy = {'torch', 'transformers', 'flwr', 'peft', 'datasets'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
