"""A codec file gives back what was put in, and nothing foreign or damaged is taken for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cgfedllm.adapter import AdapterSpec
from cgfedllm.codecs import CodecState, base, make_codec
from cgfedllm.codecs.learning import LearnedCodec
from cgfedllm.errors import CodecError, CodecStateError
from cgfedllm.storage import load_tensors, save_tensors
from cgfedllm.tgap.codec_file import CodecFile, is_codec_file, load_codec_file, save_codec_file

from .pca_codec import PcaCodec

LAYER = "base_model.model.model.layers.0.self_attn"
CARD = {"made_by": "tests", "cost": {"uplink_bytes": 7}}


@pytest.fixture
def saved(pca: str, spec: AdapterSpec, tmp_path: Path) -> Path:
    codec = make_codec(pca, {"components": 3})
    assert isinstance(codec, LearnedCodec)
    path = tmp_path / "codec.safetensors"
    save_codec_file(path, codec, codec.initial_state(spec, 5), spec, CARD)
    return path


def tamper(path: Path, **changes: str) -> None:
    """Change the metadata, and keep the file's own checksum right."""
    tensors, metadata = load_tensors(path)
    save_tensors(path, tensors, metadata | changes)


def test_there_and_back(saved: Path, spec: AdapterSpec) -> None:
    file = load_codec_file(saved)
    expected = PcaCodec(PcaCodec.Options(components=3)).initial_state(spec, 5)
    assert (file.name, file.codec_version, file.card) == ("test-pca", 1, CARD)
    assert file.options == {"components": 3, "rate": 0.3}
    assert file.spec == spec
    assert (file.state.version, file.state.hash) == (0, expected.hash)
    np.testing.assert_array_equal(file.state.tensors["basis"], expected.tensors["basis"])
    file.check(spec)
    assert is_codec_file(saved)


def test_later_versions_of_a_state_keep_their_number(
    pca: str, spec: AdapterSpec, tmp_path: Path
) -> None:
    codec = make_codec(pca)
    assert isinstance(codec, LearnedCodec)
    state = CodecState.of(codec.initial_state(spec).tensors, version=4)
    save_codec_file(tmp_path / "c.safetensors", codec, state, spec, {})
    assert load_codec_file(tmp_path / "c.safetensors").state.hash == state.hash


def test_options_given_are_put_on_top(saved: Path, spec: AdapterSpec) -> None:
    file = load_codec_file(saved)
    assert file.codec().options.model_dump() == {"components": 3, "rate": 0.3}
    assert file.codec({"rate": 0.1}).options.model_dump() == {"components": 3, "rate": 0.1}
    file.check(spec, options={"rate": 0.1})
    with pytest.raises(CodecError, match="'ratee'"):
        file.codec({"ratee": 0.1})
    # an option that the state depends on cannot be another than it was learned with
    with pytest.raises(CodecStateError, match=r"'basis' is float32\(3, 26\), not float32\(2, 26\)"):
        file.check(spec, options={"components": 2})


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"q_proj.A": (3, 7), "q_proj.B": (6, 3)}, r"lora_A.* \(2, 7\) there.*rank 2, not 3"),
        ({"q_proj.A": (2, 9), "q_proj.B": (6, 2)}, r"lora_A\.weight is \(2, 7\) there, \(2, 9\)"),
        ({"v_proj.A": (2, 7), "v_proj.B": (6, 2)}, r"it has no factor .*v_proj\.lora_A"),
        ({"q_proj.A": (2, 7)}, r"it has .*q_proj\.lora_B\.weight, which is not here"),
        ({"q_proj.B": (6, 2), "q_proj.A": (2, 7)}, r"another order, from .*q_proj\.lora_B"),
    ],
)
def test_another_adapter_is_refused_by_the_factor_that_differs(
    saved: Path, shapes: dict[str, tuple[int, int]], message: str
) -> None:
    other = AdapterSpec.from_shapes(
        {
            f"{LAYER}.{name.split('.')[0]}.lora_{name.split('.')[1]}.weight": shape
            for name, shape in shapes.items()
        }
    )
    with pytest.raises(CodecStateError, match=message):
        load_codec_file(saved).check(other)


def test_another_codec_is_refused(saved: Path, spec: AdapterSpec) -> None:
    with pytest.raises(CodecStateError, match=r"of 'test-pca', not of 'cg_resnet'"):
        load_codec_file(saved).check(spec, codec="cg_resnet")


def test_an_unknown_codec_is_refused(
    saved: Path, spec: AdapterSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = {name: codec for name, codec in base._REGISTRY.items() if name != "test-pca"}
    monkeypatch.setattr(base, "_REGISTRY", registry)
    with pytest.raises(CodecStateError, match="not known here"):
        load_codec_file(saved).check(spec)


def test_another_version_of_the_codec_is_refused(
    saved: Path, spec: AdapterSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PcaCodec, "version", 2)
    with pytest.raises(CodecStateError, match=r"version 1 of 'test-pca'.* has version 2"):
        load_codec_file(saved).check(spec)


def test_a_codec_that_learns_nothing_is_refused(saved: Path, spec: AdapterSpec) -> None:
    tamper(saved, codec="int8")
    with pytest.raises(CodecStateError, match=r"'int8'.*learns nothing"):
        load_codec_file(saved).check(spec)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "2"}, "version '2'; this release reads 1"),
        ({"state_hash": "00" * 8}, "do not match the state hash"),
        ({"state_version": "1"}, "do not match the state hash"),
        ({"state_version": "-1"}, "damaged"),
        ({"codec_version": "one"}, "damaged"),
        ({"options": "[1]"}, "damaged"),
        ({"card": "{"}, "damaged"),
        ({"spec": "[]"}, "damaged"),
        ({"format": "other"}, "no codec file"),
    ],
)
def test_damage_is_named(saved: Path, changes: dict[str, str], message: str) -> None:
    tamper(saved, **changes)
    with pytest.raises(CodecStateError, match=message):
        load_codec_file(saved)


def test_changed_values_are_found(saved: Path) -> None:
    blob = bytearray(saved.read_bytes())
    blob[-1] ^= 1
    saved.write_bytes(blob)
    with pytest.raises(CodecStateError, match="checksum"):
        load_codec_file(saved)
    saved.write_bytes(blob[:-5])
    with pytest.raises(CodecStateError, match="damaged"):
        load_codec_file(saved)


def test_values_that_do_not_fit_the_adapter_are_refused(saved: Path, spec: AdapterSpec) -> None:
    """As from somebody who makes a file whose hashes and checksum are all right."""
    file = load_codec_file(saved)
    for tensors in ({"basis": np.zeros((3, 9), np.float32)}, {"other": np.zeros(3, np.float32)}):
        state = CodecState.of(tensors)
        forged = CodecFile(file.name, file.codec_version, file.options, spec, state)
        with pytest.raises(CodecStateError, match="is not one of codec"):
            forged.check(spec)
    damaged = {"basis": np.full((3, spec.size), np.nan, np.float32)}
    with pytest.raises(CodecStateError, match="NaN"):
        CodecFile(file.name, file.codec_version, file.options, spec, CodecState.of(damaged)).check(
            spec
        )


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 64])
def test_other_files_are_no_codec_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert not is_codec_file(path)
    with pytest.raises(CodecStateError, match="no codec file"):
        load_codec_file(path)
    with pytest.raises(CodecStateError, match="does not exist"):
        load_codec_file(tmp_path / "nowhere.safetensors")


def test_a_whole_model_is_not_read_to_find_that_it_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tensors(tmp_path / "model.safetensors", {"w": np.zeros(4, np.float32)})
    monkeypatch.setattr("cgfedllm.tgap.codec_file.load_tensors", lambda *_: pytest.fail("read it"))
    with pytest.raises(CodecStateError, match="no codec file"):
        load_codec_file(tmp_path / "model.safetensors")


def test_a_state_that_does_not_fit_is_not_written(
    pca: str, spec: AdapterSpec, tmp_path: Path
) -> None:
    codec = make_codec(pca)
    assert isinstance(codec, LearnedCodec)
    with pytest.raises(CodecStateError, match="'basis' is missing"):
        save_codec_file(tmp_path / "c.safetensors", codec, CodecState.of({}), spec, {})
    assert not (tmp_path / "c.safetensors").exists()


def test_equal_codecs_give_equal_files(saved: Path, spec: AdapterSpec, tmp_path: Path) -> None:
    file = load_codec_file(saved)
    again = tmp_path / "again.safetensors"
    save_codec_file(again, file.codec(), file.state, spec, json.loads(json.dumps(file.card)))
    assert again.read_bytes() == saved.read_bytes()
