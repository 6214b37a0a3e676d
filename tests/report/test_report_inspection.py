"""`inspect` tells runs, adapters, packets and checkpoints apart, and what they hold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import CodecContext, make_codec
from cgfedllm.config import load_config
from cgfedllm.errors import CheckpointError, PacketError
from cgfedllm.metrics import RoundRecord
from cgfedllm.report.inspection import inspect
from cgfedllm.runs import RunFolder
from cgfedllm.storage import save_tensors, write_atomic, write_json

_LAYER = "base_model.model.model.layers.0.self_attn"
SPEC = AdapterSpec.from_shapes(
    {
        f"{_LAYER}.q_proj.lora_A.weight": (2, 6),
        f"{_LAYER}.q_proj.lora_B.weight": (4, 2),
        f"{_LAYER}.v_proj.lora_A.weight": (2, 6),
        f"{_LAYER}.v_proj.lora_B.weight": (4, 2),
    }
)


def _update() -> AdapterUpdate:
    return AdapterUpdate(SPEC, np.arange(1, SPEC.size + 1, dtype=np.float32))


def _adapter(folder: Path, update: AdapterUpdate) -> Path:
    save_tensors(folder / "adapter_model.safetensors", update.views())
    write_json(
        folder / "adapter_config.json",
        {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["v_proj", "q_proj"],
         "base_model_name_or_path": "some/model"},
    )  # fmt: skip
    return folder


def test_packet(tmp_path: Path) -> None:
    path = tmp_path / "update.bin"
    path.write_bytes(make_codec("int8").encode(_update(), CodecContext(SPEC, 3)))
    found = inspect(path)
    facts = dict(found.rows())
    assert found.kind == "packet"
    assert facts["codec"] == "int8, version 1"
    assert facts["round"] == "3"
    assert facts["adapter spec hash"] == SPEC.hash.hex()
    bits = 8 * path.stat().st_size / SPEC.size
    assert facts["bits per parameter"].startswith(f"{bits:.4f}")


def test_damaged_packet(tmp_path: Path) -> None:
    path = tmp_path / "update.bin"
    path.write_bytes(make_codec("raw").encode(_update(), CodecContext(SPEC, 3))[:-1])
    with pytest.raises(PacketError, match=r"update\.bin: .*truncated"):
        inspect(path)


def test_packet_of_an_unknown_codec(tmp_path: Path) -> None:
    from cgfedllm.codecs.packet import NO_STATE, Packet

    path = tmp_path / "x"
    path.write_bytes(Packet("future", 1, SPEC.hash, NO_STATE, 1, SPEC.size, b"1").to_bytes())
    assert "not known to this installation" in dict(inspect(path).rows())["codec"]


def test_adapter(tmp_path: Path) -> None:
    update = _update()
    facts = dict(inspect(_adapter(tmp_path, update)).rows())
    assert facts["kind"] == "adapter"
    assert facts["base model"] == "some/model"
    assert facts["method"] == "LORA, rank 2, alpha 4"
    assert facts["target modules"] == "q_proj, v_proj"
    assert facts["factors"] == "4 in 1 layer"
    assert facts["values"] == "all finite"
    views = update.views()
    a, b = (views[f"{_LAYER}.q_proj.lora_{k}.weight"] for k in "AB")
    expected = np.linalg.norm(4 / 2 * b @ a)
    assert facts["norms q_proj"].endswith(f"weight change {expected:.4g}")
    assert f"A {np.linalg.norm(a):.4g}, B {np.linalg.norm(b):.4g}" in facts["norms q_proj"]


def test_adapter_with_nan_is_called_out(tmp_path: Path) -> None:
    update = _update()
    update.vector[3] = np.nan
    assert "do not use" in dict(inspect(_adapter(tmp_path, update)).rows())["values"]


def test_damaged_adapter(tmp_path: Path) -> None:
    _adapter(tmp_path, _update())
    (tmp_path / "adapter_model.safetensors").write_bytes(b"oops")
    with pytest.raises(CheckpointError, match="damaged"):
        inspect(tmp_path)


def test_run_folder(tmp_path: Path, records: list[RoundRecord]) -> None:
    config = load_config(
        None, [f"output={str(tmp_path)!r}", "federation.rounds=3", "uplink.name=int8"]
    )
    with RunFolder.create(config) as run:
        fresh = dict(inspect(run.path).rows())
        assert fresh["state"] == "unfinished, without a checkpoint; it must start again"
        for record in records[:3]:
            run.append(record)
        write_atomic(run.checkpoints_dir / "round-000002.safetensors", b"")
        unfinished = dict(inspect(run.path).rows())
        assert unfinished["rounds"] == "2 of 3"
        assert f"cgfedllm resume {run.path}" in unfinished["state"]
        run.append(records[3])
    found = inspect(run.path)
    facts = dict(found.rows())
    assert found.kind == "run"
    assert facts["state"] == "finished"
    assert facts["uplink"] == "int8, 7.91 MiB, 4.00x fewer than fp32, 8.00 bits per parameter"
    assert facts["held-out NLL"] == "3.0000 -> 2.4000 (-0.6000)"
    assert facts["clients"] == "3 evaluated, 3 better than before"
    assert facts["adapter"] == "not written yet"
    assert not {"codec state", "pre-training"} & facts.keys()
    json.dumps(found.to_dict())


def test_run_folder_of_a_codec_that_learns(tmp_path: Path, learning: list[RoundRecord]) -> None:
    config = load_config(None, [f"output={str(tmp_path)!r}", "federation.rounds=3"])
    with RunFolder.create(config) as run:
        for record in learning:
            run.append(record)
    facts = dict(inspect(run.path).rows())
    assert facts["codec state"] == "3.00 MiB down"
    assert facts["pre-training"] == "5.00 MiB up, 0 B down"


def test_checkpoint(tmp_path: Path, records: list[RoundRecord]) -> None:
    path = tmp_path / "round-000002.safetensors"
    metadata = {
        "format": "1",
        "round": "2",
        "spec": SPEC.to_json(),
        "config": "ab" * 32,
        "record": json.dumps(records[2].to_dict()),
    }
    save_tensors(path, {"adapter": _update().vector}, metadata)
    facts = dict(inspect(path).rows())
    assert facts["kind"] == "checkpoint"
    assert facts["round"] == "2"
    assert facts["adapter spec hash"] == SPEC.hash.hex()
    assert facts["held-out NLL"] == "2.6000"
    save_tensors(path, {}, {**metadata, "record": "{"})
    with pytest.raises(CheckpointError, match="incomplete"):
        inspect(path)


def test_other_tensors(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x", {"a": np.zeros(3)}, {"note": "y" * 100})
    facts = dict(inspect(tmp_path / "x").rows())
    assert facts["kind"] == "tensors"
    assert facts["tensors"] == "1 tensor with 3 values"
    assert len(facts["note"]) == 60


def test_something_else(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a run folder"):
        inspect(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        inspect(tmp_path / "none")
    (tmp_path / "x").write_text("hello")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        inspect(tmp_path / "x")
