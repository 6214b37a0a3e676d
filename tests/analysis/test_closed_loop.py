"""The matrix is filled cell by cell, and its file tells the truth at every moment."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import cgfedllm
from cgfedllm import events
from cgfedllm.analysis.candidates import Candidate, candidates_of
from cgfedllm.analysis.closed_loop import ClosedLoop, Outcome
from cgfedllm.analysis.closed_loop_file import read_results
from cgfedllm.analysis.portable import portable, portable_command, portable_config
from cgfedllm.analysis.tuning import parse_tuning
from cgfedllm.config import Config
from cgfedllm.errors import CheckpointError, ConfigError, RunInterrupted, TrainingError
from cgfedllm.metrics import ClientRecord, RoundRecord
from cgfedllm.runs import RunFolder

MakeConfig = Callable[..., Config]

PARAMETERS = 1000
LOSS = {"raw": 0.0, "int8": 0.02}
BYTES = {"raw": 4000, "int8": 1000}


def records_of(config: Config) -> list[RoundRecord]:
    """Two clients; raw goes from 3.0 (plus 0.1 a seed) to 2.0 in equal steps."""
    rounds, size, own = config.federation.rounds, BYTES[config.uplink.name], parameters_of(config)
    offset = 0.1 * config.seed if config.seed < 10 else 0.0
    found = []
    for r in range(rounds + 1):
        nll = 3.0 + offset - (1.0 - LOSS[config.uplink.name]) * r / rounds
        penalty = abs(config.federation.server_lr - 1.4)  # 1.4 is best on validation rows
        found.append(
            RoundRecord(
                r,
                clients=[ClientRecord(c, 10, 4, 99, 2.0, 1.0, size, 8, 4.0, 0.2, 0.1) for c in "ab"]
                if r
                else [],
                uplink_bytes_total=2 * size * own // PARAMETERS * r,
                uplink_bytes_fp32_total=8 * own * r,
                downlink_bytes_total=16 * (r + 1),
                heldout_nll=nll if config.evaluation.heldout else None,
                client_nll={"a": nll + penalty, "b": nll + penalty},
                seconds={"train": 8.0, "encode": 0.4, "decode": 0.2, "total": 9.0} if r else {},
            )
        )
    return found


def parameters_of(config: Config) -> int:
    return PARAMETERS * config.lora.rank // 8


@dataclass
class Runs:
    """Runs that take no time: those done, in order; may be stopped or fail."""

    done: list[str] = field(default_factory=list)
    stop_at: str = ""
    diverges: tuple[str, ...] = ()
    written: list[dict[str, Any]] = field(default_factory=list)
    results: Path = Path()

    def check(self, config: Config) -> None:
        pass

    def finished(self, config: Config) -> list[RoundRecord] | None:
        return records_of(config) if config.name in self.done else None

    def rounds_done(self, config: Config) -> int:
        return 1 if config.name == self.stop_at else 0

    def complete(self, config: Config, candidate: Candidate) -> list[RoundRecord]:
        self.written.append(json.loads(self.results.read_text()))
        if config.name not in self.done:
            if config.name == self.stop_at:
                raise RunInterrupted("stopped")
            if config.name in self.diverges:
                raise TrainingError("the loss is not finite")
            self.done.append(config.name)
        return records_of(config)

    def parameters(self, config: Config) -> int:
        return parameters_of(config)


@pytest.fixture
def compare(tmp_path: Path) -> Callable[..., tuple[Outcome, dict[str, Any]]]:
    def run(
        runs: Runs,
        *codecs: str,
        seeds: tuple[int, ...] = (0, 1),
        tune: tuple[str, ...] = (),
        variants: tuple[str, ...] = (),
    ) -> tuple[Outcome, dict[str, Any]]:
        base = Config(name="x", output=str(tmp_path)).with_overrides({"federation.rounds": 4})
        runs.results = tmp_path / "x.json"
        candidates = candidates_of(base, codecs or ("raw", "int8"), variants)
        tuning = parse_tuning(tune, None, base, seeds)
        outcome = ClosedLoop(base, candidates, seeds, tuning, runs, runs.results).run()
        return outcome, read_results(runs.results)

    return run


Compare = Callable[..., tuple[Outcome, dict[str, Any]]]


def of(results: dict[str, Any], label: str) -> dict[str, Any]:
    return next(row for row in results["summary"] if row["candidate"] == label)


# ---- order and resume ---------------------------------------------------------------------------


def test_breadth_first(compare: Compare) -> None:
    runs = Runs()
    outcome, _ = compare(runs)
    assert runs.done == ["x-raw-seed0", "x-int8-seed0", "x-raw-seed1", "x-int8-seed1"]
    assert [(e.codec, e.seed) for e in outcome.entries] == [
        ("raw", 0), ("raw", 1), ("int8", 0), ("int8", 1),
    ]  # fmt: skip


def test_a_candidate_is_tuned_just_before_its_first_cell(compare: Compare) -> None:
    runs = Runs()
    compare(runs, tune=("server_lr=1,1.4",))
    assert runs.done == [
        "x-raw-tune4-server_lr1", "x-raw-tune4-server_lr1.4", "x-raw-seed0",
        "x-int8-tune4-server_lr1", "x-int8-tune4-server_lr1.4", "x-int8-seed0",
        "x-raw-seed1", "x-int8-seed1",
    ]  # fmt: skip


def test_the_file_is_written_after_every_cell_and_says_what_is_missing(compare: Compare) -> None:
    runs = Runs()
    _, results = compare(runs)
    found = [(len(state["cells"]), len(state["missing"])) for state in runs.written]
    assert found == [(0, 4), (1, 3), (2, 2), (3, 1)]
    assert runs.written[1]["missing"][0] == {
        "candidate": "int8", "seed": 0, "run": "x-int8-seed0", "rounds_done": 0,
    }  # fmt: skip
    assert results["missing"] == []


def test_a_stopped_comparison_goes_on_where_it_was(compare: Compare) -> None:
    runs = Runs(stop_at="x-raw-seed1")
    with pytest.raises(RunInterrupted):
        compare(runs)
    state = read_results(runs.results)
    assert [m["rounds_done"] for m in state["missing"]] == [1, 0]
    assert of(state, "int8")["difference_to_reference"]["mean"] == pytest.approx(0.02)
    runs.stop_at = ""
    before = len(runs.done)
    _, results = compare(runs)
    assert runs.done[before:] == ["x-raw-seed1", "x-int8-seed1"]
    assert results["missing"] == []


def test_the_file_never_forgets_what_is_complete(compare: Compare) -> None:
    """A new candidate runs its first seed before the others' second is looked at again."""
    runs = Runs()
    compare(runs)
    runs.written.clear()
    compare(runs, "raw", "int8", variants=("small:lora.rank=2",))
    assert len(runs.written[0]["cells"]) == 4


# ---- what is in the file ------------------------------------------------------------------------


def test_what_a_cell_holds(compare: Compare) -> None:
    _, results = compare(Runs())
    cell = results["cells"][1]
    assert (cell["candidate"], cell["seed"], cell["run"]) == ("int8", 0, "x-int8-seed0")
    assert cell["curve"][1] == {
        "round": 1, "heldout_nll": pytest.approx(3.0 - 0.98 / 4),
        "uplink_bytes": 2000, "downlink_bytes": 32, "total_bytes": 2032,
    }  # fmt: skip
    assert cell["uplink"] == {
        "bytes": 8000, "packets": 8, "bytes_per_packet": 1000.0,
        "bits_per_parameter": 8.0, "times_fewer_than_fp32": 4.0,
    }  # fmt: skip
    assert cell["seconds"]["encode_share_of_train"] == pytest.approx(0.05)


def test_what_a_codec_that_learns_costs_is_told_apart(
    compare: Compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = records_of

    def learning(config: Config) -> list[RoundRecord]:
        records = plain(config)
        if config.uplink.name == "int8":
            records[0].tgap_uplink_bytes = 700
            for record in records[1:]:
                record.codec_bytes_total = 50
        return records

    monkeypatch.setitem(globals(), "records_of", learning)
    _, results = compare(Runs())
    raw, int8 = results["cells"][:2]
    assert not {"codec_state", "pre_training"} & raw.keys()
    assert int8["codec_state"] == {"bytes": 50}
    assert int8["pre_training"] == {"uplink_bytes": 700, "downlink_bytes": 0}
    point = int8["curve"][1]
    assert (point["downlink_bytes"], point["total_bytes"]) == (32, 2000 + 32 + 50)


def test_summaries_are_paired_by_seed(compare: Compare) -> None:
    _, results = compare(Runs())
    int8 = of(results, "int8")
    assert results["reference"] == "raw"
    assert int8["final_nll"]["stdev"] == pytest.approx(0.1 / math.sqrt(2))
    difference = int8["difference_to_reference"]
    assert difference["by_seed"] == pytest.approx({"0": 0.02, "1": 0.02})
    assert difference["stdev"] == pytest.approx(0.0, abs=1e-12)
    assert int8["gain_kept"]["mean"] == pytest.approx(0.98)
    assert int8["gain_kept_by_round"][0]["round"] == 1
    assert int8["gain_kept_by_round"][0]["mean"] == pytest.approx(0.98)
    assert int8["times_fewer_than_reference"]["mean"] == 4.0
    assert int8["area"]["uplink"]["mean"] > 0
    assert of(results, "raw")["area"]["uplink"]["mean"] == 0.0


def test_bytes_to_a_share_of_the_gain(compare: Compare) -> None:
    _, results = compare(Runs())
    int8 = of(results, "int8")["bytes_to_share"]["uplink"]
    assert (int8["0.95"]["mean"], int8["0.95"]["reached"], int8["0.95"]["of"]) == (8000, 2, 2)
    assert (int8["0.99"]["mean"], int8["0.99"]["reached"]) == (None, 0)
    assert of(results, "raw")["bytes_to_share"]["uplink"]["0.99"]["mean"] == 32000


def test_bits_refer_to_the_base_adapter(compare: Compare) -> None:
    _, results = compare(Runs(), "raw", variants=("rank2:lora.rank=2",))
    small = of(results, "rank2")
    assert small["bytes_per_packet"]["mean"] == 1000.0
    assert small["bits_per_parameter"]["mean"] == 8.0
    assert small["times_fewer_than_fp32"]["mean"] == 4.0
    assert results["candidates"][1]["parameters"] == 250
    assert results["parameters"] == 1000


def test_fewer_rounds_show_in_the_whole_run(compare: Compare) -> None:
    _, results = compare(Runs(), "raw", variants=("few:federation.rounds=2",))
    few = of(results, "few")
    assert few["times_fewer_than_reference"]["mean"] == 2.0
    assert few["times_fewer_than_fp32"]["mean"] == 1.0
    assert [row["round"] for row in few["gain_kept_by_round"]] == [1, 2]
    assert few["gain_kept_by_round"][0]["mean"] == pytest.approx(2.0)


def test_head_of_the_file(compare: Compare) -> None:
    _, results = compare(Runs())
    assert tomllib.loads(results["config"])["federation"]["rounds"] == 4
    assert results["environment"]["versions"]["cgfedllm"] == cgfedllm.__version__
    assert results["what"]["clients"] == 2
    assert results["tuning"] is None, "nothing was tuned, and the file says so"
    assert results["candidates"][1]["uplink"]["name"] == "int8"
    assert "area" in results["definitions"]


def test_the_tuning_is_told_trial_by_trial(compare: Compare) -> None:
    _, results = compare(Runs(), tune=("server_lr=1,1.4", "decay=1,0.9"))
    tuning = results["tuning"]
    assert tuning["trials_per_candidate"] == 4
    raw, int8 = tuning["candidates"]["raw"], tuning["candidates"]["int8"]
    assert raw["chosen"] == {"federation.server_lr": 1.4}
    assert [("same_as" in row) for row in raw["trials"]] == [False, True, False, True]
    assert int8["chosen"] == {"federation.server_lr": 1.4, "uplink.error_feedback_decay": 1}
    assert [row["validation_nll"] for row in int8["trials"]] == pytest.approx(
        [2.5425, 2.5425, 2.1425, 2.1425]
    )
    assert results["cells"][1]["setting"] == int8["chosen"]
    assert raw["at_grid_edge"] == ["federation.server_lr"], "a wider grid might do better"


def test_a_candidate_that_fails_is_a_result(compare: Compare) -> None:
    runs = Runs(diverges=("x-int8-seed0",))
    outcome, results = compare(runs)
    assert outcome.failures == {"int8, seed 0": "the loss is not finite"}
    assert results["missing"][0]["failure"] == "the loss is not finite"
    assert [c["run"] for c in results["cells"]] == ["x-raw-seed0", "x-raw-seed1", "x-int8-seed1"]


def test_a_trial_that_fails_is_not_chosen(compare: Compare) -> None:
    runs = Runs(diverges=("x-raw-tune4-server_lr1.4",))
    _, results = compare(runs, tune=("server_lr=1,1.4",))
    raw = results["tuning"]["candidates"]["raw"]
    assert raw["chosen"] == {"federation.server_lr": 1}
    assert raw["trials"][1]["failure"] == "the loss is not finite"


def test_a_candidate_none_of_whose_trials_ends(compare: Compare) -> None:
    runs = Runs(diverges=("x-int8-tune4-server_lr1", "x-int8-tune4-server_lr1.4"))
    outcome, results = compare(runs, tune=("server_lr=1,1.4",))
    assert outcome.failures["int8, seed 1"] == "every tuning trial failed"
    assert results["tuning"]["candidates"]["int8"]["chosen"] is None


def test_paths_of_this_machine_stay_here(tmp_path: Path) -> None:
    here = str(Path.cwd() / "runs")
    line = ["/me/.venv/bin/cgfedllm", "compare", "/data/a.toml", "--set=data.source=/data/b", here]
    assert portable_command(line) == "cgfedllm compare a.toml --set=data.source=b runs"
    variant = f"--variant=cg:uplink.name=cg_cnn,uplink.state={here}/a.codec,data.source='/data/b'"
    assert portable_command(["cgfedllm", variant]).endswith(
        "cg:uplink.name=cg_cnn,uplink.state=runs/a.codec,data.source=b"
    )
    words = ["cgfedllm", "/a=b/c.toml", "--set=data.source=/a=b/d", 'data.source=["/a/x","/b/y"]']
    assert portable_command(words) == "cgfedllm c.toml --set=data.source=d 'data.source=[x,y]'"
    assert portable("https://a.b/c") == "https://a.b/c"
    assert portable({"uplink": {"state": "/x/a.codec"}}) == {"uplink": {"state": "a.codec"}}
    config = Config(output=str(tmp_path)).with_overrides({"data.source": "/data/rows.jsonl"})
    text = portable_config(config)
    assert "/data" not in text
    assert str(tmp_path) not in text
    assert 'source = "rows.jsonl"' in text


@pytest.mark.parametrize("content", ["[]", "{}", '{"cells":[],"candidates":[],"what":{}}', "{"])
def test_files_that_are_no_results(tmp_path: Path, content: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(CheckpointError):
        read_results(path)


# ---- with real runs -----------------------------------------------------------------------------

QUICK = ("federation.rounds=1", "evaluation.clients=false")


def test_tuning_does_not_depend_on_held_out_rows(tiny_config: MakeConfig, tmp_path: Path) -> None:
    """The same experiment with other held-out rows: other losses, the same trials and choice."""
    found = []
    for number, answer in enumerate(("the moon is red", "no idea whatsoever")):
        heldout = tmp_path / f"heldout{number}.jsonl"
        rows = [{"question": f"question {k} of {number}", "answer": answer} for k in range(4)]
        heldout.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = tiny_config(
            *QUICK, f'data.heldout_source="{heldout}"', f'output="{tmp_path / str(number)}"'
        )
        result = cgfedllm.compare(config, ["raw", "int8"], tune=["server_lr=0.5,3"])
        found.append(read_results(result.results))
        trial = RunFolder(config.run_dir.with_name("tiny-int8-tune1-server_lr3"))
        assert [r.heldout_nll for r in trial.records()] == [None, None]
        assert trial.records()[-1].client_nll.keys() == {"north", "south", "west"}
    assert found[0]["tuning"] == found[1]["tuning"]
    nlls = [[p["heldout_nll"] for p in one["cells"][0]["curve"]] for one in found]
    assert nlls[0] != nlls[1]
    for one in found:
        for label in ("raw", "int8"):
            told = one["tuning"]["candidates"][label]
            best = min(told["trials"], key=lambda trial: trial["validation_nll"])
            assert told["chosen"] == best["setting"]


def test_seeds_are_judged_on_the_same_rows(tiny_config: MakeConfig) -> None:
    config = tiny_config(*QUICK)
    cgfedllm.compare(config, ["raw", "int8"], [0, 5])
    seeds = {RunFolder(p).config().data.seed for p in Path(config.output).glob("tiny-*-seed?")}
    assert seeds == {0}


def test_a_real_comparison_with_a_variant_resumes_from_its_trials(tiny_config: MakeConfig) -> None:
    config = tiny_config(*QUICK)

    def arguments(stop: Callable[[events.Event], None]) -> dict[str, Any]:
        return {"variants": ["rank2:lora.rank=2"], "tune": ["server_lr=1,2"], "listeners": [stop]}

    started: list[str] = []

    class Stop(Exception):
        pass

    def listen(event: events.Event) -> None:
        if isinstance(event, events.RunStarted):
            started.append(event.name)
            if len(started) == 3:
                raise Stop

    with pytest.raises(Stop):
        cgfedllm.compare(config, ["raw"], **arguments(listen))
    assert started == ["tiny-raw-tune1-server_lr1", "tiny-raw-tune1-server_lr2", "tiny-raw-seed0"]
    result = cgfedllm.compare(config, ["raw"], **arguments(listen))
    assert started[3:] == [
        "tiny-raw-seed0",
        "tiny-rank2-tune1-server_lr1",
        "tiny-rank2-tune1-server_lr2",
        "tiny-rank2-seed0",
    ]
    assert [entry.scale for entry in result.entries] == [1.0, 2.0]
    results = read_results(result.results)
    bits = of(results, "rank2")["bits_per_parameter"]["mean"]
    assert 16 < bits < 16.5, "half the parameters, and a header"


def test_another_choice_does_not_pass_off_earlier_cells(tiny_config: MakeConfig) -> None:
    config = tiny_config(*QUICK)
    cgfedllm.compare(config, ["raw", "int8"])
    with pytest.raises(ConfigError, match="another configuration"):
        cgfedllm.compare(config, ["raw", "int8"], tune=["server_lr=0.5,0.6"])
