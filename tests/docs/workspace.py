"""A folder as the pages' reader has it, in small: a checkout, data sets, a model of his own."""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from cgfedllm.evaluation.catalogue import CEVAL, MMLU, Benchmark
from cgfedllm.evaluation.tasks import members_of

from .pages import ROOT, blocks

# what the pages call folders of one's own
BENCHMARKS = ("HUB", "data/hub")
DOLLY = ("DOLLY", "FOLDER")


def make_workspace(folder: Path, model: Path) -> Path:
    """A checkout in `folder`, with data sets of few short rows where its configurations look.

    The base model is a copy of `model` in all configurations, those that ship and README's own.

    Returns
    -------
    Path
        Where to stand.
    """
    root = folder / "checkout"
    shutil.copytree(model, root / "model")
    # as long as the pages take their models to be: positions of a Llama are no weights
    card = json.loads((model / "config.json").read_text())
    (root / "model/config.json").write_text(json.dumps({**card, "max_position_embeddings": 2048}))
    # what commands read or write; the package itself is the repository's
    for name in ("benchmarks", "configs", "docs"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    mine = next(block.text for block in blocks("README.md", "toml"))
    # README calls it mine.toml, other pages otherwise
    for name in ("mine.toml", "experiment.toml", "my.toml"):
        (root / name).write_text(mine, encoding="utf-8")
    for path in root.rglob("*.toml"):
        path.write_text(re.sub(r'(?m)^id = "[^"]*"', f'id = "{root / "model"}"', path.read_text()))
    _data_sets(folder / "shared" / "data", root)
    return root


def _data_sets(shared: Path, root: Path) -> None:
    for clinic in ("north", "south", "west", "east"):
        _write(root / f"clinics/{clinic}.jsonl", _questions(60, clinic))
    sites = [{"source": f"site {n}", **row} for n in range(9) for row in _questions(40, str(n))]
    _write(shared / "medquad/medquad_16407.jsonl.gz", sites)
    for split, rows in (("train", 240), ("test", 20)):
        _write(shared / f"gsm8k/{split}.jsonl.gz", _questions(rows, split))
    kinds = [
        {"instruction": row["question"], "context": "", "response": row["answer"], "category": kind}
        for kind in ("open_qa", "summarization", "brainstorming", "classification")
        for row in _questions(40, kind)
    ]
    dolly = shared / "dolly/data_dolly/10"
    for part in range(4):
        # a list, as the data set has it
        _write_text(dolly / f"local_training_{part}.json.gz", json.dumps(kinds[part::4]))
    hub = _questions_of_benchmarks().write_hub(
        shared / "lm_eval_hub",
        ceval=dict.fromkeys(_subjects(CEVAL), 1),
        mmlu=dict.fromkeys(_subjects(MMLU), 1),
    )
    for names, target in ((BENCHMARKS, hub), (DOLLY, dolly)):
        for name in names:
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).symlink_to(target)


def _questions(count: int, kind: str) -> list[dict[str, str]]:
    colours = ("red", "green", "blue", "grey")
    return [
        {"question": f"{kind} {n}?", "answer": colours[(n + len(kind)) % 4]} for n in range(count)
    ]


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    _write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = text.encode()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def _subjects(benchmark: Benchmark) -> list[str]:
    return sorted({subject for group in members_of(benchmark).values() for subject in group})


def _questions_of_benchmarks() -> ModuleType:
    """tests/evaluation/questions.py, which is no package's."""
    spec = importlib.util.spec_from_file_location(
        "questions", ROOT / "tests" / "evaluation" / "questions.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
