"""Files that survive a crash: a reader sees the old content or the new one, never half of it.

::

    write_atomic   temp file in the same folder -> fsync -> rename over the old -> fsync folder
    append_line    heal a torn last line -> append -> fsync; a failed append is cut off again

A killed process may leave a temp file behind (`.NAME.TOKEN.tmp`). Nothing reads those;
`remove_leftovers` deletes them.
"""

from __future__ import annotations

import json
import os
import secrets
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from errno import EACCES, EDQUOT, EFBIG, EINVAL, ENOSPC, ENOTSUP, EPERM, EROFS
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic_core import from_json

from cgfedllm.errors import CheckpointError, StorageError

AnyArray = NDArray[Any]
StrPath = str | os.PathLike[str]

_CHECKSUM_KEY = "cgfedllm.crc32"
_REMEDIES = {
    ENOSPC: "free some space on that disk (or choose another folder), then resume",
    EDQUOT: "your disk quota is used up; free some space, then resume",
    EFBIG: "a file size limit is in force (`ulimit -f`); raise it, then resume",
    EROFS: "the file system is read-only; choose another folder",
    EACCES: "you may not write there; choose another folder or change its permissions",
    EPERM: "you may not write there; choose another folder or change its permissions",
}


def write_atomic(path: StrPath, data: bytes | str, *, private: bool = False) -> None:
    """Replace a file's content at once; parent folders are made where missing.

    Parameters
    ----------
    path : path-like
        File to write.
    data : bytes or str
        New content; text is written as UTF-8.
    private : bool
        Readable by its owner alone, from the first byte on.

    Raises
    ------
    StorageError
        If the content cannot be written. The old file, if there was one, is untouched.
    """
    content = data.encode() if isinstance(data, str) else data
    mode = 0o600 if private else 0o666
    _replace(Path(path), lambda descriptor: _write_all(descriptor, content), mode)


def append_line(path: StrPath, text: str) -> None:
    """Append one line and bring it to the disk before returning.

    Raises
    ------
    ValueError
        If `text` holds a line break.
    StorageError
        If the line cannot be written; the lines before it are untouched.
    """
    if "\n" in text:
        raise ValueError("append_line writes one line; the text holds a line break")
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        truncate_torn_line(path)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            try:
                _write_all(descriptor, text.encode() + b"\n")
                os.fsync(descriptor)
            except BaseException:
                with suppress(OSError):
                    os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _storage_error(path, error) from error


def truncate_torn_line(path: StrPath) -> int:
    """Cut off what follows the last line break: a line that a crash left unfinished.

    Returns
    -------
    int
        Number of bytes removed; 0 for a whole or missing file.

    Raises
    ------
    StorageError
        If the file cannot be read or cut.
    """
    path = Path(path)
    try:
        with path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            keep = size
            while keep > 0:
                start = max(0, keep - 4096)
                file.seek(start)
                found = file.read(keep - start).rfind(b"\n")
                if found >= 0:
                    keep = start + found + 1
                    break
                keep = start
            if keep < size:
                file.truncate(keep)
                os.fsync(file.fileno())
            return size - keep
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise _storage_error(path, error) from error


def remove_leftovers(folder: StrPath) -> None:
    """Delete temp files of writers that were killed. Only safe while nobody else writes there."""
    for leftover in Path(folder).glob(".*.tmp"):
        with suppress(OSError):
            leftover.unlink()


def write_json(path: StrPath, value: Any, *, private: bool = False) -> None:
    """Write indented JSON, atomically; `private` as for `write_atomic`.

    Raises
    ------
    StorageError
        As `write_atomic`.
    """
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", private=private)


def read_json(path: StrPath) -> Any:
    """Read a JSON file.

    Raises
    ------
    CheckpointError
        If the file is missing, unreadable or not JSON; the message names it.
    """
    try:
        return parse_json(Path(path).read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def parse_json(text: str | bytes) -> Any:
    """Read JSON that may be damaged, or somebody else's.

    Raises
    ------
    ValueError
        If it is none, goes too deep, or holds text that cannot be written again (half of a
        surrogate pair).
    """
    return from_json(text)


def save_tensors(
    path: StrPath, tensors: Mapping[str, AnyArray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named arrays as one safetensors file, atomically, with a checksum.

    Equal arrays and metadata give equal bytes.

    Parameters
    ----------
    path : path-like
        File to write.
    tensors : mapping of str to ndarray
        Any shapes, contiguous or not.
    metadata : mapping of str to str, optional
        Text kept in the header.

    Raises
    ------
    StorageError
        As `write_atomic`.
    """
    from safetensors.numpy import save

    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    header = {**(metadata or {}), _CHECKSUM_KEY: f"{_checksum(arrays):08x}"}
    write_atomic(path, _sort_header(save(arrays, metadata=header)))


def load_tensors(path: StrPath) -> tuple[dict[str, AnyArray], dict[str, str]]:
    """Read a safetensors file.

    Returns
    -------
    tensors : dict of ndarray
        The arrays, in memory of their own.
    metadata : dict of str
        The header's text.

    Raises
    ------
    CheckpointError
        If the file is missing, not safetensors, cut short, or does not match its checksum.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (TypeError, AttributeError) as error:  # bfloat16 and float8: numpy has no such types
        raise CheckpointError(
            f"{path} holds values of a type that cannot be read here ({error}); "
            "save it again as float32"
        ) from None
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged or not a safetensors file: {error}; use an earlier checkpoint"
        ) from None
    # files of other programs have no checksum
    expected = metadata.pop(_CHECKSUM_KEY, None)
    if expected is not None and expected != f"{_checksum(tensors):08x}":
        raise CheckpointError(
            f"{path} is damaged: its values do not match its checksum; use an earlier checkpoint"
        )
    return tensors, metadata


def _replace(path: Path, write: Callable[[int], None], mode: int = 0o666) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # a token of its own, so that two writers never share a temp file; the name is cut because
        # folders limit its length
        temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.tmp")
        # not tempfile: its files are 0600 whatever the umask says, and runs are often shared
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except OSError as error:
        raise _storage_error(path, error) from error
    try:
        try:
            write(descriptor)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise _storage_error(path, error) from error
        raise
    _sync_folder(path.parent)


def _write_all(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:  # a nearly full disk takes a part before it says no
        view = view[os.write(descriptor, view) :]


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; not every file system can, and there it is as good."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (EINVAL, ENOTSUP, EPERM, EACCES):
            raise _storage_error(folder, error) from error
    finally:
        os.close(descriptor)


def _storage_error(path: Path, error: OSError) -> StorageError:
    if isinstance(error, StorageError):
        return error
    remedy = _REMEDIES.get(error.errno or 0, "check the folder and the disk it is on")
    wrapped = StorageError(f"cannot write {path}: {error.strerror or error}; {remedy}")
    wrapped.errno = error.errno
    return wrapped


def _checksum(tensors: Mapping[str, AnyArray]) -> int:
    crc = 0
    for name in sorted(tensors):
        array = np.asarray(tensors[name], order="C")
        crc = zlib.crc32(f"{name}:{array.dtype}:{array.shape};".encode(), crc)
        crc = zlib.crc32(array.reshape(-1).view(np.uint8).data if array.size else b"", crc)
    return crc


def _sort_header(blob: bytes) -> bytes:
    """Put the header's metadata in alphabetical order; safetensors keeps it in a hash map."""
    length = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    ordered = {"__metadata__": dict(sorted(metadata.items())), **header}
    text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the values stay aligned to 8 bytes
    return len(text).to_bytes(8, "little") + text + blob[8 + length :]
