"""How far a fit has come, one file, replaced after every epoch; resumed only by the same fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cgfedllm.codecs.learning import FitProgress
from cgfedllm.errors import CheckpointError
from cgfedllm.storage import load_tensors, parse_json, save_tensors

FORMAT = "cgfedllm-fit"
VERSION = "1"

Identity = Mapping[str, Any]
"""What makes two fits the same: codec, version, options, adapter, recordings, settings."""


def save_fit(path: Path, progress: FitProgress, identity: Identity) -> None:
    """Write where a fit stands.

    Raises
    ------
    StorageError
        If the disk refuses; the file of the epoch before is untouched.
    """
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "identity": json.dumps(identity, sort_keys=True),
        "best": str(progress.best),
        "curve": json.dumps([dict(row) for row in progress.curve]),
    }
    save_tensors(path, progress.tensors, metadata)


def load_fit(path: Path, identity: Identity) -> FitProgress | None:
    """Read where the same fit stands; None if it has not begun.

    Raises
    ------
    CheckpointError
        If the file is damaged, or of another fit; the message says in what that differs.
    """
    if not path.exists():
        return None
    tensors, metadata = load_tensors(path)
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise CheckpointError(f"{path} is no checkpoint of a fit, or one of another release")
    try:
        check_identity(parse_json(metadata["identity"]), identity, path)
        curve = tuple(dict(row) for row in parse_json(metadata["curve"]))
        return FitProgress(curve, int(metadata["best"]), tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is incomplete: {error!r}; fit again with --overwrite"
        ) from None


def check_identity(found: Any, identity: Identity, path: Path) -> None:
    """Refuse to go on with another fit.

    Parameters
    ----------
    found : dict
        What is written in `path`.
    identity : dict
        Of the fit at hand; keys that are not in it are not compared.

    Raises
    ------
    CheckpointError
        If they differ; the message names the first difference.
    """
    known = found if isinstance(found, dict) else {}
    for key, wanted in identity.items():
        if known.get(key) != wanted:
            there, here = _told(known.get(key), wanted)
            raise CheckpointError(
                f"{path} is of another fit: {key} is {there}, not {here}. Fit under another name "
                "(--to FILE, with --recording to fit on the same updates), or start again with "
                "--overwrite"
            )


def _told(found: Any, wanted: Any) -> tuple[str, str]:
    """Both values; of tables only what differs."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
        found, wanted = ({key: table.get(key) for key in keys} for table in (found, wanted))
    return json.dumps(found), json.dumps(wanted)
