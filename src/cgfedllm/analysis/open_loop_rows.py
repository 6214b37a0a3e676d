"""What the open-loop bench finds, as rows of tables."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from cgfedllm.analysis.trials import candidate_label


@dataclass(frozen=True)
class OpenLoopRow:
    """What one codec did at one rate on one recording.

    Parameters
    ----------
    recording, codec : str
        Names; a codec in parentheses is a reference that sends nothing.
    options : str
        Options as JSON, ``{}`` for defaults.
    asked_bpp : float or None
        Rate asked for, None for codecs that have but one.
    bpp : float
        Bits per parameter of the packets, header included.
    times_fewer_than_fp32 : float
        32 / bpp, which is twice the ratio to bf16.
    snr_db, cosine : float
        Of client updates, pooled over all.
    aggregate_snr_db, aggregate_cosine : float
        Of the weighted mean of a round's measured clients, pooled over rounds.
    swap_snr_db : float
        Of one client's packet taken for another's of the same round. Must be worse than
        `snr_db`; NaN where no round has two clients.
    encode_ms, decode_ms : float
        Medians over the updates, the first left out where there are more.
    peak_extra_bytes : int or None
        Most memory taken while one update was encoded and decoded, where it was asked for.
    updates, n_parameters : int
        Updates measured, and numbers in each.
    """

    recording: str
    codec: str
    options: str
    asked_bpp: float | None
    bpp: float
    times_fewer_than_fp32: float
    snr_db: float
    cosine: float
    aggregate_snr_db: float
    aggregate_cosine: float
    swap_snr_db: float
    encode_ms: float
    decode_ms: float
    peak_extra_bytes: int | None
    updates: int
    n_parameters: int

    @property
    def label(self) -> str:
        """Codec with its options other than the rate, as one writes a candidate."""
        return _label(self.codec, self.options)


@dataclass(frozen=True)
class ModuleRow:
    """Fidelity of one kind of factor, e.g. ``q_proj.A``; the rest as in `OpenLoopRow`."""

    recording: str
    codec: str
    options: str
    asked_bpp: float | None
    bpp: float
    module: str
    snr_db: float
    cosine: float
    energy_share: float
    """Of the update's energy; low shares can bear low SNR."""

    @property
    def label(self) -> str:
        """Codec with its options other than the rate, as one writes a candidate."""
        return _label(self.codec, self.options)


@dataclass(frozen=True)
class ModelRow:
    """SNR that a model of the updates promises at one rate: a reference, no limit."""

    recording: str
    model: str
    bpp: float
    snr_db: float


@dataclass(frozen=True)
class Refusal:
    """A codec and rate that could not be measured, and why."""

    recording: str
    codec: str
    options: str
    asked_bpp: float | None
    reason: str


@dataclass(frozen=True)
class OpenLoop:
    """Results on one recording."""

    recording: str
    rounds: tuple[int, ...]
    """Rounds the measured updates come from."""
    rows: list[OpenLoopRow] = field(default_factory=list)
    modules: list[ModuleRow] = field(default_factory=list)
    models: list[ModelRow] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)


def _label(codec: str, options: str) -> str:
    return candidate_label(codec, {k: v for k, v in json.loads(options).items() if k != "bpp"})
