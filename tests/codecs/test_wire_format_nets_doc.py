"""docs/wire-format.md, "Auto-encoders", followed without numpy, torch or this package's code.

The state is that of the golden packets (`exact_state` in test_codecs_golden.py): nothing is rounded
anywhere, so the values must be the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .test_wire_format_coded_doc import PAGE, Reader, golden

# rank vectors are the rows of an A and the columns of a B; this says whether they are rows
ARRAYS = [((8, 24), True), ((24, 8), False), ((8, 24), True), ((16, 8), False)]
VECTORS, KINDS, STAGES, STEP, SLOPE = 8, 4, 2, 1.0, 0.5
HEIGHT, WIDTH = 24, 32

Plane = list[list[float]]
Planes = list[Plane]
"""Channels of an image; a signal is an image of one row."""


# ---- the state ----------------------------------------------------------------------------------


def weight(index: int) -> int:
    """Of convolutions; means are the same."""
    return {1: 1, 5: -1}.get(index % 7, 0)


def norm(x: Planes) -> Planes:
    # variance and what is added to it make 1; weight 1/2, bias i mod 2
    return [
        [[(v - weight(i)) / 2 + i % 2 for v in row] for row in plane] for i, plane in enumerate(x)
    ]


# ---- layers -------------------------------------------------------------------------------------


def same(x: Planes, channels: int, kernel: tuple[int, int]) -> Planes:
    high, wide = kernel
    found = []
    for o in range(channels):
        out = [[0.0] * len(x[0][0]) for _ in x[0]]
        for i, plane in enumerate(x):
            for p in range(high):
                for q in range(wide):
                    w = weight(((o * len(x) + i) * high + p) * wide + q)
                    if w:
                        add(out, plane, w, high // 2 - p, wide // 2 - q)
        found.append(out)
    return found


def add(out: Plane, plane: Plane, w: int, down: int, right: int) -> None:
    for r, row in enumerate(plane):
        for c, v in enumerate(row):
            if 0 <= r + down < len(out) and 0 <= c + right < len(out[0]):
                out[r + down][c + right] += w * v


def up(x: Planes, channels: int, kernel: tuple[int, int]) -> Planes:
    high, wide = kernel
    vertical = 1 if high == 1 else 2
    found = []
    for o in range(channels):
        out = [[0.0] * (2 * len(x[0][0])) for _ in range(vertical * len(x[0]))]
        for i, plane in enumerate(x):
            for r, row in enumerate(plane):
                for c, v in enumerate(row):
                    for p in range(high):
                        for q in range(wide):
                            w = weight(((i * channels + o) * high + p) * wide + q)
                            y, z = vertical * r + p - high // 2, 2 * c + q - wide // 2
                            if w and 0 <= y < len(out) and 0 <= z < len(out[0]):
                                out[y][z] += w * v
        found.append(out)
    return found


def rectify(x: Planes) -> Planes:
    return [[[v if v > 0 else SLOPE * v for v in row] for row in plane] for plane in x]


def block(x: Planes) -> Planes:
    inner = rectify(norm(same(x, len(x), (3, 3))))
    inner = norm(same(inner, len(x), (3, 3)))
    pairs = zip(x, inner, strict=True)
    return rectify(
        [
            [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(*planes, strict=True)]
            for planes in pairs
        ]
    )


# ---- networks -----------------------------------------------------------------------------------


def cg_resnet(latents: list[Planes]) -> Plane:
    (x,) = latents
    x = rectify(norm(up(block(x), 2, (3, 3))))
    x = norm(up(x, 1, (3, 3)))
    return same(x, 1, (7, 7))[0]


def cg_cnn(latents: list[Planes]) -> Plane:
    (x,) = latents
    x = rectify(norm(same(x, 4, (1, 5))))
    x = rectify(norm(up(x, 2, (1, 5))))
    x = norm(up(x, 1, (1, 5)))
    return same(x, 1, (1, 7))[0]


def cg_unet(latents: list[Planes]) -> Plane:
    fine, coarse = (
        rectify(norm(same(latent, channels, (3, 3))))
        for latent, channels in zip(latents, (2, 4), strict=True)
    )
    x = rectify(norm(up(block(coarse), 2, (3, 3))))
    x = rectify(norm(same(x + fine, 2, (3, 3))))
    x = norm(up(x, 1, (3, 3)))
    return same(x, 1, (7, 7))[0]


# channels, height and width of the latents
LATENTS = {
    cg_resnet: [(4, HEIGHT // 4, WIDTH // 4)],
    cg_cnn: [(1, 1, 704 // 4)],
    cg_unet: [(1, HEIGHT // 2, WIDTH // 2), (1, HEIGHT // 4, WIDTH // 4)],
}


def rank_vectors(image: Plane) -> list[list[float]]:
    """All of them, in the order of the spec, which is that of kinds here too."""
    found = []
    start = 0
    for shape, _ in ARRAYS:
        length = max(shape)
        for _ in range(VECTORS):
            if len(image) == 1:
                found.append(image[0][start : start + length])
                start += length
            else:  # every array is a strip of its own: 24 + 16 rows are more than there are
                found.append([image[r][len(found)] for r in range(length)])
    return found


@pytest.mark.parametrize("network", LATENTS)
def test_the_page_decodes_the_golden_packet(network: Callable[[list[Planes]], Plane]) -> None:
    payload, wanted = golden(network.__name__)
    reader = Reader(payload)
    gains = [reader.uniform(256) for _ in range(KINDS)]
    lowest, span = reader.bits(9, 2)
    exponents = [code - 1 + lowest - 149 for code in reader.symbols(span + 2, len(ARRAYS))]
    shapes = LATENTS[network]
    sizes = [height * width for channels, height, width in shapes for _ in range(channels)]
    classes = reader.symbols(8, len(sizes))
    planes: list[list[float]] = [[] for _ in sizes]
    for which in sorted(set(classes)):
        own = [i for i, found in enumerate(classes) if found == which]
        levels = iter(reader.levels(sum(sizes[i] for i in own)))
        for i in own:
            planes[i] = [STEP * next(levels) for _ in range(sizes[i])]
    reader.finish()
    latents: list[Planes] = []
    for channels, height, width in shapes:
        mine, planes = planes[:channels], planes[channels:]
        latents.append(
            [[plane[r * width : (r + 1) * width] for r in range(height)] for plane in mine]
        )
    vectors = rank_vectors(network(latents))
    values: list[float] = []
    for array, ((rows, columns), by_row) in enumerate(ARRAYS):
        factor = gains[array] / 128 * 2.0 ** exponents[array]
        mine = [
            [v * (1 - 2 * (number % 2)) * factor for v in vectors[number]]
            for number in range(array * VECTORS, (array + 1) * VECTORS)
        ]
        for r in range(rows):
            values += mine[r] if by_row else [mine[c][r] for c in range(columns)]
    assert values == wanted
    assert any(values)


def test_every_network_is_described() -> None:
    section = PAGE.partition("## Auto-encoders")[2].partition("## A worked example")[0]
    for network in LATENTS:
        assert f"### `{network.__name__}`, version 1" in section
