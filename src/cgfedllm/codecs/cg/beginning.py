"""Weights before anything is learned, the same on every machine.

Printed networks begin as torch's own do: weights of a convolution are uniform up to one over the
root of the number of its inputs, either way. Updates are nearly noise to a convolution: from there,
networks first learn to say zero and stay there long. Fair ones begin as a linear code, the decoder
being the encoder's transpose, for which every step is worth its while. Their convolutions keep the
variance of their inputs through a ReLU (He et al., arXiv 1502.01852), and

- transposed convolutions have the weights of their counterparts;
- residual blocks do little, the first and the last convolution nothing;
- a U adds what comes up from below to what crossed the wire.
"""

from __future__ import annotations

import math
from typing import cast

import numpy as np
from torch import Tensor, nn

from cgfedllm.adapter import Float32Array
from cgfedllm.codecs.cg.design import Design
from cgfedllm.codecs.cg.nets import AutoEncoder, Prior, Residual, blank
from cgfedllm.codecs.cg.onechannel import OneChannel
from cgfedllm.codecs.entropy import Float64Array
from cgfedllm.seeding import generator

Tensors = dict[str, Float32Array]

# weight of what a block adds to its input
_RESIDUAL = 0.2

_Convolution = nn.modules.conv._ConvNd
_Upwards = nn.ConvTranspose1d | nn.ConvTranspose2d
_Norm = nn.BatchNorm1d | nn.BatchNorm2d


def initial_tensors(design: Design, seed: int) -> Tensors:
    """Weights and statistics of both networks, by name."""
    net = blank(design)
    tensors: Tensors = {}
    for name, module in net.named_modules():
        if isinstance(module, _Norm):
            values = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
            for key, value in values.items():
                tensors[f"{name}.{key}"] = np.full(module.num_features, value, np.float32)
        elif isinstance(module, _Convolution | OneChannel):
            gain = 1 if design.bounded else math.sqrt(6)
            tensors[f"{name}.weight"] = (gain * _drawn(module, name, seed)).astype(np.float32)
            if module.bias is not None:
                tensors[f"{name}.bias"] = np.zeros(tuple(module.bias.shape), np.float32)
        elif isinstance(module, Prior):
            tensors[f"{name}.log_scale"] = np.zeros(tuple(module.log_scale.shape), np.float32)
    if not design.bounded:
        _make_linear(net, tensors, design)
        _turn_round(net, tensors)
    return tensors


def _drawn(convolution: nn.Module, name: str, seed: int) -> Float64Array:
    # of a generator's bytes and correctly rounded steps alone
    weight = cast(Tensor, convolution.weight)
    drawn = generator(seed, "cg", name).bytes(4 * weight.numel())
    unit = np.frombuffer(drawn, "<u4") / 2.0**31 - 1
    values: Float64Array = unit / math.sqrt(_inputs(convolution))
    return values.reshape(tuple(weight.shape))


def _inputs(convolution: nn.Module) -> int:
    """Numbers that make one number of a convolution's output."""
    weight = cast(Tensor, convolution.weight)
    if isinstance(convolution, _Upwards):
        return math.ceil(weight.shape[0] * math.prod(size / 2 for size in weight.shape[2:]))
    return math.prod(weight.shape[1:])


def _make_linear(net: AutoEncoder, tensors: Tensors, design: Design) -> None:
    for name, module in net.named_modules():
        if isinstance(module, Residual):
            tensors[f"{name}.body.{len(module.body) - 1}.weight"][:] = _RESIDUAL
        if isinstance(module, OneChannel):
            weight = tensors[f"{name}.weight"]
            weight[:] = 0
            weight.reshape(-1)[weight.size // 2] = 1
    # what a projection on so few numbers leaves of an element
    last = next(n for n in reversed(tensors) if n.startswith("decoder") and tensors[n].ndim > 2)
    tensors[last] *= np.float32(math.sqrt(design.latent_share))


def _turn_round(net: AutoEncoder, tensors: Tensors) -> None:
    down, flat = _by_kind(net.encoder, "encoder")
    up, back = _by_kind(net.decoder, "decoder")
    for there, again in zip(down, reversed(up), strict=True):
        tensors[again] = tensors[there].copy()
    for there, again in zip(flat, back, strict=False):
        turned = tensors[there].swapaxes(0, 1)
        tensors[again] = np.flip(turned, tuple(range(2, turned.ndim))).copy()
    for merging in back[len(flat) :]:
        weight = np.zeros_like(tensors[merging])
        channels = np.arange(len(weight))
        for half in (channels, channels + len(weight)):
            weight[channels, half, 1, 1] = 1
        tensors[merging] = weight


def _by_kind(net: nn.Module, prefix: str) -> tuple[list[str], list[str]]:
    """Names of weights that change the resolution, and of others outside of residual blocks."""
    inside = {part for own in net.modules() if isinstance(own, Residual) for part in own.modules()}
    scaling: list[str] = []
    others: list[str] = []
    for name, module in net.named_modules(prefix=prefix):
        if not isinstance(module, _Convolution) or module in inside:
            continue
        strided = isinstance(module, _Upwards) or module.stride[0] > 1
        (scaling if strided else others).append(f"{name}.weight")
    return scaling, others
