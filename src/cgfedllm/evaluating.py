"""Evaluation of an adapter from its folder to tables: loss, benchmarks, answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cgfedllm.adapter import AdapterUpdate
from cgfedllm.config import Config
from cgfedllm.errors import AdapterError, CheckpointError, ConfigError
from cgfedllm.runs import RunFolder
from cgfedllm.workspace import Workspace

if TYPE_CHECKING:
    from cgfedllm.evaluation.samples import AnswerSample
    from cgfedllm.evaluation.scores import BenchmarkResult

SPLITS = ("heldout", "validation", "test")
BASE, ADAPTER = "base", "adapter"


@dataclass(frozen=True)
class SplitResult:
    """Loss on one set of rows."""

    name: str
    nll: float
    perplexity: float
    rows: int
    label_tokens: int


@dataclass(frozen=True)
class EvaluationResult:
    """What an adapter does, and what the base model does without it, on the same rows.

    Parameters
    ----------
    split : str
        Rows the loss is of.
    adapter, base : list of SplitResult
        One a set of rows; `base` is empty if it was not asked for.
    benchmarks : list of BenchmarkResult
        One a benchmark and adapter, the base model's before the adapter's.
    samples : list of AnswerSample
        Answers side by side.
    files : list of Path
        What was written.
    """

    split: str
    adapter: list[SplitResult]
    base: list[SplitResult] = field(default_factory=list)
    benchmarks: list[BenchmarkResult] = field(default_factory=list)
    samples: list[AnswerSample] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)

    def rows(self) -> list[tuple[str, str]]:
        """The losses, for a table of two columns."""
        before = {result.name: result.nll for result in self.base}
        rows = []
        for result in self.adapter:
            base = before.get(result.name)
            against = "" if base is None else f" (base {base:.4f}, {result.nll - base:+.4f})"
            rows.append(
                (
                    result.name,
                    f"NLL {result.nll:.4f}{against}, perplexity {result.perplexity:.2f}, "
                    f"{result.rows} rows, {result.label_tokens} tokens",
                )
            )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON."""
        bases = {r.benchmark.name: r for r in self.benchmarks if r.adapter == BASE}
        return {
            "split": self.split,
            "adapter": [asdict(result) for result in self.adapter],
            "base": [asdict(result) for result in self.base],
            "benchmarks": [
                r.to_dict(None if r.adapter == BASE else bases.get(r.benchmark.name))
                for r in self.benchmarks
            ],
            "samples": [asdict(sample) for sample in self.samples],
        }


def evaluate_adapter(
    path: Path,
    config: Config | None,
    split: str,
    *,
    base: bool,
    benchmarks: Sequence[str],
    shots: int,
    per_subject: int | None,
    hub: Path | None,
    samples: int,
    max_new_tokens: int,
    to: Path | None,
) -> EvaluationResult:
    """See `api.evaluate`."""
    if split not in SPLITS:
        raise ConfigError(f"split is one of {', '.join(SPLITS)}; got {split!r}")
    if benchmarks:
        _check_benchmarks(benchmarks, hub)
    folder = RunFolder(path)
    config = config or (folder.config() if folder.exists() else None)
    if config is None:
        raise ConfigError(f"{path} is not a run folder; say with --config what to evaluate it on")
    if to is None and (benchmarks or samples):
        to = folder.evaluation_dir if folder.exists() else Path("evaluation")
    workspace = Workspace(config, path)
    adapters = {BASE: workspace.whole(workspace.start)} if base else {}
    adapters[ADAPTER] = read_adapter(folder.adapter_dir if folder.exists() else path, workspace)

    losses = {label: _losses(workspace, values, label, split) for label, values in adapters.items()}
    result = EvaluationResult(split, losses[ADAPTER], losses.get(BASE, []))
    if samples:  # minutes, and refused where nothing fits; benchmarks may take hours
        result.samples.extend(_samples(workspace, adapters, split, samples, max_new_tokens))
    if benchmarks:
        from cgfedllm.evaluation.benchmarks import run_benchmark

        for name in dict.fromkeys(benchmarks):
            result.benchmarks.extend(
                run_benchmark(
                    workspace.model,
                    adapters,
                    name,
                    shots=shots,
                    per_subject=per_subject,
                    hub=hub,
                    batch_size=config.evaluation.batch_size,
                    max_new_tokens=max_new_tokens,
                    answers=None if to is None else to / "answers.jsonl",
                )
            )
    if to is not None:
        from cgfedllm.report.evaluation import write_evaluation

        result.files.extend(write_evaluation(to, result.to_dict(), result.samples, config))
    return result


def read_adapter(folder: Path, workspace: Workspace) -> AdapterUpdate:
    """Values of an adapter folder on the model's full spec.

    Raises
    ------
    CheckpointError
        If there is no adapter in it.
    AdapterError
        If it is of another model or LoRA configuration.
    """
    from cgfedllm.peft_format import WEIGHTS, load_adapter

    if not (folder / WEIGHTS).exists():
        raise CheckpointError(
            f"{folder} holds no adapter yet; let the run finish (cgfedllm resume {folder.parent})"
        )
    loaded = load_adapter(folder)
    try:
        return AdapterUpdate.from_arrays(workspace.model.full_spec, loaded.views())
    except AdapterError as error:
        raise AdapterError(f"{folder} does not fit this model and [lora] table: {error}") from None


def _check_benchmarks(names: Sequence[str], hub: Path | None) -> None:
    """Before anything is loaded, so that what is misspelt or missing is told at once."""
    from cgfedllm.evaluation.catalogue import find_benchmark
    from cgfedllm.evaluation.tasks import local_folder, require_lm_eval

    for name in names:
        local_folder(find_benchmark(name), hub)
    require_lm_eval()


def _losses(
    workspace: Workspace, adapter: AdapterUpdate, label: str, split: str
) -> list[SplitResult]:
    from cgfedllm.evaluation.nll import evaluate_nll

    owners = [None] if split == "heldout" else list(workspace.data.clients)
    results = []
    for owner in owners:
        examples = workspace.examples(owner, split)
        if not examples:
            continue
        name = "held-out" if owner is None else owner.name
        result = evaluate_nll(
            workspace.model,
            adapter,
            examples,
            packed=workspace.packed,
            batch_size=workspace.config.evaluation.batch_size,
            what=f"{name} ({label})",
        )
        results.append(
            SplitResult(name, result.nll, result.perplexity, result.rows, result.label_tokens)
        )
    if not results:
        raise ConfigError(
            f"the {split!r} split is empty; set data.splits.{split} (or data.heldout_source)"
        )
    return results


def _samples(
    workspace: Workspace,
    adapters: dict[str, AdapterUpdate],
    split: str,
    count: int,
    max_new_tokens: int,
) -> list[AnswerSample]:
    from cgfedllm.data.encoding import RowEncoder
    from cgfedllm.evaluation.samples import sample_answers

    if split == "heldout":
        rows = [("held-out", row) for row in workspace.data.heldout]
    else:
        rows = [(c.name, row) for c in workspace.data.clients for row in getattr(c, split)]
    encoder = RowEncoder(
        workspace.config.data, workspace.model.tokenizer, workspace.model.max_positions
    )
    return sample_answers(
        workspace.model,
        adapters,
        encoder,
        rows,
        count,
        batch_size=workspace.config.evaluation.batch_size,
        max_new_tokens=max_new_tokens,
    )
