"""The paper's auto-encoders. `codec` is where to start reading; torch is imported when one runs."""

from cgfedllm.codecs.cg.cg_cnn import CgCnn
from cgfedllm.codecs.cg.cg_resnet import CgResnet
from cgfedllm.codecs.cg.cg_unet import CgUnet

__all__ = ["CgCnn", "CgResnet", "CgUnet"]
