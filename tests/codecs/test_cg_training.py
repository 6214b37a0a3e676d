"""TGAP and FAF of the auto-encoders: they learn, stop, resume, repeat, and adapt."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import CodecContext, CodecState, make_codec
from cgfedllm.codecs.cg.codec import SCALE, SIGNS, AutoEncoderCodec
from cgfedllm.codecs.learning import FitProgress, FitSettings
from cgfedllm.errors import CodecStateError

A, B = "m.{}.q.lora_A.weight", "m.{}.q.lora_B.weight"
SPEC = AdapterSpec.from_shapes(
    {name.format(i): shape for i in range(2) for name, shape in ((A, (4, 16)), (B, (16, 4)))}
)
TINY: dict[str, Any] = {"stages": 2, "residual_blocks": 1}
NAMES = ["cg_resnet", "cg_cnn", "cg_unet"]


class Listed(list[AdapterUpdate]):
    """Updates in memory."""

    spec = SPEC


def made(name: str = "cg_resnet", **options: Any) -> AutoEncoderCodec:
    tiny = {key: value for key, value in TINY.items() if name != "cg_cnn" or key == "stages"}
    codec = make_codec(name, {**tiny, **options})
    assert isinstance(codec, AutoEncoderCodec)
    return codec


def updates(count: int, seed: int = 0) -> Listed:
    """One strong direction a factor, and noise."""
    rng = np.random.default_rng(seed)
    found = Listed()
    for _ in range(count):
        update = AdapterUpdate.zeros(SPEC)
        for view in update.views().values():
            strong = np.outer(
                rng.standard_normal(view.shape[0]), rng.standard_normal(view.shape[1])
            )
            view[...] = 1e-3 * (strong + 0.1 * rng.standard_normal(view.shape))
        found.append(update)
    return found


def snr(codec: AutoEncoderCodec, state: CodecState, update: AdapterUpdate) -> float:
    context = CodecContext(SPEC, 1, state=state)
    decoded = codec.decode(codec.encode(update, context), context)
    return float(20 * np.log10(update.norm() / (update - decoded).norm()))


def equal(first: CodecState, second: CodecState) -> bool:
    return first.hash == second.hash


# ---- learning -----------------------------------------------------------------------------------


def test_an_auto_encoder_learns_an_update_by_heart_if_its_rate_allows_it() -> None:
    # as many numbers in the latent as in the update, in fine steps that cost next to nothing
    codec = made(width=8, step=0.1, lam=1e-4, lr=2e-2)
    one = updates(1)
    assert codec.latent_elements(SPEC) == SPEC.size
    state = codec.fit(one, one, FitSettings(epochs=150, patience=150))
    assert snr(codec, state, one[0]) > 20
    assert snr(codec, codec.initial_state(SPEC), one[0]) < 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("preset", ["printed", "fair"])
def test_every_network_learns(name: str, preset: str) -> None:
    codec = made(name, preset=preset, width=4, lr=1e-2)
    train = updates(2)
    rows: list[dict[str, float]] = []
    codec.fit(
        train,
        train,
        FitSettings(epochs=25, patience=25),
        on_epoch=lambda progress: rows.append(dict(progress.curve[-1])),
    )
    assert [row["epoch"] for row in rows] == list(range(1, 26))
    before, after = (np.mean([row["train_loss"] for row in part]) for part in (rows[:3], rows[-5:]))
    assert after < 0.9 * before
    assert max(row["validation_snr_db"] for row in rows[-5:]) > rows[0]["validation_snr_db"]
    assert all(row["validation_bpp"] > 0 for row in rows)
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)


def test_a_dearer_bit_makes_smaller_packets() -> None:
    sizes = []
    for lam in (0.003, 0.3):
        codec, train = made(width=8, lr=1e-2, lam=lam), updates(2)
        state = codec.fit(train, train, FitSettings(epochs=60, patience=60))
        sizes.append(len(codec.encode(train[0], CodecContext(SPEC, 1, state=state))))
    assert sizes[1] < 0.9 * sizes[0]


def test_signs_are_learned_if_asked_for() -> None:
    train = updates(2)
    settings = FitSettings(epochs=1)
    signs = made().fit(train, train, settings).tensors[SIGNS]
    assert set(signs.tolist()) == {-1, 1}
    assert SIGNS not in made(align_signs=False).fit(train, train, settings).tensors
    assert SIGNS not in made(preset="printed").fit(train, train, settings).tensors


def test_printed_networks_take_the_largest_magnitude_for_one() -> None:
    train, settings = updates(3), FitSettings(epochs=1)
    largest = max(np.abs(update.vector).max() for update in train)
    assert made(preset="printed").fit(train, train, settings).tensors[SCALE].tolist() == [largest]
    as_it_is = made(preset="printed", normalise=False)
    assert SCALE not in as_it_is.fit(train, train, settings).tensors
    assert SCALE not in made().fit(train, train, settings).tensors


def test_the_state_that_did_best_is_returned() -> None:
    codec, train, validation = made(lr=5e-2), updates(2), updates(2, seed=1)
    seen: list[FitProgress] = []
    state = codec.fit(train, validation, FitSettings(epochs=12), on_epoch=seen.append)
    lam = codec.options.lam

    def price(row: Any) -> float:
        return float(10 ** (-row["validation_snr_db"] / 10) + lam * row["validation_bpp"])

    prices = [price(row) for row in seen[-1].curve]
    best = int(np.argmin(prices))
    assert seen[-1].best == best + 1
    kept = {n[4:]: array for n, array in seen[best].tensors.items() if n.startswith("now.")}
    assert equal(CodecState.of(kept), state)
    assert state.version == 0
    codec.check_state(state, SPEC)


def test_a_fit_stops_when_it_gets_no_better() -> None:
    # steps so small that nothing changes: the first epoch stays the best
    codec, train = made(lr=1e-12, preset="printed"), updates(1)
    seen: list[FitProgress] = []
    codec.fit(train, train, FitSettings(epochs=50, patience=3), on_epoch=seen.append)
    assert len(seen[-1].curve) - seen[-1].best == 3
    assert len(seen) < 50


# ---- again, and from where it stood -------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_fit_that_goes_on_ends_where_an_unbroken_one_does(name: str) -> None:
    codec, train, validation = made(name), updates(3), updates(2, seed=1)
    settings = FitSettings(epochs=6, seed=4)
    seen: list[FitProgress] = []
    unbroken = codec.fit(train, validation, settings, on_epoch=seen.append)
    for stopped in (seen[0], seen[3], seen[5]):
        later: list[FitProgress] = []
        # arrays as they come back from a file
        tensors = {name: array.copy() for name, array in stopped.tensors.items()}
        resume = FitProgress(stopped.curve, stopped.best, tensors)
        state = codec.fit(train, validation, settings, resume=resume, on_epoch=later.append)
        assert equal(state, unbroken)
        assert len(later) == 6 - len(stopped.curve)
        if later:
            assert later[-1].best == seen[-1].best
            assert later[0].curve[-1]["seconds"] > stopped.curve[-1]["seconds"]


def test_what_stops_a_fit_gets_through() -> None:
    class Stop(Exception):
        pass

    def stop(progress: FitProgress) -> None:
        raise Stop

    train = updates(1)
    with pytest.raises(Stop):
        made().fit(train, train, FitSettings(), on_epoch=stop)


def test_the_seed_decides() -> None:
    codec, train = made(), updates(3)
    first, again, other = (
        codec.fit(train, train, FitSettings(epochs=2, seed=seed)) for seed in (1, 1, 2)
    )
    assert equal(first, again)
    assert not equal(first, other)


def test_torchs_own_generator_is_left_alone() -> None:
    import torch

    before = torch.get_rng_state()
    train = updates(1)
    made().fit(train, train, FitSettings(epochs=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_fit_of_something_else_is_not_gone_on_with() -> None:
    codec, train = made(), updates(2)
    settings = FitSettings(epochs=2)
    seen: list[FitProgress] = []
    codec.fit(train, train, settings, on_epoch=seen.append)
    (progress, _) = seen
    cases = [
        (made(lam=0.2), train, settings),
        (codec, updates(2, seed=9), settings),
        (codec, train, FitSettings(epochs=2, seed=1)),
    ]
    for other, own, wanted in cases:
        with pytest.raises(CodecStateError, match="is another one"):
            other.fit(own, own, wanted, resume=progress)
    lacking = {n: array for n, array in progress.tensors.items() if "exp_avg_sq" not in n}
    broken = FitProgress(progress.curve, progress.best, lacking)
    with pytest.raises(CodecStateError, match="lacks"):
        codec.fit(train, train, settings, resume=broken)


@pytest.mark.parametrize(
    ("train", "validation", "said"),
    [
        (Listed(), updates(1), "no update to learn from"),
        (updates(1), Listed(), "no update to validate with"),
        (Listed([AdapterUpdate.zeros(SPEC)]), updates(1), "are zero"),
        (updates(1), Listed([AdapterUpdate.zeros(SPEC)]), "are zero"),
    ],
)
def test_nothing_to_learn_from(train: Listed, validation: Listed, said: str) -> None:
    with pytest.raises(CodecStateError, match=said):
        made().fit(train, validation, FitSettings())


def test_divergence_is_reported() -> None:
    train = updates(1)
    with pytest.raises(CodecStateError, match=r"diverged in epoch .* lower lr"):
        made(lr=1e38).fit(train, train, FitSettings(epochs=5))


# ---- adapting -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted() -> tuple[AutoEncoderCodec, CodecState]:
    codec = made(width=8, step=0.1, lam=1e-4, lr=1e-2, adapt_steps=30, adapt_lr=1e-3)
    train = updates(1)
    return codec, codec.fit(train, train, FitSettings(epochs=30, patience=30))


def test_adapting_learns_from_what_was_decoded(
    fitted: tuple[AutoEncoderCodec, CodecState],
) -> None:
    codec, state = fitted
    new = updates(1, seed=5)
    adapted = codec.adapt(state, new, round=1, seed=0)
    assert adapted.version == state.version + 1
    assert snr(codec, adapted, new[0]) > snr(codec, state, new[0]) + 0.1
    codec.check_state(adapted, SPEC)


def test_adapting_touches_both_networks_and_no_statistics(
    fitted: tuple[AutoEncoderCodec, CodecState],
) -> None:
    codec, state = fitted
    adapted = codec.adapt(state, updates(2), round=1, seed=0)
    changed = {n for n in state.tensors if not np.array_equal(state.tensors[n], adapted.tensors[n])}
    assert {name.split(".")[0] for name in changed} >= {"encoder", "decoder"}
    assert not any("running" in name for name in changed)
    assert SIGNS not in changed


def test_adapting_is_repeatable(fitted: tuple[AutoEncoderCodec, CodecState]) -> None:
    import torch

    codec, state = fitted
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(codec.adapt(state, updates(3), round=2, seed=1))
        assert torch.get_num_threads() == count
    torch.set_num_threads(threads)
    assert equal(*found)
    assert not equal(found[0], codec.adapt(state, updates(3), round=3, seed=1))


def test_nothing_to_adapt_to(fitted: tuple[AutoEncoderCodec, CodecState]) -> None:
    codec, state = fitted
    zeros = [AdapterUpdate.zeros(SPEC)]
    assert codec.adapt(state, [], round=1, seed=0) is state
    assert codec.adapt(state, zeros, round=1, seed=0) is state
    assert made(width=8, adapt_steps=0).adapt(state, updates(1), round=1, seed=0) is state


def test_values_that_cannot_be_learned_from_change_nothing_for_the_worse() -> None:
    codec = made(preset="printed")
    state = codec.initial_state(SPEC)
    huge = AdapterUpdate(SPEC, np.full(SPEC.size, 3e38, np.float32))
    adapted = codec.adapt(state, [huge], round=1, seed=0)
    codec.check_state(adapted, SPEC)
