"""Which of an app's arrays are coded, which are sent exactly, and how they become one vector.

::

    matrices of floats          --change, float32--> one AdapterUpdate --codec--> packet
    everything else             --bytes, exactly--------------------------------> beside it
      vectors (biases, norms), integers, truth values, complex numbers, tiny arrays

Both ends decide this alike, from what the server sent (which both hold) and the types of what
comes back. Nothing depends on the values a client has trained.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord
from numpy.typing import NDArray

from cgfedllm.adapter import AdapterSpec, AdapterUpdate, Factor, Float32Array
from cgfedllm.errors import AdapterError, CodecError, PacketError

AnyArray = NDArray[Any]

DTYPES = tuple(
    np.dtype(name)
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    )
)
"""Types of arrays that can travel, in the order of their codes on the wire."""
_CODED = ("float16", "float32", "float64")
# below it a matrix costs at most a kilobyte as float32, and a codec has nothing to work with
_TINY = 256


def read_arrays(record: ArrayRecord) -> dict[str, AnyArray]:
    """The arrays of a record, in its order, as numpy arrays in this machine's byte order.

    Raises
    ------
    AdapterError
        If one is not a numpy array, or is of a type that is not in `DTYPES`.
    """
    arrays = {}
    for name, array in record.items():
        if array.stype != "numpy.ndarray":
            raise AdapterError(
                f"array {name!r} is serialised as {array.stype!r}; cgfedllm.flower codes numpy "
                "arrays (Flower makes them of numpy and torch arrays)"
            )
        values = array.numpy()
        native = values.dtype.newbyteorder("=")
        if native not in DTYPES:
            raise AdapterError(
                f"array {name!r} holds {values.dtype}; cgfedllm.flower sends numbers and truth "
                "values only, of the types " + ", ".join(str(dtype) for dtype in DTYPES)
            )
        arrays[name] = values.astype(native, copy=False)
    return arrays


def checksum(record: ArrayRecord) -> int:
    """CRC-32 over names and bytes of all arrays, by which two ends know that they hold the same."""
    crc = 0
    for name in sorted(record):
        crc = zlib.crc32(record[name].data, zlib.crc32(name.encode(), crc))
    return crc


def check_alike(held: Mapping[str, AnyArray], trained: Mapping[str, AnyArray]) -> None:
    """Verify that a reply has the arrays that were sent, in any order.

    Raises
    ------
    AdapterError
        If one is missing, new, of another shape, or of a type it may not have.
    """
    odd = sorted(set(held) ^ set(trained))
    if odd:
        what = "misses" if odd[0] in held else "has a new"
        raise AdapterError(
            f"the reply {what} array {odd[0]!r}: cgfedllm.flower codes changes, so a client must "
            "reply with the arrays it was sent"
        )
    for name, array in held.items():
        if trained[name].shape != array.shape:
            raise AdapterError(
                f"array {name!r} was sent with shape {array.shape} and came back with "
                f"{trained[name].shape}; cgfedllm.flower codes changes, so shapes must stay"
            )
        if not may_become(array.dtype, trained[name].dtype):
            raise AdapterError(
                f"array {name!r} was sent as {array.dtype} and came back as {trained[name].dtype}; "
                "convert it before replying"
            )


def may_become(sent: np.dtype[Any], returned: np.dtype[Any]) -> bool:
    """Whether an array may come back in another type than it was sent in.

    Averages of integers are float64, and integers come back. Integers for other floats, or complex
    numbers for real ones, would stop strategies that add up in place, and with them the round.
    """
    if "c" in (sent.kind, returned.kind):
        return sent.kind == returned.kind
    return returned.kind == "f" or sent.kind != "f" or sent == np.float64


class Layout:
    """How one reply travels.

    Parameters
    ----------
    held : mapping of ndarray
        What the server sent, in order.
    dtypes : mapping of dtype
        Of what comes back. They may differ: an average of integers is a float.
    """

    def __init__(self, held: Mapping[str, AnyArray], dtypes: Mapping[str, np.dtype[Any]]) -> None:
        self._held = held
        self.dtypes = dtypes
        coded = {n: a.shape for n, a in held.items() if _is_coded(n, a, dtypes[n])}
        self.exact = [name for name in held if name not in coded]
        """Names of the arrays that are sent exactly."""
        self.spec = AdapterSpec.from_shapes(coded) if coded else None
        """The coded arrays; None if there are none."""

    @property
    def exact_size(self) -> int:
        """Bytes of the arrays that are sent exactly."""
        return sum(self._held[name].size * self.dtypes[name].itemsize for name in self.exact)

    @property
    def size(self) -> int:
        """Bytes of all arrays."""
        return sum(self._held[name].size * dtype.itemsize for name, dtype in self.dtypes.items())

    def start(self, spec: AdapterSpec) -> Float32Array:
        """What the coded arrays are a change of, shape (spec.size,)."""
        return AdapterUpdate.from_arrays(spec, {f.name: self._held[f.name] for f in spec}).vector

    def change(self, spec: AdapterSpec, trained: Mapping[str, AnyArray]) -> AdapterUpdate:
        """How the coded arrays have changed; not finite where they are not."""
        vector = np.empty(spec.size, np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            for name, where in spec.slices.items():
                wide = _wide(trained[name], self._held[name])
                change = np.subtract(trained[name], self._held[name], dtype=wide)
                vector[where] = change.reshape(-1)
        return AdapterUpdate(spec, vector)

    def changed(self, update: AdapterUpdate) -> dict[str, AnyArray]:
        """The coded arrays after a change, in the types they have in the reply.

        Raises
        ------
        PacketError
            If a value is too large for its type.
        """
        arrays = {}
        for name, change in update.views().items():
            held = self._held[name]
            with np.errstate(over="ignore"):
                after = np.add(held, change, dtype=_wide(held, change)).astype(self.dtypes[name])
            if not np.isfinite(after).all():
                raise PacketError(f"array {name!r} would change to more than {after.dtype} holds")
            arrays[name] = after
        return arrays

    def exact_bytes(self, trained: Mapping[str, AnyArray]) -> bytes:
        """The arrays that are sent exactly, as bytes that compress where they have not changed.

        An array's bytes are XORed with those of the same array as it was sent, if it has the same
        type, and sorted by their place in a number.

        Raises
        ------
        CodecError
            If a value is not finite where the one that was sent is.
        """
        for name in self.exact:
            if not _finite_as(self._held[name], trained[name]):
                raise CodecError(
                    f"array {name!r} holds NaN or infinity after training; lower the learning rate "
                    "or clip gradients"
                )
        return b"".join(
            _planes(self._with_held(name, _bytes(trained[name]))) for name in self.exact
        )

    def read_exact(self, content: bytes) -> dict[str, AnyArray]:
        """Inverse of `exact_bytes`.

        Parameters
        ----------
        content : bytes
            As many as `exact_size`.

        Raises
        ------
        PacketError
            If a value is not finite where the one that was sent is, or no truth value.
        """
        arrays, start = {}, 0
        for name in self.exact:
            shape, dtype = self._held[name].shape, self.dtypes[name]
            end = start + self._held[name].size * dtype.itemsize
            planes = np.frombuffer(content[start:end], np.uint8).reshape(dtype.itemsize, -1)
            raw = self._with_held(name, np.ascontiguousarray(planes.T))
            if dtype == np.bool_ and (raw > 1).any():
                raise PacketError(f"array {name!r} holds truth values other than 0 and 1")
            values = raw.reshape(-1).view(dtype.newbyteorder("<")).astype(dtype, copy=False)
            arrays[name] = values.reshape(shape)
            if not _finite_as(self._held[name], arrays[name]):
                raise PacketError(f"array {name!r} holds NaN or infinity")
            start = end
        return arrays

    def _with_held(self, name: str, raw: NDArray[np.uint8]) -> NDArray[np.uint8]:
        same = self._held[name].dtype == self.dtypes[name]
        return raw ^ _bytes(self._held[name]) if same else raw


def _is_coded(name: str, held: AnyArray, dtype: np.dtype[Any]) -> bool:
    if held.dtype.name not in _CODED or dtype.name not in _CODED:
        return False
    is_factor = bool(Factor.parse(name, held.shape).kind) and held.size > 0
    is_matrix = sum(length > 1 for length in held.shape) > 1 and held.size >= _TINY
    # masks, for example, hold infinity: there is no change to it that could be coded
    return (is_factor or is_matrix) and bool(np.abs(held).max() <= np.finfo(np.float32).max)


def _wide(*arrays: AnyArray) -> np.dtype[Any]:
    """In which type to add and subtract: that of the widest, float32 at least."""
    return np.result_type(np.float32, *arrays)


def _finite_as(held: AnyArray, values: AnyArray) -> bool:
    return bool(np.all(np.isfinite(values) | ~np.isfinite(held)))


def _bytes(array: AnyArray) -> NDArray[np.uint8]:
    """The bytes of an array, little endian, a row a value."""
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return little.reshape(-1).view(np.uint8).reshape(-1, array.dtype.itemsize)


def _planes(rows: NDArray[np.uint8]) -> bytes:
    return np.ascontiguousarray(rows.T).tobytes()
