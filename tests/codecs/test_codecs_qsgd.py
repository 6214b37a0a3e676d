"""Stochastic rounding: unbiased where that is asked for, drawn anew for each client and round."""

import numpy as np
import pytest

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import CodecContext, make_codec

SPEC = AdapterSpec.from_shapes({"m.0.q.lora_A.weight": (8, 256), "m.0.q.lora_B.weight": (256, 8)})
UPDATE = AdapterUpdate(SPEC, np.random.default_rng(0).standard_normal(SPEC.size, np.float32))


def decoded(
    round: int = 1, seed: int = 0, update: AdapterUpdate = UPDATE, **options: object
) -> np.ndarray:
    codec = make_codec("qsgd", dict(options))
    context = CodecContext(SPEC, round=round, seed=seed)
    return codec.decode(codec.encode(update, context), context).vector


@pytest.mark.parametrize("bucket", [0, 100])
@pytest.mark.parametrize("bpp", [1.0, 3.0])
def test_the_mean_over_many_rounds_is_the_update(bpp: float, bucket: int) -> None:
    rounds = 200
    draws = np.stack(
        [decoded(round, bpp=bpp, bucket=bucket, unbiased=True) for round in range(rounds)]
    ).astype(np.float64)
    error = draws.mean(axis=0) - UPDATE.vector
    deviation = draws.std(axis=0).mean() / np.sqrt(rounds)
    assert np.sqrt(np.square(error).mean()) < 1.3 * np.sqrt(draws.var(axis=0).mean() / rounds)
    assert abs((error * np.sign(UPDATE.vector)).mean()) < 0.1 * deviation
    # and the error of one draw is not that small
    assert deviation > 0


def test_clients_rounds_and_seeds_draw_different_noise() -> None:
    options = {"bpp": 2.0}
    one = decoded(**options)
    assert (decoded(**options) == one).all()
    assert (decoded(round=2, **options) != one).any()
    assert (decoded(seed=1, **options) != one).any()
    # a client whose update is nearly the same errs elsewhere
    other = AdapterUpdate(SPEC, UPDATE.vector * np.float32(1.0001))
    errors = [one - UPDATE.vector, decoded(update=other, **options) - other.vector]
    assert abs(np.corrcoef(errors)[0, 1]) < 0.5


def test_shrinking_has_less_error_than_zeros_where_unbiased_has_more() -> None:
    def error(**options: object) -> float:
        return float(np.linalg.norm(decoded(bpp=0.4, **options) - UPDATE.vector))

    assert error() < UPDATE.norm() < error(unbiased=True)


def test_buckets_follow_the_local_scale() -> None:
    scales = np.repeat(10.0 ** np.arange(-8, 8), SPEC.size // 16)
    update = AdapterUpdate(SPEC, (UPDATE.vector * scales).astype(np.float32))
    values = decoded(update=update, bpp=6.0, bucket=SPEC.size // 16)
    error = ((values - update.vector) / scales).reshape(16, -1)
    assert (np.linalg.norm(error, axis=1) < 0.2 * np.linalg.norm(UPDATE.vector) / 4).all()
