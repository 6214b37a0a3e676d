r"""What travels: the ordered list of LoRA factors (`AdapterSpec`) and one vector of their values.

::

    AdapterSpec   = (Factor, Factor, ...)            names, layers, shapes, order
    AdapterUpdate = AdapterSpec + one flat float32   [A_0 | B_0 | A_1 | B_1 | ...]
                                     \__ views() gives each factor back in its shape, no copy
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cgfedllm.errors import AdapterError

Float32Array = NDArray[np.float32]

_LORA_NAME = re.compile(r"^(?P<path>.+)\.lora_(?P<factor>[AB])(?:\.[^.]+)?\.weight$")
# of names read from files: far beyond any model's, and short for a regular expression
_LONGEST_NAME = 1000
_LAYER = re.compile(r"(?:^|\.)(\d+)\.(?P<module>.+)$")


@dataclass(frozen=True)
class Factor:
    """One array of an adapter.

    Parameters
    ----------
    name : str
        Parameter name as PEFT saves it, e.g.
        ``base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight``.
    shape : tuple of int
        ``(r, in)`` for a LoRA A, ``(out, r)`` for a LoRA B; anything for other arrays.
    layer : int or None
        Index of the transformer block, None outside of blocks.
    module : str
        Path inside the block, e.g. ``self_attn.q_proj``.
    kind : str
        ``"A"``, ``"B"``, or ``""`` for an array that is not a LoRA factor.
    """

    name: str
    shape: tuple[int, ...]
    layer: int | None
    module: str
    kind: str

    @classmethod
    def parse(cls, name: str, shape: Iterable[int]) -> Factor:
        """Read layer, module and kind out of a parameter name."""
        match = _LORA_NAME.match(name)
        path, kind = (match["path"], match["factor"]) if match else (name, "")
        located = _LAYER.search(path)
        layer = int(located[1]) if located else None
        module = located["module"] if located else path
        return cls(name, tuple(int(n) for n in shape), layer, module, kind)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def factor_kind(factor: Factor) -> str:
    """Module and factor without the layer, e.g. ``q_proj.A``."""
    module = factor.module.rsplit(".", 1)[-1]
    return f"{module}.{factor.kind}" if factor.kind else module


def _factor_from_json(item: object) -> Factor:
    match item:
        case [str(name), list(shape)] if len(name) <= _LONGEST_NAME and all(
            type(n) is int for n in shape
        ):
            return Factor.parse(name, shape)
    raise ValueError(f"this is not one: {item!r}"[:200])


@dataclass(frozen=True)
class AdapterSpec:
    """The ordered, named factors of an adapter: the one thing both ends must agree on.

    Raises
    ------
    AdapterError
        If there are no factors, a name repeats, or a factor is empty or has a negative size.
    """

    factors: tuple[Factor, ...]

    def __post_init__(self) -> None:
        names = [factor.name for factor in self.factors]
        if not names:
            raise AdapterError("an adapter needs at least one factor; none were given")
        if len(set(names)) != len(names):
            twice = sorted({n for n in names if names.count(n) > 1})
            raise AdapterError(f"adapter factors must have distinct names; repeated: {twice}")
        empty = [factor.name for factor in self.factors if any(n < 1 for n in factor.shape)]
        if empty:
            raise AdapterError(f"adapter factors must not be empty; empty: {empty}")

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Iterable[int]]) -> AdapterSpec:
        """Build a spec from ``{parameter name: shape}``, in the mapping's order."""
        return cls(tuple(Factor.parse(name, shape) for name, shape in shapes.items()))

    @classmethod
    def from_json(cls, text: str) -> AdapterSpec:
        """Inverse of `to_json`.

        Raises
        ------
        AdapterError
            If the text is not a list of ``[name, shape]`` pairs, or they make no spec.
        """
        try:
            factors = tuple(_factor_from_json(item) for item in json.loads(text))
        except (ValueError, TypeError, RecursionError) as error:
            raise AdapterError(
                f"not an adapter spec: a JSON list of [name, shape] pairs is needed ({error})"
            ) from None
        return cls(factors)

    def to_json(self) -> str:
        """Canonical text: a list of ``[name, shape]`` pairs."""
        return json.dumps([[f.name, list(f.shape)] for f in self.factors], separators=(",", ":"))

    def __len__(self) -> int:
        return len(self.factors)

    def __iter__(self) -> Iterator[Factor]:
        return iter(self.factors)

    @cached_property
    def size(self) -> int:
        """Number of elements over all factors."""
        return sum(factor.size for factor in self.factors)

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Where each factor lies in the flat vector."""
        slices: dict[str, slice] = {}
        start = 0
        for factor in self.factors:
            slices[factor.name] = slice(start, start + factor.size)
            start += factor.size
        return slices

    @cached_property
    def hash(self) -> bytes:
        """First 8 bytes of the SHA-256 of `to_json`; goes into every packet."""
        return hashlib.sha256(self.to_json().encode()).digest()[:8]

    def pairs(self) -> list[tuple[Factor, Factor]]:
        """The ``(A, B)`` pairs that multiply into one weight change, in order."""
        by_stem: dict[str, dict[str, Factor]] = {}
        for factor in self.factors:
            if factor.kind:
                stem = factor.name.rsplit(f".lora_{factor.kind}", 1)[0]
                by_stem.setdefault(stem, {})[factor.kind] = factor
        return [(pair["A"], pair["B"]) for pair in by_stem.values() if len(pair) == 2]


@dataclass(frozen=True, eq=False)
class AdapterUpdate:
    """Values for every factor of a spec, as one flat float32 vector.

    Parameters
    ----------
    spec : AdapterSpec
        Names, order and shapes.
    vector : ndarray, shape (spec.size,), float32
        Concatenated factors, C order.

    Raises
    ------
    AdapterError
        If dtype or size do not fit the spec.
    """

    spec: AdapterSpec
    vector: Float32Array

    def __post_init__(self) -> None:
        if self.vector.dtype != np.float32 or self.vector.shape != (self.spec.size,):
            raise AdapterError(
                f"an update of this adapter is {self.spec.size} float32 numbers; "
                f"got shape {self.vector.shape}, dtype {self.vector.dtype}"
            )

    @classmethod
    def zeros(cls, spec: AdapterSpec) -> AdapterUpdate:
        """The update that changes nothing."""
        return cls(spec, np.zeros(spec.size, np.float32))

    @classmethod
    def from_arrays(
        cls, spec: AdapterSpec, arrays: Mapping[str, NDArray[np.generic]]
    ) -> AdapterUpdate:
        """Gather named arrays into one vector.

        Raises
        ------
        AdapterError
            If a factor is missing, unknown, or of another shape.
        """
        missing = [f.name for f in spec if f.name not in arrays]
        unknown = [name for name in arrays if name not in spec.slices]
        if missing or unknown:
            raise AdapterError(
                f"arrays do not match the adapter: missing {missing[:3]}, unknown {unknown[:3]}"
            )
        vector = np.empty(spec.size, np.float32)
        for factor in spec:
            array = np.asarray(arrays[factor.name])
            if array.shape != factor.shape:
                raise AdapterError(
                    f"{factor.name} has shape {array.shape}, the adapter needs {factor.shape}"
                )
            vector[spec.slices[factor.name]] = array.reshape(-1)
        return cls(spec, vector)

    def views(self) -> dict[str, Float32Array]:
        """Each factor in its own shape; the arrays share memory with `vector`."""
        return {f.name: self.vector[self.spec.slices[f.name]].reshape(f.shape) for f in self.spec}

    def __add__(self, other: AdapterUpdate) -> AdapterUpdate:
        return AdapterUpdate(self.spec, self.vector + self._matching(other))

    def __sub__(self, other: AdapterUpdate) -> AdapterUpdate:
        return AdapterUpdate(self.spec, self.vector - self._matching(other))

    def scaled(self, factor: float) -> AdapterUpdate:
        """Every value times `factor`."""
        return AdapterUpdate(self.spec, self.vector * np.float32(factor))

    def norm(self) -> float:
        """Euclidean norm over all values (summed in float64)."""
        return float(np.sqrt(np.square(self.vector, dtype=np.float64).sum()))

    def is_finite(self) -> bool:
        """Whether no value is NaN or infinite."""
        return bool(np.isfinite(self.vector).all())

    def _matching(self, other: AdapterUpdate) -> Float32Array:
        if other.spec is not self.spec and other.spec.hash != self.spec.hash:
            raise AdapterError("updates of two different adapters cannot be combined")
        return other.vector
