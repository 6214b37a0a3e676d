r"""Along which axes an adapter will change: from where it stands, and from what a state knows.

::

    G = A Sigma A' for changes of B,  B' B for changes of A    what the other factor makes of it
    W = V diag(g)^(1/4)                                            G = V diag(g) V'
    rank axis: F = Q' W',  Q the eigenvectors of W' (X X') W       X the factor as it stands
    long axis: what the state knows (`directions`), where the adapter has grown (`grown`)
    layers:    E_j, the eigenvectors of the rows F_j X of all layers times each other

*What counts.* The model sees B A. A change dA moves its outputs by ``B dA x``, a change dB by
``dB A x``: by the root of G along the rank, and of the inputs' second moments Sigma along the long
axis of A. Squared errors are weighted by that root: a change lowers the loss by its product with
the gradient, in which the root is a factor. Optimisers that normalise their steps leave no trace of
it in the update itself.

*Where it lies.* A change of B is a sum over tokens of the error at the output times A's input.
Inputs have a large mean, so most of it lies along one direction of the rank axis, which B has grown
along already; and errors at the residual stream are alike in all layers, so rows of layers are
alike as well. Both ends hold the adapter: these directions cost no bytes, and move as it does.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from threading import Lock
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cgfedllm.adapter import Factor, Float32Array
from cgfedllm.codecs.base import CodecContext
from cgfedllm.codecs.entropy import Float64Array
from cgfedllm.codecs.learned.directions import Directions, read_directions, weighted_grams
from cgfedllm.codecs.learned.grown import grown_directions
from cgfedllm.codecs.learned.kinds import Axes, Kind, Known
from cgfedllm.codecs.parts.exact import gram, times, transposed
from cgfedllm.codecs.parts.jacobi import eigenvectors
from cgfedllm.codecs.parts.rows import row_count, to_rows

Metric = Literal["effect", "parameters"]

CLASSES = 16
"""Classes of foretold energy of rows, an octave each; A and B have their own."""
KNOWN_CLASSES = 5
"""The same of coefficients of known directions, three octaves each; the state's and those where the
adapter has grown have their own."""

_KNOWN_WIDTH = 3
# what no direction's weight falls below, as a share of the mean weight of changes of B
_FLOOR = 2.0**-10
# before B has grown, its directions along the rank are those of A's outputs
_UNGROWN = 2.0**-10
# a round's updates all have the same axes
_KEPT = 2
_kept: OrderedDict[tuple[bytes, ...], Axes] = OrderedDict()
_lock = Lock()


def axes_of(context: CodecContext, metric: Metric, *, alone: bool = False) -> Axes:
    """The axes around the adapter of a context; without one, arrays as they are.

    Parameters
    ----------
    context : CodecContext
        Spec, state, and the adapter with the one that the run began with.
    metric : str
        What errors are weighted by.
    alone : bool
        For coefficients of the state's directions and nothing else: what only serves what is left
        beside them is not looked for.
    """
    start, state = context.start, context.state
    vectors = () if start is None else (start.adapter, start.origin)
    digests = [b"" if v is None else blake2b(v.tobytes(), digest_size=16).digest() for v in vectors]
    key = context.spec.hash, state.hash, metric.encode(), bytes([alone]), *digests
    with _lock:
        if key not in _kept:
            _kept[key] = _Finder(context, metric, alone).axes()
            while len(_kept) > _KEPT:
                _kept.popitem(last=False)
        _kept.move_to_end(key)
        return _kept[key]


class _Finder:
    """Finds the axes of every kind."""

    def __init__(self, context: CodecContext, metric: Metric, alone: bool) -> None:
        self._spec = context.spec
        self._alone = alone
        self._start = None if context.start is None else context.start.adapter
        self._origin = None if context.start is None or alone else context.start.origin
        self._metric = metric
        self._known: Mapping[str, Directions] = {}
        if context.state.tensors:
            known = read_directions(context.spec, context.state.tensors)
            if any(own.whole.any() for own in known.values()):
                self._known = known
        self._grams: dict[str, Float64Array] = {}
        self._partner: dict[str, Factor] = {}
        for a, b in context.spec.pairs():
            # a convolution's B has its rank along its second axis: left as it is
            if len(a.shape) == len(b.shape) == 2:
                self._partner[a.name], self._partner[b.name] = b, a

    def axes(self) -> Axes:
        """All of them."""
        groups: dict[tuple[str, str, tuple[int, ...]], list[Factor]] = {}
        for factor in self._spec:
            groups.setdefault((factor.module, factor.kind, factor.shape), []).append(factor)
        for own in groups.values():
            self._add_grams([factor for factor in own if factor.name in self._partner])
        floor = self._floor()
        found = [self._kind(tuple(own), floor) for own in groups.values()]
        return Axes(self._spec, _classified(found))

    def _kind(self, group: tuple[Factor, ...], floor: float) -> tuple[Kind, Float64Array | None]:
        """A kind, and the energies foretold of its rows."""
        count = row_count(group[0]) * len(group)
        plain = Kind(group, np.zeros(count, np.int64))
        if self._start is None or not all(factor.name in self._partner for factor in group):
            return plain, None
        is_b = group[0].kind == "B"
        own = np.stack([self._rows(factor, self._start) for factor in group]).astype(np.float64)
        own_gram = np.stack([gram(rows) for rows in own])
        other_gram = np.stack([self._grams[self._partner[factor.name].name] for factor in group])
        if self._metric == "effect":
            strengths, basis = eigenvectors(other_gram + floor * np.eye(own.shape[1]))
            scales = np.sqrt(np.sqrt(np.maximum(strengths, floor)))
            weighted = basis * scales[:, None, :]
            spread = own_gram + _UNGROWN * other_gram if is_b else own_gram
            spread = times(times(transposed(weighted), spread), weighted)
            values, turn = eigenvectors(spread)
            forward = times(transposed(turn), transposed(weighted))
            backward = times(basis / scales[:, None, :], turn)
        else:
            values, backward = eigenvectors(own_gram if is_b else other_gram)
            forward = transposed(backward)
        known = self._along(group, forward, values)
        layers = foretold = None
        if is_b and not self._alone:
            rows = times(forward, own).swapaxes(0, 1)
            foretold, over = eigenvectors(np.stack([gram(row) for row in rows]))
            layers = over.astype(np.float32)
        elif not self._alone:
            # A is as it was drawn, for the most part: nothing that layers share
            foretold = values.T.copy()
            if known is not None:
                foretold *= known.rest.astype(np.float64) ** 2
        kind = Kind(
            group,
            plain.classes,
            forward.astype(np.float32),
            backward.astype(np.float32),
            known,
            layers,
        )
        return kind, foretold

    def _along(
        self, group: Sequence[Factor], forward: Float64Array, values: Float64Array
    ) -> Known | None:
        """Known directions of a kind.

        Parameters
        ----------
        group : sequence of Factor
            Layer by layer.
        forward : ndarray, shape (layers, r, r)
            Along the rank.
        values : ndarray, shape (layers, r)
            Energies foretold of rows.
        """
        rest = np.ones(len(group))
        parts = []
        if self._known:
            own = [self._known[factor.name] for factor in group]
            weights = np.ones((len(own), own[0].weights.size))
            if self._metric == "effect":
                weights = np.sqrt(np.stack([each.weights for each in own]))
            shares = np.stack([each.energies for each in own])[:, :-1]
            rest, weights = weights[:, -1], weights[:, :-1]
            parts.append((np.stack([each.vectors for each in own]), shares, weights))
        if self._origin is not None:
            beside, along = self._grown(group)
            vectors, shares = grown_directions(times(forward, beside), times(forward, along))
            if vectors.any():
                weights = np.broadcast_to(rest[:, None], shares.shape)
                parts.append((vectors, shares, weights))
        if not parts:
            return None
        foretold, classes = [], []
        for at, (_, shares, weights) in enumerate(parts):
            energies = values.T[:, :, None] * (shares * weights)
            foretold.append(energies / (max(float(energies.max()), 0.0) or 1.0))
            own_classes = (_octaves(foretold[-1]) // _KNOWN_WIDTH).clip(0, KNOWN_CLASSES - 1)
            classes.append(own_classes + at * KNOWN_CLASSES)
        return Known(
            np.concatenate([vectors for vectors, _, _ in parts], axis=1),
            np.sqrt(np.concatenate([weights for _, _, weights in parts], axis=1)).astype(
                np.float32
            ),
            np.sqrt(rest).astype(np.float32),
            np.concatenate(foretold, axis=2),
            np.concatenate(classes, axis=2),
        )

    def _grown(self, group: Sequence[Factor]) -> tuple[Float64Array, Float64Array]:
        """How factors have grown since the run began: beside the state's directions, and along."""
        assert self._start is not None
        assert self._origin is not None
        beside, along = [], []
        for factor in group:
            rows = self._rows(factor, self._start) - self._rows(factor, self._origin)
            left, products = rows.astype(np.float64), np.zeros((len(rows), 0))
            if factor.name in self._known:
                known = self._known[factor.name]
                products = np.zeros((len(rows), len(known.whole)))
                # twice: directions are not quite orthogonal, and what one pass leaves along them
                # would count as a direction of its own, next to the one it is
                for _ in range(2):
                    more = known.along(left)
                    products += more
                    left -= known.across(more)
            beside.append(left)
            along.append(products)
        return np.stack(beside), np.stack(along)

    def _rows(self, factor: Factor, vector: Float32Array) -> Float32Array:
        return to_rows(vector[self._spec.slices[factor.name]], factor)

    def _add_grams(self, group: Sequence[Factor]) -> None:
        """Rows times rows of factors of one shape, weighted by what is known of the long axis."""
        if self._start is None or not group:
            return
        rows = [self._rows(factor, self._start) for factor in group]
        known = [self._known[factor.name] for factor in group] if self._known else []
        grams = weighted_grams(rows, known) if known else np.stack([gram(own) for own in rows])
        self._grams.update(zip((factor.name for factor in group), grams, strict=True))

    def _floor(self) -> float:
        if self._start is None:
            return 0.0
        grams = [self._grams[a.name] for a, _ in self._spec.pairs() if a.name in self._partner]
        # a sum that does not depend on the order
        weights = [math.fsum(np.diagonal(own)) / len(own) for own in grams]
        return (max([*weights, 0.0]) or 1.0) * _FLOOR


def _classified(found: Sequence[tuple[Kind, Float64Array | None]]) -> tuple[Kind, ...]:
    """Kinds with the classes of their energies: octaves below the largest of all A or all B."""
    largest = {"A": 0.0, "B": 0.0}
    for kind, foretold in found:
        if foretold is not None:
            letter = kind.factors[0].kind
            largest[letter] = max(largest[letter], float(foretold.max()))
    kinds = []
    for kind, foretold in found:
        if foretold is not None:
            letter = kind.factors[0].kind
            shares = foretold.reshape(-1) / (largest[letter] or 1.0)
            classes = _octaves(shares).clip(0, CLASSES - 1)
            kind = replace(kind, classes=classes + (CLASSES if letter == "A" else 0))
        kinds.append(kind)
    return tuple(kinds)


def _octaves(shares: Float64Array) -> NDArray[np.int64]:
    """Octaves below 1; what is not above 0 lies below all."""
    return np.where(shares > 0, -np.frexp(shares)[1].astype(np.int64), CLASSES - 1)
