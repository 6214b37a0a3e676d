"""Which codecs are tried with which options, and at which rates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cgfedllm.adapter import AdapterSpec
from cgfedllm.analysis.candidates import parse_codec
from cgfedllm.analysis.coding import CodecCoder, Coder
from cgfedllm.analysis.fitted import Fitted
from cgfedllm.analysis.peers import PeerCoder, is_peer, make_peer
from cgfedllm.codecs import codec_class, codec_names, make_codec
from cgfedllm.config import Config

RATES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0)
"""Bits per parameter that rate-controlled codecs are asked for."""


@dataclass(frozen=True)
class Trial:
    """A codec or peer with its options at one rate, not made yet."""

    codec: str
    options: dict[str, Any]
    asked_bpp: float | None = None
    fitted: Fitted | None = None
    """Where its state comes from; without one, a codec that learns has learned nothing."""

    @property
    def described(self) -> dict[str, Any]:
        """The options, and by name the state, as tables tell them."""
        return self.options if self.fitted is None else {**self.options, "state": self.fitted.name}

    @property
    def label(self) -> str:
        """For people."""
        return candidate_label(self.codec, self.described)

    @property
    def uses_start(self) -> bool:
        """Whether it codes against where an update starts from."""
        return not is_peer(self.codec) and codec_class(self.codec).uses_start

    def make(self, spec: AdapterSpec, seed: int = 0) -> Coder:
        """Build the codec, or a peer at the rate.

        Parameters
        ----------
        spec : AdapterSpec
            Of the updates it will code.
        seed : int
            Of the state of a codec that has learned nothing.

        Raises
        ------
        CodecError
            If the codec does not accept the options or the rate.
        CodecStateError
            If the state is not one for this codec and adapter.
        """
        if is_peer(self.codec):
            return PeerCoder(make_peer(self.codec), float(self.options["bpp"]))
        if self.fitted is not None:
            self.fitted.file.check(spec, options=self.options)
            return CodecCoder(self.fitted.file.codec(self.options), self.fitted.file.state)
        codec = make_codec(self.codec, self.options)
        return CodecCoder(codec, codec.initial_state(spec, seed))


def untaught() -> list[str]:
    """Codecs that need no training: without a codec file the others have learned nothing."""
    return [name for name in codec_names() if codec_class(name).kind != "learned"]


def read_candidate(text: str) -> tuple[str, dict[str, Any]]:
    """Read ``NAME[:key=value,...]`` into a codec's name and options.

    Raises
    ------
    ConfigError
        If it has another form, or the codec does not exist or refuses an option.
    """
    base = Config()
    changes = parse_codec(text, base).changes
    return changes.get("uplink.name", base.uplink.name), dict(changes.get("uplink.options", {}))


def candidate_label(codec: str, options: dict[str, Any]) -> str:
    """``NAME:key=value,...``; the name alone without options."""
    text = ",".join(
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in options.items()
    )
    return f"{codec}:{text}" if text else codec


def trials(
    candidates: Sequence[tuple[str, dict[str, Any]]],
    rates: Sequence[float] = RATES,
    fitted: Sequence[Fitted] = (),
) -> list[Trial]:
    """Every candidate at every rate: a codec that has an option ``bpp``, or a peer, at each.

    Parameters
    ----------
    candidates : sequence of (name, options)
        One that gives ``bpp`` itself is run at that rate only.
    rates : sequence of float
        Bits per parameter.
    fitted : sequence of Fitted
        Codec files, each with the options it was fitted with: one whose codec has an option
        ``bpp`` at every rate too, since its state serves them all.

    Raises
    ------
    CodecError
        If a codec is unknown.
    """
    result = []
    for name, options in candidates:
        if not is_peer(name) and "bpp" not in codec_class(name).Options.model_fields:
            result.append(Trial(name, options))
        elif "bpp" in options:
            result.append(Trial(name, options, float(options["bpp"])))
        else:
            result += [Trial(name, {**options, "bpp": rate}, rate) for rate in rates]
    for one in fitted:
        asked: Sequence[float | None] = rates if "bpp" in one.file.options else [None]
        result += [
            Trial(one.file.name, {} if rate is None else {"bpp": rate}, rate, one) for rate in asked
        ]
    return result
