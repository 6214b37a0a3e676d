"""What a learned codec keeps of updates it did not learn from: real packets, there and back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from cgfedllm.analysis.fidelity import Fidelity
from cgfedllm.analysis.samples import spread
from cgfedllm.codecs import Codec, CodecContext, CodecState

if TYPE_CHECKING:
    from cgfedllm.tgap.ensemble import Ensemble

MOST = 64
"""Updates coded of each pool."""


@dataclass(frozen=True)
class PoolFidelity:
    """Pooled over the updates that were coded.

    Parameters
    ----------
    updates : int
        How many, spread evenly over the pool.
    snr_db : float
        Sum over sum, dB; 0 is what predicting nothing gets.
    cosine : float
        Between -1 and 1.
    bpp : float
        Bits per parameter of whole packets, headers included.
    """

    updates: int
    snr_db: float
    cosine: float
    bpp: float

    def to_dict(self) -> dict[str, Any]:
        """Plain types, ready for JSON, which knows no infinity: that and NaN become null."""
        return {key: value if math.isfinite(value) else None for key, value in asdict(self).items()}


def measure_pool(
    codec: Codec,
    state: CodecState,
    pool: Ensemble,
    *,
    seed: int,
    most: int = MOST,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> PoolFidelity:
    """Encode and decode updates of a pool, each with what both ends would know.

    Parameters
    ----------
    codec : Codec
        With its options.
    state : CodecState
        What it learned.
    pool : Ensemble
        Updates, none coded twice.
    seed : int
        Seed both ends share.
    most : int
        At most so many are coded.
    tick : callable
        Told how many are done, of how many.
    """
    first = {sample: index for index, sample in reversed(list(enumerate(pool.samples)))}
    distinct = sorted(first.values())
    chosen = [distinct[position] for position in spread(len(distinct), most)]
    total, size = Fidelity(), 0
    for done, index in enumerate(chosen, start=1):
        context = CodecContext(
            pool.spec,
            pool.samples[index].rounds[-1],
            seed,
            state,
            previous=pool.previous(index) if codec.uses_previous else None,
            start=pool.start(index) if codec.uses_start else None,
        )
        update = pool[index]
        packet = codec.encode(update, context)
        total.add(update.vector, codec.decode(packet, context).vector)
        size += len(packet)
        tick(done, len(chosen))
    return PoolFidelity(
        updates=len(chosen),
        snr_db=total.snr_db,
        cosine=total.cosine,
        bpp=8 * size / (len(chosen) * pool.spec.size),
    )
