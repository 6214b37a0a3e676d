"""Results of an evaluation: tables for people, and files for whatever reads them next.

::

    evaluation.json   everything, with what is needed to explain and to repeat it
    nll.csv           loss by set of rows
    benchmarks.csv    accuracies by group and subject
    samples.md        answers side by side, where they were asked for
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from cgfedllm.analysis.portable import provenance
from cgfedllm.config import Config
from cgfedllm.evaluation.scores import BenchmarkResult, Score
from cgfedllm.report.rows import plain, table_to_csv
from cgfedllm.report.tables import plain_table
from cgfedllm.storage import write_atomic, write_json

if TYPE_CHECKING:
    from cgfedllm.evaluation.samples import AnswerSample

FORMAT = 1

DEFINITIONS = {
    "nll": "negative log-likelihood in nats per label token; perplexity is its exponential",
    "value": "share of questions answered right, 0 to 1; in differences_to_base the mean of paired "
    "differences, -1 to 1",
    "standard_error": "of the value, from the spread of the questions within each subject (n - 1); "
    "about 95 % of intervals value +- 1.96 standard errors hold the number that all questions of "
    "this kind would give; null where a subject has one question",
    "average": "questions: mean over questions, a subject weighing as many as it has (available), "
    "also where a sample was asked; subjects: mean of the subjects' means",
    "choices": "how often each option (A, B, C, D) was chosen",
    "chance": "expected value of guessing",
    "C-Eval": "the val split, whose labels are public; leaderboard numbers are of the test split",
    "sample": "per_subject questions drawn at random with seed; the same for every adapter",
}


def benchmark_table(results: Sequence[BenchmarkResult]) -> RenderableType:
    """One benchmark: groups as rows, adapters as columns.

    Parameters
    ----------
    results : sequence of BenchmarkResult
        Of the same benchmark. A second one is compared with the first.
    """
    first = results[0]
    table = plain_table()
    table.title = f"{first.benchmark.title}, {_asked(first)}"
    table.title_justify = "left"
    table.title_style = "bold"
    table.add_column("% right", overflow="fold", min_width=18)
    for title in (*(r.adapter for r in results), *["difference"] * (len(results) == 2), "chance"):
        table.add_column(title, justify="right", no_wrap=True)
    columns = [[_percent(s, "{:.1f}") for s in result.groups()] for result in results]
    if len(results) == 2:
        columns.append([_percent(s, "{:+.1f}") for s in results[1].differences(first)])
    for row, group in enumerate(first.groups()):
        over = f" of {group.subjects} subjects" if group.subjects > 1 else ""
        table.add_row(
            f"{group.name} ({group.questions:,} questions{over})",
            *(column[row] for column in columns),
            f"{100 * first.benchmark.chance:.0f}",
        )
    notes = [
        f"means over {first.groups()[0].average} unless named otherwise",
        "± is one standard error, of differences paired by question",
    ]
    notes += [
        f"{result.adapter} chose {_choices(result)}" for result in results if result.choices()
    ]
    return Group(table, Text("; ".join(notes), style="italic dim"))


def write_evaluation(
    folder: Path,
    measured: Mapping[str, Any],
    samples: Sequence[AnswerSample],
    config: Config,
) -> list[Path]:
    """Write the results files.

    Parameters
    ----------
    folder : Path
        Made if missing; files of an earlier evaluation are replaced.
    measured : mapping
        `EvaluationResult.to_dict`.
    samples : sequence of AnswerSample
        Answers to be shown side by side.
    config : Config
        What was evaluated on.

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    StorageError
        If the disk refuses.
    """
    source = provenance(config)
    if measured["benchmarks"]:
        source["environment"]["versions"]["lm-eval"] = metadata.version("lm-eval")
    document = {
        "format": FORMAT,
        **source,
        **measured,
        "definitions": DEFINITIONS,
    }
    write_json(folder / "evaluation.json", plain(document))
    write_atomic(folder / "nll.csv", _csv(_nll_rows(measured)))
    files = [folder / "evaluation.json", folder / "nll.csv"]
    if measured["benchmarks"]:
        write_atomic(folder / "benchmarks.csv", _csv(_score_rows(measured["benchmarks"])))
        files.append(folder / "benchmarks.csv")
    if samples:
        from cgfedllm.evaluation.samples import to_markdown

        text = to_markdown(samples, f"Answers of {config.name}")
        write_atomic(folder / "samples.md", text)
        files.append(folder / "samples.md")
    return files


def _asked(result: BenchmarkResult) -> str:
    shots = f"{result.shots}-shot" if result.shots else "zero-shot"
    some = "all questions" if result.per_subject is None else f"{result.per_subject} a subject"
    return f"{shots}, {some} of the {result.benchmark.split} split"


def _percent(score: Score, layout: str) -> str:
    shown = layout.format(100 * score.value)
    if score.standard_error is None:
        return shown
    return f"{shown} ±{100 * score.standard_error:.1f}"


def _choices(result: BenchmarkResult) -> str:
    shares = enumerate(result.choices())
    return ", ".join(f"{chr(ord('A') + option)} {100 * share:.0f} %" for option, share in shares)


def _nll_rows(measured: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for label in ("base", "adapter"):
        for row in measured[label]:
            yield {"adapter": label, "split": measured["split"], **row}


def _score_rows(benchmarks: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for result in benchmarks:
        about = {key: result[key] for key in ("benchmark", "adapter", "shots")}
        for kind, key in (
            ("group", "groups"),
            ("subject", "subjects"),
            ("difference to base", "differences_to_base"),
        ):
            chance = None if kind.startswith("difference") else result["chance"]
            for score in result[key]:
                yield {**about, "kind": kind, **score, "chance": chance}


def _csv(rows: Iterator[dict[str, Any]]) -> str:
    found = list(rows)
    return table_to_csv(list(found[0]), [list(row.values()) for row in found])
