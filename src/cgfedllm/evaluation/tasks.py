"""Questions as lm-eval's stock tasks ask them, from the hub or from a folder laid out like it.

A stock task names its data set by its id on the hub. For a local copy that id alone is replaced by
the copy's folder; description, prompt, options, worked examples and scoring stay lm-eval's. The
data sets are plain files, and code that comes with one is never run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cgfedllm import events
from cgfedllm.data.names import did_you_mean
from cgfedllm.errors import ConfigError, DataError, MissingExtraError
from cgfedllm.evaluation.catalogue import Benchmark
from cgfedllm.seeding import generator

# lm-eval's own default; where worked examples are drawn, they are those of everybody else's runs
_SHOTS_SEED = 1234


@dataclass(frozen=True)
class Subject:
    """The questions asked of one subject.

    Parameters
    ----------
    name : str
        The subject.
    task : lm_eval Task
        What asks and judges.
    questions : tuple of int
        Places in the split of the questions chosen, ascending.
    available : int
        How many the split has.
    """

    name: str
    task: Any
    questions: tuple[int, ...]
    available: int

    def requests(self) -> list[Any]:
        """lm-eval's requests, those of a question together, questions in order."""
        with quiet(), Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
            self.task.set_fewshot_seed(_SHOTS_SEED)
            self.task.build_all_requests(samples=list(self.questions))
        requests: list[Any] = self.task.instances
        return requests

    def digest(self, requests: Sequence[Any]) -> str:
        """What was asked and what counts as right, in 16 hex digits."""
        said = [[*request.arguments, self.task.doc_to_target(request.doc)] for request in requests]
        text = json.dumps([self.questions, self.available, said], default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def require_lm_eval() -> None:
    """Refuse to go on without lm-eval.

    Raises
    ------
    MissingExtraError
        If it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingExtraError("benchmarks need lm-eval: pip install 'cgfedllm[eval]'")


def local_folder(benchmark: Benchmark, hub: Path | None) -> Path | None:
    """The data set's folder in a local copy of the hub; None if there is no copy.

    Raises
    ------
    DataError
        If it is not there; the message says how to get it.
    """
    if hub is None:
        return None
    folder = hub.expanduser().resolve() / benchmark.data
    if not folder.is_dir():
        what = f"holds no folder {benchmark.data}" if hub.is_dir() else "does not exist"
        raise DataError(f"{hub} {what}\n{_how_to_get(benchmark, hub)}")
    return folder


@contextmanager
def quiet() -> Iterator[None]:
    """Inside this block lm-eval and `datasets` keep their logs and bars to themselves."""
    import datasets

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


def members_of(benchmark: Benchmark) -> dict[str, tuple[str, ...]]:
    """Subjects of every group of a benchmark, by lm-eval's tags where it has them.

    Raises
    ------
    MissingExtraError
        If lm-eval is not installed.
    """
    require_lm_eval()
    index = _task_manager(benchmark.folder).task_index
    found: dict[str, tuple[str, ...]] = {}
    for group in benchmark.groups:
        if isinstance(group.subjects, str):
            tasks = sorted(index[group.subjects].tags)
            found[group.name] = tuple(task.removeprefix(benchmark.prefix) for task in tasks)
        elif group.subjects is not None:
            found[group.name] = group.subjects
    every = tuple(dict.fromkeys(name for names in found.values() for name in names))
    return {group.name: found.get(group.name, every) for group in benchmark.groups}


def load_subjects(
    benchmark: Benchmark,
    subjects: Sequence[str],
    *,
    shots: int,
    per_subject: int | None,
    seed: int,
    hub: Path | None,
) -> list[Subject]:
    """Read the questions of subjects and choose which to ask.

    Parameters
    ----------
    benchmark : Benchmark
        Whose.
    subjects : sequence of str
        Which; published as progress one by one.
    shots : int
        Worked examples in each prompt.
    per_subject : int or None
        Most questions of a subject, drawn at random; None is all.
    seed : int
        Of that draw. It depends on nothing else but the names of benchmark and subject.
    hub : Path or None
        Folder that holds data sets under their hub ids; None reads from the hub (or its cache).

    Raises
    ------
    DataError
        If the data set cannot be read; the message says what is expected where.
    ConfigError
        If there are fewer worked examples than asked for.
    MissingExtraError
        If lm-eval is not installed.
    """
    require_lm_eval()
    folder = local_folder(benchmark, hub)
    changes: dict[str, Any] = {}
    if folder is not None:
        changes = {"dataset_path": str(folder), "dataset_kwargs": {"cache_dir": _cache(folder)}}
    manager = _task_manager(benchmark.folder)
    loaded = []
    for done, name in enumerate(subjects, start=1):
        task = _load(manager, benchmark, name, folder, changes)
        worked = len(task.fewshot_docs())
        if shots > worked:
            raise ConfigError(
                f"{benchmark.title}, {name}: {shots} worked examples are asked for, there are "
                f"{worked}; lower --shots"
            )
        task.set_config(key="num_fewshot", value=shots)
        available = len(task.eval_docs)
        loaded.append(
            Subject(name, task, _draw(benchmark, name, available, per_subject, seed), available)
        )
        events.publish(
            events.EvaluationProgress(f"{benchmark.title}: reading", done, len(subjects))
        )
    return loaded


def check_subjects(benchmark: Benchmark, asked: Sequence[str], known: Sequence[str]) -> None:
    """Refuse names that the benchmark does not have.

    Raises
    ------
    ConfigError
        If there is one.
    """
    for name in asked:
        if name not in known:
            raise ConfigError(
                f"{benchmark.title} has no subject {name!r}.{did_you_mean(name, known)}"
            )


def _draw(
    benchmark: Benchmark, subject: str, available: int, wanted: int | None, seed: int
) -> tuple[int, ...]:
    if wanted is None or wanted >= available:
        return tuple(range(available))
    random = generator(seed, "benchmark", benchmark.name, subject)
    # lm-eval takes questions in the order of the split, whatever order they are named in
    return tuple(sorted(random.choice(available, wanted, replace=False).tolist()))


@cache
def _task_manager(folder: str) -> Any:
    """lm-eval's index of the tasks in one of its folders; that of all takes tens of seconds."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    with quiet():
        return lm_eval.tasks.TaskManager(include_defaults=False, include_path=[root / folder])


def _load(
    manager: Any,
    benchmark: Benchmark,
    subject: str,
    folder: Path | None,
    changes: dict[str, Any],
) -> Any:
    name = benchmark.prefix + subject
    try:
        with quiet():
            # as the member of a group: that is how lm-eval lets a stock task be changed
            group = {"group": benchmark.name + "-chosen", "task": [{"task": name, **changes}]}
            return manager.load([group])["tasks"][name]
    except Exception as error:  # whatever `datasets` raises
        what = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if folder is None:
            raise DataError(
                f"{benchmark.title}, {subject}: the data set {benchmark.data} cannot be read from "
                f"the hub or its cache: {what}\n{_how_to_get(benchmark, Path('HUB'))}"
            ) from error
        raise DataError(
            f"{benchmark.title}, {subject}: {folder} cannot be read: {what}\n"
            f"{_how_to_get(benchmark, folder.parents[benchmark.data.count('/')])}"
        ) from error


def _cache(folder: Path) -> str:
    """Where `datasets` keeps what it reads from this copy.

    It knows a local folder by its last name and `configs` alone: in one cache for all, other files
    under the same names would be taken for those read before.
    """
    import datasets

    state = [str(folder)]
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        found = path.stat()
        state.append(f"{path.relative_to(folder)} {found.st_size} {found.st_mtime_ns}")
    digest = hashlib.sha256("\n".join(state).encode()).hexdigest()[:16]
    return str(Path(datasets.config.HF_DATASETS_CACHE) / "cgfedllm" / digest)


def _how_to_get(benchmark: Benchmark, hub: Path) -> str:
    target = hub / benchmark.data
    return (
        f"a local copy is the data set's repository as it is on the hub, under {target}: its "
        f"README.md, whose `configs` name the files of each subject, and those files. With a "
        f"network: `hf download {benchmark.data} --repo-type dataset --local-dir {target}`, then "
        f"--hub {hub}"
    )
