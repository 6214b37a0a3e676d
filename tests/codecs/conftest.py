"""Every registered codec, at the options its tests run with, and updates to try it on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import Codec, codec_class, codec_names, make_codec
from cgfedllm.errors import CodecError

# The default of 0.1 bits is below the header of the small adapters here, so little is sent of
# them; the same tests are run again at a rate that sends something.
GENEROUS_BPP = (4.0, 2.0, 1.0, 0.5)
# Networks as small as they come; those of full size are in test_cg_*.py.
BASE: dict[str, dict[str, Any]] = {
    "cg_cnn": {"stages": 2},
    "cg_resnet": {"stages": 2, "residual_blocks": 1},
    "cg_unet": {"stages": 2, "residual_blocks": 1},
}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "cg_cnn": [{"preset": "printed"}],
    "cg_resnet": [{"preset": "printed"}, {"preset": "printed", "latent_dtype": "bfloat16"}],
    "cg_unet": [{"preset": "printed"}],
    "int4": [{"group": 3}],
    "learned": [
        {"bpp": 4.0, "metric": "parameters"},
        {"bpp": 4.0, "grown": False},
        {"bpp": 4.0, "scale_exponent": -14},
    ],
    "qsgd": [{"unbiased": True, "bpp": 4.0}, {"bucket": 8, "bpp": 8.0}],
    "zero": [{"scale": 0.5}],
    "zstd": [{"dtype": "bfloat16", "level": 1}],
}


def _cases() -> dict[str, tuple[str, dict[str, Any]]]:
    cases: dict[str, tuple[str, dict[str, Any]]] = {}
    for name in codec_names():
        options: list[dict[str, Any]] = [{}]
        if "bpp" in codec_class(name).Options.model_fields:
            options.append(_generous(name))
        for chosen in options + VARIANTS.get(name, []):
            text = ",".join(f"{key}={value}" for key, value in chosen.items())
            cases[f"{name}({text})"] = name, {**BASE.get(name, {}), **chosen}
    return cases


def _generous(name: str) -> dict[str, Any]:
    """The highest of the rates that the codec's options allow."""
    for bpp in GENEROUS_BPP:
        with suppress(CodecError):
            make_codec(name, {"bpp": bpp})
            return {"bpp": bpp}
    return {}


CASES = _cases()


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def codec(request: pytest.FixtureRequest) -> Codec:
    name, options = request.param
    return make_codec(name, options)


@pytest.fixture(scope="session")
def all_codecs() -> list[Codec]:
    return [make_codec(name, options) for name, options in CASES.values()]


@pytest.fixture(scope="session")
def lora_spec() -> Callable[[int, int], AdapterSpec]:
    """Query and value projections of some layers of some width, rank 8."""

    def make(layers: int, width: int) -> AdapterSpec:
        shapes = {}
        for layer in range(layers):
            for module in ("q_proj", "v_proj"):
                stem = f"base_model.model.model.layers.{layer}.self_attn.{module}"
                shapes[f"{stem}.lora_A.weight"] = (8, width)
                shapes[f"{stem}.lora_B.weight"] = (width, 8)
        return AdapterSpec.from_shapes(shapes)

    return make


@pytest.fixture(scope="session")
def realistic() -> Callable[[AdapterSpec, int], AdapterUpdate]:
    """What AdamW makes of a factor in few steps: one strong direction, noise, saturation."""

    def make(spec: AdapterSpec, seed: int = 0) -> AdapterUpdate:
        rng = np.random.default_rng(seed)
        update = AdapterUpdate.zeros(spec)
        for view in update.views().values():
            rank, length = min(view.shape), max(view.shape)
            strong = rng.standard_normal((rank, 1)) * rng.standard_normal((1, length))
            rows = np.tanh(strong + 0.7 * rng.standard_normal((rank, length)))
            view[...] = 1e-3 * (rows if view.shape[0] == rank else rows.T)
        return update

    return make
