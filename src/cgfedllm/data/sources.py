"""From `data.source` to rows, with the file each row came from.

::

    "demo"              -> demo.py
    file, glob          -> readers.py
    folder of files     -> readers.py, the files of the wanted split
    folder, other       -> hub.py (saved to disk, or laid out like a hub data set)
    anything else       -> hub.py (a hub id)
"""

from __future__ import annotations

import re
from pathlib import Path

from cgfedllm.config import DEMO_DATA, DataConfig
from cgfedllm.data.demo import demo_files
from cgfedllm.data.hub import is_saved_to_disk, load_hub_rows, load_saved_rows, wrong_split
from cgfedllm.data.readers import data_extension, file_stem, read_file
from cgfedllm.data.rows import SourceFile
from cgfedllm.errors import DataError

_WILDCARD = re.compile(r"[*?\[]")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# the words `datasets` knows splits by, so that a folder means the same to both
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}


def load_sources(
    config: DataConfig, *, source: str | None = None, split: str | None = None
) -> list[SourceFile]:
    """Read every row of a source.

    Parameters
    ----------
    config : DataConfig
        `source`, `name` and `split` are used.
    source, split : str, optional
        Read these instead of `config.source` and `config.split`.

    Returns
    -------
    list of SourceFile
        Sorted by path; at least one, each with at least one row.

    Raises
    ------
    DataError
        If nothing is found, or something found cannot be read. The message says which file and,
        for text files, which line.
    """
    source = config.source if source is None else source
    split = config.split if split is None else split
    if source == DEMO_DATA:
        return demo_files()
    path = Path(source).expanduser()
    if path.is_file():
        return _read([path])
    if path.is_dir():
        return _folder(path, config.name, split)
    if _WILDCARD.search(source):
        return _read(_glob(path))
    if not _HUB_ID.fullmatch(source) or data_extension(path) or source.startswith("."):
        raise DataError(
            f"{source} does not exist (looked in {Path.cwd()}); data.source takes a file, a glob, "
            'a folder, a hub id such as "openai/gsm8k", "demo" or "node"'
        )
    return [
        SourceFile(source, source.rpartition("/")[2], load_hub_rows(source, config.name, split))
    ]


def _read(paths: list[Path]) -> list[SourceFile]:
    stems = [file_stem(path) for path in paths]
    return [
        SourceFile(
            str(path),
            # files of the same name in several folders are told apart by the folder
            stem if stems.count(stem) == 1 else f"{path.resolve().parent.name}-{stem}",
            read_file(path),
        )
        for path, stem in zip(paths, stems, strict=True)
    ]


def _glob(pattern: Path) -> list[Path]:
    parts = pattern.parts
    fixed = next(number for number, part in enumerate(parts) if _WILDCARD.search(part))
    root = Path(*parts[:fixed]) if fixed else Path()
    found = sorted(path for path in root.glob(str(Path(*parts[fixed:]))) if path.is_file())
    if not found:
        raise DataError(
            f"no file matches {pattern} (looked in {root.resolve()}); check data.source"
        )
    return found


def _folder(folder: Path, name: str | None, split: str) -> list[SourceFile]:
    if is_saved_to_disk(folder):
        return [SourceFile(str(folder), folder.resolve().name, load_saved_rows(folder, split))]
    files = sorted(path for path in folder.iterdir() if path.is_file() and data_extension(path))
    if name is not None or not files or (folder / "README.md").is_file():
        if not any(path.is_file() for path in folder.rglob("*")):
            raise DataError(f"folder {folder} holds no files; check data.source")
        rows = load_hub_rows(str(folder), name, split)
        return [SourceFile(str(folder), folder.resolve().name, rows)]
    splits = {path: _split_of(path) for path in files}
    chosen = [path for path in files if splits[path] == split]
    if not chosen:
        raise DataError(wrong_split(str(folder), split, sorted(set(splits.values()))))
    return _read(chosen)


def _split_of(path: Path) -> str:
    """The split a file name speaks of; a name that speaks of none is training data."""
    words = re.split(r"[^a-z]+", file_stem(path).lower())
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), "train")
