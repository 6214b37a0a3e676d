r"""Compressors of other projects, for the open-loop bench only and only where installed.

::

    update --peer's own format, its quality searched for the rate--> bytes --peer--> update

They are no codecs of the wire: nothing here is sent by a run, none is a dependency, and the bench
leaves them out unless asked. What is counted is all a peer writes; the adapter's shapes, which both
ends know, are not in it where its format can do without.

- ``nncodec``: NNCodec 2, Fraunhofer HHI's implementation of ISO/IEC 15938-17 (DeepCABAC; Becking et
  al., ICML 2023 Neural Compression Workshop). The Clear BSD License: three clauses of BSD and
  "no express or implied licenses to any party's patent rights are granted". That is why it is never
  a dependency here; whoever installs it has to look into patents first. Its package asks for NumPy
  below 2, which this project cannot run with; 2.1.3 works with later ones if installed with
  ``--no-deps`` beside what it imports. (torchvision, which it imports for its model zoo only, must
  be of the torch that is there.)
- ``zfp``: ZFP (Lindstrom, IEEE TVCG 20(12), 2014) through ``zfpy``. BSD 3-Clause, Lawrence
  Livermore National Security.
- ``sz3``: SZ3 (Liang et al., IEEE Trans. Big Data 9(2), 2023) through ``pysz``. UChicago Argonne's
  own BSD text: three clauses, changes to be marked, and an acknowledgement to be printed in
  documentation that comes with redistributed copies. We redistribute none.

ZFP and SZ3 are made for fields that vary smoothly; updates of adapters do not.
"""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import metadata
from typing import Any, ClassVar, Protocol

import numpy as np

from cgfedllm.adapter import AdapterSpec, AdapterUpdate, Float32Array
from cgfedllm.codecs import CodecContext
from cgfedllm.codecs.rate import largest_within
from cgfedllm.errors import CodecError, ConfigError, MissingExtraError

PREFIX = "peer:"
"""What the names of peers begin with in tables."""


class Peer(Protocol):
    """Another project's compressor, as the bench uses it."""

    @property
    def name(self) -> str:
        """As after ``--peer``."""

    def available(self) -> bool:
        """Whether it is installed and can be imported."""

    def encode(self, update: AdapterUpdate, rate: float) -> bytes:
        """All the peer writes for one update, at most `rate` bits per parameter.

        Raises
        ------
        CodecError
            If it needs more.
        MissingExtraError
            If it is not installed.
        """

    def decode(self, blob: bytes, spec: AdapterSpec) -> AdapterUpdate:
        """Inverse of `encode`, for bytes that it wrote itself."""


@dataclass(frozen=True)
class PeerCoder:
    """A peer at one rate, called as a codec is."""

    peer: Peer
    rate: float

    def encode(self, update: AdapterUpdate, context: CodecContext) -> bytes:
        """See `Peer.encode`; the context is not used."""
        return self.peer.encode(update, self.rate)

    def decode(self, blob: bytes, context: CodecContext) -> AdapterUpdate:
        """See `Peer.decode`; of the context only the adapter is used."""
        return self.peer.decode(blob, context.spec)


class _Installed(ABC):
    """What peers that are Python packages share."""

    name: ClassVar[str]
    package: ClassVar[str]
    module: ClassVar[str]
    install: ClassVar[str]

    def available(self) -> bool:
        try:
            self._load()
        except MissingExtraError:
            return False
        return True

    def encode(self, update: AdapterUpdate, rate: float) -> bytes:
        budget = rate * update.spec.size
        blob = self._encode(self._load(), update.vector, budget)
        if 8 * len(blob) > budget:
            raise CodecError(
                f"{PREFIX}{self.name}: needs {8 * len(blob) / update.spec.size:.3g} bits per "
                f"parameter here, {rate:g} are asked for"
            )
        return blob

    def decode(self, blob: bytes, spec: AdapterSpec) -> AdapterUpdate:
        vector = self._decode(self._load(), blob, spec.size)
        return AdapterUpdate(spec, np.ascontiguousarray(vector, np.float32))

    def _load(self) -> Any:
        try:
            return importlib.import_module(self.module)
        except (ImportError, OSError, RuntimeError) as error:
            # RuntimeError is what a torchvision of another torch raises
            raise MissingExtraError(
                f"--peer {self.name} needs {self.package}, which cannot be imported ({error}): "
                f"`{self.install}`, or leave the peer out"
            ) from None

    @abstractmethod
    def _encode(self, library: Any, vector: Float32Array, budget: float) -> bytes:
        """The best within `budget` bits; the least the peer can do where nothing fits."""

    @abstractmethod
    def _decode(self, library: Any, blob: bytes, size: int) -> Float32Array: ...


class NNCodec(_Installed):
    """Trellis-coded quantisation and DeepCABAC, one tensor for the whole update.

    A tensor a factor would cost some 25 bytes of headers each and gains nothing: the contexts adapt
    anyway. Searched are its quantisation parameter (sixteen steps an octave) and a few weights of
    its own rate-distortion optimisation, without which it does badly below two bits; the attempt
    with the least error counts. Its sparsification is left off.
    """

    name = "nncodec"
    package = "nncodec"
    module = "nncodec.nnc"
    # the package's own demands include NumPy 1, and far more than it imports
    install = (
        "pip install torchvision scikit-learn h5py pandas opencv-python-headless && "
        "pip install --no-deps nncodec"
    )
    _DENSITY = 4
    _ROW = 64  # only for its row skipping
    _LAMBDAS = (0.0, 1.0, 2.0, 4.0)

    def _encode(self, library: Any, vector: Float32Array, budget: float) -> bytes:
        scale, largest = _scales(vector)
        octave = 1 << self._DENSITY
        # as qualities: the finest step is this much below the values' scale
        finest = min(12.0, budget / vector.size) + 4 - math.log2(scale)
        coarsest = -2 - math.log2(largest)
        table = {"0": np.pad(vector, (0, -vector.size % self._ROW)).reshape(-1, self._ROW)}
        found: list[bytes] = []
        for weight in self._LAMBDAS:

            def plan(quality: float, weight: float = weight) -> tuple[float, bytes]:
                qp = round(-octave * quality)
                blob = library.compress(
                    table,
                    bitstream_path=None,
                    qp=max(-511, min(511, qp)),
                    qp_density=self._DENSITY,
                    lambda_scale=weight,
                    use_dq=True,
                    row_skipping=True,
                    return_bitstream=True,
                )
                return 8 * len(blob), bytes(blob)

            found.append(largest_within(budget, plan, coarsest, finest, steps=8))
        fitting = [blob for blob in found if 8 * len(blob) <= budget]
        if not fitting:
            return min(found, key=len)
        return min(fitting, key=lambda b: _error(vector, self._decode(library, b, vector.size)))

    def _decode(self, library: Any, blob: bytes, size: int) -> Float32Array:
        values: Float32Array = library.decompress(bytearray(blob))["0"]
        return values.reshape(-1)[:size]


class Zfp(_Installed):
    """Fixed rate in blocks of 4 x 4 x 4 successive values; a block takes 9 bits or more.

    Of one to four dimensions three did best. Asked for less than 9 bits a block, zfpy 1.0.1
    corrupts the heap, so it is never asked.
    """

    name = "zfp"
    package = "zfpy"
    module = "zfpy"
    install = "pip install zfpy"
    _BLOCK = 64
    _LEAST = 9

    def _encode(self, library: Any, vector: Float32Array, budget: float) -> bytes:
        blocks = np.pad(vector, (0, -vector.size % self._BLOCK)).reshape(-1, 4, 4)
        bits = int(budget // (len(blocks) // 4))
        while True:
            bits = max(self._LEAST, bits)
            blob: bytes = library.compress_numpy(blocks, rate=bits / self._BLOCK)
            if 8 * len(blob) <= budget or bits == self._LEAST:
                return blob
            bits -= 1  # its header

    def _decode(self, library: Any, blob: bytes, size: int) -> Float32Array:
        values: Float32Array = library.decompress_numpy(blob)
        return values.reshape(-1)[:size]


class Sz3(_Installed):
    """Uniform quantiser, Huffman codes and Zstandard, without prediction.

    Its absolute error bound is searched. Predicting a value from its neighbours, which is SZ3's
    strength and its default, costs bits here.
    """

    name = "sz3"
    package = "pysz"
    module = "pysz"
    install = "pip install pysz"

    def _encode(self, library: Any, vector: Float32Array, budget: float) -> bytes:
        scale, largest = _scales(vector)

        def plan(quality: float) -> tuple[float, bytes]:
            config = library.szConfig()
            config.errorBoundMode = library.szErrorBoundMode.ABS
            config.cmprAlgo = library.szAlgorithm.NOPRED
            config.absErrorBound = 2.0**-quality
            blob = library.sz.compress(vector, config)[0].tobytes()
            return 8 * len(blob), blob

        return largest_within(budget, plan, -1 - math.log2(largest), 20 - math.log2(scale))

    def _decode(self, library: Any, blob: bytes, size: int) -> Float32Array:
        data = np.frombuffer(blob, np.uint8).copy()
        values: Float32Array = library.sz.decompress(data, np.float32, (size,))[0]
        return values


_PEERS: dict[str, Callable[[], _Installed]] = {p.name: p for p in (NNCodec, Zfp, Sz3)}


def peer_names() -> list[str]:
    """All peers, installed or not."""
    return list(_PEERS)


def make_peer(name: str) -> Peer:
    """Make a peer by its name, with or without the prefix.

    Raises
    ------
    ConfigError
        If there is none of that name.
    """
    return _make(name)


def peer_version(name: str) -> str | None:
    """Version of an installed peer's package, where it tells one.

    Raises
    ------
    ConfigError
        If there is no peer of that name.
    MissingExtraError
        If it cannot be imported.
    """
    peer = _make(name)
    peer._load()
    try:
        return metadata.version(peer.package)
    except metadata.PackageNotFoundError:
        return None


def is_peer(name: str) -> bool:
    """Whether a name in a table is a peer's."""
    return name.startswith(PREFIX)


def _make(name: str) -> _Installed:
    bare = name.removeprefix(PREFIX)
    if bare not in _PEERS:
        near = get_close_matches(bare, _PEERS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(_PEERS)}"
        raise ConfigError(f"no peer is named {bare!r}; {hint}")
    return _PEERS[bare]()


def _scales(vector: Float32Array) -> tuple[float, float]:
    """Root mean square and largest magnitude; 1 for an update of zeros."""
    rms = math.sqrt(float(np.mean(np.square(vector, dtype=np.float64))))
    return (rms, float(np.abs(vector).max())) if rms > 0 else (1.0, 1.0)


def _error(vector: Float32Array, decoded: Float32Array) -> float:
    return float(np.square(vector.astype(np.float64) - decoded).sum())
