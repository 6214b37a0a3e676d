"""TGAP and FAF of the auto-encoders. Imported only where one is trained.

An image is cut into tiles; an epoch shows one tile of every update, drawn at random, a few updates
an optimiser step. Convolutions are the same everywhere, so a tile teaches what its image does, and
there are more steps for the same work.

Printed: mean squared error. Fair: squared error of the update as a share of a mean update's energy,
plus lambda times the bits a parameter. The first term summed over updates is what the signal-to-
noise ratio is made of. Bits are those of latents with uniform noise on (Balle et al., arXiv
1611.01704), while the decoder is shown rounded ones (Minnen and Singh, arXiv 2007.08739).
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cgfedllm.adapter import AdapterSpec, AdapterUpdate, Float32Array
from cgfedllm.codecs.base import CodecState
from cgfedllm.codecs.cg import scales
from cgfedllm.codecs.cg.alignment import aligned
from cgfedllm.codecs.cg.codec import BESIDE, SCALE, SIGNS, scale_of
from cgfedllm.codecs.cg.nets import with_tensors
from cgfedllm.codecs.cg.running import one_thread
from cgfedllm.codecs.learning import Array, FitProgress, FitSettings, OnEpoch, Updates
from cgfedllm.codecs.parts.draws import random_order
from cgfedllm.codecs.parts.judging import judge
from cgfedllm.errors import CodecStateError
from cgfedllm.seeding import derive_seed, generator

if TYPE_CHECKING:
    from cgfedllm.codecs.cg.codec import AutoEncoderCodec

Tensors = dict[str, Array]
Tile = tuple[slice, ...]

_IDENTITY = "fit.identity"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")

# longest side of a tile, in strides of the network; of a signal, which is thin, more
_TILE = {1: 4096, 2: 8}
# updates that an epoch is judged by, spread evenly over the validation updates
_JUDGED = 8
# most updates that a step of adapting learns from; the next ones are the next step's
_ADAPTED = 8
# updates that signs are learned from
_ALIGNED = 32
# the learning rate of a fair fit falls to half in so many epochs, to a third in twice as many
_SLOWING = 40
_LARGEST_WEIGHT = 1e12
_LONGEST_STEP = 1.0


def fit(
    codec: AutoEncoderCodec,
    train: Updates,
    validation: Updates,
    settings: FitSettings,
    resume: FitProgress | None,
    on_epoch: OnEpoch,
) -> CodecState:
    """See `LearnedCodec.fit`.

    Epochs are judged by their packets for at most 8 of the validation updates, spread evenly: by
    squared error over energy, for the fair preset plus lambda times bits a parameter. The same
    updates, settings and number of threads give the same state.
    """
    if not len(train) or not len(validation):
        what = "learn from" if not len(train) else "validate with"
        raise CodecStateError(f"{codec.name}: there is no update to {what}")
    energy = _mean_energy(train)
    judged = _spread(validation, _JUDGED)
    if not energy or not any(update.vector.any() for update in judged):
        raise CodecStateError(
            f"{codec.name}: all updates to learn from, or all to validate with, are zero"
        )
    sizes = len(train), len(validation)
    identity = _identity(codec, train.spec.hash, sizes, settings.seed, energy)
    if resume is None:
        best = dict(codec.initial_state(train.spec, settings.seed).tensors)
        if codec.sign_count(train.spec):
            best[SIGNS] = aligned(codec.layout(train.spec), _normalised(train))
        if codec.scaled:
            best[SCALE] = np.array([max(np.abs(own.vector).max() for own in train)], np.float32)
        trainer = Trainer(codec, train.spec, best, energy, codec.options.chosen_lr)
        if codec.options.printed:
            trainer.begin_statistics(train[0])
        curve, chosen = [], 0
    else:
        trainer = _resumed(codec, train, resume, identity, energy)
        best = {n[5:]: array for n, array in resume.tensors.items() if n.startswith("best.")}
        curve, chosen = list(resume.curve), resume.best
    started = time.perf_counter() - (curve[-1]["seconds"] if curve else 0.0)
    for epoch in range(len(curve) + 1, settings.epochs + 1):
        if epoch - 1 - chosen >= settings.patience:
            break
        loss = trainer.epoch(train, epoch, settings.seed)
        state = CodecState.of(trainer.tensors())
        curve.append(
            {
                "epoch": epoch,
                "train_loss": loss,
                **judge(codec, state, [(update, None) for update in judged]),
                "seconds": time.perf_counter() - started,
            }
        )
        if not chosen or _price(codec, curve[-1]) < _price(codec, curve[chosen - 1]):
            chosen, best = epoch, dict(state.tensors)
        kept = {f"best.{name}": array for name, array in best.items()}
        memory = {**kept, **trainer.memory(), _IDENTITY: identity}
        on_epoch(FitProgress(tuple(curve), chosen, memory))
    return CodecState.of(best)


def adapt(
    codec: AutoEncoderCodec,
    state: CodecState,
    updates: Sequence[AdapterUpdate],
    round: int,
    seed: int,
) -> CodecState:
    """See `LearnedCodec.adapt`: a few steps on decoded updates, statistics left as they are."""
    updates = [update for update in updates if update.vector.any()]
    if not updates or not codec.options.adapt_steps:
        return state
    codec.check_state(state, updates[0].spec)
    with one_thread():
        energy, lr = _mean_energy(updates), codec.options.adapt_lr
        trainer = Trainer(codec, updates[0].spec, state.tensors, energy, lr)
        trainer.hold_statistics()
        noise = torch.Generator().manual_seed(derive_seed(seed, "cg", "adapt", round))
        rng = generator(seed, "cg", "adapt", round)
        batch = min(_ADAPTED, len(updates))
        for step in range(codec.options.adapt_steps):
            chosen = [updates[(step * batch + at) % len(updates)] for at in range(batch)]
            trainer.step(chosen, rng, noise)
    tensors = trainer.tensors()
    if not _finite(tensors):
        return state  # values no network can learn from
    return CodecState.of(tensors, state.version + 1)


class Trainer:
    """Networks in training: weights, optimiser, and how a step is made of updates.

    Parameters
    ----------
    codec : AutoEncoderCodec
        Whose networks they are.
    spec : AdapterSpec
        Of the updates.
    tensors : mapping
        State to begin with.
    energy : float
        Of a mean update.
    lr : float
        Learning rate.
    """

    def __init__(
        self,
        codec: AutoEncoderCodec,
        spec: AdapterSpec,
        tensors: Mapping[str, Array],
        energy: float,
        lr: float,
    ) -> None:
        self._codec = codec
        self._layout = codec.layout(spec)
        self._tiles = _tiles(self._layout.shape, codec.design.stride)
        self._lr = lr
        self._root_energy = math.sqrt(energy)
        self._beside = {name: tensors[name] for name in BESIDE if name in tensors}
        self._signs = self._beside.get(SIGNS)
        self._scale = scale_of(tensors)
        own = {name: array for name, array in tensors.items() if name not in BESIDE}
        self._net = with_tensors(codec.design, own).train()
        # fused: one pass over all weights, instead of several over each of a hundred small arrays
        self._adam = torch.optim.Adam(self._net.parameters(), lr, fused=True)

    def begin_statistics(self, update: AdapterUpdate) -> None:
        """Begin with the means and variances of batch normalisation that an update has.

        From torch's 0 and 1 they take epochs to arrive at those of values that are a thousand times
        smaller. Until then little gets through, and of a network that has learned nothing the
        least is the best: such an epoch would be the one that is kept.
        """
        image = _stacked([self._printed_image(update)])
        momenta = [(norm, norm.momentum) for norm in self._norms()]
        for norm, _ in momenta:
            norm.momentum = 1.0
        with torch.no_grad():
            self._net.decoder(self._net.encoder(image))
        for norm, momentum in momenta:
            norm.momentum = momentum

    def hold_statistics(self) -> None:
        """Leave the means and variances of batch normalisation alone from here on."""
        for norm in self._norms():
            norm.eval()

    def epoch(self, train: Updates, epoch: int, seed: int) -> float:
        """One tile of every update; the mean loss of a step.

        Raises
        ------
        CodecStateError
            If weights are no longer finite.
        """
        if not self._codec.options.printed:
            for group in self._adam.param_groups:
                group["lr"] = self._lr / (1 + (epoch - 1) / _SLOWING)
        rng = generator(seed, "cg", "fit", epoch)
        noise = torch.Generator().manual_seed(derive_seed(seed, "cg", "noise", epoch))
        order = random_order(rng, len(train))
        batch = self._codec.options.batch_size
        losses = [
            self.step([train[int(at)] for at in order[start : start + batch]], rng, noise)
            for start in range(0, len(train), batch)
        ]
        if not _finite(self.tensors()):
            raise CodecStateError(
                f"{self._codec.name}: training diverged in epoch {epoch}; set a lower lr"
            )
        return float(np.mean(losses))

    def step(
        self, updates: Sequence[AdapterUpdate], rng: np.random.Generator, noise: torch.Generator
    ) -> float:
        """Learn from one tile, drawn from `rng`, of some updates; the loss before."""
        tile = self._tiles[int.from_bytes(rng.bytes(8), "little") % len(self._tiles)]
        self._adam.zero_grad(set_to_none=True)
        if self._codec.options.printed:
            loss = self._printed_loss(updates, tile)
        else:
            loss = self._fair_loss(updates, tile, noise)
        cast(Any, loss).backward()
        norm = nn.utils.clip_grad_norm_(self._net.parameters(), _LONGEST_STEP)
        if torch.isfinite(norm):
            self._adam.step()
        return float(loss.detach())

    def tensors(self) -> Tensors:
        """The state as it stands, copied."""
        found: Tensors = {
            name: tensor.detach().numpy().copy() for name, tensor in self._net.state_dict().items()
        }
        return found | self._beside

    def memory(self) -> Tensors:
        """Everything needed to go on: the state and the optimiser's moments."""
        found = {f"now.{name}": array for name, array in self.tensors().items()}
        for name, weight in self._net.named_parameters():
            for key, moment in self._adam.state[weight].items():
                found[f"adam.{key}.{name}"] = moment.numpy().copy()
        return found

    def remember(self, memory: Mapping[str, Array]) -> None:
        """Go on with the optimiser's moments that `memory` gave."""
        for name, weight in self._net.named_parameters():
            self._adam.state[weight] = {
                key: torch.from_numpy(np.array(memory[f"adam.{key}.{name}"])) for key in _MOMENTS
            }

    def _norms(self) -> list[nn.BatchNorm1d | nn.BatchNorm2d]:
        kinds = nn.BatchNorm1d | nn.BatchNorm2d
        return [module for module in self._net.modules() if isinstance(module, kinds)]

    def _printed_loss(self, updates: Sequence[AdapterUpdate], tile: Tile) -> Tensor:
        images = _stacked([self._printed_image(update)[tile] for update in updates])
        return functional.mse_loss(self._net.decoder(self._net.encoder(images)), images)

    def _printed_image(self, update: AdapterUpdate) -> Float32Array:
        return self._layout.to_image(update.vector / self._scale)

    def _fair_loss(
        self, updates: Sequence[AdapterUpdate], tile: Tile, noise: torch.Generator
    ) -> Tensor:
        pairs = [self._image_and_weights(update) for update in updates]
        images = _stacked([image[tile] for image, _ in pairs])
        weights = _stacked([weight[tile] for _, weight in pairs])
        step = self._codec.options.step
        latents = [latent / step for latent in self._net.encoder(images)]
        spread = [torch.rand(own.shape, generator=noise) - 0.5 for own in latents]
        bits = self._net.prior.bits([own + by for own, by in zip(latents, spread, strict=True)])
        # rounded on the way forward, passed through on the way back
        rounded = [own + (torch.round(own) - own).detach() for own in latents]
        decoded = self._net.decoder([own * step for own in rounded])
        error = (torch.square(images - decoded) * weights).sum()
        price = self._codec.options.lam * bits / self._layout.spec.size
        # a tile stands for its image
        return (error + price) * (len(self._tiles) / len(updates))

    def _image_and_weights(self, update: AdapterUpdate) -> tuple[Float32Array, Float32Array]:
        """Normalised image, and what its squared errors weigh in a mean update's energy."""
        exponents = scales.exponents_of(update)
        image = self._layout.to_image(scales.normalised(update, exponents), self._signs)
        each = np.square(scales.scales_of(exponents) / self._root_energy).clip(max=_LARGEST_WEIGHT)
        sizes = [factor.size for factor in update.spec]
        return image, self._layout.to_image(np.repeat(each, sizes).astype(np.float32))


def _resumed(
    codec: AutoEncoderCodec, train: Updates, resume: FitProgress, identity: Array, energy: float
) -> Trainer:
    memory = resume.tensors
    if not np.array_equal(memory.get(_IDENTITY, ()), identity):
        raise CodecStateError(
            f"{codec.name}: the fit to go on with is another one: it has other options, another "
            "adapter, other updates or another seed. Start anew, or with what it was started with"
        )
    state = {name[4:]: array for name, array in memory.items() if name.startswith("now.")}
    codec.check_state(CodecState.of(state), train.spec)
    trainer = Trainer(codec, train.spec, state, energy, codec.options.chosen_lr)
    try:
        trainer.remember(memory)
    except KeyError as missing:
        raise CodecStateError(f"{codec.name}: the fit to go on with lacks {missing}") from None
    return trainer


def _price(codec: AutoEncoderCodec, row: Mapping[str, float]) -> float:
    """What an epoch is judged by, as a share of the energy; smaller is better."""
    lost: float = 10 ** (-row["validation_snr_db"] / 10)
    return lost if codec.options.printed else lost + codec.options.lam * row["validation_bpp"]


def _tiles(shape: tuple[int, ...], stride: int) -> list[Tile]:
    """Nearly equal parts of an image that cover it, their sides multiples of the stride."""
    axes = []
    for size in shape:
        sites = size // stride
        parts = -(-sites // _TILE[len(shape)])
        edges = [stride * (sites * part // parts) for part in range(parts + 1)]
        axes.append([slice(*ends) for ends in pairwise(edges)])
    return list(product(*axes))


def _stacked(images: Sequence[Float32Array]) -> Tensor:
    return torch.from_numpy(np.stack(images)[:, None])


def _mean_energy(updates: Updates | Sequence[AdapterUpdate]) -> float:
    total = sum(float(np.square(own.vector, dtype=np.float64).sum()) for own in updates)
    return total / len(updates)


def _spread(updates: Updates, most: int) -> list[AdapterUpdate]:
    """At most so many of them, first and last among them where there is room."""
    count = len(updates)
    if count <= most:
        return list(updates)
    return [updates[at * (count - 1) // (most - 1)] for at in range(most)]


def _normalised(updates: Updates) -> Iterator[Float32Array]:
    for update in _spread(updates, _ALIGNED):
        yield scales.normalised(update, scales.exponents_of(update))


def _identity(codec: AutoEncoderCodec, *told: object) -> Array:
    """Hash of what must be the same for a fit to go on."""
    text = repr((codec.name, codec.version, codec.options.model_dump(), *told))
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), np.uint8)


def _finite(tensors: Mapping[str, Array]) -> bool:
    return all(bool(np.isfinite(array).all()) for array in tensors.values())
