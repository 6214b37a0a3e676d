"""Averaging adapters as products: exactly, and how far averaging the factors is from it.

The model sees B A, the server averages A and B apart, and mean(B) mean(A) != mean(B A)
(Sun et al., arXiv 2403.12313, section 3; Wang et al., FLoRA, arXiv 2409.05976).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray

from cgfedllm.adapter import AdapterSpec, AdapterUpdate, Float32Array
from cgfedllm.federation.messages import ARRAYS, METRICS, NUM_EXAMPLES, adapter_of, adapter_record

Float64Array = NDArray[np.float64]


class ProductGap:
    """Estimates ||mean(BA) - mean(B) mean(A)|| / ||mean(BA)|| while updates stream by.

    Every product is multiplied with the same few random vectors; norms of the results estimate
    Frobenius norms (Hutchinson) without ever forming an (out, in) matrix or keeping a client.

    Parameters
    ----------
    spec : AdapterSpec
        Adapter with A and B factors.
    probes : int
        Random vectors; the relative error of a norm is about ``sqrt(2 / probes)`` for one
        factor pair and averages out over the pairs.
    """

    def __init__(self, spec: AdapterSpec, probes: int = 16) -> None:
        self._pairs = spec.pairs()
        rng = np.random.Generator(np.random.Philox(0))
        widths = {a.shape[1] for a, _ in self._pairs}
        self._probes: dict[int, Float32Array] = {
            width: rng.standard_normal((width, probes), dtype=np.float32)
            for width in sorted(widths)
        }
        self._sums: list[Float64Array] = [
            np.zeros((b.shape[0], probes), np.float64) for _, b in self._pairs
        ]
        self._weight = 0.0

    def add(self, adapter: AdapterUpdate, weight: float) -> None:
        """Take in one client's adapter (not its change)."""
        views = adapter.views()
        for (a, b), total in zip(self._pairs, self._sums, strict=True):
            total += weight * self._product(views[b.name], views[a.name])
        self._weight += weight

    def value(self, average: AdapterUpdate) -> float | None:
        """The gap to `average`, the factors averaged apart; None without finite products."""
        if not self._pairs or self._weight == 0:
            return None
        views = average.views()
        difference = norm = 0.0
        for (a, b), total in zip(self._pairs, self._sums, strict=True):
            mean = total / self._weight
            apart = self._product(views[b.name], views[a.name])
            if not (np.isfinite(mean).all() and np.isfinite(apart).all()):
                return None
            difference += float(np.square(mean - apart).sum())
            norm += float(np.square(mean).sum())
        return float(np.sqrt(difference / norm)) if norm > 0 else None

    def _product(self, b: Float32Array, a: Float32Array) -> Float64Array:
        """``B A`` times the probes; not finite if a client sent what is too large for that."""
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(b @ (a @ self._probes[a.shape[1]]), np.float64)


class ProductAverage(FedAvg):
    """Averages the products B A exactly and factors the mean back to rank r.

    ::

        mean(B A) = [w_1 B_1 | w_2 B_2 | ...] [A_1 ; A_2 ; ...]  --QR, SVD-->  rank r  -->  B', A'

    Of all factorisations of the rank-r product the one is taken whose A' lies closest to the
    averaged A, so that the client's optimisers meet familiar scales in the next round.

    Parameters
    ----------
    spec : AdapterSpec
        Adapter with A and B factors.
    **options
        As for Flower's FedAvg.
    """

    def __init__(self, spec: AdapterSpec, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self._spec = spec

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate whole adapters by their products."""
        replies = list(replies)
        _, metrics = super().aggregate_train(server_round, replies)
        valid = [reply for reply in replies if reply.has_content()]
        if not valid:
            return None, metrics
        weights = np.array([_weight(reply) for reply in valid], np.float64)
        weights /= weights.sum()
        adapters = [adapter_of(self._spec, reply.content.array_records[ARRAYS]) for reply in valid]
        averaged = average_products(adapters, weights)
        return adapter_record(averaged), metrics


def average_products(adapters: list[AdapterUpdate], weights: Float64Array) -> AdapterUpdate:
    """Weighted mean of the adapters' products, at their own rank.

    Parameters
    ----------
    adapters : list of AdapterUpdate
        Whole adapters (not changes) on one spec.
    weights : ndarray, shape (len(adapters),), float64
        Sum to one.
    """
    spec = adapters[0].spec
    mean = sum((w * a.vector.astype(np.float64) for w, a in zip(weights, adapters, strict=True)))
    result = AdapterUpdate(spec, np.asarray(mean, np.float32))
    all_views = [adapter.views() for adapter in adapters]
    out = result.views()
    for a, b in spec.pairs():
        left = np.concatenate(
            [w * v[b.name].astype(np.float64) for w, v in zip(weights, all_views, strict=True)],
            axis=1,
        )
        right = np.concatenate([v[a.name].astype(np.float64) for v in all_views], axis=0)
        new_a, new_b = _refactor(left, right, out[a.name].astype(np.float64))
        out[a.name][...] = new_a
        out[b.name][...] = new_b
    return result


def _refactor(
    left: Float64Array, right: Float64Array, near: Float64Array
) -> tuple[Float64Array, Float64Array]:
    """Best rank-r (A, B) with B A = left @ right, A near `near` of shape (r, in)."""
    rank = near.shape[0]
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right.T)
    u, s, vt = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
    basis = vt[:rank] @ q_right.T  # orthonormal rows that span the product's row space
    scaled = (q_left @ u[:, :rank]) * s[:rank]
    coordinates = near @ basis.T  # near, projected on that row space
    if np.linalg.cond(coordinates) > 1e6:
        # nearly parallel rows: no A near them spans the product; keep their size, so that no
        # direction has both factors zero, which no gradient leaves
        size = float(np.linalg.norm(near)) / rank**0.5
        coordinates = (size or 1.0) * np.eye(*coordinates.shape)
    return coordinates @ basis, scaled @ np.linalg.pinv(coordinates)


def _weight(reply: Message) -> float:
    return float(reply.content.metric_records[METRICS][NUM_EXAMPLES])  # type: ignore[arg-type]
