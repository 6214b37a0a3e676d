"""The file of a pre-trained codec: everything an encoder or a decoder needs, in one safetensors.

::

    tensors     the codec's state
    metadata    format, version          that this is a codec file, and which kind of one
                codec, codec_version     whose state it is
                options                  of the codec, JSON
                spec                     the adapter's factors
                state_version, state_hash
                card                     where it comes from and what it is worth, JSON

No code, no pickle: a file from elsewhere can hold wrong numbers, never run anything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cgfedllm.adapter import AdapterSpec
from cgfedllm.codecs import CodecState, codec_class, make_codec
from cgfedllm.codecs.learning import LearnedCodec
from cgfedllm.errors import CheckpointError, CodecError, CodecStateError
from cgfedllm.storage import StrPath, load_tensors, parse_json, save_tensors
from cgfedllm.tgap.spec_difference import first_difference

FORMAT = "cgfedllm-codec"
VERSION = 1
_LONGEST_NAME = 64


@dataclass(frozen=True)
class CodecFile:
    """A pre-trained codec.

    Parameters
    ----------
    name : str
        Of the codec.
    codec_version : int
        Version of the codec that learned the state.
    options : dict
        All of the codec's options, as it was fitted.
    spec : AdapterSpec
        The adapter it was fitted for.
    state : CodecState
        What it learned.
    card : dict
        Plain types: data, recording, splits, fidelity, cost; see `docs/tgap.md`.
    """

    name: str
    codec_version: int
    options: dict[str, Any]
    spec: AdapterSpec
    state: CodecState
    card: dict[str, Any] = field(default_factory=dict)

    def codec(self, options: Mapping[str, Any] | None = None) -> LearnedCodec:
        """The codec with the file's options, and `options` on top.

        Raises
        ------
        CodecStateError
            If this installation has no such codec, or another version of it, or the codec refuses
            the file's own options.
        CodecError
            If the codec refuses one of `options`.
        """
        try:
            found = codec_class(self.name)
        except CodecError as error:
            raise CodecStateError(f"the codec file is of a codec not known here: {error}") from None
        if not issubclass(found, LearnedCodec):
            raise CodecStateError(
                f"the codec file is of {self.name!r}, which here is a codec that learns nothing"
            )
        if found.version != self.codec_version:
            raise CodecStateError(
                f"the codec file is of version {self.codec_version} of {self.name!r}, this "
                f"installation has version {found.version}; use the release that wrote it, or "
                "pre-train again"
            )
        try:
            make_codec(self.name, self.options)
        except CodecError as error:
            raise CodecStateError(f"the codec file is damaged: {error}") from None
        made = make_codec(self.name, {**self.options, **(options or {})})
        assert isinstance(made, LearnedCodec)
        return made

    def check(
        self,
        spec: AdapterSpec,
        *,
        codec: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Verify that the state can be used for an adapter.

        Parameters
        ----------
        spec : AdapterSpec
            The adapter to be coded.
        codec : str, optional
            Name of the codec the file is wanted for.
        options : mapping, optional
            As for `codec`.

        Raises
        ------
        CodecStateError
            If it is of another codec or version, of another adapter (the message names the first
            factor that differs), or its values do not fit codec and adapter.
        """
        if codec is not None and codec != self.name:
            raise CodecStateError(
                f"the codec file is of {self.name!r}, not of {codec!r}; name the codec it is of, "
                f"or pre-train {codec!r}"
            )
        made = self.codec(options)
        different = first_difference(spec, self.spec)
        if different is not None:
            raise CodecStateError(
                f"the codec file is of another adapter: {different}. Use it with the model and "
                "the [lora] table it was made for, or pre-train on updates of this adapter"
            )
        made.check_state(self.state, spec)


def save_codec_file(
    path: StrPath,
    codec: LearnedCodec,
    state: CodecState,
    spec: AdapterSpec,
    card: Mapping[str, Any],
) -> CodecFile:
    """Write a codec file, at once or not at all.

    Raises
    ------
    CodecStateError
        If the state is not one of this codec for this adapter.
    StorageError
        If it cannot be written.
    """
    codec.check_state(state, spec)
    options = codec.options.model_dump(mode="json")
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "codec": codec.name,
        "codec_version": str(codec.version),
        "options": json.dumps(options),
        "spec": spec.to_json(),
        "state_version": str(state.version),
        "state_hash": state.hash.hex(),
        "card": json.dumps(card, ensure_ascii=False),
    }
    save_tensors(path, state.tensors, metadata)
    return CodecFile(codec.name, codec.version, options, spec, state, dict(card))


def is_codec_file(path: StrPath) -> bool:
    """Whether a file says of itself that it is a codec file, whole or not."""
    try:
        with safe_open(str(path), framework="numpy") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError, ValueError):
        return False


def load_codec_file(path: StrPath) -> CodecFile:
    """Read a codec file; `CodecFile.check` says whether it fits an adapter.

    Raises
    ------
    CodecStateError
        If it is missing, damaged, no codec file, or of another version of the format.
    """
    # before its values are read: somebody may name a whole model by mistake
    if Path(path).is_file() and not is_codec_file(path):
        raise CodecStateError(
            f"{path} is damaged, or no codec file: `cgfedllm pretrain` writes those"
        )
    try:
        tensors, metadata = load_tensors(path)
    except CheckpointError as error:
        raise CodecStateError(f"{error} (codec files are made by `cgfedllm pretrain`)") from None
    if metadata.get("version") != str(VERSION):
        raise CodecStateError(
            f"{path} is a codec file of version {metadata.get('version')!r}; this release reads "
            f"{VERSION}. Use the release that wrote it, or pre-train again"
        )
    try:
        state = CodecState.of(tensors, _natural(metadata["state_version"]))
        read = CodecFile(
            name=_name(metadata["codec"]),
            codec_version=_natural(metadata["codec_version"]),
            options=_table(metadata["options"]),
            spec=AdapterSpec.from_json(metadata["spec"]),
            state=state,
            card=_card(metadata["card"]),
        )
    except (KeyError, ValueError) as error:
        raise CodecStateError(f"{path} is damaged: {error!r}; pre-train again") from None
    if state.hash.hex() != metadata.get("state_hash"):
        raise CodecStateError(
            f"{path} is damaged: its values do not match the state hash in it; copy it again from "
            "where it came, or pre-train again"
        )
    return read


def _name(text: str) -> str:
    if not 0 < len(text) <= _LONGEST_NAME:  # it is shown, whole
        raise ValueError(f"no codec has a name of {len(text)} characters")
    return text


def _natural(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**32:
        raise ValueError(f"{number} is out of range")
    return number


def _table(text: str) -> dict[str, Any]:
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError(f"not a table: {text[:40]!r}")
    return value


def _card(text: str) -> dict[str, Any]:
    """A card, of which runs can use what they compute with."""
    card = _table(text)
    cost = card.get("cost", {})
    if not isinstance(cost, dict):
        raise ValueError("the card's cost is not a table")
    for key in ("uplink_bytes", "downlink_bytes"):
        spent = cost.get(key, 0)
        if not isinstance(spent, int) or not 0 <= spent < 2**63:
            raise ValueError(f"the card's {key} is not a number of bytes")
    if not isinstance(cost.get("basis", ""), str):
        raise ValueError("the card's basis of its cost is not a text")
    federated = card.get("federated", [])
    if not isinstance(federated, list) or not all(isinstance(run, dict) for run in federated):
        raise ValueError("the card's federated runs are not a list of tables")
    return card
