"""The public API: compare, references, evaluate, export, and the promise of equal results."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cgfedllm
from cgfedllm import events
from cgfedllm.config import Config, load_config
from cgfedllm.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    RunInterrupted,
    StorageError,
)
from cgfedllm.evaluation.nll import NllResult
from cgfedllm.peft_format import load_adapter
from cgfedllm.runs import RunFolder

MakeConfig = Callable[..., Config]

QUICK = ("federation.rounds=1", "evaluation.clients=false", "data.splits.test=0.1")


class Stop(Exception):
    pass


def result_of(run_dir: Path) -> tuple[list[dict[str, Any]], bytes]:
    """Metrics without the clock, and the adapter's bytes."""
    rows = []
    for record in RunFolder(run_dir).records():
        row = record.to_dict()
        row.pop("seconds")
        for client in row["clients"]:
            for key in ("train_seconds", "encode_seconds", "decode_seconds"):
                client.pop(key)
        rows.append(row)
    return rows, (run_dir / "adapter" / "adapter_model.safetensors").read_bytes()


def started() -> tuple[list[str], Callable[[events.Event], None]]:
    """Names of the runs that start, and the listener that notes them."""
    names: list[str] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.RunStarted):
            names.append(event.name)

    return names, listen


# ---- equal configurations give equal results ----------------------------------------------------


def test_same_configuration_same_seed_same_result(tiny_config: MakeConfig) -> None:
    settings = (
        "lora.dropout=0.1",
        "uplink.name=int8",
        "downlink.name=bf16",
        "federation.fraction_train=0.7",
    )
    one = cgfedllm.run(tiny_config(*settings, "name=one"))
    cgfedllm.run(tiny_config("seed=9", "name=between"))
    two = cgfedllm.run(tiny_config(*settings, "name=two"))
    assert result_of(one.run_dir) == result_of(two.run_dir)


def test_another_seed_gives_another_result(tiny_config: MakeConfig) -> None:
    runs = [cgfedllm.run(tiny_config(*QUICK, f"seed={s}", f"name=s{s}")) for s in (0, 1)]
    assert runs[0].records[-1].heldout_nll != runs[1].records[-1].heldout_nll


def test_the_config_in_the_run_folder_reruns_the_experiment_exactly(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    """In a fresh process, from another working folder."""
    first = cgfedllm.run(tiny_config("uplink.name=int8", "federation.rounds=2"))
    file = first.run_dir / "config.toml"
    assert load_config(file).to_toml() == file.read_text()
    done = subprocess.run(
        [sys.executable, "-m", "cgfedllm.cli", "run", str(file), "--name", "again", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert result_of(first.run_dir) == result_of(first.run_dir.with_name("again"))


def test_watching_does_not_change_the_result(tiny_config: MakeConfig) -> None:
    heard: list[events.Event] = []
    quiet = cgfedllm.run(tiny_config(*QUICK, "name=quiet"))
    watched = cgfedllm.run(
        tiny_config(*QUICK, "name=watched", "tracking.tensorboard=true"), listeners=[heard.append]
    )
    assert result_of(quiet.run_dir) == result_of(watched.run_dir)
    assert {type(event) for event in heard} >= {
        events.RunStarted,
        events.RoundStarted,
        events.ClientStarted,
        events.StepFinished,
        events.ClientFinished,
        events.EvaluationProgress,
        events.RoundFinished,
    }


# ---- compare ------------------------------------------------------------------------------------


def test_compare_runs_every_codec_with_every_seed(tiny_config: MakeConfig) -> None:
    config = tiny_config(*QUICK)
    result = cgfedllm.compare(config, ["raw", "int8"], [0, 3])
    assert [(e.codec, e.seed) for e in result.entries] == [
        ("raw", 0),
        ("raw", 3),
        ("int8", 0),
        ("int8", 3),
    ]
    raw, int8 = result.entries[0].records, result.entries[2].records
    assert raw[0].heldout_nll == int8[0].heldout_nll, "seeds are paired"
    assert raw[1].uplink_bytes > 3 * int8[1].uplink_bytes
    for entry in result.entries:
        folder = RunFolder(config.run_dir.with_name(f"tiny-{entry.codec}-seed{entry.seed}"))
        assert folder.config().uplink.name == entry.codec
        assert folder.config().seed == entry.seed


def test_complete_cells_are_not_run_again(tiny_config: MakeConfig) -> None:
    config = tiny_config(*QUICK)
    first = cgfedllm.compare(config, ["raw", "int8"])
    names, listen = started()
    wider = cgfedllm.compare(config, ["raw", "int8", "bf16"], [0, 1], listeners=[listen])
    assert sorted(names) == [
        "tiny-bf16-seed0",
        "tiny-bf16-seed1",
        "tiny-int8-seed1",
        "tiny-raw-seed1",
    ]
    assert wider.entries[0] == first.entries[0]


def test_broken_cells_are_resumed(tiny_config: MakeConfig) -> None:
    config = tiny_config("federation.rounds=2", "evaluation.clients=false")
    resumed: list[tuple[str, int]] = []

    def stop(event: events.Event) -> None:
        if isinstance(event, events.RunStarted):
            resumed.append((event.name, event.resumed_from))
        elif (
            isinstance(event, events.RoundFinished)
            and event.record.round == 1
            and len(resumed) == 2
        ):
            raise Stop

    with pytest.raises(Stop):
        cgfedllm.compare(config, ["raw", "int8"], listeners=[stop])
    resumed.clear()
    names: list[tuple[str, int]] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.RunStarted):
            names.append((event.name, event.resumed_from))

    result = cgfedllm.compare(config, ["raw", "int8"], listeners=[listen])
    assert names == [("tiny-int8-seed0", 1)]
    unbroken = cgfedllm.run(config.with_overrides({"uplink.name": "int8", "name": "unbroken"}))
    assert result.entries[1].records[-1].heldout_nll == unbroken.records[-1].heldout_nll


def test_the_configured_codec_keeps_its_options(tiny_config: MakeConfig) -> None:
    config = tiny_config(*QUICK, "uplink.name=int8", "uplink.error_feedback=false")
    cgfedllm.compare(config, ["int8", "bf16"])
    for codec in ("int8", "bf16"):
        uplink = RunFolder(config.run_dir.with_name(f"tiny-{codec}-seed0")).config().uplink
        assert (uplink.name, uplink.error_feedback) == (codec, False)


def test_references_are_rows_of_their_own(tiny_config: MakeConfig) -> None:
    config = tiny_config(*QUICK)
    references = ["centralised", "local-only"]
    result = cgfedllm.compare(config, ["raw", "int8"], [0], references=references)
    assert [entry.codec for entry in result.entries] == ["raw", "int8", *references]
    starts = {entry.records[0].heldout_nll for entry in result.entries}
    assert len(starts) == 1
    assert all(e.records[-1].heldout_nll < e.records[0].heldout_nll for e in result.entries)
    names, listen = started()
    assert (
        cgfedllm.compare(config, ["raw", "int8"], [0], references=references, listeners=[listen])
        == result
    )
    assert names == []


@pytest.mark.parametrize("label", ["int8", "centralised"])
def test_results_of_another_configuration_are_not_passed_off_as_this_ones(
    tiny_config: MakeConfig, label: str
) -> None:
    config = tiny_config(*QUICK)
    references = [label] if label == "centralised" else []
    codecs = ["raw", *({label} - set(references))]
    cgfedllm.compare(config, codecs, references=references)
    shutil.rmtree(config.run_dir.with_name("tiny-raw-seed0"))
    changed = config.with_overrides({"training.lr": 1e-3})
    names, listen = started()
    with pytest.raises(ConfigError, match=rf"{label}.*another configuration.*--name"):
        cgfedllm.compare(changed, codecs, references=references, listeners=[listen])
    assert names == [], "found before anything is trained"


def test_trackers_and_folders_do_not_make_a_cell_another(tiny_config: MakeConfig) -> None:
    config = tiny_config(*QUICK)
    cgfedllm.compare(config, ["raw", "int8"])
    names, listen = started()
    tracked = config.with_overrides({"tracking.tensorboard": True})
    cgfedllm.compare(tracked, ["raw", "int8"], listeners=[listen])
    assert names == []


def test_a_stopped_comparison_says_so(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cgfedllm import api

    monkeypatch.setattr(
        api, "run", lambda config, **_: api.RunResult(config.run_dir, Path(), [], True)
    )
    with pytest.raises(RunInterrupted, match="run the same command again"):
        cgfedllm.compare(tiny_config(*QUICK), ["raw", "int8"])


# ---- references ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["centralised", "local-only"])
def test_a_reference_has_a_folder_of_its_own(tiny_config: MakeConfig, kind: str) -> None:
    config = tiny_config("federation.rounds=2")
    result = cgfedllm.reference(config, kind)
    assert result.run_dir == config.run_dir.with_name(f"tiny-{kind}")
    assert [record.round for record in result.records] == [0, 1, 2]
    assert not result.interrupted
    folders = (
        [result.adapter_dir]
        if kind == "centralised"
        else [result.adapter_dir / name for name in ("north", "south", "west")]
    )
    assert all(load_adapter(folder).norm() > 0 for folder in folders)
    assert cgfedllm.resume(result.run_dir) == result, "complete"


def test_a_stopped_reference_is_not_resumed_as_a_federation(tiny_config: MakeConfig) -> None:
    config = tiny_config("federation.rounds=2")

    def stop(event: events.Event) -> None:
        if isinstance(event, events.RoundFinished) and event.record.round == 1:
            raise Stop

    with pytest.raises(Stop):
        cgfedllm.reference(config, "centralised", listeners=[stop])
    with pytest.raises(CheckpointError, match="references have none"):
        cgfedllm.resume(config.run_dir.with_name("tiny-centralised"))


def test_an_unknown_reference(tiny_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"centralised, local-only; got 'central'"):
        cgfedllm.reference(tiny_config(), "central")


# ---- evaluate -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(
    tiny_model: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> cgfedllm.RunResult:
    """A complete run with every split; tests only read it."""
    output = tmp_path_factory.mktemp("finished")
    config = load_config(
        None,
        [
            f'model.id="{tiny_model}"',
            f'data.source="{tiny_data}"',
            "data.format=qa",
            "data.max_length=96",
            "data.partition.kind=natural",
            "data.partition.column=client",
            "data.splits.validation=0.1",
            "data.splits.test=0.1",
            "data.splits.heldout=0.1",
            "lora.rank=4",
            "training.batch_size=4",
            "training.local_steps=3",
            "training.lr=5e-3",
            "federation.rounds=2",
            "tracking.tensorboard=false",
            f'output="{output}"',
        ],
    )
    return cgfedllm.run(config)


def test_evaluation_of_a_run_gives_what_the_run_measured(finished: cgfedllm.RunResult) -> None:
    result = cgfedllm.evaluate(finished.run_dir)
    assert [each.name for each in result.adapter] == ["held-out"]
    assert result.adapter[0].nll == finished.records[-1].heldout_nll
    assert result.base[0].nll == finished.records[0].heldout_nll
    assert result.adapter[0].perplexity == pytest.approx(math.exp(result.adapter[0].nll))
    assert result.adapter[0].rows == 12
    validation = cgfedllm.evaluate(finished.run_dir, split="validation")
    measured = {each.name: each.nll for each in validation.adapter}
    assert measured == finished.records[-1].client_nll


def test_the_test_split_has_a_row_for_each_client(finished: cgfedllm.RunResult) -> None:
    result = cgfedllm.evaluate(finished.run_dir, split="test")
    assert [each.name for each in result.adapter] == ["north", "south", "west"]
    assert all(a.nll < b.nll for a, b in zip(result.adapter, result.base, strict=True))
    assert json.loads(json.dumps(result.to_dict()))["split"] == "test"
    assert len(result.rows()) == 3
    assert "perplexity" in result.rows()[0][1]


def test_an_adapter_folder_is_evaluated_with_a_config(
    finished: cgfedllm.RunResult, tmp_path: Path
) -> None:
    exported = cgfedllm.export(finished.run_dir, tmp_path / "adapter")
    config = RunFolder(finished.run_dir).config()
    by_folder = cgfedllm.evaluate(exported, config=config)
    assert by_folder == cgfedllm.evaluate(finished.run_dir)


def test_what_cannot_be_evaluated(
    finished: cgfedllm.RunResult, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"heldout, validation, test; got 'train'"):
        cgfedllm.evaluate(finished.run_dir, split="train")
    with pytest.raises(ConfigError, match=r"not a run folder.*--config"):
        cgfedllm.evaluate(finished.adapter_dir)
    with pytest.raises(CheckpointError, match="no adapter"):
        cgfedllm.evaluate(tmp_path, config=tiny_config())
    with pytest.raises(AdapterError, match=r"does not fit this model and \[lora\] table"):
        cgfedllm.evaluate(finished.adapter_dir, config=tiny_config("lora.rank=2"))
    with pytest.raises(ConfigError, match=r"'test' split is empty.*data\.splits\.test"):
        cgfedllm.evaluate(finished.adapter_dir, config=tiny_config(), split="test")
    config = tiny_config("data.splits.heldout=0")
    with pytest.raises(ConfigError, match=r"'heldout' split is empty.*data\.heldout_source"):
        cgfedllm.evaluate(finished.adapter_dir, config=config)


def test_perplexity_of_an_enormous_loss_is_infinite() -> None:
    assert NllResult(nll=1e4, label_tokens=1, rows=1).perplexity == math.inf
    assert NllResult(nll=2.0, label_tokens=1, rows=1).perplexity == pytest.approx(7.389, abs=1e-3)


# ---- export -------------------------------------------------------------------------------------


def generate(model: Any, tokenizer: Any) -> list[int]:
    import torch

    inputs = tokenizer("what is the colour of the sky", return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return output[0].tolist()


def test_an_exported_adapter_loads_in_plain_peft_and_generates(
    finished: cgfedllm.RunResult, tiny_model: Path, tmp_path: Path
) -> None:
    import peft
    import torch
    import transformers

    folder = cgfedllm.export(finished.run_dir, tmp_path / "adapter")
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    with torch.inference_mode():
        ids = torch.arange(5, 25)[None]
        before = base(input_ids=ids).logits.clone()
        model = peft.PeftModel.from_pretrained(base, folder)
        after = model(input_ids=ids).logits
    assert not torch.allclose(before, after)
    assert len(generate(model, tokenizer)) > 6


def test_a_merged_model_loads_in_plain_transformers_and_says_the_same(
    finished: cgfedllm.RunResult, tiny_model: Path, tmp_path: Path
) -> None:
    import peft
    import torch
    import transformers

    folder = cgfedllm.export(finished.run_dir, tmp_path / "merged", merge=True)
    merged = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted = peft.PeftModel.from_pretrained(base, finished.adapter_dir)
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        np.testing.assert_allclose(
            merged(input_ids=ids).logits, adapted(input_ids=ids).logits, atol=1e-4
        )
    assert generate(merged, tokenizer) == generate(adapted, tokenizer)


def test_exporting_leaves_the_shared_model_as_it_was(
    finished: cgfedllm.RunResult, tmp_path: Path
) -> None:
    before = cgfedllm.evaluate(finished.run_dir)
    cgfedllm.export(finished.run_dir, tmp_path / "merged", merge=True)
    assert cgfedllm.evaluate(finished.run_dir) == before


def test_what_cannot_be_exported(
    finished: cgfedllm.RunResult, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="not a run folder"):
        cgfedllm.export(tmp_path, tmp_path / "to")

    def stop(event: events.Event) -> None:
        if isinstance(event, events.RoundFinished):
            raise Stop

    config = tiny_config()
    with pytest.raises(Stop):
        cgfedllm.run(config, listeners=[stop])
    with pytest.raises(CheckpointError, match=rf"no adapter yet.*cgfedllm resume {config.run_dir}"):
        cgfedllm.export(config.run_dir, tmp_path / "to")
    file = tmp_path / "file"
    file.write_text("")
    for merge in (False, True):
        with pytest.raises(StorageError, match="cannot write"):
            cgfedllm.export(finished.run_dir, file / "below", merge=merge)
    assert not (tmp_path / "to").exists()
