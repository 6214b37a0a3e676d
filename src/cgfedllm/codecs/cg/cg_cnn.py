"""`cg_cnn`: the paper's 1-D auto-encoder, 32 numbers in for one out.

The paper gives its rate only (3.21 %; the shapes it reports make 1/32). Ours halves the signal five
times with 2, 4, 8, 16, 32 channels, kernel 5, and mixes them into one.
"""

from __future__ import annotations

from pydantic import Field

from cgfedllm.codecs.base import register
from cgfedllm.codecs.cg.codec import AutoEncoderCodec
from cgfedllm.codecs.cg.options import AutoEncoderOptions


class CnnOptions(AutoEncoderOptions):
    """One stage fewer than the others."""

    stages: int = Field(
        default=5,
        ge=1,
        le=10,
        description="How often the signal is halved; from five on the latent is 1/32 of it.",
    )


@register
class CgCnn(AutoEncoderCodec):
    """Plain 1-D networks on the adapter's rank vectors, end to end."""

    name = "cg_cnn"
    rates = "printed 1 or 0.5 bits, fair about 0.06"
    summary = "the paper's 1-D auto-encoder of the adapter's rank vectors, latent 1/32 of them"
    paper = "CG-FedLLM, Wu et al., arXiv 2405.13746"
    Options = CnnOptions
    net = "cnn"

    options: CnnOptions
