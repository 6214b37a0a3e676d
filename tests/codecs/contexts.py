"""What both ends hold, made up: for tests that try every codec."""

from __future__ import annotations

import numpy as np

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import Codec, CodecState, Start
from cgfedllm.codecs.learned import Learned
from cgfedllm.codecs.learned.fitting import learn


def begun(codec: Codec, spec: AdapterSpec) -> Start | None:
    """Where an update starts from, for codecs that use it."""
    if not codec.uses_start:
        return None
    origin, change = np.random.default_rng(8).standard_normal((2, spec.size), np.float32)
    return Start(origin + change / 16, origin)


def taught(codec: Codec, spec: AdapterSpec) -> CodecState:
    """A state that knows something, for codecs that learn in a moment."""
    if not isinstance(codec, Learned):
        return codec.initial_state(spec)
    values = np.random.default_rng(9).standard_normal((3, spec.size), np.float32)
    updates = [AdapterUpdate(spec, own) for own in values]
    return CodecState.of(learn(spec, updates, codec.options.directions))
