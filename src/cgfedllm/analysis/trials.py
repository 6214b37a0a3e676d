"""Which codecs are tried with which options, and at which rates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cgfedllm.adapter import AdapterUpdate
from cgfedllm.analysis.candidates import parse_codec
from cgfedllm.analysis.peers import PeerCoder, is_peer, make_peer
from cgfedllm.codecs import CodecContext, codec_class, make_codec
from cgfedllm.config import Config

RATES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0)
"""Bits per parameter that rate-controlled codecs are asked for."""


class Coder(Protocol):
    """What the bench needs of a codec, and has of a peer too."""

    def encode(self, update: AdapterUpdate, context: CodecContext) -> bytes:
        """As `Codec.encode`."""

    def decode(self, blob: bytes, context: CodecContext) -> AdapterUpdate:
        """As `Codec.decode`."""


@dataclass(frozen=True)
class Trial:
    """A codec or peer with its options at one rate, not made yet."""

    codec: str
    options: dict[str, Any]
    asked_bpp: float | None = None

    @property
    def label(self) -> str:
        """For people."""
        return candidate_label(self.codec, self.options)

    def make(self) -> Coder:
        """Build the codec, or a peer at the rate.

        Raises
        ------
        CodecError
            If the codec does not accept the options or the rate.
        """
        if is_peer(self.codec):
            return PeerCoder(make_peer(self.codec), float(self.options["bpp"]))
        return make_codec(self.codec, self.options)


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
    candidates: Sequence[tuple[str, dict[str, Any]]], rates: Sequence[float] = RATES
) -> list[Trial]:
    """Every candidate at every rate: a codec that has an option ``bpp``, or a peer, at each.

    Parameters
    ----------
    candidates : sequence of (name, options)
        One that gives ``bpp`` itself is run at that rate only.
    rates : sequence of float
        Bits per parameter.

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
    return result
