"""Which codecs an app can ask for, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord

from cgfedllm.adapter import AdapterSpec
from cgfedllm.codecs import codec_names, make_codec
from cgfedllm.codecs.learning import LearnedCodec
from cgfedllm.errors import CodecError, CodecStateError, ConfigError
from cgfedllm.flower import CompressedStrategy, compression
from cgfedllm.flower.choice import choose
from cgfedllm.tgap.codec_file import load_codec_file, save_codec_file

from ..codecs.contexts import taught
from .apps import Arrays, app_of, fedavg, grid_of, record_of, stepped

LORA = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
ADAPTER: Arrays = {
    LORA.format(layer, kind): np.random.default_rng([layer, ord(kind)])
    .standard_normal(shape)
    .astype(np.float32)
    for layer in range(2)
    for kind, shape in (("A", (4, 48)), ("B", (48, 4)))
}


def replies(codec: Any, start: Arrays, **options: Any) -> Any:
    strategy = CompressedStrategy(fedavg(), codec)
    strategy.start(grid_of(app_of(codec, stepped, **options)), record_of(start), num_rounds=2)
    return strategy.traffic[-1]


@pytest.mark.parametrize("name", [name for name in codec_names() if not name.startswith("cg_")])
def test_every_codec_that_needs_no_file_carries_an_adapter(name: str) -> None:
    traffic = replies(name, ADAPTER)
    assert not traffic.refused
    assert len(traffic.received) == 4


def test_options_are_typed_after_the_name() -> None:
    choice = choose("lowrank:bpp=0.25,max_pieces=2")
    assert choice.codec.options.model_dump() == {"bpp": 0.25, "max_pieces": 2}


@pytest.mark.parametrize(
    ("codec", "error", "complaint"),
    [
        ("lowrnk", CodecError, "did you mean 'lowrank'"),
        ("lowrank:bpp=-1", CodecError, "option 'bpp'"),
        ("lowrank:rate=1", CodecError, "option 'rate'"),
        ("lowrank:bpp", ConfigError, "no key=value"),
        ("cg_resnet", CodecError, "knows nothing before it is fitted"),
        ("missing.safetensors", CodecStateError, "does not exist"),
    ],
)
def test_what_cannot_be_is_refused_where_the_app_is_made(
    codec: str, error: type[Exception], complaint: str
) -> None:
    with pytest.raises(error, match=complaint):
        compression(codec)
    with pytest.raises(error, match=complaint):
        CompressedStrategy(fedavg(), codec)


# ---- codec files --------------------------------------------------------------------------------


@pytest.fixture
def codec_file(tmp_path: Path) -> Path:
    """As `cgfedllm pretrain` writes them, with a state that nobody would derive."""
    spec = AdapterSpec.from_shapes({name: array.shape for name, array in ADAPTER.items()})
    codec = make_codec("learned", {"bpp": 2.0, "directions": 4})
    assert isinstance(codec, LearnedCodec)
    path = tmp_path / "codec.safetensors"
    save_codec_file(path, codec, taught(codec, spec), spec, {})
    return path


def test_a_codec_file_serves_both_ends(codec_file: Path) -> None:
    traffic = replies(codec_file, ADAPTER)
    assert not traffic.refused
    assert len(traffic.received) == 4


def test_a_client_without_the_file_is_told_so(codec_file: Path) -> None:
    strategy = CompressedStrategy(fedavg(), codec_file)
    grid = grid_of(app_of("learned:bpp=2.0,directions=4"))
    sent = strategy.configure_train(1, record_of(ADAPTER), ConfigRecord(), grid)
    (reason,) = {reply.error.reason for reply in grid.send_and_receive(sent)}
    assert f"with state {load_codec_file(codec_file).state.hash.hex()}" in reason


def test_a_file_of_other_arrays_stops_the_server_at_once(codec_file: Path) -> None:
    other = {name.replace("q_proj", "v_proj"): array for name, array in ADAPTER.items()}
    strategy = CompressedStrategy(fedavg(), codec_file)
    with pytest.raises(CodecStateError, match="of another adapter"):
        strategy.start(grid_of(app_of("raw")), record_of(other), num_rounds=1)
