"""Data sets read through Hugging Face `datasets`: from the hub, or from a local folder.

The library is imported only when it is needed: it takes seconds.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cgfedllm.data.names import did_you_mean
from cgfedllm.data.rows import Row
from cgfedllm.errors import DataError


def load_hub_rows(source: str, name: str | None, split: str) -> list[Row]:
    """Rows of one split of a data set on the hub, or of a local folder laid out like one.

    Parameters
    ----------
    source : str
        Hub id or folder.
    name : str or None
        Configuration of the data set.
    split : str
        Split; slices such as ``train[:100]`` work too.

    Raises
    ------
    DataError
        If the data set, configuration or split does not exist, or the hub is out of reach.
    """
    from datasets import load_dataset
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError

    try:
        data = load_dataset(source, name, split=split)
    except DatasetNotFoundError as error:
        raise DataError(_not_there(source, error)) from None
    except DataFilesNotFoundError as error:
        raise DataError(f"data source {source!r}: no data files in it ({error})") from None
    except (ConnectionError, OSError) as error:
        raise DataError(_out_of_reach(source, error)) from None
    except ValueError as error:
        raise DataError(_wrong_name(source, name, split, str(error))) from None
    except Exception as error:
        raise DataError(f"data source {source!r} cannot be loaded: {error}") from error
    return _rows(data, source)


def is_saved_to_disk(folder: Path) -> bool:
    """Whether `datasets` wrote the folder with ``save_to_disk``."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def load_saved_rows(folder: Path, split: str) -> list[Row]:
    """Rows of a folder that ``save_to_disk`` wrote; `split` counts only if it holds several.

    Raises
    ------
    DataError
        If the folder is damaged or has no such split.
    """
    from datasets import DatasetDict, load_from_disk

    try:
        data = load_from_disk(str(folder))
    except Exception as error:
        raise DataError(f"{folder} looks saved to disk but cannot be read: {error}") from error
    if isinstance(data, DatasetDict):
        if split not in data:
            raise DataError(wrong_split(str(folder), split, list(data)))
        data = data[split]
    return _rows(data, str(folder))


def wrong_split(source: str, split: str, known: list[str]) -> str:
    """The message for a split that is not there."""
    return (
        f"{source} has no split {split!r}; it has {', '.join(known)}."
        f"{did_you_mean(split, known)} Set data.split (data.heldout_split for data.heldout_source)"
    )


def _rows(data: Any, source: str) -> list[Row]:
    rows: list[Row] = data.to_list()
    if not rows:
        raise DataError(f"{source} has no rows in this split")
    return rows


def _not_there(source: str, error: Exception) -> str:
    return (
        f"data source {source!r} is neither a file nor a folder here, nor a data set on the hub "
        f"that can be read: {error}. Check the spelling; for a private or gated one run "
        "`hf auth login`"
    )


def _out_of_reach(source: str, error: Exception) -> str:
    offline = next((key for key in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if _set(key)), None)
    why = f"{offline} is set" if offline else f"the hub cannot be reached ({_first_line(error)})"
    return (
        f"data source {source!r} is neither a file nor a folder here, so it was looked for on "
        f"the hub, but {why} and it is not in the local cache. Give a local file or folder, "
        f"or load it once with {'that variable unset' if offline else 'a network'}; "
        "after that it is cached"
    )


def _wrong_name(source: str, name: str | None, split: str, message: str) -> str:
    if "split" in message.lower():
        return f"data source {source!r}, split {split!r}: {message}. Set data.split"
    if "BuilderConfig" in message or "config name" in message.lower():
        what = f"has no configuration {name!r}" if name else "needs a configuration name"
        return f"data source {source!r} {what}: {message}. Set data.name"
    return f"data source {source!r} cannot be loaded: {message}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _set(variable: str) -> bool:
    return os.environ.get(variable, "").upper() in {"1", "ON", "YES", "TRUE"}
