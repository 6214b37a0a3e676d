"""What a configuration's [privacy] table comes to, and what is refused before anything starts."""

from __future__ import annotations

import pytest

from cgfedllm.config import Config, load_config
from cgfedllm.errors import ConfigError, PrivacyError
from cgfedllm.privacy.plan import plan_privacy

CENTRAL = ("privacy.mechanism=central", "federation.weighting=uniform")


def config(*settings: str) -> Config:
    return load_config(None, ["privacy.delta=1e-5", "federation.rounds=4", *settings])


def test_without_a_mechanism_there_is_no_plan() -> None:
    assert plan_privacy(config("privacy.epsilon=2.0"), 10) is None


@pytest.mark.parametrize("setting", ["0", "-1", "nan", "inf"])
def test_a_budget_that_is_none_is_a_privacy_error(setting: str) -> None:
    with pytest.raises(PrivacyError, match=r"privacy\.epsilon"):
        config(f"privacy.epsilon={setting}")


@pytest.mark.parametrize("setting", ["0.0", "1.0", "-0.1", "nan"])
def test_a_delta_that_is_none_is_a_privacy_error(setting: str) -> None:
    with pytest.raises(PrivacyError, match=r"privacy\.delta"):
        config(f"privacy.delta={setting}")


def test_other_mistakes_are_config_errors() -> None:
    with pytest.raises(ConfigError):
        config("privacy.clip=0.0")
    with pytest.raises(ConfigError, match=r"uplink\.error_feedback = false"):
        config("privacy.mechanism=local", "uplink.name=int8")
    config("privacy.mechanism=local", "uplink.name=int8", "uplink.error_feedback=false")
    for key, value in (
        ("federation.weighting", "examples"),
        ("federation.strategy.name", "median"),
        ("federation.aggregation", "product"),
    ):
        with pytest.raises(ConfigError, match=key):
            config(*CENTRAL, f"{key}={value}")


def test_local_noise_is_for_any_other_update_and_knows_no_sampling() -> None:
    local = plan_privacy(
        config("privacy.mechanism=local", "privacy.clip=0.5", "federation.fraction_train=0.2"), 10
    )
    assert local is not None
    assert local.sensitivity == 1.0
    assert local.sampling == 1.0
    assert 0.99 * 8 < local.spent(4) <= 8


def test_central_noise_is_for_one_client_more_or_less_and_knows_sampling() -> None:
    whole = plan_privacy(config(*CENTRAL, "privacy.clip=0.5"), 10)
    some = plan_privacy(config(*CENTRAL, "privacy.clip=0.5", "federation.fraction_train=0.3"), 10)
    assert whole is not None
    assert some is not None
    assert whole.sensitivity == some.sensitivity == 0.5
    assert (whole.expected_clients, some.expected_clients) == (10, 3)
    assert some.multiplier < whole.multiplier


def test_delta_is_told_and_a_weak_one_is_called_weak() -> None:
    few = plan_privacy(load_config(None, ["privacy.mechanism=local", "privacy.repeatable=true"]), 3)
    assert few is not None
    assert few.delta == pytest.approx(3**-1.1)
    text = few.describe(10_000)
    assert "delta 0.3" in text
    assert "promises little" in text
    assert "hides nothing" in text
    strong = plan_privacy(config("privacy.mechanism=local"), 3)
    assert strong is not None
    assert "promises little" not in strong.describe(10_000)
    assert "hides nothing" not in strong.describe(10_000)
    with pytest.raises(PrivacyError, match=r"set privacy\.delta"):
        plan_privacy(load_config(None, ["privacy.mechanism=local"]), 1)


def test_a_given_multiplier_must_keep_the_budget() -> None:
    settings = ("privacy.mechanism=local", "privacy.epsilon=2.0")
    needed = plan_privacy(config(*settings), 10)
    assert needed is not None
    quieter = needed.multiplier * 0.98
    with pytest.raises(PrivacyError, match="would spend"):
        plan_privacy(config(*settings, f"privacy.noise_multiplier={quieter}"), 10)
    louder = plan_privacy(config(*settings, "privacy.noise_multiplier=50.0"), 10)
    assert louder is not None
    assert louder.multiplier == 50
    assert louder.spent(4) < 2


def test_an_adaptive_norm_is_central_and_its_count_leaves_something_for_the_sum() -> None:
    adaptive = "privacy.adaptive_clip.enabled=true"
    for other in ("privacy.mechanism=local", "privacy.mechanism=none"):
        with pytest.raises(ConfigError, match="only mechanism = 'central' has"):
            config(other, adaptive)
    few = plan_privacy(config(*CENTRAL, adaptive), 10)
    assert few is not None
    assert few.adaptive is not None
    # with few clients the count gets the multiplier itself, and the sum 15 % more noise
    assert few.adaptive.count_noise == few.multiplier
    assert few.noise_std == pytest.approx(few.multiplier * few.clip * (4 / 3) ** 0.5)
    many = plan_privacy(config(*CENTRAL, adaptive, "privacy.noise_multiplier=20.0"), 10_000)
    assert many is not None
    assert many.adaptive is not None
    assert many.adaptive.count_noise == 500
    assert many.noise_std == pytest.approx(many.multiplier * many.clip, rel=1e-3)
    assert few.spent(4) == plan_privacy(config(*CENTRAL), 10).spent(4)  # type: ignore[union-attr]
    assert "count gets noise of 500 clients" in many.describe(100)
    with pytest.raises(PrivacyError, match=r"it must be above 10, half of the noise multiplier"):
        plan_privacy(
            config(
                *CENTRAL, adaptive, "privacy.noise_multiplier=20.0",
                "privacy.adaptive_clip.count_noise=10.0",
            ),
            10,
        )  # fmt: skip
