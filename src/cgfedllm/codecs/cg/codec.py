"""What `cg_resnet`, `cg_cnn` and `cg_unet` have in common: updates to images to latents to bytes.

::

    printed   update / one scale --stack--> image --encoder--> latent, floats
              --decoder, Tanh--> image * scale
    fair      update / scale of each factor --signs, layout--> image --encoder--> latent
              --round--> integers --range coder--> packet
              --decoder--> image * gain of each kind of factor * scale of each factor

CG-FedLLM, Wu et al., arXiv 2405.13746. *Printed* is what the paper describes. *Fair* keeps the
networks and repairs what stands in their way; docs/codecs.md says what, and why. The integers of a
packet are the same for every receiver; values are rebuilt in floats, which may differ in their last
bits between types of processors.

Networks are functions of the state alone, so both ends want a fitted one in their context: `fit`
makes it of recorded updates. `initial_state` gives one that has learned nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from cgfedllm.adapter import AdapterSpec, AdapterUpdate, Float32Array
from cgfedllm.codecs.base import CodecContext, CodecState
from cgfedllm.codecs.cg import scales
from cgfedllm.codecs.cg.alignment import Signs
from cgfedllm.codecs.cg.design import Design, NetName
from cgfedllm.codecs.cg.latents import (
    BYTES,
    Change,
    changed,
    dequantised,
    pack_floats,
    quantised,
    read_latents,
    unpack_floats,
    write_latents,
)
from cgfedllm.codecs.cg.layout import Layout, layout_of
from cgfedllm.codecs.cg.options import AutoEncoderOptions
from cgfedllm.codecs.entropy import SymbolReader, SymbolWriter
from cgfedllm.codecs.learning import (
    FitProgress,
    FitSettings,
    LearnedCodec,
    OnEpoch,
    StateShapes,
    Updates,
)
from cgfedllm.codecs.parts.rows import count_rows
from cgfedllm.errors import CodecError, CodecStateError

if TYPE_CHECKING:
    from cgfedllm.codecs.cg.running import Network

SIGNS = "layout.signs"
"""Name of the state's signs of rank vectors."""
SCALE = "input.scale"
"""Name of what printed networks take for 1, shape (1,)."""
BESIDE = (SIGNS, SCALE)
"""Names of the arrays of a state that are not the networks'."""


class AutoEncoderCodec(LearnedCodec):
    """An encoder and a decoder network around a latent that is sent.

    Subclasses choose the network.
    """

    net: ClassVar[NetName]

    options: AutoEncoderOptions

    @property
    def design(self) -> Design:
        """Sizes of the networks."""
        own = self.options
        blocks = getattr(own, "residual_blocks", 0)
        slope = 0.0 if own.printed else own.slope
        return Design(self.net, own.stages, own.width, blocks, own.printed, slope)

    def layout(self, spec: AdapterSpec) -> Layout:
        """Where an adapter's values lie in the networks' input."""
        own = self.options
        return layout_of(spec, own.chosen_layout, own.chosen_order, self.design.stride)

    def latent_shapes(self, spec: AdapterSpec) -> list[tuple[int, ...]]:
        """Shapes of what is sent, channels first."""
        return self.design.latent_shapes(self.layout(spec).shape)

    def payload_size(self, spec: AdapterSpec) -> int | None:
        """Printed: the latent's numbers. Fair: None, it depends on the values."""
        if not self.options.printed:
            return None
        return BYTES[self.options.latent_dtype] * self.latent_elements(spec)

    def latent_elements(self, spec: AdapterSpec) -> int:
        """Numbers in the latents of an update."""
        return sum(math.prod(shape) for shape in self.latent_shapes(spec))

    def decode_changed(self, blob: bytes, context: CodecContext, change: Change) -> AdapterUpdate:
        """As `decode`, but for what `change` makes of the latents (`analysis.latents`)."""
        payload = self._open(blob, context).payload
        return AdapterUpdate(context.spec, self._rebuilt(payload, context, change))

    def initial_state(self, spec: AdapterSpec, seed: int = 0) -> CodecState:
        """Random weights, no rank vector turned over; the same on every machine."""
        return _initial_state(self.design, self.sign_count(spec), self.scaled, seed)

    def state_shapes(self, spec: AdapterSpec) -> StateShapes:
        """See `LearnedCodec.state_shapes`."""
        shapes: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {
            name: (shape, np.dtype(np.float32)) for name, shape in _shapes(self.design)
        }
        if signs := self.sign_count(spec):
            shapes[SIGNS] = (signs,), np.dtype(np.int8)
        if self.scaled:
            shapes[SCALE] = (1,), np.dtype(np.float32)
        return shapes

    def check_state(self, state: CodecState, spec: AdapterSpec) -> None:
        """See `LearnedCodec.check_state`; a scale is also refused that nothing can be divided by.

        Raises
        ------
        CodecStateError
            If the state is not of this codec, these options and this adapter, or is damaged.
        """
        super().check_state(state, spec)
        if self.scaled and not state.tensors[SCALE][0] > 0:
            raise CodecStateError(f"the state is damaged: {SCALE!r} is not above 0")

    def fit(
        self,
        train: Updates,
        validation: Updates,
        settings: FitSettings,
        *,
        resume: FitProgress | None = None,
        on_epoch: OnEpoch = lambda progress: None,
    ) -> CodecState:
        """Train both networks; see `LearnedCodec.fit`, and `training` for how."""
        from cgfedllm.codecs.cg.training import fit

        return fit(self, train, validation, settings, resume, on_epoch)

    def adapt(
        self, state: CodecState, updates: Sequence[AdapterUpdate], *, round: int, seed: int
    ) -> CodecState:
        """Take a few small steps on what was decoded; see `LearnedCodec.adapt`.

        Decoded updates are all there is: what a network lost it cannot learn from them. The steps
        strengthen what gets through as the updates drift, and no more.
        """
        from cgfedllm.codecs.cg.training import adapt

        return adapt(self, state, updates, round, seed)

    @property
    def scaled(self) -> bool:
        """Whether the state holds a scale."""
        return self.options.printed and self.options.normalise

    def sign_count(self, spec: AdapterSpec) -> int:
        """Rank vectors that have a sign in the state; 0 if none has."""
        aligned = self.options.align_signs and not self.options.printed
        return count_rows(spec) if aligned else 0

    def _encode(self, update: AdapterUpdate, context: CodecContext) -> bytes:
        network = self._network(context)
        layout, tensors = self.layout(context.spec), context.state.tensors
        if self.options.printed:
            latents = network.encode(layout.to_image(update.vector / scale_of(tensors)))
            return pack_floats(latents, self.options.latent_dtype)
        return self._encode_fair(update, network, layout, tensors.get(SIGNS))

    def _decode(self, payload: bytes, context: CodecContext) -> Float32Array:
        return self._rebuilt(payload, context)

    def _rebuilt(
        self, payload: bytes, context: CodecContext, change: Change | None = None
    ) -> Float32Array:
        network = self._network(context)
        layout = self.layout(context.spec)
        shapes = self.latent_shapes(context.spec)
        if self.options.printed:
            latents = unpack_floats(payload, shapes, self.options.latent_dtype)
            image = network.decode(changed(latents, change))
            return layout.to_vector(image) * scale_of(context.state.tensors)
        if not payload:
            return np.zeros(context.spec.size, np.float32)
        reader = SymbolReader(payload)
        exponents, gains = scales.read_scales(reader, context.spec)
        levels = read_latents(reader, shapes)
        reader.finish()
        image = network.decode(changed(dequantised(levels, self.options.step), change))
        values = layout.to_vector(image, context.state.tensors.get(SIGNS))
        return scales.denormalised(values, context.spec, exponents, gains)

    def _encode_fair(
        self, update: AdapterUpdate, network: Network, layout: Layout, signs: Signs | None
    ) -> bytes:
        exponents = scales.exponents_of(update)
        values = scales.normalised(update, exponents)
        levels = quantised(network.encode(layout.to_image(values, signs)), self.options.step)
        image = network.decode(dequantised(levels, self.options.step))
        decoded = layout.to_vector(image, signs)
        gains = scales.best_gains(values, decoded, update.spec, exponents)
        if not gains.any():
            return b""
        writer = SymbolWriter()
        scales.write_scales(writer, exponents, gains)
        write_latents(writer, levels)
        return writer.finish()

    def _network(self, context: CodecContext) -> Network:
        if not context.state.tensors:
            raise CodecError(
                f"{self.name} codes with trained networks, and was given none: make them with "
                "`cgfedllm pretrain`, or take Codec.initial_state, which has learned nothing"
            )
        from cgfedllm.codecs.cg.running import network

        def weights() -> dict[str, Float32Array]:
            self.check_state(context.state, context.spec)
            return {n: array for n, array in context.state.tensors.items() if n not in BESIDE}

        return network(self.design, context.state.hash, weights)


def scale_of(tensors: Mapping[str, NDArray[Any]]) -> np.float32:
    """What a printed network's input is divided by, and its output multiplied with."""
    return np.float32(tensors[SCALE][0]) if SCALE in tensors else np.float32(1)


@lru_cache(maxsize=16)
def _shapes(design: Design) -> tuple[tuple[str, tuple[int, ...]], ...]:
    from cgfedllm.codecs.cg.nets import blank

    counts = ".num_batches_tracked"  # torch's own, which states do without
    found = blank(design).state_dict().items()
    return tuple((n, tuple(values.shape)) for n, values in found if not n.endswith(counts))


@lru_cache(maxsize=16)
def _initial_state(design: Design, signs: int, scaled: bool, seed: int) -> CodecState:
    from cgfedllm.codecs.cg.beginning import initial_tensors

    tensors: dict[str, NDArray[Any]] = {**initial_tensors(design, seed)}
    if signs:
        tensors[SIGNS] = np.ones(signs, np.int8)
    if scaled:
        tensors[SCALE] = np.ones(1, np.float32)
    for array in tensors.values():
        array.flags.writeable = False  # one object for all who ask
    return CodecState.of(tensors)
