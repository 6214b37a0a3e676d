"""A codec state that means harm, from a server or a file: opened within bounds, or not at all."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from cgfedllm.adapter import AdapterSpec
from cgfedllm.codecs import CodecState, make_codec
from cgfedllm.codecs.learning import LearnedCodec
from cgfedllm.errors import CodecStateError
from cgfedllm.federation.codec_state import (
    CodecBroadcast,
    StatefulCodec,
    options_text,
    pack_whole,
    receive_state,
)
from cgfedllm.tgap.codec_file import is_codec_file, load_codec_file, save_codec_file

SPEC = AdapterSpec.from_shapes({"m.0.q.lora_A.weight": (2, 7), "m.0.q.lora_B.weight": (6, 2)})
OPTIONS: dict[str, dict[str, Any]] = {
    "learned": {"directions": 3},
    "cg_cnn": {"stages": 2},
    "cg_resnet": {"stages": 2, "residual_blocks": 1},
    "cg_unet": {"stages": 2, "residual_blocks": 1},
}
HUGE = {"stages": 10, "width": 256}
"""Networks of terabytes."""

SHORT = settings(max_examples=75, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=10_000, suppress_health_check=list(HealthCheck))


def codec_of(name: str) -> LearnedCodec:
    made = make_codec(name, OPTIONS[name])
    assert isinstance(made, LearnedCodec)
    return made


def whole(options: bytes, packed: bytes, length: int | None = None) -> bytes:
    """A state as a server sends it, its checksum right."""
    content = struct.pack("<I", len(options) if length is None else length) + options + packed
    return struct.pack("<I", zlib.crc32(content)) + content


def tensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str, shape: list[int], size: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}


def pressed(name: str, packed: bytes) -> bytes:
    """As the codec packs it."""
    return zstandard.ZstdCompressor().compress(packed) if name == "learned" else packed


def refused(name: str, blob: bytes, kind: Any = "full", hash_: bytes = bytes(8)) -> CodecStateError:
    base = StatefulCodec(codec_of(name), codec_of(name).initial_state(SPEC))
    broadcast = CodecBroadcast(kind, 1, hash_, blob)
    with pytest.raises(CodecStateError) as caught:
        receive_state(broadcast, name, SPEC, base)
    assert len(str(caught.value)) < 2_000
    return caught.value


HEADERS: dict[str, bytes] = {
    "nothing": b"",
    "a length beyond the file": tensors({}, length=2**63),
    "no JSON": tensors(b"\xff" * 40),
    "deep": tensors(b'{"__metadata__":' + b"[" * 2_000),
    "deep and closed": tensors(b'{"a":' + b"[" * 1_500 + b"]" * 1_500 + b"}"),
    "a list": tensors([1, 2]),
    "no metadata": tensors({"x": entry("F32", [1], 4)}, bytes(4)),
    "metadata of numbers": tensors({"__metadata__": {"version": 1}}),
    "version beyond integers": tensors({"__metadata__": {"version": "9" * 3_000}}),
    "version that is none": tensors({"__metadata__": {"version": "one"}}),
    "negative version": tensors({"__metadata__": {"version": "-1"}}),
    "bfloat16": tensors({"__metadata__": {"version": "1"}, "x": entry("BF16", [1], 2)}, bytes(2)),
    "float8": tensors({"__metadata__": {"version": "1"}, "x": entry("F8_E4M3", [1], 1)}, bytes(1)),
    "a type of nobody's": tensors({"x": entry("F99", [1], 4)}, bytes(4)),
    "a shape of exabytes": tensors({"x": entry("F32", [2**62, 4], 4)}, bytes(4)),
    "a shape of nothing": tensors({"x": entry("F32", [0, 2**63], 0)}),
    "a shape below nothing": tensors({"x": entry("F32", [-1], 4)}, bytes(4)),
    "a shape of many axes": tensors({"x": entry("F32", [1] * 99, 4)}, bytes(4)),
    "a shape that lies": tensors({"x": entry("F32", [5], 4)}, bytes(4)),
    "values behind the end": tensors({"x": {**entry("F32", [1], 4), "data_offsets": [8, 12]}}),
    "overlapping values": tensors({"x": entry("F32", [1], 4), "y": entry("F32", [1], 4)}, bytes(4)),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_lies_is_refused(name: str, case: str) -> None:
    options = options_text(codec_of(name)).encode()
    refused(name, whole(options, pressed(name, HEADERS[case])))
    refused(name, pressed(name, HEADERS[case]), kind="increment")


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    codec = codec_of(name)
    state = codec.initial_state(SPEC)
    first = next(key for key, values in state.tensors.items() if values.dtype.kind == "f")
    own = {**state.tensors, first: np.full_like(state.tensors[first], bad)}
    made = CodecState.of(own, 1)
    error = refused(name, pack_whole(codec, made), hash_=made.hash)
    assert first in str(error)


@pytest.mark.parametrize("name", OPTIONS)
def test_arrays_of_another_type_or_number_are_refused(name: str) -> None:
    codec = codec_of(name)
    state = codec.initial_state(SPEC)
    for key, values in state.tensors.items():
        for other in (np.complex64, np.float16, np.bool_, np.int64):
            made = CodecState.of({**state.tensors, key: values.astype(other)}, 1)
            refused(name, pack_whole(codec, made), hash_=made.hash)
    made = CodecState.of({**state.tensors, "another": np.zeros(1, np.float32)}, 1)
    refused(name, pack_whole(codec, made), hash_=made.hash)


OPTIONS_TEXTS = {
    "no JSON": b"{",
    "not text": b"\xff\xfe",
    "a list": b"[]",
    "deep": b"[" * 60_000,
    "unknown": b'{"no_such": 1}',
    "of another type": b'{"directions": "many", "stages": "many"}',
    "beyond bounds": b'{"directions": 1e99, "stages": 1e99}',
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("case", OPTIONS_TEXTS)
def test_options_that_a_codec_does_not_take_are_refused(name: str, case: str) -> None:
    refused(name, whole(OPTIONS_TEXTS[case], codec_of(name).pack_state(CodecState())))


@pytest.mark.parametrize("name", ["cg_cnn", "cg_resnet", "cg_unet"])
def test_options_of_networks_of_terabytes_take_no_memory(name: str) -> None:
    """The options come with a state, so a server could ask a client for any network."""
    blob = whole(json.dumps(HUGE).encode(), codec_of(name).pack_state(CodecState()))
    codec = make_codec(name, HUGE)
    assert isinstance(codec, LearnedCodec)
    assert codec.state_limit(SPEC) > 2**38
    tracemalloc.start()
    try:
        refused(name, blob)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["cg_cnn", "cg_resnet", "cg_unet"])
@pytest.mark.parametrize("options", [{}, {"preset": "printed"}, {"align_signs": False}])
def test_shapes_of_states_are_known_without_making_one(name: str, options: dict[str, Any]) -> None:
    codec = make_codec(name, {**OPTIONS[name], **options})
    assert isinstance(codec, LearnedCodec)
    made = codec.initial_state(SPEC).tensors
    assert codec.state_shapes(SPEC) == {key: (v.shape, v.dtype) for key, v in made.items()}


def frames() -> dict[str, bytes]:
    """Zstandard frames that ask for more than they are worth."""
    streaming = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    skippable = bytes.fromhex("502a4d18") + (1000).to_bytes(4, "little") + bytes(1000)
    honest = codec_of("learned").pack_state(codec_of("learned").initial_state(SPEC))
    # magic, a window descriptor, a content size of two bytes, no block
    wide = bytes.fromhex("28b52ffd 40") + b"%c" + (200).to_bytes(2, "little")
    return {
        "bomb": zstandard.ZstdCompressor(level=19).compress(bytes(2**26)),
        "bomb of no size": streaming.compress(bytes(2**26)) + streaming.flush(),
        "empty": zstandard.ZstdCompressor().compress(b""),
        "cut": honest[:-1],
        "followed by more": honest + b"\0",
        "followed by another": honest + honest,
        "skippable": skippable,
        "after a skippable one": skippable + honest,
        "window of 128 MiB": wide % 0x88,
        "window of terabytes": wide % 0xFF,
        "size of exabytes": bytes.fromhex("28b52ffd e0") + b"\xfe" * 8,
    }


@pytest.mark.parametrize("case", frames())
def test_frames_that_claim_too_much_take_no_memory(case: str) -> None:
    blob = frames()[case]
    options = options_text(codec_of("learned")).encode()
    refused("learned", whole(options, blob))
    tracemalloc.start()
    try:
        refused("learned", whole(options, blob))
        refused("learned", blob, kind="increment")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


LIMITED = """
import resource, sys
from cgfedllm.adapter import AdapterSpec
from cgfedllm.errors import CodecStateError
from cgfedllm.federation.codec_state import CodecBroadcast, receive_state
from pathlib import Path

spec = AdapterSpec.from_json(sys.argv[1])
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
# what C libraries allocate counts here too
resource.setrlimit(resource.RLIMIT_AS, (now + 64 * 2**20,) * 2)
for path in sys.argv[2:]:
    broadcast = CodecBroadcast("full", 1, bytes(8), Path(path).read_bytes())
    try:
        receive_state(broadcast, "learned", spec, None)
    except CodecStateError:
        continue
    sys.exit(path)
"""


def test_frames_that_claim_too_much_in_a_process_of_little_memory(tmp_path: Path) -> None:
    options = options_text(codec_of("learned")).encode()
    paths = []
    for number, blob in enumerate(frames().values()):
        paths.append(tmp_path / f"{number}")
        paths[-1].write_bytes(whole(options, blob))
    command = [sys.executable, "-c", LIMITED, SPEC.to_json(), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- anything at all ----------------------------------------------------------------------------


@st.composite
def damage(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Something done to some bytes."""
    place = draw(st.floats(0, 1, exclude_max=True))
    extra = draw(st.binary(max_size=12))
    removed = draw(st.integers(0, 12))

    def damaged(blob: bytes) -> bytes:
        at = int(place * len(blob))
        return blob[:at] + extra + blob[at + removed :]

    return damaged


def any_damage(name: str, inner: Any, outer: Any, seal: bool) -> None:
    """Inside what is packed, in what is sent, or in both; the checksum right or not."""
    codec = codec_of(name)
    state = codec.initial_state(SPEC)
    plain = save(dict(state.tensors), {"version": "0"})
    blob = whole(options_text(codec).encode(), pressed(name, inner(plain)))
    content = outer(blob[4:])
    blob = (struct.pack("<I", zlib.crc32(content)) if seal else blob[:4]) + content
    broadcast = CodecBroadcast("full", 0, state.hash, blob)
    try:
        received = receive_state(broadcast, name, SPEC, None)
    except CodecStateError as error:
        refusal = str(error)
        if len(refusal) > 2_000:
            pytest.fail(refusal[:200])
        return
    assert received.state.hash == state.hash


@SHORT
@given(st.sampled_from(sorted(OPTIONS)), damage(), damage(), st.booleans())
def test_any_damage_is_refused(name: str, inner: Any, outer: Any, seal: bool) -> None:
    any_damage(name, inner, outer, seal)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@LONG
@given(st.sampled_from(sorted(OPTIONS)), damage(), damage(), st.booleans())
def test_any_damage_is_refused_at_length(name: str, inner: Any, outer: Any, seal: bool) -> None:
    any_damage(name, inner, outer, seal)


# ---- codec files from a stranger ----------------------------------------------------------------


@pytest.fixture(scope="module")
def codec_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("codec") / "codec.safetensors"
    codec = codec_of("learned")
    save_codec_file(path, codec, codec.initial_state(SPEC), SPEC, {"cost": {"uplink_bytes": 3}})
    return path


def damaged_file(content: bytes, damaged: Callable[[bytes], bytes], path: Path) -> None:
    path.write_bytes(damaged(content))
    is_codec_file(path)
    try:
        load_codec_file(path).check(SPEC)
    except CodecStateError:
        return
    assert load_codec_file(path).state.hash == codec_of("learned").initial_state(SPEC).hash


@SHORT
@given(damage())
def test_a_damaged_codec_file_is_refused(codec_file: Path, damaged: Any) -> None:
    damaged_file(codec_file.read_bytes(), damaged, codec_file.with_name("damaged"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@LONG
@given(damage())
def test_a_damaged_codec_file_is_refused_at_length(codec_file: Path, damaged: Any) -> None:
    damaged_file(codec_file.read_bytes(), damaged, codec_file.with_name("damaged"))


FIELDS = {
    "codec": ["raw", "", "../../codec", "x" * 10**5],
    "codec_version": ["-1", "1e9", "9" * 5_000, "１"],
    "options": ["[]", "{", "[" * 10**5, json.dumps(HUGE), '{"directions": 10000000}'],
    "spec": [
        "[]",
        "[" * 10**5,
        '[["x", [1e99]]]',
        '[["x", [99999999999999999999]]]',
        json.dumps([["a" * 10**6, [1]]]),
        json.dumps([["\n".join([".1.x"] * 10**5), [1]]]),
    ],
    "state_version": ["-1", str(2**32), "nan"],
    "state_hash": ["", "00" * 8, "x" * 10**6],
    "card": [
        "[]",
        "[" * 10**5,
        '{"cost": 1}',
        '{"cost": {"uplink_bytes": "1"}}',
        '{"cost": {"uplink_bytes": 1e400}}',
        '{"cost": {"downlink_bytes": -1}}',
        '{"cost": {"basis": 1}}',
        '{"federated": {}}',
        '{"federated": [1]}',
    ],
}
CHANGES = [(key, value) for key, values in FIELDS.items() for value in values]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("key", "value"), CHANGES, ids=lambda text: text[:20])
def test_what_a_codec_file_says_of_itself_is_not_believed(
    codec_file: Path, tmp_path: Path, key: str, value: str
) -> None:
    """Its checksum is over its values alone, so a stranger writes the rest at will."""
    content = codec_file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"][key] = value
    path = tmp_path / "changed.safetensors"
    path.write_bytes(tensors(header, content[8 + length :]))
    if (key, value) == ("codec_version", "１"):  # a digit, in some script
        load_codec_file(path)
        return
    with pytest.raises(CodecStateError) as caught:
        load_codec_file(path).check(SPEC)
    assert len(str(caught.value)) < 10_000
