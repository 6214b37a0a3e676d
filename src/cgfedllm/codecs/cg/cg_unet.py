"""`cg_unet`: a U-shaped auto-encoder of our own, 64 numbers in for one out.

The paper names a "U-Former" without saying what it is. Here the skip connections of a U-Net
(Ronneberger et al., arXiv 1505.04597) cross the wire, each squeezed to a few channels: 2 at 1/16 of
the image's height and width, 4 at 1/32, 16 at 1/64.
"""

from __future__ import annotations

from cgfedllm.codecs.base import register
from cgfedllm.codecs.cg.codec import AutoEncoderCodec
from cgfedllm.codecs.cg.options import ImageOptions


@register
class CgUnet(AutoEncoderCodec):
    """U-shaped networks on the adapter as an image."""

    name = "cg_unet"
    rates = "printed 0.5 or 0.25 bits, fair about 0.03"
    summary = "a U-shaped auto-encoder of our own in place of the paper's, latent 1/64"
    paper = "after CG-FedLLM, Wu et al., arXiv 2405.13746"
    Options = ImageOptions
    net = "unet"

    options: ImageOptions
