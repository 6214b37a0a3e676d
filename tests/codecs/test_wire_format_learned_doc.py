"""docs/wire-format.md, "`learned`", followed with the standard library alone."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from operator import mul
from typing import Any

import numpy as np
import pytest

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import CodecContext, CodecState, make_codec
from cgfedllm.codecs.learned import Learned
from cgfedllm.codecs.learned.fitting import learn
from cgfedllm.codecs.packet import HEADER_SIZE
from cgfedllm.codecs.rate import payload_bits

from .test_codecs_golden import (
    GOLDEN_BPP,
    LearnedRows,
    begun,
    golden_case,
    golden_codec,
    large_update,
)
from .test_wire_format_coded_doc import (
    Reader,
    f32,
    golden,
    lowrank_coded,
    lowrank_modes,
    lowrank_scalar,
    lowrank_short,
    orthonormal,
)

Matrix = list[list[float]]
# module, "A" or "B", shape: those of the golden packets
FACTORS = [("q", "A", (8, 24)), ("q", "B", (24, 8)), ("v", "A", (8, 24)), ("v", "B", (16, 8))]


def decode(  # type: ignore[no-untyped-def]
    payload: bytes,
    factors: Sequence[tuple[str, str, tuple[int, int]]],
    start: list[float],
    origin: list[float],
    state: State | None,
):
    reader = Reader(payload)
    axes = reader.bits(3)[0]
    alone = axes in (3, 4)
    axes -= 2 if alone else 0
    in_pieces = not alone and reader.bits(1)[0]
    exponent = reader.bits(9)[0] - 160
    kinds = list(dict.fromkeys(factors))
    places = {kind: [i for i, own in enumerate(factors) if own == kind] for kind in kinds}
    offsets = [0]
    for _, _, shape in factors:
        offsets.append(offsets[-1] + shape[0] * shape[1])
    now, before = (rows_of(factors, offsets, vector) for vector in (start, origin))
    held = Held(axes, factors, now, before, state)
    found = [Axes(held, kind, places[kind]) for kind in kinds]
    if in_pieces:
        groups = [[[[0] * own.length] * own.ranks] * own.layers for own in found]
        modes = lowrank_modes(reader, groups)
        short = lowrank_short(reader, groups, modes)
    else:
        groups = [[[list(range(own.length))]] for own in found]
        modes = {} if alone else row_modes(reader, kinds, found, axes)
    scale_codes: dict[tuple[int, int, int], int] = {}
    if modes:
        low, span = reader.bits(7, 2)
        if len(modes) > 16 * (span + 1):
            codes = reader.symbols(span + 1, len(modes))
        else:
            codes = [reader.uniform(span + 1) for _ in modes]
        scale_codes = {at: low + code for at, code in zip(modes, codes, strict=True)}
    vectors = lowrank_coded(reader, groups, modes, scale_codes)
    loose = [(which, k, i) for k, own in enumerate(found) for i, which in enumerate(own.loose)]
    step = reader.float32() if loose or 7 in modes.values() else 0.0
    vectors |= lowrank_scalar(reader, groups, modes, scale_codes, step)
    coefficients = [[0.0] * len(own.loose) for own in found]
    for which in sorted({which for which, _, _ in loose}) if step else []:
        own = [(k, i) for c, k, i in loose if c == which]
        for (k, i), value in zip(own, reader.points(len(own), step), strict=True):
            coefficients[k][i] = value
    reader.finish()
    rows = [[[0.0] * own.length for _ in own.foretold] for own in found]
    if in_pieces:
        for k, own in enumerate(found):
            own.over = []
            for layer in range(own.layers):
                at = [at for at in modes if at[:2] == (k, layer)]
                matrix = sum_of_pieces([short[a] for a in at], [vectors[a] for a in at], own)
                for j, row in enumerate(matrix):
                    rows[k][j * own.layers + layer] = row
    else:
        for (k, _, i), values in vectors.items():
            rows[k][i] = values
    return assembled(factors, offsets, found, rows, coefficients, exponent)


def row_modes(reader, kinds, found, axes) -> dict[tuple[int, int, int], int]:  # type: ignore[no-untyped-def]
    classes = classes_of(kinds, found) if axes else [[0] * len(own.foretold) for own in found]
    modes: dict[tuple[int, int, int], int] = {}
    for which in sorted({c for own in classes for c in own}):
        at = [(k, 0, i) for k, own in enumerate(classes) for i, c in enumerate(own) if c == which]
        highest = reader.uniform(8)
        own = reader.symbols(highest + 1, len(at)) if highest else [0] * len(at)
        modes |= {a: m for a, m in zip(at, own, strict=True) if m}
    return dict(sorted(modes.items()))


def sum_of_pieces(short, long, own) -> Matrix:  # type: ignore[no-untyped-def]
    matrix: Matrix = [[0.0] * own.length for _ in range(own.ranks)]
    for q, y in zip(orthonormal(short), long, strict=True):
        for r, entry in enumerate(map(f32, q)):
            matrix[r] = [f32(x + f32(v * entry)) for x, v in zip(matrix[r], y, strict=True)]
    return matrix


def decode_linear(  # type: ignore[no-untyped-def]
    payload: bytes,
    factors: Sequence[tuple[str, str, tuple[int, int]]],
    start: list[float],
    state: State,
    budget: float,
    bits: int,
):
    word, e, width = struct.unpack("<IhB", payload[:7])
    assert word >> 29 == 7
    axes = word & (2**29 - 1)
    ranks = sum(shape[0] if kind == "A" else shape[1] for _, kind, shape in factors)
    m = max(0, min(int((budget - 56) / bits), len(state.whole[0]) * ranks))
    assert len(payload) == 7 + -(-m * width // 8)
    body = int.from_bytes(payload[7:], "little")
    numbers = [(body >> (width * i) & ((1 << width) - 1)) - (1 << (width - 1)) for i in range(m)]
    kinds = list(dict.fromkeys(factors))
    places = {kind: [i for i, own in enumerate(factors) if own == kind] for kind in kinds}
    offsets = [0]
    for _, _, shape in factors:
        offsets.append(offsets[-1] + shape[0] * shape[1])
    now = rows_of(factors, offsets, start)
    held = Held(axes, factors, now, now, state)
    found = [Axes(held, kind, places[kind]) for kind in kinds]
    order = [(-share, k, i) for k, own in enumerate(found) for i, share in enumerate(own.shares)]
    b = max(map(abs, numbers)).bit_length()
    coefficients = [[0.0] * len(own.shares) for own in found]
    for (_, k, i), number in zip(sorted(order), numbers, strict=False):
        coefficients[k][i] = math.ldexp(f32(number), -b)
    rows = [[[0.0] * own.length for _ in own.foretold] for own in found]
    return assembled(factors, offsets, found, rows, coefficients, e + b)


def assembled(factors, offsets, found, rows, coefficients, exponent) -> list[float]:  # type: ignore[no-untyped-def]
    out = [0.0] * offsets[-1]
    for own, values, loose in zip(found, rows, coefficients, strict=True):
        for factor, matrix in zip(own.places, own.rebuilt(values, loose), strict=True):
            _, kind, shape = factors[factor]
            for r, row in enumerate(matrix):
                for n, value in enumerate(row):
                    at = r * shape[1] + n if kind == "A" else n * shape[1] + r
                    out[offsets[factor] + at] = f32(math.ldexp(value, exponent))
    return out


def rows_of(factors, offsets, vector) -> list[Matrix]:  # type: ignore[no-untyped-def]
    found = []
    for (_, kind, (height, width)), offset in zip(factors, offsets, strict=False):
        own = vector[offset : offset + height * width]
        lines = [own[i * width : (i + 1) * width] for i in range(height)]
        found.append(
            lines if kind == "A" else [list(column) for column in zip(*lines, strict=True)]
        )
    return found


@dataclass
class State:
    """Of every factor: whole numbers, energies, weights."""

    whole: list[list[list[int]]]
    energies: Matrix
    weights: Matrix


class Held:
    """What both ends hold."""

    def __init__(self, axes, factors, now, before, state) -> None:  # type: ignore[no-untyped-def]
        self.axes, self.factors, self.now, self.before = axes, factors, now, before
        self.state = state
        if state and not any(v for z in state.whole for row in z for v in row):
            self.state = None
        if axes in (2, 6):
            means = [
                math.fsum(g[i][i] for i in range(len(g))) / len(g)
                for g in (self.gram(i) for i, f in enumerate(factors) if f[1] == "A")
            ]
            self.floor = (max(means) or 1.0) * 2.0**-10

    def inverses(self, factor: int) -> list[float]:
        assert self.state
        return [1 / math.sqrt(sum(v * v for v in z) or 1) for z in self.state.whole[factor]]

    def directions(self, factor: int) -> Matrix:
        assert self.state
        pairs = zip(self.state.whole[factor], self.inverses(factor), strict=True)
        return [[f32(v * inverse) for v in z] for z, inverse in pairs]

    def products(self, rows: Matrix, factor: int) -> Matrix:
        assert self.state
        whole, p = rounded(rows)
        pairs = list(zip(self.state.whole[factor], self.inverses(factor), strict=True))
        return [
            [math.ldexp(sum(map(mul, row, z)), p - 14) * inverse for z, inverse in pairs]
            for row in whole
        ]

    def across(self, products: Matrix, factor: int) -> Matrix:
        assert self.state
        inverses = self.inverses(factor)
        whole, p = rounded([list(map(mul, row, inverses)) for row in products])
        columns = transposed(self.state.whole[factor])
        return [[math.ldexp(sum(map(mul, row, z)), p - 14) for z in columns] for row in whole]

    def gram(self, factor: int) -> Matrix:
        rows = self.now[factor]
        plain = gram(rows)
        if not self.state:
            return plain
        *weights, rest = self.state.weights[factor]
        along = self.products(rows, factor)
        out = [[rest * v for v in row] for row in plain]
        for i, weight in enumerate(weights):
            for a, row in enumerate(out):
                for b in range(len(row)):
                    row[b] += (weight - rest) * (along[a][i] * along[b][i])
        return out

    def grown(self, factor: int) -> tuple[Matrix, Matrix]:
        pairs = zip(self.now[factor], self.before[factor], strict=True)
        rows = [[f32(x - y) for x, y in zip(a, b, strict=True)] for a, b in pairs]
        along: Matrix = [[] for _ in rows]
        if self.state:
            along = [[0.0] * len(self.directions(factor)) for _ in rows]
            for _ in range(2):
                more = self.products(rows, factor)
                taken = self.across(more, factor)
                pairs = zip(rows, taken, strict=True)
                rows = [[x - y for x, y in zip(a, b, strict=True)] for a, b in pairs]
                along = [
                    [a + m for a, m in zip(own, new, strict=True)]
                    for own, new in zip(along, more, strict=True)
                ]
        return rows, along


class Axes:
    def __init__(self, held, kind, places) -> None:  # type: ignore[no-untyped-def]
        self.over: list[Matrix] = []
        self.places, self.letter = places, kind[1]
        rows, factors, axes = held.now, held.factors, held.axes
        self.axes = axes
        self.ranks, self.length = len(rows[places[0]]), len(rows[places[0]][0])
        self.layers = len(places)
        self.foretold = [0.0] * (self.ranks * self.layers)
        self.loose: list[int] = []
        self.shares: list[float] = []
        self.directions: list[Matrix] = []
        if not axes:
            return
        module, letter, _ = kind
        partners = []
        for place in places:
            nth = [i for i, own in enumerate(factors) if own == kind].index(place)
            other = [i for i, f in enumerate(factors) if f[0] == module and f[1] != letter]
            partners.append(other[nth])
        own_grams = [gram(rows[i]) for i in places]
        other_grams = [held.gram(i) for i in partners]
        if axes in (2, 6):
            f = held.floor
            raised = [
                [[v + (f if i == j else 0.0) for j, v in enumerate(row)] for i, row in enumerate(g)]
                for g in other_grams
            ]
            p, r, spreads = [], [], []
            for (g, v), own, other in zip(
                eigenvectors(raised), own_grams, other_grams, strict=True
            ):
                h = [math.sqrt(math.sqrt(max(value, f))) for value in g]
                p.append([[x * y for x, y in zip(row, h, strict=True)] for row in v])
                r.append([[x / y for x, y in zip(row, h, strict=True)] for row in v])
                s = own
                if letter == "B":
                    lines = zip(own, other, strict=True)
                    s = [[x + 2.0**-10 * y for x, y in zip(*line, strict=True)] for line in lines]
                spreads.append(times(times(transposed(p[-1]), s), p[-1]))
            turned = eigenvectors(spreads)
            forward = [
                times(transposed(q), transposed(own)) for (_, q), own in zip(turned, p, strict=True)
            ]
            self.backward = [times(own, q) for (_, q), own in zip(turned, r, strict=True)]
        else:
            turned = eigenvectors(own_grams if letter == "B" else other_grams)
            self.backward = [q for _, q in turned]
            forward = [transposed(q) for q in self.backward]
        u = [values for values, _ in turned]
        self._along(held, forward, u)
        if letter == "B":
            h = [times(own, rows[place]) for own, place in zip(forward, places, strict=True)]
            pairs = eigenvectors([gram([own[j] for own in h]) for j in range(self.ranks)])
            self.over = [vectors for _, vectors in pairs]
            self.foretold = [value for values, _ in pairs for value in values]
        else:
            roots = self.rest if self.directions else [1.0] * self.layers
            self.foretold = [
                u[layer][j] * (roots[layer] * roots[layer])
                for j in range(self.ranks)
                for layer in range(self.layers)
            ]

    def _along(self, held, forward, u) -> None:  # type: ignore[no-untyped-def]
        rest = [1.0] * self.layers
        sets = []
        if held.state:
            shares = [held.state.energies[i][:-1] for i in self.places]
            weights = [[1.0] * len(own) for own in shares]
            if self.axes in (2, 6):
                roots = [[math.sqrt(w) for w in held.state.weights[i]] for i in self.places]
                weights = [own[:-1] for own in roots]
                rest = [own[-1] for own in roots]
            sets.append(([held.directions(i) for i in self.places], shares, weights))
        if self.axes in (5, 6):
            grown = [held.grown(place) for place in self.places]
            y = [times(own, rows) for own, (rows, _) in zip(forward, grown, strict=True)]
            known = [times(own, along) for own, (_, along) in zip(forward, grown, strict=True)]
            vectors, shares = [], []
            grams = [gram(rows) for rows in y]
            for (q, t), own, g, c in zip(eigenvectors(grams), y, grams, known, strict=True):
                all_ = math.fsum(
                    [*(g[i][i] for i in range(len(g))), *(v * v for row in c for v in row)]
                )
                there = [value > 0 and value > 2.0**-8 * all_ for value in q]
                inverse = [1 / math.sqrt(v) if ok else 0.0 for v, ok in zip(q, there, strict=True)]
                product = times(transposed(t), own)
                vectors.append(
                    [[f32(v * i) for v in row] for row, i in zip(product, inverse, strict=True)]
                )
                total = 0.0
                for value, ok in zip(q, there, strict=True):
                    total += value * ok
                pairs = zip(q, there, strict=True)
                shares.append([v / (total or 1.0) if ok else 0.0 for v, ok in pairs])
            if any(v for own in vectors for row in own for v in row):
                weights = [[w] * self.ranks for w in rest]
                sets.append((vectors, shares, weights))
        if not sets:
            return
        classes: list[list[list[int]]] = [[[] for _ in rest] for _ in range(self.ranks)]
        parts: list[Matrix] = [[[] for _ in rest] for _ in range(self.ranks)]
        for at, (_, shares, weights) in enumerate(sets):
            foretold = [
                [
                    [u[at][j] * (s * w) for s, w in zip(shares[at], weights[at], strict=True)]
                    for at in range(self.layers)
                ]
                for j in range(self.ranks)
            ]
            v = max(x for own in foretold for row in own for x in row) or 1.0
            for j, own in enumerate(foretold):
                for layer, row in enumerate(own):
                    classes[j][layer] += [
                        min(max(octave(x / v, 15) // 3, 0), 4) + 5 * at for x in row
                    ]
                    parts[j][layer] += [x / v for x in row]
        self.shares = [x for own in parts for row in own for x in row]
        self.loose = [c for own in classes for row in own for c in row]
        self.directions = [
            [d for vectors, _, _ in sets for d in vectors[layer]] for layer in range(self.layers)
        ]
        self.roots = [
            [f32(math.sqrt(w)) for _, _, weights in sets for w in weights[layer]]
            for layer in range(self.layers)
        ]
        self.rest = [f32(math.sqrt(w)) for w in rest]

    def rebuilt(self, coefficients: Matrix, loose: list[float]) -> list[Matrix]:
        n, layers, ranks = self.length, self.layers, self.ranks
        if not self.axes:
            return [coefficients[at::layers] for at in range(layers)]
        x = [[coefficients[j * layers + layer] for j in range(ranks)] for layer in range(layers)]
        if self.over:
            for j in range(ranks):
                own = coefficients[j * layers : (j + 1) * layers]
                for layer in range(layers):
                    x[layer][j] = weighted(self.over[j][layer], own, n)
        if self.directions:
            count = len(self.directions[0])
            own = [loose[at : at + count] for at in range(0, len(loose), count)]
            c = [own[layer::layers] for layer in range(layers)]
            x = [
                [[f32(v / root) for v in row] for row in own]
                for own, root in zip(x, self.rest, strict=True)
            ]
            for i in range(count):
                for layer in range(layers):
                    direction = self.directions[layer][i]
                    for j in range(ranks):
                        along = f32(c[layer][j][i] / self.roots[layer][i])
                        if along:
                            pairs = zip(x[layer][j], direction, strict=True)
                            x[layer][j] = [f32(v + f32(along * d)) for v, d in pairs]
        return [
            [weighted(self.backward[layer][i], x[layer], n) for i in range(ranks)]
            for layer in range(layers)
        ]


def weighted(weights: list[float], rows: Matrix, n: int) -> list[float]:
    total = [0.0] * n
    for weight, row in zip(map(f32, weights), rows, strict=True):
        if any(row):
            total = [f32(t + f32(weight * v)) for t, v in zip(total, row, strict=True)]
    return total


def octave(ratio: float, zero: int) -> int:
    return -math.frexp(ratio)[1] if ratio > 0 else zero


def classes_of(kinds, found) -> list[list[int]]:  # type: ignore[no-untyped-def]
    largest = {"A": 0.0, "B": 0.0}
    for (_, letter, _), own in zip(kinds, found, strict=True):
        largest[letter] = max(largest[letter], *own.foretold)
    return [
        [
            min(max(octave(u / (largest[letter] or 1.0), 15), 0), 15) + 16 * (letter == "A")
            for u in own.foretold
        ]
        for (_, letter, _), own in zip(kinds, found, strict=True)
    ]


def rounded(rows: Matrix) -> tuple[list[list[int]], int]:
    p = math.frexp(max(abs(v) for row in rows for v in row))[1]
    return [[round(Fraction(v) * Fraction(2) ** (14 - p)) for v in row] for row in rows], p


def gram(rows: Matrix) -> Matrix:
    whole, p = rounded(rows)
    power = Fraction(2) ** (2 * p - 28)
    return [
        [float(sum(x * y for x, y in zip(a, b, strict=True)) * power) for b in whole] for a in whole
    ]


def transposed(x: Matrix) -> Matrix:
    return [list(column) for column in zip(*x, strict=True)]


def times(x: Matrix, y: Matrix) -> Matrix:
    out = []
    for row in x:
        line = []
        for j in range(len(y[0])):
            total = row[0] * y[0][j]
            for k in range(1, len(y)):
                total += row[k] * y[k][j]
            line.append(total)
        out.append(line)
    return out


def eigenvectors(matrices: list[Matrix]) -> list[tuple[list[float], Matrix]]:
    n = len(matrices[0])
    a = [[row[:] for row in m] for m in matrices]
    v = [[[float(i == j) for j in range(n)] for i in range(n)] for _ in matrices]
    for _ in range(10):
        unsettled = [(m, own) for m, own in zip(a, v, strict=True) if not settled(m)]
        size = n + n % 2
        ring = list(range(size))
        for _ in range(size - 1):
            pairs = [sorted((ring[i], ring[size - 1 - i])) for i in range(size // 2)]
            for m, own in unsettled:
                turn(m, own, [(p, q) for p, q in pairs if q < n])
            ring = [ring[0], ring[-1], *ring[1:-1]]
    found = []
    for m, own in zip(a, v, strict=True):
        order = sorted(range(n), key=lambda i, m=m: -m[i][i])  # type: ignore[misc]
        found.append(([m[i][i] for i in order], [[row[i] for i in order] for row in own]))
    return found


def settled(m: Matrix) -> bool:
    n = len(m)
    most = max(abs(m[i][i]) for i in range(n))
    return all(abs(m[i][j]) <= 2.0**-40 * most for i in range(n) for j in range(n) if i != j)


def turn(m: Matrix, vectors: Matrix, pairs: list[tuple[int, int]]) -> None:
    turns = []
    for p, q in pairs:
        if m[p][q]:
            z = (m[q][q] - m[p][p]) / (2 * m[p][q])
            t = (-1.0 if z < 0 else 1.0) / (abs(z) + math.sqrt(z * z + 1))
        else:
            t = 0.0
        c = 1 / math.sqrt(t * t + 1)
        turns.append((p, q, c, t * c))
    for matrix in (m, vectors):
        for row in matrix:
            for p, q, c, s in turns:
                row[p], row[q] = c * row[p] - s * row[q], s * row[p] + c * row[q]
        if matrix is m:
            for p, q, c, s in turns:
                x, y = m[p], m[q]
                m[p] = [c * g - s * h for g, h in zip(x, y, strict=True)]
                m[q] = [s * g + c * h for g, h in zip(x, y, strict=True)]


def state_of(spec: AdapterSpec, tensors: Mapping[str, Any]) -> State:
    return State(
        [tensors[factor.name].tolist() for factor in spec],
        tensors["energies"].tolist(),
        tensors["weights"].tolist(),
    )


def several_layers() -> tuple[list[tuple[str, str, tuple[int, int]]], AdapterSpec]:
    layers = [("q", "A", (3, 20)), ("q", "B", (10, 3))] * 5
    spec = AdapterSpec.from_shapes(
        {
            f"m.layers.{at // 2}.q_proj.lora_{kind}.weight": shape
            for at, (_, kind, shape) in enumerate(layers)
        }
    )
    return layers, spec


@pytest.mark.parametrize("name", ["learned", "learned_rows"])
def test_the_page_decodes_the_golden_packets(name: str) -> None:
    payload, wanted = golden(name)
    update, context = golden_case(golden_codec(name))
    start = context.start
    assert start is not None
    assert start.origin is not None
    state = state_of(update.spec, context.state.tensors)
    assert decode(payload, FACTORS, start.adapter.tolist(), start.origin.tolist(), state) == wanted


def test_the_page_decodes_the_golden_packet_of_linear_mode() -> None:
    payload, wanted = golden("learned_linear")
    codec = golden_codec("learned_linear")
    update, context = golden_case(codec)
    assert context.start is not None
    state = state_of(update.spec, context.state.tensors)
    budget = payload_bits(update.spec, GOLDEN_BPP)
    assert (
        decode_linear(payload, FACTORS, context.start.adapter.tolist(), state, budget, 6) == wanted
    )


@pytest.mark.parametrize("how", [Learned, LearnedRows])
@pytest.mark.parametrize(
    ("metric", "grown", "learned"),
    [
        (None, True, True),
        ("effect", True, True),
        ("effect", True, False),
        ("effect", False, True),
        ("parameters", True, True),
        ("parameters", False, False),
    ],
)
def test_the_page_decodes_packets_of_several_layers(
    metric: str | None, grown: bool, learned: bool, how: type[Learned]
) -> None:
    layers, spec = several_layers()
    start = begun(spec)
    assert start.origin is not None
    update = large_update(spec, salt=3)
    options = {"bpp": 6.0, "metric": metric or "effect", "grown": grown}
    codec: Learned = type("", (how,), {"alike_from": math.inf})(Learned.Options(**options))
    state = CodecState.of(learn(spec, [large_update(spec, salt=at) for at in range(4)], 8))
    context = CodecContext(spec, 1, start=start if metric else None)
    context = replace(context, state=state if learned else codec.initial_state(spec))
    blob = codec.encode(update, context)
    wanted = codec.decode(blob, context).vector
    found = decode(
        blob[HEADER_SIZE:],
        layers,
        start.adapter.tolist(),
        start.origin.tolist(),
        state_of(spec, context.state.tensors),
    )
    assert struct.pack(f"<{spec.size}f", *found) == wanted.tobytes()
    assert AdapterUpdate(spec, wanted).norm() > 0


@pytest.mark.parametrize("metric", ["effect", "parameters"])
def test_the_page_decodes_packets_of_nothing_but_known_directions(metric: str) -> None:
    layers, spec = several_layers()
    start = begun(spec)
    assert start.origin is not None
    codec = make_codec("learned", {"bpp": 1.5, "metric": metric, "directions": 8})
    assert isinstance(codec, Learned)
    state = CodecState.of(learn(spec, [large_update(spec, salt=at) for at in range(4)], 8))
    bases = codec.directions(state, spec)
    update = large_update(spec, salt=3)
    for factor, view in zip(spec, update.views().values(), strict=True):
        basis = bases[factor.name]
        view[...] = view @ basis.T @ basis if factor.kind == "A" else basis.T @ basis @ view
    context = CodecContext(spec, 1, start=start, state=state)
    blob = codec.encode(update, context)
    payload = blob[HEADER_SIZE:]
    assert Reader(payload).bits(3)[0] == {"parameters": 3, "effect": 4}[metric]
    wanted = codec.decode(blob, context).vector
    held = state_of(spec, state.tensors)
    found = decode(payload, layers, start.adapter.tolist(), start.origin.tolist(), held)
    assert struct.pack(f"<{spec.size}f", *found) == wanted.tobytes()
    assert AdapterUpdate(spec, wanted).norm() > 0


@pytest.mark.parametrize("metric", ["effect", "parameters"])
@pytest.mark.parametrize("bpp", [2.0, 9.0])
def test_the_page_decodes_sums_of_packets_of_linear_mode(metric: str, bpp: float) -> None:
    layers, spec = several_layers()
    start = begun(spec)
    codec = make_codec(
        "learned",
        {"bpp": bpp, "metric": metric, "directions": 8, "bits": 5, "scale_exponent": -13},
    )
    assert isinstance(codec, Learned)
    state = CodecState.of(learn(spec, [large_update(spec, salt=at) for at in range(4)], 8))
    context = CodecContext(spec, 1, start=start, state=state)
    updates = [large_update(spec, salt=at) for at in (3, 4, 5)]
    total = sum(codec.levels(codec.encode(own, context), context) for own in updates)
    blob = codec.packet_of(np.asarray(total), context)
    wanted = codec.decode(blob, context).vector
    held = state_of(spec, state.tensors)
    budget = payload_bits(spec, bpp)
    found = decode_linear(
        blob[HEADER_SIZE:], layers, start.adapter.tolist(), held, budget, codec.options.bits
    )
    assert struct.pack(f"<{spec.size}f", *found) == wanted.tobytes()
    assert wanted.any()
