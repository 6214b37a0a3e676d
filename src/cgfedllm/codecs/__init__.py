"""Codecs: one module each, found by name. `base` is the contract, `packet` the wire format."""

from cgfedllm.codecs.base import (
    Codec,
    CodecContext,
    CodecOptions,
    CodecState,
    codec_class,
    codec_names,
    make_codec,
    register,
)
from cgfedllm.codecs.bf16 import Bf16
from cgfedllm.codecs.int8 import Int8
from cgfedllm.codecs.raw import Raw

__all__ = [
    "Bf16",
    "Codec",
    "CodecContext",
    "CodecOptions",
    "CodecState",
    "Int8",
    "Raw",
    "codec_class",
    "codec_names",
    "make_codec",
    "register",
]
