"""What `learned` does beyond the contract of all codecs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import CodecContext, CodecState, Start, make_codec
from cgfedllm.codecs.learned import Learned
from cgfedllm.codecs.learned.axes import CLASSES, KNOWN_CLASSES, axes_of
from cgfedllm.codecs.learned.directions import ENERGIES, WEIGHTS, orthonormal
from cgfedllm.codecs.learned.fitting import learn
from cgfedllm.codecs.learning import FitProgress, FitSettings
from cgfedllm.codecs.packet import HEADER_SIZE
from cgfedllm.errors import CodecStateError, PacketError

LAYERS, WIDTH, RANK = 6, 384, 4
EVERY_METRIC = pytest.mark.parametrize("metric", ["effect", "parameters"])


def make_spec() -> AdapterSpec:
    shapes = {}
    for layer in range(LAYERS):
        for module in ("q_proj", "o_proj"):
            stem = f"m.layers.{layer}.{module}"
            shapes[f"{stem}.lora_A.weight"] = (RANK, WIDTH)
            shapes[f"{stem}.lora_B.weight"] = (WIDTH // 2, RANK)
    return AdapterSpec.from_shapes(shapes)


SPEC = make_spec()
FIRST_B = "m.layers.0.q_proj.lora_B.weight"


def normal(seed: int, scale: float = 1e-3) -> AdapterUpdate:
    values = np.random.default_rng(seed).standard_normal(SPEC.size, np.float32)
    return AdapterUpdate(SPEC, values * np.float32(scale))


def only(update: AdapterUpdate, kind: str) -> AdapterUpdate:
    kept = AdapterUpdate(SPEC, update.vector.copy())
    for name, view in kept.views().items():
        if f"lora_{kind}" not in name:
            view[...] = 0
    return kept


def begun(seed: int = 0, of_b: float = 1e-2) -> Start:
    """A drawn, B grown along one direction of the rank axis that all layers share a little."""
    origin = only(normal(seed, 0.1), "A")
    start = AdapterUpdate(SPEC, origin.vector + only(normal(seed + 1, 1e-3), "A").vector)
    rng = np.random.default_rng(seed + 100)
    common = rng.standard_normal(WIDTH // 2)
    for name, view in start.views().items():
        if "lora_B" in name:
            own = common + 0.3 * rng.standard_normal(WIDTH // 2)
            view[...] = of_b * np.outer(own, rng.standard_normal(RANK))
    return Start(start.vector, origin.vector)


def more_of(start: Start, seed: int = 9, along: float = 0.0) -> AdapterUpdate:
    """A change of B where it has grown along the rank; along the other axis too, or elsewhere."""
    update = normal(seed, 1e-5)
    rng = np.random.default_rng(seed)
    views = AdapterUpdate(SPEC, start.adapter).views()
    for name, view in update.views().items():
        if "lora_B" in name:
            left, _, right = np.linalg.svd(views[name], full_matrices=False)
            where = along * left[:, 0] + (1 - along) * rng.standard_normal(WIDTH // 2) / 14
            view[...] += 1e-2 * np.outer(where, right[0])
    return update


def trained(seed: int = 0, directions: int = 2) -> CodecState:
    """A state of updates that lie along a few directions, others in each factor."""
    rng = np.random.default_rng(seed)
    bases = {f.name: np.linalg.qr(rng.standard_normal((max(f.shape), 2)))[0].T for f in SPEC}
    updates = []
    for _ in range(6):
        update = AdapterUpdate.zeros(SPEC)
        for name, view in update.views().items():
            rows = rng.standard_normal((RANK, 2)) * [2, 1] @ bases[name]
            view[...] = rows if "lora_A" in name else rows.T
        updates.append(update)
    return CodecState.of(learn(SPEC, updates, directions))


def context_of(start: Start | None = None, state: CodecState | None = None) -> CodecContext:
    return CodecContext(SPEC, 1, start=start, state=state or CodecState())


def product_of(start: Start, update: AdapterUpdate) -> list[np.ndarray]:
    views, changes = AdapterUpdate(SPEC, start.adapter).views(), update.views()
    return [
        changes[b.name] @ views[a.name] + views[b.name] @ changes[a.name] for a, b in SPEC.pairs()
    ]


def energy(arrays: list[np.ndarray]) -> float:
    return sum(float(np.square(own).sum()) for own in arrays)


def coded(update: AdapterUpdate, context: CodecContext, **options: Any) -> AdapterUpdate:
    codec = make_codec("learned", options)
    return codec.decode(codec.encode(update, context), context)


# ---- axes ---------------------------------------------------------------------------------------


@EVERY_METRIC
@given(seed=st.integers(0, 100), state=st.booleans(), origin=st.booleans())
def test_coefficients_give_the_update_back(
    metric: Any, seed: int, state: bool, origin: bool
) -> None:
    start = begun(seed) if origin else replace(begun(seed), origin=None)
    axes = axes_of(context_of(start, trained() if state else None), metric)
    update = normal(seed + 1)
    back = axes.back(*axes.into(update.vector))
    # changes of A weigh as little as B is small, so they come back less exactly
    assert np.abs(back - update.vector).max() < 2e-3 * np.abs(update.vector).max()


def test_without_an_adapter_rows_are_as_they_are() -> None:
    axes, update = axes_of(context_of(state=trained()), "effect"), normal(0)
    rows, loose = axes.into(update.vector)
    assert (axes.back(rows, loose) == update.vector).all()
    assert not loose.size
    assert not any(kind.classes.any() for kind in axes.kinds)


def test_energy_in_parameters_is_the_updates() -> None:
    update = normal(1)
    # small integers stand for directions, so they are not quite orthogonal
    rows, loose = axes_of(context_of(begun(), trained()), "parameters").into(update.vector)
    assert energy([*rows, loose]) == pytest.approx(update.norm() ** 2, rel=0.02)


def test_the_metric_is_the_root_of_the_products() -> None:
    """Twice the adapter makes four times the product's energy, and twice that of its root."""
    update, start = only(normal(1), "B"), begun()
    twice = Start(only(AdapterUpdate(SPEC, 2 * start.adapter), "A").vector)
    once = Start(only(AdapterUpdate(SPEC, start.adapter), "A").vector)
    found = [axes_of(context_of(own), "effect").into(update.vector)[0] for own in (once, twice)]
    assert energy(found[1]) == pytest.approx(2 * energy(found[0]), rel=0.02)


def test_energy_is_foretold_where_the_adapter_has_grown() -> None:
    start = replace(begun(), origin=None)
    axes = axes_of(context_of(start), "effect")
    rows, _ = axes.into(more_of(start).vector)
    for kind, own in zip(axes.kinds, rows, strict=True):
        if kind.factors[0].kind == "B":
            # the first direction of the rank axis, in all layers
            assert energy([own[:LAYERS]]) > 0.9 * energy([own])
            assert kind.classes[:LAYERS].min() < kind.classes[LAYERS:].min()
            assert (kind.classes < CLASSES).all()
        else:
            assert (kind.classes >= CLASSES).all()


def test_an_adapter_that_has_not_grown_yet_foretells_nothing() -> None:
    start = begun(of_b=0.0)
    axes = axes_of(context_of(Start(start.origin, start.origin)), "effect")
    assert not axes.loose.size
    for kind in axes.kinds:
        if kind.factors[0].kind == "B":
            assert len(set(kind.classes.tolist())) == 1


def test_the_states_directions_and_the_grown_ones_have_classes_of_their_own() -> None:
    start, state = begun(), trained()
    known, grown, both = (
        axes_of(context_of(own, given_), "effect").loose
        for own, given_ in (
            (replace(start, origin=None), state),
            (start, None),
            (start, state),
        )
    )
    factors = len(SPEC)
    assert known.size == factors * RANK * 2
    assert grown.size == factors * RANK * RANK
    assert both.size == known.size + grown.size
    assert (known < KNOWN_CLASSES).all()
    assert both.max() >= KNOWN_CLASSES


def test_nothing_is_counted_twice() -> None:
    """Directions that are not quite orthogonal, and growth along them."""
    state = trained(directions=8)
    known = axes_of(context_of(replace(begun(), origin=None), state), "parameters")
    update = AdapterUpdate(SPEC, known.back(*known.into(normal(3).vector)))
    for name, view in update.views().items():
        vectors = _unit(state.tensors[name][:2])
        view[...] = view @ vectors.T @ vectors if "lora_A" in name else vectors.T @ (vectors @ view)
    origin = begun().origin
    assert origin is not None
    start = Start(origin + update.vector, origin)
    rows, loose = axes_of(context_of(start, state), "parameters").into(update.vector)
    assert energy(rows) < 1e-3 * update.norm() ** 2
    assert energy([loose]) == pytest.approx(update.norm() ** 2, rel=0.05)


def test_growth_along_known_directions_adds_no_others() -> None:
    """Of a few large entries, coarsely kept: what projecting once leaves is no direction.

    It was one: 16 % of the growth, along what was known already. A coefficient that was dropped
    beside it then took the sign of the whole, and error feedback grew by a quarter every round.
    """
    rng = np.random.default_rng(0)
    state, start = trained(directions=8), begun()
    tensors = {name: array.copy() for name, array in state.tensors.items()}
    assert start.origin is not None
    grown = AdapterUpdate(SPEC, start.origin.copy())
    for name, view in grown.views().items():
        n = max(view.shape)
        true = np.linalg.qr(rng.standard_normal((n, 8)) ** 5)[0].T
        tensors[name][:] = np.rint(true * (5 / np.abs(true).max(axis=1, keepdims=True)))
        along = rng.standard_normal((RANK, 8)) @ np.linalg.qr(tensors[name].T.astype(float))[0].T
        view[...] += along if "lora_A" in name else along.T
    context = context_of(Start(grown.vector, start.origin), CodecState.of(tensors))
    for kind in axes_of(context, "effect").kinds:
        assert kind.known is not None
        for vectors in kind.known.vectors.astype(np.float64):
            assert np.linalg.norm(vectors, 2) ** 2 < 1.6


def _unit(whole: np.ndarray) -> np.ndarray:
    return whole / np.linalg.norm(whole.astype(np.float64), axis=1, keepdims=True)


# ---- what it buys -------------------------------------------------------------------------------


def lost(update: AdapterUpdate, start: Start, context: CodecContext, **options: Any) -> float:
    """Share of what an update does that a packet loses."""
    error = energy(product_of(start, update - coded(update, context, **options)))
    return error / energy(product_of(start, update))


def test_fewer_bits_say_more_along_the_rank_axis_of_the_adapter() -> None:
    start = begun()
    update = more_of(start)
    there = lost(update, start, context_of(start), bpp=0.2, grown=False)
    assert there < 0.5 * lost(update, start, context_of(), bpp=0.2)


def test_and_along_the_directions_in_which_it_has_grown() -> None:
    start = begun()
    update = more_of(start, along=0.7)
    there = lost(update, start, context_of(start), bpp=0.1)
    assert there < 0.6 * lost(update, start, context_of(start), bpp=0.1, grown=False)


def test_and_along_those_that_a_state_knows() -> None:
    start, state = begun(), trained()
    update = normal(5, 1e-5)
    known = {f.name: v for f, v in zip(SPEC, _first_directions(state), strict=True)}
    rng = np.random.default_rng(0)
    for name, view in update.views().items():
        if "lora_B" in name:
            view[...] += 1e-3 * np.outer(known[name], rng.standard_normal(RANK))
    there = lost(update, start, context_of(start, state), bpp=0.1)
    assert there < 0.5 * lost(update, start, context_of(start), bpp=0.1)


def _first_directions(state: CodecState) -> list[np.ndarray]:
    found = [state.tensors[factor.name][0].astype(np.float64) for factor in SPEC]
    return [own / np.linalg.norm(own) for own in found]


def test_what_counts_little_in_the_product_is_not_sent_first() -> None:
    start, update = begun(of_b=1e-5), normal(3)
    shares = {}
    for metric in ("effect", "parameters"):
        found = coded(update, context_of(start), bpp=0.5, metric=metric)
        of_a, of_b = (only(found, kind).norm() ** 2 for kind in "AB")
        shares[metric] = of_a / (of_a + of_b)
    assert shares["effect"] < 0.25 * shares["parameters"]


# ---- packets ------------------------------------------------------------------------------------


def test_a_packet_is_read_with_what_it_was_made_with() -> None:
    codec, update = make_codec("learned", {"bpp": 1.0}), normal(0)
    context = context_of(begun(), trained())
    blob = codec.encode(update, context)
    with pytest.raises(PacketError, match="the adapter it changes"):
        codec.decode(blob, replace(context, start=None))
    with pytest.raises(PacketError, match="what the run began with"):
        codec.decode(blob, replace(context, start=replace(begun(), origin=None)))
    with pytest.raises(PacketError, match="state hash"):
        codec.decode(blob, replace(context, state=trained(1)))


@pytest.mark.parametrize("options", [{"metric": "parameters"}, {"grown": False}, {"bpp": 0.1}])
def test_a_packet_tells_how_it_was_made(options: dict[str, Any]) -> None:
    codec, other = make_codec("learned", {"bpp": 1.0}), make_codec("learned", options)
    context, update = context_of(begun(), trained()), normal(0)
    blob = codec.encode(update, context)
    assert (other.decode(blob, context).vector == codec.decode(blob, context).vector).all()


def test_packets_without_an_adapter_say_so() -> None:
    codec, update = make_codec("learned", {"bpp": 1.0}), normal(0)
    blob = codec.encode(update, context_of())
    found = codec.decode(blob, context_of(begun()))
    assert (found.vector == codec.decode(blob, context_of()).vector).all()


@EVERY_METRIC
@pytest.mark.parametrize("bpp", [0.1, 1.0, 8.0])
def test_a_change_along_known_directions_alone_needs_nothing_else(metric: Any, bpp: float) -> None:
    """What a client trains along them (`training.subspace`), with what float32 rounds."""
    context = context_of(begun(), trained())
    start, inside = begun().adapter, normal(0)
    for name, basis in orthonormal(SPEC, trained()).items():
        view = inside.views()[name]
        view[...] = view @ basis.T @ basis if "lora_A" in name else basis.T @ basis @ view
    update = AdapterUpdate(SPEC, (start + inside.vector) - start)
    beside = AdapterUpdate(SPEC, update.vector + normal(1, 1e-4).vector)
    options = {"bpp": bpp, "metric": metric, "directions": 2}
    found, other = (coded(own, context, **options) for own in (update, beside))
    error = np.linalg.norm(found.vector - update.vector) / np.linalg.norm(update.vector)
    assert error < np.linalg.norm(other.vector - beside.vector) / np.linalg.norm(beside.vector)
    assert error < {0.1: 0.7, 1.0: 0.05, 8.0: 0.001}[bpp]


# ---- the state ----------------------------------------------------------------------------------


class Recorded(list[AdapterUpdate]):
    spec = SPEC

    def start(self, index: int, /) -> Start | None:
        return begun(index) if index % 2 else None


CODEC = make_codec("learned", {"directions": 2})
assert isinstance(CODEC, Learned)
UPDATES = Recorded(normal(seed) for seed in range(6))


def test_one_pass_fits_a_state() -> None:
    told: list[FitProgress] = []
    state = CODEC.fit(UPDATES, UPDATES, FitSettings(), on_epoch=told.append)
    CODEC.check_state(state, SPEC)
    assert state.hash == CodecState.of(learn(SPEC, UPDATES, 2)).hash
    (progress,) = told
    assert progress.best == 1
    assert progress.curve[0]["epoch"] == 1
    assert 0 < progress.curve[0]["train_loss"] < 1
    again = CODEC.fit(UPDATES, UPDATES, FitSettings(), resume=progress)
    assert again.hash == state.hash


@pytest.mark.parametrize(("which", "what"), [(0, "learn from"), (1, "validate with")])
def test_nothing_to_learn_from_is_said(which: int, what: str) -> None:
    pools = [UPDATES, UPDATES]
    pools[which] = Recorded()
    with pytest.raises(CodecStateError, match=f"no update to {what}"):
        CODEC.fit(*pools, FitSettings())


def test_what_is_decoded_needs_no_new_state() -> None:
    """The adapter that both ends hold is made of it: FAF without a byte."""
    state = trained()
    assert CODEC.adapt(state, UPDATES, round=1, seed=0) is state


def test_a_state_goes_over_the_wire_in_fewer_bytes() -> None:
    codec = make_codec("learned", {"directions": 8})
    assert isinstance(codec, Learned)
    state = CodecState.of(learn(SPEC, UPDATES, 8), 3)
    blob = codec.pack_state(state)
    entries = sum(state.tensors[factor.name].size for factor in SPEC)
    assert len(blob) < 0.75 * entries
    found = codec.unpack_state(blob, SPEC)
    assert (found.hash, found.version) == (state.hash, 3)


def test_damaged_states_are_refused() -> None:
    state = trained()
    blob = CODEC.pack_state(state)
    for damaged in (blob[:-5], blob + b"\0", b"", b"nonsense", bytes(200)):
        with pytest.raises(CodecStateError, match="damaged"):
            CODEC.unpack_state(damaged, SPEC)
    import zstandard

    bomb = zstandard.ZstdCompressor().compress(bytes(10**7))
    with pytest.raises(CodecStateError, match=r"damaged: .* of 10000000 bytes"):
        CODEC.unpack_state(bomb, SPEC)
    with pytest.raises(CodecStateError, match=r"float32\(24, 3\), not float32\(24, 6\)"):
        make_codec("learned", {"directions": 5}).check_state(state, SPEC)
    for factor in (0, -1, 1e30):
        tensors = {**state.tensors, ENERGIES: np.float32(factor) * state.tensors[ENERGIES]}
        with pytest.raises(CodecStateError, match="'energies' is not from"):
            CODEC.check_state(CodecState.of(tensors), SPEC)


def test_a_state_made_to_confuse_does_not() -> None:
    """All directions the same, and the rest counting for more than they do."""
    start, state = begun(), trained(directions=8)
    views = AdapterUpdate(SPEC, start.adapter).views()
    tensors = dict(state.tensors)
    for factor in SPEC:
        row = views[factor.name][0] if factor.kind == "A" else views[factor.name][:, 0]
        whole = np.rint(100 * row / np.abs(row).max()).astype(np.int8)
        tensors[factor.name] = np.tile(whole, (8, 1))
    tensors[WEIGHTS] = np.full_like(tensors[WEIGHTS], 2.0**-40)
    tensors[WEIGHTS][:, -1] = 2.0**40
    confusing = CodecState.of(tensors)
    make_codec("learned", {"directions": 8}).check_state(confusing, SPEC)  # type: ignore[attr-defined]
    found = coded(normal(1), context_of(start, confusing), bpp=1.0, directions=8)
    assert found.is_finite()


def test_a_packet_that_would_say_nothing_is_empty() -> None:
    context = context_of(begun(), trained())
    for bpp in (0.0121, 0.0125, 0.014):
        codec = make_codec("learned", {"bpp": bpp})
        packet = codec.encode(normal(1), context)
        said = codec.decode(packet, context).vector.any()
        assert said or len(packet) == HEADER_SIZE


def test_where_there_is_nothing_to_learn_that_is_said() -> None:
    still = Recorded(AdapterUpdate.zeros(SPEC) for _ in range(2))
    with pytest.raises(CodecStateError, match="no directions to learn"):
        CODEC.fit(still, still, FitSettings())


def test_a_large_model_has_a_small_state() -> None:
    """LLaMA-7B, r = 8, four attention projections: the state stays below 64 MB."""
    shapes = {}
    for layer in range(32):
        for module in "qkvo":
            stem = f"m.layers.{layer}.{module}_proj"
            shapes[f"{stem}.lora_A.weight"] = (8, 4096)
            shapes[f"{stem}.lora_B.weight"] = (4096, 8)
    spec = AdapterSpec.from_shapes(shapes)
    codec = make_codec("learned")
    assert isinstance(codec, Learned)
    assert codec.state_limit(spec) < 64e6
