"""The same update gives the same packet, and that the same values: on every machine, to the bit.

The golden file of each codec, and of each mode with a format of its own, is two lines of
hexadecimal digits, a packet and the float32 values it decodes to. It is written once, when the
format is settled, and never overwritten::

    python tests/codecs/test_codecs_golden.py NAME

If a format is changed on purpose: raise the codec's version, delete the file, write it anew.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cgfedllm.adapter import AdapterSpec, AdapterUpdate
from cgfedllm.codecs import Codec, CodecContext, CodecState, Start, codec_names, make_codec
from cgfedllm.codecs.learned import Learned

GOLDEN = Path(__file__).parent / "golden"
# enough for what has rate control to send something of the larger adapter
GOLDEN_BPP = 2.0
# as small as they come; halves below zero stay exact
GOLDEN_NETWORKS: dict[str, dict[str, Any]] = {
    "cg_cnn": {"stages": 2, "slope": 0.5},
    "cg_resnet": {"stages": 2, "slope": 0.5, "residual_blocks": 1},
    "cg_unet": {"stages": 2, "slope": 0.5, "residual_blocks": 1},
}

GOLDEN_OPTIONS = {
    **GOLDEN_NETWORKS,
    "learned": {"directions": 8},
    "learned_rows": {"directions": 8},
    "learned_linear": {"directions": 8, "bits": 6, "scale_exponent": -12},
}
# with a format of their own, by the codec they are a mode of
MODES = {"learned_linear": "learned", "learned_rows": "learned"}
GOLDEN_NAMES = [*codec_names(), *MODES]

LAYER = "base_model.model.model.layers.0.self_attn"


def lora_spec(rank: int, width: int, out: int, last: int) -> AdapterSpec:
    return AdapterSpec.from_shapes(
        {
            f"{LAYER}.q_proj.lora_A.weight": (rank, width),
            f"{LAYER}.q_proj.lora_B.weight": (out, rank),
            f"{LAYER}.v_proj.lora_A.weight": (rank, width),
            f"{LAYER}.v_proj.lora_B.weight": (last, rank),
        }
    )


# the worked example of docs/wire-format.md, for codecs whose packets have one size
SMALL = lora_spec(2, 5, 4, 3)
LARGE = lora_spec(8, 24, 24, 16)


def small_update() -> AdapterUpdate:
    """Element i is ((37 i) mod 101 - 50) / 64; the last row of the last A factor is zero."""
    index = np.arange(SMALL.size)
    vector = ((37 * index) % 101 - 50).astype(np.float32) / np.float32(64)
    update = AdapterUpdate(SMALL, vector)
    update.views()[f"{LAYER}.v_proj.lora_A.weight"][1] = 0
    return update


def large_update(spec: AdapterSpec = LARGE, salt: int = 0) -> AdapterUpdate:
    """A rank-one pattern and some noise in each factor, all of integers over a power of two."""
    update = AdapterUpdate.zeros(spec)
    index = np.arange(spec.size) + salt
    noise = (37 * index) % 101 - 50
    for at, (factor, view) in enumerate(zip(spec, update.views().values(), strict=True)):
        row, column = np.indices(factor.shape)
        pattern = ((5 * row + at) % 7 - 3) * ((11 * column + at) % 13 - 6)
        own = noise[spec.slices[factor.name]].reshape(factor.shape)
        view[...] = (16 * pattern + own).astype(np.float32) / np.float32(2**16)
    return update


def exact_state(codec: Codec, spec: AdapterSpec) -> CodecState:
    """A state for which float32 rounds nothing, so that all processors agree on every bit.

    Element i of a convolution or of means is 1 where i mod 7 is 1, -1 where it is 5, otherwise 0.
    Batch normalisation halves what is left, since its variance and what is added to it make 1, and
    adds i mod 2; so do other offsets. Signs of rank vectors alternate, from 1. Energies and weights
    are 2^-(i mod 5).
    """
    initial = codec.initial_state(spec)
    if not initial.tensors:
        return initial
    tensors = {}
    for name, array in initial.tensors.items():
        index = np.arange(array.size)
        if name == "layout.signs":
            values = 1 - 2 * (index % 2)
        elif name in ("energies", "weights"):
            values = 2.0 ** -(index % 5)
        elif name.endswith("running_var"):
            values = np.full(array.size, 1 - 2.0**-16)
        elif name.endswith("bias"):
            values = index % 2
        elif name.endswith("weight") and array.ndim == 1:
            values = np.full(array.size, 0.5)
        else:
            values = (index % 7 == 1) * 1 - (index % 7 == 5)
        tensors[name] = values.astype(array.dtype).reshape(array.shape)
    return CodecState.of(tensors)


class LearnedRows(Learned):
    """As at few bits a parameter, of which an adapter as small as these has none to send."""

    pieces_from = alike_from = math.inf


def golden_codec(name: str) -> Codec:
    if name == "learned_rows":
        return LearnedRows(Learned.Options(**GOLDEN_OPTIONS[name], bpp=GOLDEN_BPP))
    options, name = GOLDEN_OPTIONS.get(name, {}), MODES.get(name, name)
    codec = make_codec(name, options)
    return (
        make_codec(name, {**options, "bpp": GOLDEN_BPP}) if hasattr(codec.options, "bpp") else codec
    )


def golden_case(codec: Codec) -> tuple[AdapterUpdate, CodecContext]:
    rated = hasattr(codec.options, "bpp")
    update = large_update() if rated or codec.payload_size(SMALL) is None else small_update()
    previous = (update.vector / np.float32(2))[::-1].copy()
    state = exact_state(codec, update.spec)
    return update, CodecContext(update.spec, 7, 5, state, previous, begun(update.spec))


def begun(spec: AdapterSpec) -> Start:
    """A begins as pattern and noise, B at zero; both have grown a little."""
    origin, grown = large_update(spec, salt=5), large_update(spec, salt=11)
    for name, view in origin.views().items():
        view[...] *= 8 * ("lora_A" in name)
    return Start(origin.vector + grown.vector, origin.vector)


def golden_lines(name: str) -> tuple[bytes, bytes]:
    packet, decoded = (GOLDEN / f"{name}.hex").read_text().split()
    return bytes.fromhex(packet), bytes.fromhex(decoded)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden_packet(name: str) -> None:
    codec = golden_codec(name)
    assert codec.encode(*golden_case(codec)) == golden_lines(name)[0], (
        "the wire format changed: old and new releases cannot talk to each other. "
        "If that is meant, raise the codec's version and remake the golden packet"
    )


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden_packet_decodes_to_the_same_bits(name: str) -> None:
    codec = golden_codec(name)
    update, context = golden_case(codec)
    packet, wanted = golden_lines(name)
    decoded = codec.decode(packet, context).vector
    assert decoded.astype("<f4").tobytes() == wanted
    assert decoded.any(), "says nothing about decoding: nothing was sent"
    assert (AdapterUpdate(update.spec, decoded).norm()) < 2 * update.norm()


def test_no_golden_packet_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.glob("*.hex")} == set(GOLDEN_NAMES)


@pytest.mark.parametrize("name", GOLDEN_NETWORKS)
def test_golden_networks_round_nothing(name: str) -> None:
    import torch

    from cgfedllm.codecs.cg.nets import with_tensors

    codec = golden_codec(name)
    update, context = golden_case(codec)
    tensors = {n: array for n, array in context.state.tensors.items() if n != "layout.signs"}
    image = torch.from_numpy(codec.layout(update.spec).to_image(update.vector))[None, None] * 2**12
    found = []
    for dtype in (torch.float32, torch.float64):
        net = with_tensors(codec.design, tensors).eval().to(dtype)
        with torch.no_grad():
            latents = net.encoder(image.to(dtype))
            values = net.decoder([latent.round() for latent in latents])
        found.append([own.double() for own in (*latents, values)])
    assert all(torch.equal(single, double) for single, double in zip(*found, strict=True))
    assert all(own.any() for own in found[0])


# ---- other processes, other numbers of threads --------------------------------------------------


def middle_size_hashes() -> dict[str, str]:
    """Of every codec's packet and values, for an update large enough to be worth threads."""
    spec = lora_spec(8, 4096, 4096, 1024)
    update = large_update(spec)
    previous = large_update(spec, salt=9).vector
    hashes = {}
    for name in GOLDEN_NAMES:
        codec = make_codec(MODES.get(name, name), GOLDEN_OPTIONS[name] if name in MODES else {})
        learns = codec.name == "learned"
        state = exact_state(codec, spec) if learns else codec.initial_state(spec)
        context = CodecContext(spec, 7, 5, state, previous, begun(spec))
        packet = codec.encode(update, context)
        decoded = codec.decode(packet, context).vector.astype("<f4").tobytes()
        hashes[name] = " ".join(hashlib.sha256(part).hexdigest() for part in (packet, decoded))
    return hashes


def test_threads_and_processes_make_no_difference() -> None:
    seen = []
    for threads in ("1", "2"):
        limits = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        child = subprocess.run(
            [sys.executable, __file__, "--hashes"],
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, **dict.fromkeys(limits, threads)},
        )
        seen.append(json.loads(child.stdout))
    assert seen[0] == seen[1] == middle_size_hashes()


def write_golden(name: str) -> None:
    codec = golden_codec(name)
    update, context = golden_case(codec)
    packet = codec.encode(update, context)
    decoded = codec.decode(packet, context).vector.astype("<f4").tobytes()
    with (GOLDEN / f"{name}.hex").open("x") as file:  # never overwrites
        file.write(f"{packet.hex()}\n{decoded.hex()}\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["--hashes"]:
        print(json.dumps(middle_size_hashes()))
    else:
        for wanted in sys.argv[1:]:
            write_golden(wanted)
