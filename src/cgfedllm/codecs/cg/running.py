"""Networks at work: weights in, latents and values out. Imported only where one runs.

On one thread, so that a packet does not depend on how many there are. Processors with other vector
units sum in another order, so values may differ in their last bits from one type to another.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray

from cgfedllm.adapter import Float32Array
from cgfedllm.codecs.cg.design import Design
from cgfedllm.codecs.cg.nets import AutoEncoder, with_tensors

_KEPT = 8
# of what networks make: far above any normalised value, and its square is still a float32
_LARGEST = 1e18


class Network:
    """Encoder and decoder with fixed weights, for one image at a time.

    Parameters
    ----------
    design : Design
        Sizes.
    tensors : mapping
        Weights and statistics, by name.
    """

    def __init__(self, design: Design, tensors: Mapping[str, NDArray[np.float32]]) -> None:
        self._net: AutoEncoder = with_tensors(design, tensors).eval()

    def encode(self, image: Float32Array) -> list[Float32Array]:
        """Latents of an image, channels first; they may be infinite or NaN."""
        with inference():
            latents = self._net.encoder(torch.from_numpy(image[None, None]))
            return [latent[0].numpy().copy() for latent in latents]

    def decode(self, latents: Sequence[Float32Array]) -> Float32Array:
        """The image that latents stand for, kept finite."""
        with inference():
            image = self._net.decoder([torch.from_numpy(latent[None]) for latent in latents])
            values: Float32Array = image[0, 0].numpy().copy()
        np.nan_to_num(values, copy=False, nan=0.0, posinf=_LARGEST, neginf=-_LARGEST)
        return np.clip(values, -_LARGEST, _LARGEST, out=values)


_networks: OrderedDict[tuple[Design, bytes], Network] = OrderedDict()
_lock = Lock()


def network(
    design: Design, state_hash: bytes, tensors: Callable[[], Mapping[str, NDArray[np.float32]]]
) -> Network:
    """The network of a state; the last few are kept, others made of what `tensors` gives."""
    key = design, state_hash
    with _lock:
        found = _networks.pop(key, None)
        if found is None:
            found = Network(design, tensors())
        _networks[key] = found
        while len(_networks) > _KEPT:
            _networks.popitem(last=False)
        return found


@contextmanager
def inference() -> Iterator[None]:
    """No gradients, one thread."""
    with one_thread(), torch.inference_mode():
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch inside, what there was outside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
