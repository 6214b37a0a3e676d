"""Every codec, up and down at once: a run ends, and both ends hold the same adapter."""

from collections.abc import Callable
from pathlib import Path

import pytest

import cgfedllm
from cgfedllm.codecs import codec_class, codec_names, make_codec
from cgfedllm.config import Config, learns
from cgfedllm.federation.checkpoint import latest_checkpoint
from cgfedllm.federation.client_state import ClientState
from cgfedllm.workspace import Workspace

MakeConfig = Callable[..., Config]

LOSSY = [name for name in codec_names() if not make_codec(name).lossless and not learns(name)]


@pytest.mark.parametrize("name", LOSSY)
def test_both_ends_hold_the_same_adapter(tiny_config: MakeConfig, name: str) -> None:
    rate = 2.0 if "bpp" in codec_class(name).Options.model_fields else None
    options = "{}" if rate is None else f"{{bpp = {rate}}}"
    config = tiny_config(
        f"uplink.name={name}",
        f"uplink.options={options}",
        f"downlink.name={name}",
        f"downlink.options={options}",
        "federation.rounds=3",
    )
    result = cgfedllm.run(config)
    workspace = Workspace(config, Path())
    checkpoint = latest_checkpoint(result.run_dir / "checkpoints", workspace.spec, config)
    assert checkpoint is not None
    for client in workspace.data.clients:
        state = ClientState(result.run_dir / "clients" / client.name, workspace.spec)
        held = state.reference(checkpoint.round)
        assert held is not None
        assert held.vector.tobytes() == checkpoint.reference.vector.tobytes()
    fp32 = 4 * workspace.spec.size
    for record in result.records[1:]:
        assert len(record.clients) == 3
        for client in record.clients:
            assert 0 < client.uplink_bytes < 0.6 * fp32
            assert 0 < client.downlink_bytes < 0.6 * fp32
    assert result.records[-1].heldout_nll is not None
