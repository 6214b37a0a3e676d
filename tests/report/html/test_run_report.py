"""What the report of a run says."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cgfedllm.adapter import AdapterSpec
from cgfedllm.errors import CheckpointError
from cgfedllm.metrics import ClientRecord, FailureRecord, ModuleRecord, RoundRecord
from cgfedllm.report.html.page import write_run_report
from cgfedllm.runs import RunFolder
from cgfedllm.storage import save_tensors, write_json

MakeRun = Callable[..., RunFolder]
ReportOf = Callable[[RunFolder], Any]

TRAFFIC = "Bytes of the whole run, over all clients"
CLIENTS = "Clients over the whole run"
ROUNDS = "All rounds"


def test_the_headline_says_what_came_out(
    make_run: MakeRun, report_of: ReportOf, records: list[RoundRecord]
) -> None:
    page = report_of(make_run(records, "uplink.name=int8"))
    assert page.of("h1") == ["trial"]
    assert "finished" in page.of("span")
    assert (
        "3 clients trained one adapter in 3 rounds. Held-out NLL fell by 0.6000 nats per label "
        "token. The uplink carried 4.00 times fewer bytes than bare float32." in page.text
    )
    assert page.of("strong") == ["2.4000", "4.00× fewer", "8", "1:11 min"]
    assert "−0.6000 from 3.0000, nats per label token" in page.text
    assert "7.91 MiB instead of 31.6 MiB" in page.text


def test_each_kind_of_bytes_stands_apart(
    make_run: MakeRun, report_of: ReportOf, learning: list[RoundRecord]
) -> None:
    page = report_of(make_run(learning, "uplink.name=cg_cnn"))
    table = page.table(TRAFFIC)
    assert table["Uplink"] | {"kind": ""} == {
        "kind": "", "codec": "cg_cnn", "sent": "7.91 MiB", "as fp32": "31.6 MiB",
        "fewer": "4.00x", "bits per parameter": "8",
    }  # fmt: skip
    assert table["Downlink"]["sent"] == "31.6 MiB"
    assert table["Codec state, down"]["sent"] == "3.00 MiB"
    assert table["Pre-training, up"]["sent"] == "5.00 MiB"
    assert "Pre-training, down" not in table
    assert "pre-training apart, 5.00 MiB" in page.text
    assert {
        "Bytes sent so far",
        "Uplink in each round",
        "Downlink in each round",
        "Codec state sent down in each round",
    } <= set(page.of("figcaption"))


def test_a_kind_that_was_never_sent_has_no_chart(
    make_run: MakeRun, report_of: ReportOf, records: list[RoundRecord]
) -> None:
    page = report_of(make_run(records))
    assert "Codec state sent down in each round" not in page.of("figcaption")
    assert "Codec state, down" not in page.table(TRAFFIC)


def test_charts_are_told_in_words(
    make_run: MakeRun, report_of: ReportOf, records: list[RoundRecord]
) -> None:
    page = report_of(make_run(records))
    assert (
        "held-out rows: 3.0000 at round 0, 2.4000 at round 3; lowest 2.4000, highest 3.0000. "
        "clients’ own rows, mean: 3.0900 at round 0, 2.4900 at round 3; "
        "lowest 2.4900, highest 3.0900." in page.of("desc")
    )
    drawings = [attributes for tag, attributes in page.tags if tag == "svg"]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for attributes in drawings:
        named = attributes.get("aria-label") or attributes.get("aria-hidden")
        assert named or set(attributes["aria-labelledby"].split()) <= set(ids)


def test_a_row_for_each_client(
    make_run: MakeRun, report_of: ReportOf, records: list[RoundRecord]
) -> None:
    table = report_of(make_run(records)).table(CLIENTS)
    assert table["numpy"] == {
        "client": "numpy", "rows": "100", "weight": "33.3 %", "rounds": "3",
        "NLL before": "3.1000", "NLL after": "2.5000", "change": "−0.6000",
        "uplink": "2.64 MiB", "downlink": "10.5 MiB", "training": "15.0 s", "failures": "0",
    }  # fmt: skip
    # never gave a usable reply, and is not forgotten
    assert table["sklearn"]["failures"] == "1"
    assert table["sklearn"]["rows"] == table["sklearn"]["NLL after"] == "–"


def test_weights_are_those_of_the_average(
    make_run: MakeRun, report_of: ReportOf, records: list[RoundRecord]
) -> None:
    for record in records[1:]:
        record.clients[0].examples = 300
    table = report_of(make_run(records)).table(CLIENTS)
    assert [table[name]["weight"] for name in ("numpy", "torch")] == ["60.0 %", "20.0 %"]
    equal = report_of(make_run(records, "federation.weighting=uniform")).table(CLIENTS)
    assert equal["numpy"]["weight"] == equal["torch"]["weight"] == "33.3 %"
    summed = report_of(make_run(records, "federation.aggregation=sum")).table(CLIENTS)
    assert "weight" not in summed["numpy"]


def test_faults_say_who_when_and_why(
    make_run: MakeRun, report_of: ReportOf, records: list[RoundRecord]
) -> None:
    records[3].attempts = 2
    folder = make_run(records)
    folder.note_resume(1)
    page = report_of(folder)
    assert page.table("1 reply that could not be used")["2"] == {
        "round": "2", "client": "sklearn", "reason": "NaN loss",
    }  # fmt: skip
    assert "Round 3 was tried 2 times: too few replies were usable." in page.text
    assert "The run was stopped and went on after round 1 (" in page.text
    assert "resumed after round 1" in page.table("Where and with what it ran")


def test_no_faults_are_said_too(
    make_run: MakeRun, report_of: ReportOf, records: list[RoundRecord]
) -> None:
    records[2].failures = []
    assert "None: every reply was used" in report_of(make_run(records)).text


KEPT = "SNR and cosine by module, over the whole run"


def test_what_the_packets_kept_by_module(
    make_run: MakeRun, report_of: ReportOf, keeping: list[RoundRecord]
) -> None:
    page = report_of(make_run(keeping, "uplink.name=int4"))
    table = page.table(KEPT)
    assert list(table) == ["q_proj A", "q_proj B", "v_proj A", "v_proj B", "all modules"]
    assert table["q_proj A"] == {
        "module and factor": "q_proj A", "share of the energy": "12.5 %", "SNR (dB)": "20.00",
        "cosine": "0.995",
    }  # fmt: skip
    # sums over rounds before anything is divided: 9 of signal, 1 + 2 + 3 of error
    assert table["v_proj B"]["SNR (dB)"] == "1.76"
    assert table["all modules"]["SNR (dB)"] == f"{10 * math.log10(24 / 12.06):.2f}"
    told = " ".join(page.of("desc"))
    first, last = (10 * math.log10(8 / (2 * n + 0.02)) for n in (1, 3))
    assert f"SNR: {first:.2f} at round 1, {last:.2f} at round 3" in told
    assert "Highest: round 1, q_proj A: 20.00 dB. Lowest: round 3, q_proj B: 0.00 dB." in told
    assert "SNR of the packets by round and module" in page.of("figcaption")


def test_exact_packets_are_called_so(
    make_run: MakeRun, report_of: ReportOf, keeping: list[RoundRecord]
) -> None:
    for record in keeping:
        for client in record.clients:
            client.fidelity = {"q_proj.A": ModuleRecord(1.0, 1.0, 0.0)}
            client.fidelity["q_proj.B"] = ModuleRecord(0.0, 0.0, 0.0)
    page = report_of(make_run(keeping))
    table = page.table(KEPT)
    assert [table[name]["SNR (dB)"] for name in table] == ["exact", "–", "exact"]
    assert not [title for title in page.of("figcaption") if "SNR" in title]


def test_runs_that_do_not_tell_have_no_such_part(
    make_run: MakeRun, report_of: ReportOf, records: list[RoundRecord]
) -> None:
    assert "What the packets kept" not in report_of(make_run(records)).text


def test_many_rounds_share_columns(
    make_run: MakeRun, report_of: ReportOf, make_records: Callable[..., list[RoundRecord]]
) -> None:
    records = make_records(150, ("numpy",))
    for record in records[1:]:
        record.clients[0].fidelity = {"q_proj.A": ModuleRecord(2.0, 1.0, 1.0)}
    page = report_of(make_run(records, rounds=150))
    cells = [attributes for tag, attributes in page.tags if attributes.get("class") == "cell"]
    assert len(cells) == 50
    assert "rounds 148 to 150, q_proj A: 3.01 dB" in page.of("title")


def test_what_no_packet_can_keep_is_shown_all_the_same(
    make_run: MakeRun, report_of: ReportOf, keeping: list[RoundRecord]
) -> None:
    """A client's word is only bounded; no word breaks the page."""
    odd = [0.0, 5e-324, 1e120]
    for record in keeping[1:]:
        for number, client in enumerate(record.clients):
            client.fidelity = {
                f"{a}{b}{c}": ModuleRecord(odd[a], odd[b], odd[c])
                for a, b, c in np.ndindex(3, 3, 3)
                if number == 0
            }
    table = report_of(make_run(keeping)).table(KEPT)
    assert len(table) == 28
    assert all(row["cosine"] == "–" or abs(float(row["cosine"].replace("−", "-"))) <= 1
               for row in table.values())  # fmt: skip


def test_the_privacy_budget_by_round(
    make_run: MakeRun, report_of: ReportOf, records: list[RoundRecord]
) -> None:
    for record in records:
        record.epsilon = 2.0 * record.round
        for client in record.clients:
            client.train_loss = 0.0  # nobody tells it under local privacy
    settings = ("privacy.mechanism=local", "privacy.epsilon=8", "privacy.delta=1e-5")
    folder = make_run(records, *settings)
    (folder.path / "privacy.json").write_text('{"key": "5ec7e7"}')
    page = report_of(folder)
    facts = page.table("Privacy of a client’s part in the run")
    assert facts["epsilon spent"]["value"] == "6.000"
    assert facts["epsilon, budget of the run"]["value"] == "8"
    assert facts["mechanism"]["value"] == "local differential privacy"
    assert [text for text in page.of("desc") if "budget: 8.000." in text]
    assert "Training loss, mean over clients" not in page.of("figcaption")
    assert "5ec7e7" not in folder.report_path.read_text()


def test_a_run_without_privacy_says_nothing_of_it(
    make_run: MakeRun, report_of: ReportOf, records: list[RoundRecord]
) -> None:
    page = report_of(make_run(records))
    assert "Privacy" not in page.of("h2")
    assert "Privacy spent" not in page.of("figcaption")


def test_the_flush_is_marked(
    make_run: MakeRun, report_of: ReportOf, records: list[RoundRecord]
) -> None:
    rows = [ClientRecord(c.client, 100, 0, 0, 0.0, 0.1, 500, 0, 0.0, 0.1, 0.1)
            for c in records[1].clients]  # fmt: skip
    last = RoundRecord(4, rows, flush=True, uplink_bytes=1500, heldout_nll=2.3)
    last.uplink_bytes_total = records[3].uplink_bytes_total + 1500
    last.uplink_bytes_fp32_total = records[3].uplink_bytes_fp32_total
    settings = ("uplink.name=topk", "uplink.flush=int8")
    page = report_of(make_run([*records, last], *settings))
    assert "finished" in page.of("span")
    assert "trained one adapter in 3 rounds" in page.text
    assert "Round 4 is the flush" in page.text
    assert page.table(ROUNDS)["4 (flush)"]["training loss"] == "–"
    assert page.table(CLIENTS)["numpy"]["rounds"] == "3"
    columns = [a for tag, a in page.tags if tag == "path" and a.get("class") == "bar flush"]
    assert columns
    assert "The paler column is the flush" in page.text


def test_without_the_flush_such_a_run_is_not_finished(
    make_run: MakeRun, report_of: ReportOf, records: list[RoundRecord]
) -> None:
    page = report_of(make_run(records, "uplink.name=topk", "uplink.flush=int8"))
    assert "unfinished" in page.of("span")
    assert "Stopped before its end: 3 of 4 rounds done." in page.text


def test_a_reference_sent_nothing(make_run: MakeRun, report_of: ReportOf) -> None:
    seconds = {"train": 5.0, "evaluate": 1.0, "total": 6.0}
    records = [RoundRecord(r, heldout_nll=3.0 - r / 10, seconds=seconds) for r in range(4)]
    page = report_of(make_run(records))
    assert "3 rounds of training without a federation: nothing travelled." in page.text
    assert "Held-out NLL fell by 0.3000" in page.text
    assert not {"What was sent", "Clients"} & set(page.of("h2"))


def test_no_round_yet(make_run: MakeRun, report_of: ReportOf) -> None:
    page = report_of(make_run([]))
    assert "Stopped before its end: 0 of 3 rounds done." in page.text
    assert "No round has finished yet" in page.text
    assert page.of("figcaption") == []
    assert page.tables["Where and with what it ran"]


def test_a_run_that_is_still_going(
    make_run: MakeRun, report_of: ReportOf, records: list[RoundRecord]
) -> None:
    folder = make_run(records[:2])
    with RunFolder(folder.path):
        page = report_of(folder)
    assert "running" in page.of("span")
    assert "Still running: 1 of 3 rounds done. Held-out NLL fell by 0.2000" in page.text


def test_whoever_holds_the_run_is_not_told_that_somebody_works_on_it(
    make_run: MakeRun, report_of: ReportOf, records: list[RoundRecord]
) -> None:
    with make_run(records[:2]) as folder:
        assert "unfinished" in report_of(folder).of("span")


def test_only_the_state_before_training_is_no_change(
    make_run: MakeRun, report_of: ReportOf, records: list[RoundRecord]
) -> None:
    page = report_of(make_run(records[:1]))
    assert "evaluated once, nats per label token" in page.text
    assert "Held-out NLL changed" not in page.text


def test_numbers_that_are_none_break_nothing(
    make_run: MakeRun, report_of: ReportOf, records: list[RoundRecord]
) -> None:
    records[2].heldout_nll = math.nan
    records[3].heldout_nll = math.inf
    records[2].update_norm = 1e300
    page = report_of(make_run(records))
    assert "Held-out NLL is no finite number any more." in page.text
    table = page.table(ROUNDS)
    assert (table["2"]["held-out NLL"], table["3"]["held-out NLL"]) == ("nan", "inf")
    drawn = [a["d"] for tag, a in page.tags if tag == "path"]
    assert drawn
    assert not [path for path in drawn if "nan" in path or "inf" in path]


def _adapter(folder: RunFolder, alpha: float = 8.0) -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(0)
    tensors = {}
    for layer in range(2):
        stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{stem}.lora_A.weight"] = random.standard_normal((2, 6)).astype(np.float32)
        tensors[f"{stem}.lora_B.weight"] = random.standard_normal((4, 2)).astype(np.float32)
    save_tensors(folder.adapter_dir / "adapter_model.safetensors", tensors)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "alpha_pattern": {"q_proj": alpha}}
    write_json(folder.adapter_dir / "adapter_config.json", settings)
    return tensors


def test_how_far_each_module_moved(
    make_run: MakeRun, report_of: ReportOf, records: list[RoundRecord]
) -> None:
    folder = make_run(records)
    tensors = _adapter(folder)
    spec = AdapterSpec.from_shapes({name: array.shape for name, array in tensors.items()})
    norms = [np.linalg.norm(8 / 2 * tensors[b.name] @ tensors[a.name]) for a, b in spec.pairs()]
    page = report_of(folder)
    row = page.table("Change of the weights by module, over all layers")["self_attn.q_proj"]
    assert row["norm of the change"] == f"{math.hypot(*norms):.4g}"
    assert row["matrices"] == "2"
    titles = [text for tag, text in page.texts if tag == "title"]
    for layer, norm in enumerate(norms):
        assert f"layer {layer}, self_attn.q_proj: {norm:.4g}" in titles


def test_a_run_without_an_adapter_claims_nothing_about_modules(
    make_run: MakeRun, report_of: ReportOf, records: list[RoundRecord]
) -> None:
    captions = report_of(make_run(records)).tables
    assert not [caption for caption in captions if "module" in caption or "codec on" in caption]


def test_configuration_without_the_folders_of_this_machine(
    make_run: MakeRun, report_of: ReportOf, records: list[RoundRecord]
) -> None:
    folder = make_run(records, 'data.source="/secret/place/rows.jsonl"', "lora.rank=3")
    page = report_of(folder)
    changed = page.table("Settings that differ from the defaults")
    assert changed["lora.rank"]["value"] == "3"
    assert changed["data.source"]["value"] == "rows.jsonl"
    assert "training.lr" not in changed
    [whole] = page.of("pre")
    assert tomllib.loads(whole)["lora"]["rank"] == 3
    assert "/secret/place" not in folder.report_path.read_text()


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("metrics.jsonl", b'{"round": 1, "clients": 7}\n', "line 1 of metrics.jsonl is damaged"),
        ("environment.json", b"{", "environment.json cannot be read"),
        ("environment.json", b'{"versions": 3}', "environment.json is damaged at 'versions'"),
        ("config.toml", b"name = [", "config.toml cannot be read"),
        ("config.toml", b"novelty = 1\n", "novelty"),
        ("adapter/adapter_config.json", b"[]", "is not a PEFT configuration"),
        ("adapter/adapter_model.safetensors", b"\xff" * 64, "not a safetensors file"),
        ("codec.safetensors", b"\x00" * 64, "codec.safetensors"),
    ],
    ids=[
        "a line of metrics", "environment is no JSON", "environment of other types",
        "configuration is no TOML", "configuration of another release", "no PEFT configuration",
        "adapter", "codec",
    ],
)  # fmt: skip
def test_a_damaged_file_costs_only_what_was_in_it(
    make_run: MakeRun,
    report_of: ReportOf,
    records: list[RoundRecord],
    file: str,
    content: bytes,
    problem: str,
) -> None:
    folder = make_run(records)
    _adapter(folder)
    path = folder.path / file
    path.write_bytes(content + (path.read_bytes() if file == "metrics.jsonl" else b""))
    page = report_of(folder)
    problems = page.of("li")
    assert [text for text in problems if problem in text]
    assert not [text for text in problems if str(folder.path) in text]
    assert page.table(ROUNDS)["3"]["held-out NLL"] == "2.4000"


def test_without_a_configuration_nobody_knows_whether_it_is_finished(
    make_run: MakeRun, report_of: ReportOf, records: list[RoundRecord]
) -> None:
    folder = make_run(records)
    folder.config_path.write_text("novelty = 1\n")
    page = report_of(folder)
    assert "unclear" in page.of("span")
    assert "3 rounds done; how many there were to be, only its configuration tells." in page.text


def test_a_loss_that_stays_is_said_to_stay(
    make_run: MakeRun, report_of: ReportOf, records: list[RoundRecord]
) -> None:
    for record in records:
        record.heldout_nll = 3.0
    assert "Held-out NLL did not change." in report_of(make_run(records)).text


def test_missing_files_are_told_of(
    make_run: MakeRun, report_of: ReportOf, records: list[RoundRecord]
) -> None:
    folder = make_run(records)
    folder.environment_path.unlink()
    folder.metrics_path.unlink()
    page = report_of(folder)
    assert "environment.json does not exist" in page.of("li")
    assert "No round has finished yet" in page.text


def test_a_torn_last_line_is_no_damage(
    make_run: MakeRun, report_of: ReportOf, records: list[RoundRecord]
) -> None:
    folder = make_run(records)
    with folder.metrics_path.open("ab") as file:
        file.write(b'{"round": 4, "cli')
    assert "could be read" not in report_of(folder).text


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a run folder: it has no config\.toml"):
        write_run_report(RunFolder(tmp_path))


def test_the_same_folder_gives_the_same_file(make_run: MakeRun, records: list[RoundRecord]) -> None:
    folder = make_run(records)
    first = write_run_report(folder).read_bytes()
    assert write_run_report(folder).read_bytes() == first


def test_many_clients_and_rounds_stay_a_small_file(
    make_run: MakeRun, make_records: Callable[..., list[RoundRecord]]
) -> None:
    many = make_records(rounds=1, clients=tuple(f"client-{i}" for i in range(1000)))
    long = make_records(rounds=300, clients=("a", "b"))
    for record in long:
        record.failures = [FailureRecord("c", "timed out")]
    for records, rounds in ((many, 1), (long, 300)):
        path = write_run_report(make_run(records, rounds=rounds))
        assert path.stat().st_size < 1_000_000
