"""Codecs: one module each, found by name. `base` is the contract, `packet` the wire format."""

from cgfedllm.codecs.base import (
    Codec,
    CodecContext,
    CodecOptions,
    CodecState,
    Start,
    codec_class,
    codec_names,
    make_codec,
    register,
)
from cgfedllm.codecs.bf16 import Bf16
from cgfedllm.codecs.cg import CgCnn, CgResnet, CgUnet
from cgfedllm.codecs.dct import Dct
from cgfedllm.codecs.ecsq import Ecsq
from cgfedllm.codecs.eden import Eden
from cgfedllm.codecs.int4 import Int4
from cgfedllm.codecs.int8 import Int8
from cgfedllm.codecs.learned import Learned
from cgfedllm.codecs.lowrank import Lowrank
from cgfedllm.codecs.qsgd import Qsgd
from cgfedllm.codecs.raw import Raw
from cgfedllm.codecs.sign import Sign
from cgfedllm.codecs.sketch import Sketch
from cgfedllm.codecs.topk import TopK
from cgfedllm.codecs.zero import Zero
from cgfedllm.codecs.zstd import Zstd

__all__ = [
    "Bf16",
    "CgCnn",
    "CgResnet",
    "CgUnet",
    "Codec",
    "CodecContext",
    "CodecOptions",
    "CodecState",
    "Dct",
    "Ecsq",
    "Eden",
    "Int4",
    "Int8",
    "Learned",
    "Lowrank",
    "Qsgd",
    "Raw",
    "Sign",
    "Sketch",
    "Start",
    "TopK",
    "Zero",
    "Zstd",
    "codec_class",
    "codec_names",
    "make_codec",
    "register",
]
