"""An adapter laid out as an image or a signal: nothing lost, nothing twice, padding is zero."""

from __future__ import annotations

import numpy as np
import pytest

from cgfedllm.adapter import AdapterSpec
from cgfedllm.codecs.cg.alignment import aligned
from cgfedllm.codecs.cg.layout import Layout, LayoutName, Order, layout_of
from cgfedllm.codecs.parts.rows import count_rows


def lora(layers: int, hidden: int, key_value: int, rank: int) -> AdapterSpec:
    shapes = {}
    for layer in range(layers):
        for module, out in (("q", hidden), ("k", key_value), ("v", key_value), ("o", hidden)):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{module}_proj"
            shapes[f"{stem}.lora_A.weight"] = (rank, hidden)
            shapes[f"{stem}.lora_B.weight"] = (out, rank)
    return AdapterSpec.from_shapes(shapes)


SPECS = {
    "LoRA": lora(3, 24, 8, 4),
    "one element": AdapterSpec.from_shapes({"x": (1,)}),
    "only B": AdapterSpec.from_shapes({"m.0.q.lora_B.weight": (7, 3)}),
    "odd shapes": AdapterSpec.from_shapes(
        {
            "scalar": (),
            "vector": (5,),
            "conv.lora_A.weight": (2, 3, 2, 2),
            "conv.lora_B.weight": (4, 2, 2, 2),
            "cube": (2, 3, 4),
            "long vector": (301,),
        }
    ),
}
LAYOUTS: list[LayoutName] = ["stack", "fold", "line"]
ORDERS: list[Order] = ["spec", "kind"]


def counted(layout: Layout) -> np.ndarray:
    """The image of 1, 2, 3, ...: what is where."""
    return layout.to_image(np.arange(1, layout.spec.size + 1, dtype=np.float32))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("stride", [2, 64])
def test_every_element_has_one_place(
    spec: AdapterSpec, name: LayoutName, order: Order, stride: int
) -> None:
    layout = layout_of(spec, name, order, stride)
    image = counted(layout)
    assert all(size % stride == 0 for size in image.shape)
    there = np.sort(image[image != 0])
    np.testing.assert_array_equal(there, np.arange(1, spec.size + 1))
    values = np.random.default_rng(0).standard_normal(spec.size).astype(np.float32)
    signs = np.where(np.arange(count_rows(spec)) % 3 == 0, -1, 1)
    for turned in (None, signs):
        back = layout.to_vector(layout.to_image(values, turned), turned)
        np.testing.assert_array_equal(back, values)


def test_rank_vectors_are_the_columns_of_a_stack() -> None:
    spec = SPECS["LoRA"]
    image = counted(layout_of(spec, "stack", "spec", 2))
    (first, second) = list(spec)[:2]
    a = np.arange(1, first.size + 1).reshape(first.shape)
    b = np.arange(first.size + 1, first.size + second.size + 1).reshape(second.shape)
    np.testing.assert_array_equal(image[:, :4], a.T)
    np.testing.assert_array_equal(image[:, 4:8], b)


def test_llama_7b_is_the_papers_image() -> None:
    layout = layout_of(lora(32, 4096, 4096, 8), "stack", "spec", 64)
    assert layout.shape == (4096, 2048)
    assert layout.spec.size == 4096 * 2048  # no padding


def test_short_factors_share_a_strip() -> None:
    # k.B and v.B are a third as long as the others: three of them make one strip
    layout = layout_of(lora(30, 576, 192, 8), "stack", "kind", 64)
    assert layout.shape == (576, 8 * (30 * 6 + 30 * 2 // 3))
    assert layout.spec.size == 576 * 1600


def test_padding_stays_bounded_where_one_vector_is_very_long() -> None:
    spec = AdapterSpec.from_shapes(
        {f"m.{i}.q.lora_A.weight": (4, 16) for i in range(64)} | {"bias": (1024,)}
    )
    assert np.prod(layout_of(spec, "stack", "spec", 2).shape) < 1.5 * spec.size


def test_order_by_kind_puts_layers_side_by_side() -> None:
    spec = SPECS["LoRA"]
    kinds = [
        (block.factor.module, block.factor.kind, block.factor.layer)
        for block in layout_of(spec, "line", "kind", 2).blocks
    ]
    assert kinds[:3] == [("self_attn.q_proj", "A", layer) for layer in range(3)]
    assert len({kind[:2] for kind in kinds[::3]}) == 8


def test_a_fold_is_near_square_and_padded_below() -> None:
    spec = AdapterSpec.from_shapes({"x": (1000,)})
    image = counted(layout_of(spec, "fold", "spec", 8))
    assert image.shape == (32, 32)
    np.testing.assert_array_equal(image.reshape(-1)[:1000], np.arange(1, 1001))


def test_signs_make_neighbours_alike() -> None:
    spec = SPECS["LoRA"]
    layout = layout_of(spec, "stack", "kind", 2)
    rng = np.random.default_rng(0)
    hidden = np.where(rng.random(count_rows(spec)) < 0.5, -1, 1)

    def update() -> np.ndarray:
        """All rank vectors of a length are one random vector, some of them turned over."""
        image = np.zeros(layout.shape, np.float32)
        shared = {length: rng.standard_normal(length) for length in (24, 8)}
        for block in layout.blocks:
            own = block.of(image)
            own[...] = shared[own.shape[1]]
        return layout.to_vector(image, hidden)

    found = aligned(layout, [update() for _ in range(5)])
    assert found.dtype == np.int8
    for length in (24, 8):
        rows = [b.rows for b in layout.blocks if b.factor.size == 4 * length]
        products = np.concatenate([found[own] * hidden[own] for own in rows])
        assert abs(products.sum()) == products.size
    untouched = AdapterSpec.from_shapes({"weights": (65, 2)})  # too many rows to compare
    image = layout_of(untouched, "stack", "spec", 2)
    vectors = [rng.standard_normal(untouched.size).astype(np.float32)]
    np.testing.assert_array_equal(aligned(image, vectors), np.ones(65))
