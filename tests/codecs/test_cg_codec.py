"""The auto-encoders as codecs: presets, sizes, scales, latents, errors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import CodecContext, CodecState, make_codec
from cgfedllm.codecs.cg import latents, scales
from cgfedllm.codecs.cg.codec import SCALE, SIGNS, AutoEncoderCodec
from cgfedllm.codecs.entropy import SymbolReader, SymbolWriter, bits_of_levels
from cgfedllm.codecs.packet import HEADER_SIZE, Packet
from cgfedllm.errors import CodecError, CodecStateError, PacketError

NAMES = ["cg_resnet", "cg_cnn", "cg_unet"]
SMALL: dict[str, Any] = {"stages": 2}
LAYER = "base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.weight"
SPEC = AdapterSpec.from_shapes(
    {
        LAYER.format(layer, module, kind): shape
        for layer in range(2)
        for module in ("q", "v")
        for kind, shape in (("A", (8, 32)), ("B", (32, 8)))
    }
)


def made(name: str = "cg_resnet", **options: Any) -> AutoEncoderCodec:
    codec = make_codec(name, {**SMALL, **options})
    assert isinstance(codec, AutoEncoderCodec)
    return codec


def context_of(codec: AutoEncoderCodec, spec: AdapterSpec = SPEC, seed: int = 0) -> CodecContext:
    return CodecContext(spec, 1, state=codec.initial_state(spec, seed))


def normal(seed: int = 0, spec: AdapterSpec = SPEC) -> AdapterUpdate:
    values = np.random.default_rng(seed).standard_normal(spec.size, np.float32)
    return AdapterUpdate(spec, values * np.float32(1e-3))


def through(codec: AutoEncoderCodec, update: AdapterUpdate) -> AdapterUpdate:
    context = context_of(codec, update.spec)
    return codec.decode(codec.encode(update, context), context)


# ---- what is sent -------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bits"), [("float32", 0.5), ("bfloat16", 0.25)])
def test_printed_llama_7b_sends_the_papers_latent(dtype: str, bits: float) -> None:
    shapes = {
        LAYER.format(layer, module, kind): shape
        for layer in range(32)
        for module in "qkvo"
        for kind, shape in (("A", (8, 4096)), ("B", (4096, 8)))
    }
    spec = AdapterSpec.from_shapes(shapes)
    codec = make_codec("cg_resnet", {"preset": "printed", "latent_dtype": dtype})
    assert isinstance(codec, AutoEncoderCodec)
    assert codec.layout(spec).shape == (4096, 2048)
    assert codec.latent_shapes(spec) == [(64, 64, 32)]
    assert codec.payload_size(spec) == bits * spec.size / 8


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_latents_are_the_float32_ones_rounded(name: str) -> None:
    update = normal().scaled(1e3)
    wide, narrow = (
        made(name, preset="printed", latent_dtype=dtype) for dtype in ("float32", "bfloat16")
    )
    sizes = [wide.payload_size(SPEC), narrow.payload_size(SPEC)]
    assert sizes[0] == 2 * (sizes[1] or 0)
    first, second = through(wide, update), through(narrow, update)
    assert (first - second).norm() < 0.05 * first.norm()


@pytest.mark.parametrize("name", NAMES)
def test_printed_values_stay_within_one(name: str) -> None:
    assert np.abs(through(made(name, preset="printed"), normal().scaled(1e8)).vector).max() <= 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(4))
def test_fair_is_never_farther_from_an_update_than_zeros(name: str, seed: int) -> None:
    # weights that have learned nothing: what they say is worth something or is left out
    codec, update = made(name), normal(seed)
    context = context_of(codec, seed=seed)
    decoded = codec.decode(codec.encode(update, context), context)
    assert (update - decoded).norm() <= update.norm()


@pytest.mark.parametrize("exponent", [-100, 3, 90])
def test_fair_does_not_depend_on_scale(exponent: int) -> None:
    codec, update = made(), normal()
    larger = AdapterUpdate(SPEC, np.ldexp(update.vector, exponent))
    wanted = np.ldexp(through(codec, update).vector, exponent)
    np.testing.assert_array_equal(through(codec, larger).vector, wanted)


def test_a_factor_of_zeros_stays_one() -> None:
    codec, update = made(), normal()
    name = LAYER.format(1, "q", "A")
    update.views()[name][...] = 0
    decoded = through(codec, update)
    assert decoded.vector.any()
    assert not decoded.views()[name].any()


def test_nothing_to_send_is_a_bare_header() -> None:
    codec = made()
    assert len(codec.encode(AdapterUpdate.zeros(SPEC), context_of(codec))) == HEADER_SIZE


def test_one_huge_value_does_not_outshine_the_others() -> None:
    codec, update = made(), normal()
    decoded = through(codec, update)
    update.vector[5] = 1e30
    first = SPEC.slices[LAYER.format(0, "q", "A")]
    elsewhere = np.ones(SPEC.size, bool)
    elsewhere[first] = False
    # its own kind of factor is lost, the others hardly notice
    kinds = scales.kinds(SPEC)
    sizes = [factor.size for factor in SPEC]
    others = np.repeat(kinds != kinds[0], sizes)
    found = through(codec, update).vector[others]
    np.testing.assert_allclose(found, decoded.vector[others], atol=0.3 * decoded.vector.max())


def test_a_coarser_step_makes_a_smaller_packet() -> None:
    sizes = [
        len(codec.encode(normal(), context_of(codec)))
        for codec in (made(step=step) for step in (0.05, 0.5, 2.0))
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3


# ---- what is refused ----------------------------------------------------------------------------


def packet(codec: AutoEncoderCodec, payload: bytes, context: CodecContext) -> bytes:
    parameters = context.spec.size
    spec_hash, state_hash = context.spec.hash, context.state.hash
    return Packet(codec.name, 1, spec_hash, state_hash, 1, parameters, payload).to_bytes()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("change", [-4, -1, 1, 4])
def test_a_latent_of_another_size_is_refused(name: str, dtype: str, change: int) -> None:
    codec = made(name, preset="printed", latent_dtype=dtype)
    context = context_of(codec)
    size = codec.payload_size(SPEC)
    assert size
    assert codec.decode(packet(codec, bytes(size), context), context).is_finite()
    with pytest.raises(PacketError, match=f"payload is {size + change} bytes, .* needs {size}"):
        codec.decode(packet(codec, bytes(size + change), context), context)


def test_a_latent_with_other_options_is_refused() -> None:
    codec = made(stages=3)
    context = context_of(codec)
    blob = codec.encode(normal(), context)
    with pytest.raises(PacketError, match="state hash"):
        made().decode(blob, context_of(made()))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_latent_that_is_not_finite_is_refused(value: float, dtype: str) -> None:
    codec = made(preset="printed", latent_dtype=dtype)
    context = context_of(codec)
    numbers = np.full(codec.latent_elements(SPEC), value, np.float32)
    payload = numbers.tobytes()
    if dtype == "bfloat16":
        payload = (numbers.view(np.uint32) >> 16).astype("<u2").tobytes()
    with pytest.raises(PacketError, match="NaN or infinity"):
        codec.decode(packet(codec, payload, context), context)


def test_levels_left_over_are_refused() -> None:
    codec = made()
    context = context_of(codec)
    payload = Packet.from_bytes(codec.encode(normal(), context)).payload
    for wrong in (payload + bytes(range(1, 41)), payload[: len(payload) // 2] + b"\1" * 60):
        with pytest.raises(PacketError):
            codec.decode(packet(codec, wrong, context), context)


def test_without_a_state_it_says_what_to_do() -> None:
    codec = made()
    with pytest.raises(CodecError, match="cgfedllm pretrain"):
        codec.encode(normal(), CodecContext(SPEC, 1))


def test_a_state_of_another_network_is_refused() -> None:
    codec = made()
    other = made(residual_blocks=1).initial_state(SPEC)
    with pytest.raises(CodecStateError, match="not one of codec 'cg_resnet'"):
        codec.encode(normal(), CodecContext(SPEC, 1, state=other))


def test_a_damaged_state_is_refused() -> None:
    codec = made()
    tensors = dict(codec.initial_state(SPEC).tensors)
    name = next(iter(tensors))
    tensors[name] = np.full_like(tensors[name], np.nan)
    with pytest.raises(CodecStateError, match="NaN or infinity"):
        codec.encode(normal(), CodecContext(SPEC, 1, state=CodecState.of(tensors)))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"preset": "printed", "step": 0.5}, "step"),
        ({"preset": "printed", "align_signs": False}, "align_signs"),
        ({"latent_dtype": "bfloat16"}, "latent_dtype"),
        ({"normalise": False}, "normalise"),
        ({"preset": "best"}, "preset"),
        ({"stages": 0}, "stages"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], named: str) -> None:
    with pytest.raises(CodecError, match=named):
        make_codec("cg_resnet", options)


@pytest.mark.parametrize("preset", ["printed", "fair"])
def test_options_can_be_written_down_and_read_again(preset: str) -> None:
    options = make_codec("cg_unet", {"preset": preset}).options
    assert make_codec("cg_unet", options.model_dump()).options == options


def test_a_signal_has_no_layout_to_choose() -> None:
    with pytest.raises(CodecError, match="layout"):
        make_codec("cg_cnn", {"layout": "stack"})


def test_codecs_are_listed_without_torch() -> None:
    code = "import sys, cgfedllm.codecs as c; assert 'cg_unet' in c.codec_names(); "
    code += "c.make_codec('cg_resnet'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


# ---- state --------------------------------------------------------------------------------------


def test_a_packed_state_is_the_state() -> None:
    codec = made()
    state = codec.initial_state(SPEC, 3)
    again = codec.unpack_state(codec.pack_state(state), SPEC)
    assert again.hash == state.hash
    update = normal()
    blobs = {codec.encode(update, CodecContext(SPEC, 1, state=own)) for own in (state, again)}
    assert len(blobs) == 1


def test_signs_of_rank_vectors_turn_them_over() -> None:
    codec, update = made(), normal()
    context = context_of(codec)
    tensors = dict(context.state.tensors)
    signs = np.where(np.arange(tensors[SIGNS].size) % 2, -1, 1).astype(np.int8)
    turned = replace(context, state=CodecState.of({**tensors, SIGNS: signs}))
    layout = codec.layout(SPEC)
    other = AdapterUpdate(SPEC, layout.to_vector(layout.to_image(update.vector, signs)))
    # the same image, so the same payload; values come out turned over
    payloads = [
        Packet.from_bytes(codec.encode(own, where)).payload
        for own, where in ((update, context), (other, turned))
    ]
    assert payloads[0] == payloads[1]
    found = codec.decode(codec.encode(other, turned), turned).vector
    back = layout.to_vector(layout.to_image(through(codec, update).vector, signs))
    np.testing.assert_array_equal(found, back)


def test_what_a_printed_state_takes_for_one_scales_what_goes_in_and_comes_out() -> None:
    codec, update = made(preset="printed"), normal()
    context = context_of(codec)
    larger = CodecState.of({**context.state.tensors, SCALE: np.full(1, 2.0**9, np.float32)})
    scaled, other = update.scaled(2.0**9), replace(context, state=larger)
    payloads = [
        Packet.from_bytes(codec.encode(own, where)).payload
        for own, where in ((update, context), (scaled, other))
    ]
    assert payloads[0] == payloads[1]
    found = codec.decode(codec.encode(scaled, other), other)
    np.testing.assert_array_equal(found.vector, through(codec, update).scaled(2.0**9).vector)


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_a_state_that_takes_nothing_for_one_is_refused(scale: float) -> None:
    codec = made(preset="printed")
    tensors = dict(codec.initial_state(SPEC).tensors)
    state = CodecState.of({**tensors, SCALE: np.full(1, scale, np.float32)})
    with pytest.raises(CodecStateError, match="not above 0"):
        codec.encode(normal(), CodecContext(SPEC, 1, state=state))


def test_states_do_not_get_mixed_up() -> None:
    codec, update = made(), normal()
    contexts = [context_of(codec, seed=seed) for seed in range(12)]  # more than are kept
    blobs = [codec.encode(update, context) for context in contexts]
    assert len({blob[HEADER_SIZE:] for blob in blobs}) > 6
    assert [codec.encode(update, context) for context in reversed(contexts)] == blobs[::-1]


# ---- scales and latents -------------------------------------------------------------------------


def test_scales_are_powers_of_two_near_the_mean_magnitude() -> None:
    update = AdapterUpdate.zeros(SPEC)
    wanted = [-149, -30, -1, 0, 5, 60, 127, None]
    for view, exponent in zip(update.views().values(), wanted, strict=True):
        if exponent is not None:
            view[...] = np.ldexp(np.float32(1), exponent)
            view.reshape(-1)[::2] *= -1
    exponents = scales.exponents_of(update)
    assert exponents.tolist() == [scales.NOTHING if e is None else e for e in wanted]
    values = scales.normalised(update, exponents)
    assert set(np.abs(values).tolist()) == {0.0, 1.0}
    gains = np.full(4, 128)
    back = scales.denormalised(values, SPEC, exponents, gains)
    np.testing.assert_array_equal(back, update.vector)
    writer = SymbolWriter()
    scales.write_scales(writer, exponents, gains)
    read, found = scales.read_scales(SymbolReader(writer.finish()), SPEC)
    assert (read.tolist(), found.tolist()) == (exponents.tolist(), gains.tolist())


def test_a_gain_is_the_one_with_the_least_error() -> None:
    values = normal().scaled(1e3).vector
    noise = normal(1).scaled(1e3).vector
    exponents = np.array([-3, -9, 4, 0, 2, -1, 0, 1])
    decoded = (0.5 * values + 0.3 * noise).astype(np.float32)
    gains = scales.best_gains(values, decoded, SPEC, exponents)
    sizes = np.repeat(scales.scales_of(exponents), [factor.size for factor in SPEC])
    kinds = np.repeat(scales.kinds(SPEC), [factor.size for factor in SPEC])

    def error(kind: int, gain: int) -> float:
        own = kinds == kind
        return float(np.square(sizes * (values - gain / 128 * decoded))[own].sum())

    for kind, gain in enumerate(gains):
        assert 0 < gain < 255
        assert error(kind, gain) <= min(error(kind, gain - 1), error(kind, gain + 1))
    assert not scales.best_gains(values, -decoded, SPEC, exponents).any()


def test_an_impossible_scale_is_refused() -> None:
    writer = SymbolWriter()
    writer.uniform(np.full(4, 128), 256)
    writer.bits(np.array([200, 78]), 9)
    writer.symbols(np.ones(8, int), 80)
    with pytest.raises(PacketError, match=r"2\^129"):
        scales.read_scales(SymbolReader(writer.finish()), SPEC)


Shapes = list[tuple[int, ...]]


@pytest.mark.parametrize(
    "shapes", [[(1, 1, 1)], [(64, 9, 5)], [(2, 8, 8), (4, 4, 4), (16, 2, 2)], [(1, 3000)]]
)
@pytest.mark.parametrize("spread", [0.0, 0.4, 3.0, 5000.0])
def test_levels_of_latents_come_back(shapes: Shapes, spread: float) -> None:
    rng = np.random.default_rng(0)
    values = [
        (
            spread
            * rng.standard_normal(shape)
            / (1 + np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)))
        ).astype(np.float32)
        for shape in shapes
    ]
    levels = latents.quantised(values, 0.5)
    writer = SymbolWriter()
    latents.write_latents(writer, levels)
    reader = SymbolReader(writer.finish())
    for own, found in zip(levels, latents.read_latents(reader, shapes), strict=True):
        np.testing.assert_array_equal(own, found)
    reader.finish()


def test_channels_of_unlike_size_have_tables_of_their_own() -> None:
    rng = np.random.default_rng(0)
    widths = np.geomspace(0.2, 20, 16)[:, None, None]
    levels = np.rint(widths * rng.standard_normal((16, 20, 20))).astype(np.int32)
    writer = SymbolWriter()
    latents.write_latents(writer, [levels])
    assert 8 * len(writer.finish()) < 0.9 * bits_of_levels(levels)


def test_latents_that_are_not_finite_are_sent_as_something_that_is() -> None:
    wild = [np.array([[np.nan, np.inf, -np.inf, 1.0]], np.float32)]
    floats = latents.unpack_floats(latents.pack_floats(wild, "float32"), [(1, 4)], "float32")
    assert np.isfinite(floats[0]).all()
    (levels,) = latents.quantised(wild, 1e-3)
    assert levels.tolist()[0][0::3] == [0, 1000]
    assert levels[0, 1] == -levels[0, 2] > 1000


Realistic = Callable[[AdapterSpec, int], AdapterUpdate]


@pytest.mark.parametrize("name", NAMES)
def test_full_size_networks_code_a_million_parameters_in_time(
    name: str, lora_spec: Callable[[int, int], AdapterSpec], realistic: Realistic
) -> None:
    import time

    codec = make_codec(name)
    spec = lora_spec(50, 576)
    update = realistic(spec, 0)
    context = CodecContext(spec, 1, state=codec.initial_state(spec))
    codec.decode(codec.encode(update, context), context)
    start = time.process_time()
    blob = codec.encode(update, context)
    encoded = time.process_time()
    codec.decode(blob, context)
    # of the processor's time, which other processes do not change much
    assert encoded - start < 0.5
    assert time.process_time() - encoded < 0.5
