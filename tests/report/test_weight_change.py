"""How far training moved each weight: the norm of (alpha / r) B A, with alpha as PEFT finds it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cgfedllm.adapter import AdapterSpec
from cgfedllm.errors import AdapterError
from cgfedllm.report.weight_change import weight_changes

_STEM = "base_model.model.model.layers.{}.self_attn.q_proj"
SHAPES = {
    f"{_STEM.format(layer)}.lora_{kind}.weight": shape
    for layer in range(2)
    for kind, shape in (("A", (2, 6)), ("B", (4, 2)))
}


def norms(config: dict[str, Any], shapes: dict[str, tuple[int, ...]] = SHAPES) -> list[float]:
    random = np.random.default_rng(0)
    tensors = {name: random.standard_normal(shape) for name, shape in shapes.items()}
    spec = AdapterSpec.from_shapes(shapes)
    return [norm for _, norm in weight_changes(spec, tensors, config)]


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({"lora_alpha": 4}, (2.0, 2.0)),
        ({"lora_alpha": 4, "use_rslora": True}, (4 / 2**0.5, 4 / 2**0.5)),
        ({"lora_alpha": 4, "alpha_pattern": {"q_proj": 6}}, (3.0, 3.0)),
        ({"lora_alpha": 4, "alpha_pattern": {"layers.1.self_attn.q_proj": 6}}, (2.0, 3.0)),
        ({"lora_alpha": 4, "alpha_pattern": {"^model.layers.[0]..*": 6}}, (3.0, 2.0)),
        ({"lora_alpha": 4, "alpha_pattern": {"proj": 6}}, (2.0, 2.0)),
    ],
)
def test_norm_of_the_change(config: dict[str, Any], scales: tuple[float, float]) -> None:
    random = np.random.default_rng(0)
    values = [random.standard_normal(shape) for shape in SHAPES.values()]
    bare = [np.linalg.norm(b @ a) for a, b in zip(values[::2], values[1::2], strict=True)]
    expected = [scale * norm for scale, norm in zip(scales, bare, strict=True)]
    assert norms(config) == pytest.approx(expected)


def test_an_untrained_adapter_changes_nothing() -> None:
    spec = AdapterSpec.from_shapes(SHAPES)
    tensors = {f.name: np.full(f.shape, f.kind == "A", np.float32) for f in spec}
    assert [norm for _, norm in weight_changes(spec, tensors, {"lora_alpha": 4})] == [0.0, 0.0]


def test_what_is_no_matrix_is_passed_over() -> None:
    names = list(SHAPES)
    shapes = {**SHAPES, names[0]: (2, 6, 1, 1), names[1]: (4, 2, 1, 1)}
    assert len(norms({"lora_alpha": 4}, shapes)) == 1


@pytest.mark.parametrize("patterns", [{"(": 2}, [1]])
def test_patterns_that_cannot_be_read(patterns: Any) -> None:
    with pytest.raises(AdapterError, match="alpha_pattern"):
        norms({"lora_alpha": 4, "alpha_pattern": patterns})


def test_factors_that_do_not_fit() -> None:
    shapes = {**SHAPES, next(reversed(SHAPES)): (4, 3)}
    with pytest.raises(AdapterError, match="rank 2, its partner 3"):
        norms({"lora_alpha": 4}, shapes)
