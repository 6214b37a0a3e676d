"""Storage: old content or new content, never a mixture, and named errors."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cgfedllm import storage
from cgfedllm.errors import CheckpointError, StorageError


def _leftovers(folder: Path) -> list[Path]:
    return list(folder.glob(".*.tmp"))


def _fail_with(code: int):
    def fail(*_args: object, **_kwargs: object) -> int:
        raise OSError(code, os.strerror(code))

    return fail


def test_write_atomic_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    storage.write_atomic(path, "first")
    storage.write_atomic(path, b"second")
    assert path.read_bytes() == b"second"
    assert _leftovers(path.parent) == []


def test_written_files_honour_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        storage.write_atomic(tmp_path / "x", "1")
    finally:
        os.umask(old)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permissions"),
        (errno.EIO, "check the folder"),
    ],
)
def test_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, code: int, remedy: str
) -> None:
    path = tmp_path / "state.json"
    storage.write_atomic(path, "old")
    monkeypatch.setattr(storage.os, where, _fail_with(code))
    with pytest.raises(StorageError, match=remedy) as caught:
        storage.write_atomic(path, "new")
    monkeypatch.undo()
    assert str(path) in str(caught.value)
    assert caught.value.errno == code
    assert path.read_text() == "old"
    assert _leftovers(tmp_path) == []


def test_partial_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(storage.os, "write", lambda fd, data: write(fd, bytes(data[:3])))
    storage.write_atomic(tmp_path / "x", b"0123456789")
    assert (tmp_path / "x").read_bytes() == b"0123456789"


def test_interrupt_during_write_removes_the_temp_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_fd: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(storage.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        storage.write_atomic(tmp_path / "x", b"1")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_real_size_limit_in_a_process_of_its_own(tmp_path: Path) -> None:
    """The kernel, not a mock, refuses the bytes half way through."""
    script = """
import resource, signal, sys
from cgfedllm.errors import StorageError
from cgfedllm import storage
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = sys.argv[1]
storage.write_atomic(folder + "/state", b"old")
storage.append_line(folder + "/lines", "one")
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for call in (
    lambda: storage.write_atomic(folder + "/state", bytes(100_000)),
    lambda: storage.append_line(folder + "/lines", "x" * 100_000),
):
    try:
        call()
    except StorageError as error:
        print("refused", error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.count("refused cannot write") == 2
    assert (tmp_path / "state").read_bytes() == b"old"
    assert (tmp_path / "lines").read_text() == "one\n"
    assert _leftovers(tmp_path) == []


def test_kill_in_the_middle_leaves_only_an_ignored_temp_file(tmp_path: Path) -> None:
    script = """
import os, signal, sys
from cgfedllm import storage
path = sys.argv[1] + "/state"
storage.write_atomic(path, "old")
storage.os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
storage.write_atomic(path, "new")
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=60)
    assert done.returncode == -9
    assert (tmp_path / "state").read_text() == "old"
    assert len(_leftovers(tmp_path)) == 1
    storage.write_atomic(tmp_path / "state", "newer")
    assert (tmp_path / "state").read_text() == "newer"
    storage.remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_append_heals_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    storage.append_line(path, "one")
    with path.open("a") as file:
        file.write('{"round": 2, "cli')
    storage.append_line(path, "two")
    assert path.read_text() == "one\ntwo\n"


@pytest.mark.parametrize(
    ("before", "after"),
    [("", ""), ("a\n", "a\n"), ("a\nb", "a\n"), ("b", ""), ("a\n" + "b" * 10_000, "a\n")],
)
def test_truncate_torn_line(tmp_path: Path, before: str, after: str) -> None:
    path = tmp_path / "x"
    path.write_text(before)
    assert storage.truncate_torn_line(path) == len(before) - len(after)
    assert path.read_text() == after


def test_truncate_torn_line_of_a_missing_file_is_nothing(tmp_path: Path) -> None:
    assert storage.truncate_torn_line(tmp_path / "none") == 0


def test_append_refuses_two_lines(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one line"):
        storage.append_line(tmp_path / "x", "a\nb")


def test_failed_append_keeps_the_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    storage.append_line(path, "one")
    monkeypatch.setattr(storage.os, "fsync", _fail_with(errno.ENOSPC))
    with pytest.raises(StorageError, match="free some space"):
        storage.append_line(path, "two")
    assert path.read_text() == "one\n"


def test_tensors_round_trip(tmp_path: Path) -> None:
    arrays = {
        "flat": np.arange(6, dtype=np.float32),
        "transposed": np.arange(6, dtype=np.float64).reshape(2, 3).T,
        "scalar": np.array(3, np.int64),
        "empty": np.zeros((0, 4), np.float32),
        "bytes": np.frombuffer(b"hello", np.uint8),
    }
    path = tmp_path / "x.safetensors"
    storage.save_tensors(path, arrays, {"round": "3", "note": "ü"})
    tensors, metadata = storage.load_tensors(path)
    assert metadata == {"round": "3", "note": "ü"}
    assert tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        assert tensors[name].dtype == array.dtype
        assert tensors[name].shape == array.shape
        np.testing.assert_array_equal(tensors[name], array)


def test_equal_tensors_give_equal_bytes(tmp_path: Path) -> None:
    metadata = {f"key{i}": str(i) for i in range(20)}
    blobs = set()
    for i in range(5):
        storage.save_tensors(tmp_path / f"{i}", {"b": np.ones(3), "a": np.zeros(2)}, metadata)
        blobs.add((tmp_path / f"{i}").read_bytes())
    assert len(blobs) == 1


def test_no_tensors_at_all(tmp_path: Path) -> None:
    storage.save_tensors(tmp_path / "x", {})
    assert storage.load_tensors(tmp_path / "x") == ({}, {})


def test_damaged_tensors_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    storage.save_tensors(path, {"a": np.arange(100, dtype=np.float32)})
    blob = path.read_bytes()
    flipped = bytearray(blob)
    flipped[-1] ^= 1
    for damaged in (b"", blob[:4], blob[:-10], b"not safetensors at all", bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"x\.safetensors is damaged"):
            storage.load_tensors(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        storage.load_tensors(tmp_path / "none")


def test_bfloat16_is_refused_with_a_remedy(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"BF16","shape":[4],"data_offsets":[0,8]}}'
    header += b" " * (-len(header) % 8)
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match=r"x\.safetensors holds values.*as float32"):
        storage.load_tensors(path)


def test_json_round_trip_and_errors(tmp_path: Path) -> None:
    storage.write_json(tmp_path / "x.json", {"a": [1, "ü"]})
    assert storage.read_json(tmp_path / "x.json") == {"a": [1, "ü"]}
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"x\.json cannot be read"):
        storage.read_json(tmp_path / "x.json")
    with pytest.raises(CheckpointError, match="does not exist"):
        storage.read_json(tmp_path / "y.json")
