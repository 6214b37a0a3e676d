"""`lowrank`: rank-one pieces of every factor. `codec` is where to start reading."""

from cgfedllm.codecs.lowrank.codec import Lowrank

__all__ = ["Lowrank"]
