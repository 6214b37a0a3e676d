"""What a node is told by whoever starts it, and what comes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

import cgfedllm
from cgfedllm.config import Config
from cgfedllm.errors import ConfigError, DataError, FederationError, PrivacyError
from cgfedllm.federation.node import node_data, node_workspace, state_folder
from cgfedllm.workspace import workspace_for

MakeConfig = Callable[..., Config]
RUN = "0123456789abcdef"


def node(config: Config, **settings: str | int) -> Context:
    told = {key.replace("_", "-"): value for key, value in settings.items()}
    return Context(1, 2, told, RecordDict(), {"config": config.to_toml()})


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "ward 7.jsonl"
    path.write_text(
        "".join(json.dumps({"question": f"why {n}", "answer": f"so {n}"}) + "\n" for n in range(20))
    )
    return path


def test_a_node_trains_on_rows_of_its_own(tiny_config: MakeConfig, rows: Path) -> None:
    context = node(tiny_config("data.source=node"), data=str(rows), name="clinic a/b")
    data = node_data(node_workspace(context), context)
    assert data.name == "clinic-a-b"  # safe as a file name
    assert len(data.train) + len(data.validation) == 20  # nothing is held out for a server


def test_a_node_is_called_like_its_file_unless_told(tiny_config: MakeConfig, rows: Path) -> None:
    context = node(tiny_config("data.source=node"), data=str(rows))
    assert node_data(node_workspace(context), context).name == "ward-7"


def test_rows_of_its_own_are_split_as_among_others(
    tiny_config: MakeConfig, tmp_path: Path, tiny_data: Path
) -> None:
    """So a run over a network ends as in one process that has everybody's files."""
    for client in ("north", "south"):
        lines = [line for line in tiny_data.read_text().splitlines() if f'"{client}"' in line]
        (tmp_path / f"{client}.jsonl").write_text("\n".join(lines))
    together = tiny_config(
        f'data.source="{tmp_path}/*.jsonl"',
        "data.partition.kind=files",
        f'data.heldout_source="{tiny_data}"',
        "data.splits.heldout=0",
    ).with_overrides({"data.heldout_source": None})
    expected = workspace_for(together.to_toml(), "").data.clients
    for number, client in enumerate(("north", "south")):
        context = node(tiny_config("data.source=node"), data=str(tmp_path / f"{client}.jsonl"))
        own = node_data(node_workspace(context), context)
        assert own == expected[number]


@pytest.mark.parametrize(
    ("source", "settings", "wrong"),
    [
        ("node", {}, "this one has none"),
        ("demo", {"data": "rows.jsonl"}, "data.source = 'demo'"),
        ("demo", {}, "no partition-id"),
        (None, {"partition-id": 99}, "partition 99 does not exist"),
        ("node", {"dta": "rows.jsonl"}, "'dta', which means nothing here"),
    ],
)
def test_settings_that_do_not_fit_the_run_are_refused(
    tiny_config: MakeConfig, source: str | None, settings: dict[str, str | int], wrong: str
) -> None:
    context = node(tiny_config(*[f"data.source={source}"] * bool(source)), **settings)
    with pytest.raises(DataError, match=wrong):
        node_data(node_workspace(context), context)


def test_a_node_may_have_its_own_copy_of_the_model(
    tiny_config: MakeConfig, tiny_model: Path, rows: Path
) -> None:
    config = tiny_config("data.source=node", "model.id=organisation/model")
    workspace = node_workspace(node(config, data=str(rows), model=str(tiny_model)))
    assert workspace.config.model.id == str(tiny_model)


def test_each_run_has_a_memory_of_its_own(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    config = tiny_config()
    assert state_folder(node(config), "north", RUN) == tmp_path / "home/cgfedllm" / RUN / "north"
    told = node(config, state_dir=str(tmp_path / "disk"))
    assert state_folder(told, "north", RUN) == tmp_path / "disk" / RUN / "north"


@pytest.mark.parametrize(
    "key", ["", "../../etc", "0123456789ABCDEF", RUN + "0", "/tmp", RUN + "\n"]
)
def test_a_server_cannot_choose_where_a_client_writes(
    tiny_config: MakeConfig, tmp_path: Path, key: str
) -> None:
    with pytest.raises(FederationError, match="another app"):
        state_folder(node(tiny_config(), state_dir=str(tmp_path)), "north", key)


def test_one_process_has_no_nodes(tiny_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match="--superlink"):
        cgfedllm.run(tiny_config("data.source=node"))


def test_privacy_needs_to_know_how_many_clients_there_are(tiny_config: MakeConfig) -> None:
    private = ("privacy.mechanism=local", "privacy.delta=1e-5", "uplink.error_feedback=false")
    unknown = tiny_config("data.source=node", *private)
    with pytest.raises(PrivacyError, match=r"federation\.clients"):
        _ = workspace_for(unknown.to_toml(), "").privacy
    known = tiny_config("data.source=node", "federation.clients=3", *private)
    plan = workspace_for(known.to_toml(), "").privacy
    assert plan is not None
    assert plan.clients == 3


def test_a_wrong_number_of_clients_is_noticed(tiny_config: MakeConfig) -> None:
    with pytest.raises(DataError, match=r"federation\.clients is 5, but the data has 3"):
        cgfedllm.run(tiny_config("federation.clients=5"))
