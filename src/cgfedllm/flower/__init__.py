"""The codecs for any other Flower app: one mod for its clients, one wrapper for its strategy.

>>> app = ClientApp(mods=[cgfedllm.flower.compression("lowrank:bpp=0.2")])
>>> strategy = cgfedllm.flower.CompressedStrategy(FedAvg(), "lowrank:bpp=0.2")

What is compressed how, and what it costs: docs/drop-in.md.
"""

from cgfedllm.flower.mod import compression
from cgfedllm.flower.strategy import CompressedStrategy, Traffic

__all__ = ["CompressedStrategy", "Traffic", "compression"]
