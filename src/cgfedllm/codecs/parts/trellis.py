r"""Vectors at less than one bit an entry: the nearest codeword of a convolutional code.

::

    bits b_0 b_1 b_2 ... --shift register, 7 long--> k parities each --> +1 / -1, k n' = n entries

One bit decides k signs through the code's memory, so a scalar quantiser's loss at low rates
(a third of the bits) is mostly won back: trellis source coding, Viterbi and Omura, IEEE Trans. IT
20(3), 1974; as a quantiser, Marcellin and Fischer, IEEE Trans. Communications 38(1), 1990. The
codeword with the largest inner product is found by the Viterbi algorithm, in integers, so it is
the same on every machine. Every sequence of bits is a codeword: nothing can fail to decode.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cgfedllm.adapter import Float32Array
from cgfedllm.codecs.entropy import SymbolReader, SymbolWriter

Int8Array = NDArray[np.int8]
Uint8Array = NDArray[np.uint8]

_MEMORY = 6
_STATES = 1 << _MEMORY
# taps of the k parities, found by a random search for the largest mean inner product with
# Gaussian vectors; one tap a parity would be the sign quantiser
GENERATORS: dict[int, tuple[int, ...]] = {
    1: (1,),
    2: (0o161, 0o133),
    3: (0o145, 0o133, 0o171),
    4: (0o121, 0o145, 0o167, 0o135),
    6: (0o173, 0o101, 0o127, 0o117, 0o115, 0o145),
    8: (0o133, 0o103, 0o125, 0o173, 0o117, 0o161, 0o145, 0o111),
}
"""Parities of the code that spends 1/k bit an entry, by k."""
# entries are integers of this many bits while searching: sums stay exact in float32
_ENTRY_BITS = 10
_RENORMALISE = 64
# other states than 0 cannot be the first
_UNREACHABLE = -float(1 << 21)
_AT_ONCE = 1 << 22


def encode(vectors: Float32Array, k: int) -> Uint8Array:
    """Bits of the codewords nearest in direction.

    Parameters
    ----------
    vectors : ndarray, shape (count, n)
        Finite values; each vector's own scale does not matter.
    k : int
        Entries a bit, a key of `GENERATORS`.

    Returns
    -------
    ndarray, shape (count, ceil(n / k))
        0 or 1.
    """
    if k == 1:
        return (vectors < 0).astype(np.uint8)
    count, n = vectors.shape
    steps = -(-n // k)
    part = max(1, _AT_ONCE // (steps * _STATES // 8))
    return np.concatenate(
        [_search(vectors[at : at + part], k, steps) for at in range(0, count, part)]
    )


def decode(bits: Uint8Array, k: int, n: int) -> Int8Array:
    """Codewords of +1 and -1, shape (count, n), of bits of shape (count, ceil(n / k))."""
    count, steps = bits.shape
    padded = np.zeros((count, steps + _MEMORY), np.uint8)
    padded[:, _MEMORY:] = bits
    words = np.zeros((count, steps, k), np.int8)
    for at, taps in enumerate(GENERATORS[k]):
        parity = np.zeros((count, steps), np.uint8)
        for delay in range(_MEMORY + 1):
            if taps >> delay & 1:
                parity ^= padded[:, _MEMORY - delay : _MEMORY - delay + steps]
        words[:, :, at] = 1 - 2 * parity.astype(np.int8)
    return words.reshape(count, -1)[:, :n]


def write_bits(writer: SymbolWriter, bits: Uint8Array) -> None:
    """Write an array of bits, eight a symbol."""
    writer.uniform(np.packbits(bits.reshape(-1)), 256)


def read_bits(reader: SymbolReader, count: int, steps: int) -> Uint8Array:
    """Read bits, shape (count, steps)."""
    size = count * steps
    packed = reader.uniform(256, -(-size // 8)).astype(np.uint8)
    return np.unpackbits(packed, count=size).reshape(count, steps)


def _search(vectors: Float32Array, k: int, steps: int) -> Uint8Array:
    """Viterbi algorithm over all vectors at once.

    A register of 7 bits is (state << 1 | bit); the new state is its lower 6 bits, so state s is
    reached from registers s and s + 64, that is from states s >> 1 and (s >> 1) + 32.
    """
    count, n = vectors.shape
    flat = np.zeros((steps * k, count), np.float32)
    largest = np.maximum(np.abs(vectors).max(axis=1, keepdims=True), np.finfo(np.float32).tiny)
    flat[:n] = np.rint(vectors / largest * np.float32(1 << _ENTRY_BITS)).T
    entries = flat.reshape(steps, k, count)
    signs = _signs(k)
    metric = np.full((_STATES, count), _UNREACHABLE, np.float32)
    metric[0] = 0
    upper = np.empty((steps, _STATES, count), bool)
    for step in range(steps):
        # integers below 2^24 throughout: exact in whatever order the product is summed
        branch = (signs @ entries[step]).reshape(2, _STATES // 2, 2, count)
        branch += metric.reshape(2, _STATES // 2, 1, count)
        low, high = branch.reshape(2, _STATES, count)
        np.greater(high, low, out=upper[step])
        np.maximum(low, high, out=metric)
        if step % _RENORMALISE == 0:
            metric -= metric.max(axis=0)
    state = metric.argmax(axis=0)
    bits = np.empty((steps, count), np.uint8)
    each = np.arange(count)
    for step in range(steps - 1, -1, -1):
        bits[step] = state & 1
        state = (state + _STATES * upper[step, state, each]) >> 1
    return np.ascontiguousarray(bits.T)


def _signs(k: int) -> NDArray[Any]:
    """Signs that each register sends, shape (2 * states, k)."""
    registers = np.arange(2 * _STATES)[:, None] & np.array(GENERATORS[k])
    parity = np.zeros(registers.shape, np.int64)
    for shift in range(_MEMORY + 1):
        parity ^= registers >> shift & 1
    return (1 - 2 * parity).astype(np.float32)
