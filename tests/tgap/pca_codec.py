"""A small codec that learns: projections on the leading directions of the updates it has seen.

Its fit has all that a fit can have: epochs, momentum, a best state, early stopping.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cgfedllm.adapter import AdapterSpec, AdapterUpdate, Float32Array
from cgfedllm.analysis.fidelity import Fidelity
from cgfedllm.codecs import CodecContext, CodecOptions, CodecState
from cgfedllm.codecs.learning import FitProgress, FitSettings, LearnedCodec, OnEpoch, Updates
from cgfedllm.errors import CodecStateError
from cgfedllm.seeding import generator

NAME = "test-pca"


class PcaOptions(CodecOptions):
    components: int = 2
    rate: float = 0.3


class PcaCodec(LearnedCodec):
    name = NAME
    rates = "32 bits a component"
    summary = "for tests"
    Options = PcaOptions

    @property
    def components(self) -> int:
        assert isinstance(self.options, PcaOptions)
        return self.options.components

    @property
    def rate(self) -> float:
        assert isinstance(self.options, PcaOptions)
        return self.options.rate

    def initial_state(self, spec: AdapterSpec, seed: int = 0) -> CodecState:
        drawn = generator(seed, NAME).standard_normal((self.components, spec.size))
        return CodecState.of({"basis": orthonormal(drawn)})

    def fit(
        self,
        train: Updates,
        validation: Updates,
        settings: FitSettings,
        *,
        resume: FitProgress | None = None,
        on_epoch: OnEpoch = lambda progress: None,
    ) -> CodecState:
        if not len(train):
            raise CodecStateError("there is nothing to learn from")
        basis = self.initial_state(train.spec, settings.seed).tensors["basis"]
        progress = resume or FitProgress(
            (), 0, {"basis": basis, "momentum": np.zeros_like(basis), "best": basis}
        )
        began = time.perf_counter() - (progress.curve[-1]["seconds"] if progress.curve else 0.0)
        while not self._over(progress, settings):
            progress = self._epoch(progress, train, validation, began)
            on_epoch(progress)
        return CodecState.of({"basis": progress.tensors["best"]})

    def adapt(
        self, state: CodecState, updates: Sequence[AdapterUpdate], *, round: int, seed: int
    ) -> CodecState:
        if not updates:
            return state
        gain = sum(along(state.tensors["basis"], u.vector) for u in updates)
        return CodecState.of(
            {"basis": orthonormal(state.tensors["basis"] + self.rate * gain)}, state.version + 1
        )

    def payload_size(self, spec: AdapterSpec) -> int:
        return 4 * self.components

    def _encode(self, update: AdapterUpdate, context: CodecContext) -> bytes:
        return (context.state.tensors["basis"] @ update.vector).tobytes()

    def _decode(self, payload: bytes, context: CodecContext) -> Float32Array:
        return context.state.tensors["basis"].T @ np.frombuffer(payload, np.float32)

    def _over(self, progress: FitProgress, settings: FitSettings) -> bool:
        done = len(progress.curve)
        return done >= settings.epochs or done - progress.best >= settings.patience > 0 < done

    def _epoch(
        self, progress: FitProgress, train: Updates, validation: Updates, began: float
    ) -> FitProgress:
        basis = progress.tensors["basis"]
        gain = sum(along(basis, update.vector) for update in train) / len(train)
        momentum = (0.5 * progress.tensors["momentum"] + gain).astype(np.float32)
        basis = orthonormal(basis + self.rate * momentum)
        judged = Fidelity()
        for update in validation:
            judged.add(update.vector, basis.T @ (basis @ update.vector))
        row = {
            "epoch": len(progress.curve) + 1,
            "train_loss": float(-np.square(gain).sum()),
            "validation_snr_db": judged.snr_db,
            "validation_cosine": judged.cosine,
            "validation_bpp": 32 * self.components / basis.shape[1],
            "seconds": time.perf_counter() - began,
        }
        known = [r["validation_snr_db"] for r in progress.curve]
        better = row["validation_snr_db"] > max(known, default=-np.inf)
        return FitProgress(
            (*progress.curve, row),
            row["epoch"] if better else progress.best,
            {
                "basis": basis,
                "momentum": momentum,
                "best": basis if better else progress.tensors["best"],
            },
        )


def along(basis: Float32Array, vector: Float32Array) -> Float32Array:
    unit = vector / max(float(np.linalg.norm(vector)), 1e-12)
    return np.outer(basis @ unit, unit).astype(np.float32)


def orthonormal(rows: NDArray[np.floating]) -> Float32Array:
    q, r = np.linalg.qr(np.asarray(rows, np.float64).T)
    return np.ascontiguousarray((q * np.sign(np.diag(r))).T, dtype=np.float32)
