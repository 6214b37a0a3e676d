"""A codec that learns next to nothing, for the paths that only learned codecs take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cgfedllm.adapter import AdapterSpec, AdapterUpdate, Float32Array
from cgfedllm.codecs import CodecContext, CodecOptions, CodecState, base, register
from cgfedllm.codecs.learning import FitProgress, FitSettings, LearnedCodec, OnEpoch, Updates
from cgfedllm.report.model_card import make_card
from cgfedllm.tgap.codec_file import save_codec_file
from cgfedllm.tgap.recording import Recording


class _Halves(LearnedCodec):
    """Sends every other value as float32 and repeats it; its state is a factor on what it sends."""

    name = "halves"
    rates = "16 bits"
    summary = "every other value, twice"

    def payload_size(self, spec: AdapterSpec) -> int:
        return 4 * self.latent_elements(spec)

    def latent_elements(self, spec: AdapterSpec) -> int:
        return -(-spec.size // 2)

    def decode_changed(
        self,
        blob: bytes,
        context: CodecContext,
        change: Callable[[Float32Array], Float32Array],
    ) -> AdapterUpdate:
        latent = change(np.frombuffer(self._open(blob, context).payload, np.float32))
        return AdapterUpdate(context.spec, np.repeat(latent, 2)[: context.spec.size])

    def initial_state(self, spec: AdapterSpec, seed: int = 0) -> CodecState:
        return CodecState.of({"scale": np.zeros(1, np.float32)})

    def fit(
        self,
        train: Updates,
        validation: Updates,
        settings: FitSettings,
        *,
        resume: FitProgress | None = None,
        on_epoch: OnEpoch = lambda progress: None,
    ) -> CodecState:
        raise NotImplementedError

    def adapt(
        self, state: CodecState, updates: Sequence[AdapterUpdate], *, round: int, seed: int
    ) -> CodecState:
        raise NotImplementedError

    def _encode(self, update: AdapterUpdate, context: CodecContext) -> bytes:
        return (update.vector[::2] * context.state.tensors["scale"]).tobytes()

    def _decode(self, payload: bytes, context: CodecContext) -> Float32Array:
        return np.repeat(np.frombuffer(payload, np.float32), 2)[: context.spec.size]


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[LearnedCodec]]:
    """The codec, registered for one test."""
    with monkeypatch.context() as patch:
        patch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
        yield register(_Halves)


@pytest.fixture
def codec_file(halves: type[LearnedCodec]) -> Callable[..., Path]:
    """``codec_file(path, recording, rounds)``: its file, fitted on those rounds (as its card says).

    Its factor is 1: it sends values as they are.
    """

    def make(path: Path, recording: Recording, rounds: Sequence[int], **card: Any) -> Path:
        codec = halves(CodecOptions())
        splits = {
            "train": {
                "updates": 1, "samples_in_a_pass": 1, "rounds": [list(rounds)], "clients": ["a"],
            }
        }  # fmt: skip
        made = make_card([recording], splits=splits, fit={}, fidelity={}, cost={}, notes=[])
        state = CodecState.of({"scale": np.ones(1, np.float32)})
        save_codec_file(path, codec, state, recording.spec, {**made, **card})
        return path

    return make
