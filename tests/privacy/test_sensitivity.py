"""What noise has to hide: how far one client moves what is noised, measured over codecs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import CodecContext, Start, codec_names, make_codec
from cgfedllm.codecs.feedback import encode_with_feedback
from cgfedllm.federation.secure_client import encode_within
from cgfedllm.privacy.ledger import Ledger
from cgfedllm.privacy.mechanism import clip_update, private_mean, protect_update
from cgfedllm.privacy.noise import Float64Array
from cgfedllm.privacy.plan import AdaptiveClip, PrivacyPlan

MakePlan = Callable[..., PrivacyPlan]

SPEC = AdapterSpec.from_shapes(
    {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": (4, 96),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": (96, 4),
    }
)
CLIP = 0.5
# the paper's auto-encoders take seconds to make; their decoders are bounded by the same clipping
FAST = [name for name in codec_names() if not name.startswith("cg_")]


class Listening(Ledger):
    """A ledger that keeps what it was asked to hide."""

    def __init__(self) -> None:
        super().__init__(Path("/nonexistent"), 1, seed=0)
        self.hidden = np.zeros(0)

    def noise(self, values: Float64Array, round: int) -> Float64Array:  # type: ignore[override]
        self.hidden = values.copy()
        return np.zeros(values.size)


def decoded(codec: str, update: AdapterUpdate, round: int) -> AdapterUpdate:
    """What the server makes of a client's update that was clipped and coded."""
    made = make_codec(codec)
    zeros = np.zeros(SPEC.size, np.float32)
    context = CodecContext(SPEC, round, 3, made.initial_state(SPEC, 3), start=Start(zeros, zeros))
    return made.decode(made.encode(clip_update(update, CLIP), context), context)


def noised(updates: list[AdapterUpdate], plan: PrivacyPlan, **options: object) -> np.ndarray:
    ledger = Listening()
    private_mean(updates, SPEC, plan, ledger, round=1, **options)  # type: ignore[arg-type]
    return ledger.hidden


def update(seed: int, norm: float, peaked: bool = False) -> AdapterUpdate:
    values = np.random.default_rng(seed).standard_normal(SPEC.size)
    if peaked:
        values *= np.arange(SPEC.size) % 97 == seed % 97
    return AdapterUpdate(SPEC, (norm * values / np.linalg.norm(values)).astype(np.float32))


@pytest.mark.parametrize("codec", FAST)
@pytest.mark.parametrize("peaked", [False, True])
def test_leaving_a_client_out_moves_the_sum_by_the_sensitivity_at_most(
    plan: MakePlan, codec: str, peaked: bool
) -> None:
    central = plan("central", clip=CLIP)
    members = [
        decoded(codec, update(seed, norm, peaked), 1)
        for seed, norm in ((1, 0.01), (2, 0.5), (3, 80.0), (4, 0.499))
    ]
    whole = noised(members, central)
    for index in range(len(members)):
        zeroed = [*members]
        zeroed[index] = AdapterUpdate.zeros(SPEC)
        moved = float(np.linalg.norm(whole - noised(zeroed, central)))
        assert moved <= central.sensitivity * (1 + 1e-9)
        absent = members[:index] + members[index + 1 :]
        np.testing.assert_allclose(noised(absent, central), noised(zeroed, central))


def test_some_codecs_lengthen_and_would_break_it_without_the_second_clipping() -> None:
    longest = {name: decoded(name, update(5, 9.0), 1).norm() for name in FAST}
    assert any(norm > CLIP * 1.001 for norm in longest.values())
    for norm in longest.values():
        assert np.isfinite(norm)


@pytest.mark.parametrize("codec", ["int4", "sign", "topk", "sketch"])
@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), power=st.integers(-20, 20), peaked=st.booleans())
def test_nobody_is_worth_more_than_the_clip(
    codec: str, seed: int, power: int, peaked: bool
) -> None:
    sent = decoded(codec, update(seed, 2.0**power, peaked), 1)
    assert float(np.linalg.norm(clip_update(sent, CLIP).vector.astype(np.float64))) <= CLIP


def test_two_updates_of_a_local_client_are_apart_by_the_sensitivity_at_most(
    plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = plan("local", clip=CLIP)
    monkeypatch.setattr(Ledger, "noise", lambda _, values, round: np.zeros(values.size))
    sent = [
        protect_update(update(seed, norm), local, tmp_path, client="a", round=1).vector
        for seed, norm in ((1, 50.0), (1, -50.0), (2, 0.3), (3, 0.0001))
    ]
    distances = [float(np.linalg.norm(a - b)) for a in sent for b in sent]
    assert max(distances) <= local.sensitivity * (1 + 1e-6)
    assert max(distances) == pytest.approx(local.sensitivity, rel=1e-5)  # opposite ones


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), exponent=st.integers(-14, -3), bits=st.sampled_from([2, 8, 16]))
def test_where_only_sums_are_seen_clients_stay_within_the_clip_themselves(
    seed: int, exponent: int, bits: int
) -> None:
    codec = make_codec("sketch", {"bpp": 1.0 * bits, "bits": bits, "scale_exponent": exponent})
    context = CodecContext(SPEC, 1, 3)
    encoded = encode_within(
        lambda wanted: encode_with_feedback(codec, wanted, context, enabled=False),
        clip_update(update(seed, 3.0), CLIP),
        CLIP,
    )
    assert encoded.decoded.norm() <= CLIP
    assert codec.decode(encoded.packet, context).norm() <= CLIP


# ---- a norm that adapts -------------------------------------------------------------------------

ADAPTIVE = AdaptiveClip(quantile=0.5, rate=0.2, count_noise=2.0)


def test_sum_and_count_together_spend_what_one_sum_did(plan: MakePlan) -> None:
    """In units of its noise, a client moves what is released by 1 / multiplier, as without."""
    central = plan("central", clip=CLIP, multiplier=3.0, adaptive=ADAPTIVE)
    assert ADAPTIVE.update_multiplier(3.0) == pytest.approx((3.0**-2 - 4.0**-2) ** -0.5)
    clip = 0.3
    members = [update(seed, norm) for seed, norm in ((1, 0.1), (2, 0.3), (3, 7.0))]
    within = [True, True, False]
    unit = np.append(np.full(SPEC.size, central.noise_std_at(clip)), ADAPTIVE.count_noise)
    whole = noised(members, central, clip=clip, within=within)
    moves = []
    for index in range(3):
        rest = [m for at, m in enumerate(members) if at != index]
        short = [w for at, w in enumerate(within) if at != index]
        other = noised(rest, central, clip=clip, within=short)
        moves.append(float(np.linalg.norm((whole - other) / unit)))
    assert max(moves) <= 1 / 3.0 * (1 + 1e-6)
    assert max(moves) == pytest.approx(1 / 3.0, rel=1e-5)  # who is clipped reaches it


def test_the_norm_settles_at_the_quantile(plan: MakePlan) -> None:
    for quantile in (0.2, 0.5, 0.8):
        adaptive = AdaptiveClip(quantile, 0.5, 2.0)
        central = plan("central", clip=10.0, multiplier=3.0, clients=50, adaptive=adaptive)
        norms, clip = np.linspace(0.02, 1.0, 50), 10.0
        members = [AdapterUpdate.zeros(SPEC)]
        for _ in range(200):
            within = [bool(norm <= clip) for norm in norms]
            _, clip = private_mean(
                members, SPEC, central, Listening(), round=1, clip=clip, within=within
            )
        assert clip == pytest.approx(quantile, abs=0.05)


def test_the_count_is_noised_as_stated(plan: MakePlan, tmp_path: Path) -> None:
    """From many releases, by what the norm did."""
    central = plan("central", clip=1.0, multiplier=3.0, rounds=200, adaptive=ADAPTIVE)
    ledger = central.ledger(tmp_path, "server")
    tiny = AdapterSpec.from_shapes({"m.0.q.lora_A.weight": (1, 2)})
    shares = []
    for round_ in range(200):
        members = [AdapterUpdate.zeros(tiny)] * 4
        _, clip = private_mean(
            members, tiny, central, ledger, round=round_, within=[True, True, True, False]
        )
        shares.append(0.5 - np.log(clip) / 0.2)
    assert np.mean(shares) == pytest.approx(0.75, abs=0.1)
    assert np.std(shares) == pytest.approx(ADAPTIVE.count_noise / 4, rel=0.15)
