"""`learned`: the flagship. `codec` is where to start reading."""

from cgfedllm.codecs.learned.codec import Learned

__all__ = ["Learned"]
