"""The codec an app asks for: by name and options, or by a codec file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cgfedllm.adapter import AdapterSpec
from cgfedllm.codecs import Codec, CodecContext, CodecState, Start, make_codec
from cgfedllm.codecs.learning import LearnedCodec
from cgfedllm.errors import CodecError
from cgfedllm.flower.arrays import Layout
from cgfedllm.pairs import read_codec
from cgfedllm.storage import StrPath
from cgfedllm.tgap.codec_file import CodecFile, load_codec_file


@dataclass(frozen=True)
class Choice:
    """A codec, and where its state comes from.

    Parameters
    ----------
    codec : Codec
        With its options.
    file : CodecFile or None
        Of a pre-trained codec; both ends have a copy.
    """

    codec: Codec
    file: CodecFile | None = None

    @property
    def label(self) -> str:
        """Name, all options and state, by which two ends compare what they were told."""
        state = "" if self.file is None else f" with state {self.file.state.hash.hex()}"
        return f"{self.codec.name} {self.codec.options.model_dump_json()}{state}"

    def context(self, layout: Layout, spec: AdapterSpec, round: int) -> CodecContext:
        """What both ends know when they code one reply.

        Raises
        ------
        CodecStateError
            If the codec file is of other arrays.
        """
        start = Start(layout.start(spec)) if self.codec.uses_start else None
        return CodecContext(spec, round, state=self._state(spec), start=start)

    def _state(self, spec: AdapterSpec) -> CodecState:
        if self.file is None:
            return self.codec.initial_state(spec)
        self.file.check(spec)
        return self.file.state


def choose(codec: StrPath) -> Choice:
    """Find the codec that was asked for.

    Parameters
    ----------
    codec : str or path
        ``NAME`` or ``NAME:key=value,key=value``; or a codec file, which ends in ``.safetensors``.

    Raises
    ------
    ConfigError
        If the text has another form.
    CodecError
        If there is no such codec, it refuses an option, or knows nothing without a codec file.
    CodecStateError
        If the codec file is missing, damaged or of another release.
    """
    if Path(codec).suffix == ".safetensors":
        file = load_codec_file(codec)
        return Choice(file.codec(), file)
    made = make_codec(*read_codec(str(codec)))
    # one that starts from where the arrays stand knows something before it has learned
    if isinstance(made, LearnedCodec) and not made.uses_start:
        raise CodecError(
            f"codec {made.name!r} knows nothing before it is fitted: give the codec file that "
            "`cgfedllm pretrain` wrote in place of its name, the same on server and clients"
        )
    return Choice(made)
