"""Latents of the auto-encoders can be counted, and changed between encoder and decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.analysis.latents import CountsLatent, ShowsLatent
from cgfedllm.codecs import CodecContext, make_codec

SMALL: dict[str, Any] = {"stages": 2, "width": 2}


@pytest.mark.parametrize("preset", ["printed", "fair"])
@pytest.mark.parametrize("name", ["cg_resnet", "cg_cnn", "cg_unet"])
def test_the_latent_is_what_the_decoder_sees(
    name: str,
    preset: str,
    lora_spec: Callable[[int, int], AdapterSpec],
    realistic: Callable[[AdapterSpec, int], AdapterUpdate],
) -> None:
    codec = make_codec(name, {**SMALL, "preset": preset})
    assert isinstance(codec, CountsLatent)
    assert isinstance(codec, ShowsLatent)
    spec = lora_spec(2, 32)
    context = CodecContext(spec, 1, state=codec.initial_state(spec))
    packet = codec.encode(realistic(spec, 0), context)
    decoded = codec.decode(packet, context)
    seen: list[np.ndarray] = []

    def same(latent: np.ndarray) -> np.ndarray:
        seen.append(latent)
        return latent

    np.testing.assert_array_equal(
        codec.decode_changed(packet, context, same).vector, decoded.vector
    )
    (latent,) = seen
    assert (latent.dtype, latent.shape) == (np.float32, (codec.latent_elements(spec),))
    assert latent.any()
    moved = codec.decode_changed(packet, context, lambda values: values + np.float32(3))
    assert not np.allclose(moved.vector, decoded.vector, rtol=1e-3, atol=0)


def test_the_papers_rate_in_elements(lora_spec: Callable[[int, int], AdapterSpec]) -> None:
    spec = lora_spec(8, 256)  # 64 columns of 256 for A, as many for B: nothing is padded
    for name, share in (("cg_resnet", 1 / 64), ("cg_unet", 1 / 64), ("cg_cnn", 1 / 32)):
        codec = make_codec(name, {})
        assert isinstance(codec, CountsLatent)
        assert codec.latent_elements(spec) == share * spec.size
