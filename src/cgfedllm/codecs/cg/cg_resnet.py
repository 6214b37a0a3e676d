"""`cg_resnet`: the paper's "ResNet-3" auto-encoder, 64 numbers in for one out."""

from __future__ import annotations

from cgfedllm.codecs.base import register
from cgfedllm.codecs.cg.codec import AutoEncoderCodec
from cgfedllm.codecs.cg.options import ImageOptions


@register
class CgResnet(AutoEncoderCodec):
    """Residual networks on the adapter as an image."""

    name = "cg_resnet"
    rates = "printed 0.5 or 0.25 bits, fair about 0.03"
    summary = "the paper's ResNet auto-encoder of the adapter as an image, latent 1/64 of it"
    paper = "CG-FedLLM, Wu et al., arXiv 2405.13746"
    Options = ImageOptions
    net = "resnet"

    options: ImageOptions
