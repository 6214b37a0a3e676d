"""Peers are measured where they are installed, by their real bytes, and only when asked for."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from cgfedllm.adapter import AdapterUpdate
from cgfedllm.analysis.open_loop import measure
from cgfedllm.analysis.peers import make_peer, peer_names, peer_version
from cgfedllm.analysis.trials import Trial, trials
from cgfedllm.cli import app
from cgfedllm.codecs import CodecContext
from cgfedllm.errors import CodecError, ConfigError, MissingExtraError
from cgfedllm.report.figures.style import codec_of

from .recordings import SPEC, noise, write_recording

MODULES = {"nncodec": "nncodec.nnc", "zfp": "zfpy", "sz3": "pysz"}
HEADER = 8


@pytest.fixture
def fake_zfp(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A ZFP of fixed rate: signs and one scale, as many bytes as it is asked for."""

    def compress(blocks: np.ndarray[Any, Any], *, rate: float) -> bytes:
        scale = np.float32(np.abs(blocks).mean()).tobytes()
        head = np.uint32(blocks.size).tobytes() + scale
        size = round(rate * blocks.size / 8)
        return head + np.packbits(blocks.reshape(-1) > 0).tobytes()[:size].ljust(size, b"\0")

    def decompress(blob: bytes) -> np.ndarray[Any, Any]:
        count = int(np.frombuffer(blob[:4], np.uint32)[0])
        scale = np.frombuffer(blob[4:8], np.float32)[0]
        bits = np.unpackbits(np.frombuffer(blob[8:], np.uint8))[:count]
        values = np.zeros(count, np.float32)
        values[: len(bits)] = np.where(bits > 0, scale, -scale)
        return values.reshape(-1, 4, 4)

    module = ModuleType("zfpy")
    vars(module).update(compress_numpy=compress, decompress_numpy=decompress)
    monkeypatch.setitem(sys.modules, "zfpy", module)
    return module


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(app, ["bench", "codecs", *map(str, args)])


@pytest.mark.parametrize("name", MODULES)
def test_a_peer_that_is_not_installed_says_how_to_get_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, MODULES[name], None)
    peer = make_peer(name)
    assert not peer.available()
    for call in (lambda: peer.encode(noise(1, 1), 1.0), lambda: peer.decode(b"", SPEC)):
        with pytest.raises(
            MissingExtraError, match=r"--peer .*`pip install .*`, or leave the peer out"
        ):
            call()
    with pytest.raises(MissingExtraError):
        peer_version(name)


def test_unknown_names() -> None:
    assert peer_names() == list(MODULES)
    with pytest.raises(ConfigError, match=r"no peer is named 'nncodek'; did you mean 'nncodec'"):
        make_peer("nncodek")
    with pytest.raises(ConfigError, match=r"known: nncodec, zfp, sz3"):
        make_peer("peer:gzip")


def test_bytes_stay_within_the_rate_header_included(fake_zfp: ModuleType) -> None:
    peer = make_peer("zfp")
    assert peer.available()
    update = noise(1, 1)
    blob = peer.encode(update, 2.0)
    assert 8 * (len(blob) + HEADER) > 2 * SPEC.size >= 8 * len(blob)
    assert peer.decode(blob, SPEC).vector.shape == (SPEC.size,)
    with pytest.raises(CodecError, match=r"peer:zfp: needs .* bits per parameter .*0\.1 are asked"):
        peer.encode(update, 0.1)


def test_a_peer_runs_at_every_rate_and_its_refusals_are_noted(
    fake_zfp: ModuleType, tmp_path: Path
) -> None:
    assert trials([("peer:zfp", {})], (0.1, 2.0))[1] == Trial("peer:zfp", {"bpp": 2.0}, 2.0)
    recording = write_recording(tmp_path / "r")
    result = measure("r", recording, [("peer:zfp", {})], rates=(0.1, 2.0), memory=True)
    (row,) = [r for r in result.rows if r.bpp > 0]
    assert (row.codec, row.label, row.asked_bpp) == ("peer:zfp", "peer:zfp", 2.0)
    assert 1.8 < row.bpp <= 2
    assert row.snr_db > 3  # signs keep 2 / pi of a Gaussian
    (refusal,) = result.refusals
    assert (refusal.codec, refusal.asked_bpp) == ("peer:zfp", 0.1)


def test_the_command_takes_peers_only_when_asked(
    fake_zfp: ModuleType, cli: Callable[..., Any], tmp_path: Path
) -> None:
    write_recording(tmp_path / "one")
    common = ("-r", "one", "--codec", "int8", "--updates", 3, "--rate", 2, "--to", "out")
    assert cli(*common).exit_code == 0
    assert "peer" not in (tmp_path / "out" / "open_loop.json").read_text()
    result = cli(*common, "--peer", "zfp")
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader((tmp_path / "out" / "codecs.csv").open()))
    assert rows[-1]["codec"] == "peer:zfp"
    told = json.loads((tmp_path / "out" / "open_loop.json").read_text())
    assert "--peer zfp" in told["command"]
    assert list(told["peers"]) == ["zfp"]
    # no colon: not every file system takes one
    assert (tmp_path / "out" / "codecs" / "peer-zfp.svg").exists()


def test_the_command_reports_missing_and_unknown_peers_before_it_starts(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pysz", None)
    write_recording(tmp_path / "one")
    for peer, code, told in (("sz3", 1, "pip install pysz"), ("sz", 2, "no peer is named 'sz'")):
        result = cli("-r", "one", "--peer", peer, "--to", "out")
        assert result.exit_code == code
        assert told in result.stderr
    assert not (tmp_path / "out").exists()


def test_nncodec_takes_the_attempt_with_the_least_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in whose bytes tell the step; a greater weight gives the finer step at the rate."""

    def compress(table: dict[str, Any], *, qp: int, lambda_scale: float, **rest: Any) -> bytearray:
        assert rest["bitstream_path"] is None  # or it writes a file into the working folder
        step = 2.0 ** (qp / 16)
        level = np.round(table["0"] / step).astype(np.int32)
        bits = level.size * max(0.0, 3 - qp / 16 - lambda_scale / 4)
        body = np.float64(step).tobytes() + level.tobytes()
        return Bitstream(body, int(bits / 8))

    class Bitstream(bytearray):
        def __new__(cls, body: bytes, size: int) -> Any:
            made = super().__new__(cls)
            bodies[size] = body
            return made

        def __init__(self, body: bytes, size: int) -> None:
            super().__init__(size.to_bytes(4, "little").ljust(size, b"\0"))

    def decompress(blob: bytearray) -> dict[str, Any]:
        body = bodies[int.from_bytes(blob[:4], "little")]
        level = np.frombuffer(body[8:], np.int32)
        return {"0": (level * np.frombuffer(body[:8], np.float64)[0]).astype(np.float32)}

    bodies: dict[int, bytes] = {}
    module = SimpleNamespace(compress=compress, decompress=decompress)
    monkeypatch.setitem(sys.modules, "nncodec", ModuleType("nncodec"))
    monkeypatch.setitem(sys.modules, "nncodec.nnc", module)
    peer, update = make_peer("nncodec"), noise(1, 1)
    blob = peer.encode(update, 2.0)
    assert 8 * len(blob) <= 2 * SPEC.size
    error = np.square(peer.decode(blob, SPEC).vector - update.vector).mean()
    # weight 4 reaches step 1 at 2 bits; without it the step would be 2
    assert error == pytest.approx(1 / 12, rel=0.15)


@pytest.mark.parametrize("name", MODULES)
def test_round_trip_of_the_real_thing(name: str) -> None:
    pytest.importorskip(MODULES[name], exc_type=ImportError)
    peer = make_peer(name)
    update = noise(1, 1)
    context = CodecContext(SPEC, 1)
    snr = []
    for rate in (2.0, 4.0, 8.0):
        coder = Trial(f"peer:{name}", {"bpp": rate}, rate).make(SPEC)
        blob = coder.encode(update, context)
        assert type(blob) is bytes
        assert blob == peer.encode(update, rate)
        assert 8 * len(blob) <= rate * SPEC.size
        error = coder.decode(blob, context) - update
        snr.append(20 * np.log10(update.norm() / error.norm()))
    assert snr == sorted(snr)
    assert snr[-1] > 30
    zeros = AdapterUpdate.zeros(SPEC)
    assert peer.decode(peer.encode(zeros, 8.0), SPEC).norm() == 0


def test_a_peer_has_one_look_of_its_own() -> None:
    assert codec_of("peer:zfp") == codec_of("peer:zfp:bpp=1") == "peer:zfp"
    assert codec_of("ecsq:bpp=1") == "ecsq"
