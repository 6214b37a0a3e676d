"""The networks: the paper's shapes and sizes, and gradients everywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from cgfedllm.codecs.cg.beginning import initial_tensors
from cgfedllm.codecs.cg.design import Design, NetName
from cgfedllm.codecs.cg.nets import with_tensors
from cgfedllm.codecs.cg.onechannel import OneChannel

PAPER = Design("resnet", stages=6, width=2, blocks=3, bounded=True)
NETS: list[tuple[NetName, tuple[int, ...]]] = [
    ("resnet", (16, 32)),
    ("unet", (16, 32)),
    ("cnn", (256,)),
]


def parameters(design: Design, side: str) -> int:
    tensors = initial_tensors(design, 0)
    own = {name: array for name, array in tensors.items() if name.startswith(side)}
    return sum(array.size for name, array in own.items() if "running" not in name)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_resnet_3_has_the_papers_number_of_parameters(side: str) -> None:
    assert parameters(PAPER, side) == pytest.approx(0.247e6, abs=500)


def test_resnet_3_has_the_papers_layers() -> None:
    tensors = initial_tensors(PAPER, 0)
    convolutions = {n: array.shape for n, array in tensors.items() if array.ndim == 4}
    down = [(1, 1, 3, 3), (2, 1, 3, 3), (4, 2, 3, 3), (8, 4, 3, 3), (16, 8, 3, 3)]
    down += [(32, 16, 3, 3), (64, 32, 3, 3)]
    block = [(64, 64, 3, 3)] * 6
    encoder = [shape for name, shape in convolutions.items() if name.startswith("encoder")]
    decoder = [shape for name, shape in convolutions.items() if name.startswith("decoder")]
    assert encoder == down + block
    # transposed convolutions have their input first
    assert decoder == [*block, *down[:0:-1], (1, 1, 7, 7)]


def test_resnet_3_has_the_papers_latent() -> None:
    assert PAPER.latent_shapes((4096, 2048)) == [(64, 64, 32)]


@pytest.mark.parametrize(
    ("design", "shape", "share"),
    [
        (PAPER, (640, 128), 64),
        (Design("unet", 6, 2, 3, bounded=False), (640, 128), 64),
        (Design("cnn", 5, 2, 0, bounded=False), (8192,), 32),
    ],
)
def test_latents_are_as_small_as_the_paper_says(
    design: Design, shape: tuple[int, ...], share: int
) -> None:
    latents = design.latent_shapes(shape)
    assert sum(np.prod(own) for own in latents) * share == np.prod(shape)
    assert design.latent_share * share == 1
    net = with_tensors(design, initial_tensors(design, 0)).eval()
    with torch.no_grad():
        found = net.encoder(torch.randn(2, 1, *shape))
        assert [tuple(own.shape) for own in found] == [(2, *own) for own in latents]
        assert net.decoder(found).shape == (2, 1, *shape)


def test_printed_networks_are_bounded_and_fair_ones_are_not() -> None:
    image = 100 * torch.randn(2, 1, 16, 16)
    for bounded in (True, False):
        design = Design("resnet", 2, 2, 1, bounded)
        net = with_tensors(design, initial_tensors(design, 0))
        (latent,) = net.encoder(image)
        values = net.decoder([1e6 * latent])
        assert bool((latent >= 0).all()) == bounded
        assert bool((values.abs() <= 1).all()) == bounded


@pytest.mark.parametrize(("net", "shape"), NETS)
@pytest.mark.parametrize("bounded", [True, False])
def test_gradients_reach_every_weight(net: NetName, shape: tuple[int, ...], bounded: bool) -> None:
    design = Design(net, 3, 2, 2, bounded, slope=0.0 if bounded else 0.9)
    network = with_tensors(design, initial_tensors(design, 0)).train()
    images = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 1, *shape))).float()
    latents = network.encoder(images)
    loss = torch.square(network.decoder(latents) - images).mean()
    if not bounded:
        loss = loss + 1e-3 * network.prior.bits(latents)
    loss.backward()
    for name, weight in network.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        assert weight.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("design", "shape"),
    [
        (Design("resnet", 6, 2, 3, bounded=False, slope=0.9), (256, 256)),
        (Design("unet", 6, 2, 3, bounded=False, slope=0.9), (256, 256)),
        (Design("cnn", 5, 2, 0, bounded=False, slope=0.9), (65536,)),
    ],
    ids=["resnet", "unet", "cnn"],
)
def test_fair_networks_begin_as_a_projection(design: Design, shape: tuple[int, ...]) -> None:
    image = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 1, *shape))).float()
    network = with_tensors(design, initial_tensors(design, 0)).train()
    with torch.no_grad():
        found = network.decoder(network.encoder(image))
    cosine = (found * image).sum() / found.norm() / image.norm()
    # on random directions, as many as latents: the root of their share
    assert 0.3 * design.latent_share**0.5 < cosine < 1.2 * design.latent_share**0.5
    assert (image - found).norm() < image.norm()


def test_initial_weights_depend_on_the_seed_alone() -> None:
    design = Design("unet", 3, 2, 1, bounded=False)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = initial_tensors(design, 7)
    assert torch.equal(torch.get_rng_state(), before), "torch's own generator was used"
    torch.manual_seed(2)
    again, other = initial_tensors(design, 7), initial_tensors(design, 8)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not all(np.array_equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("shape", [(3, 1, 16, 24), (2, 1, 6, 6), (2, 1, 64), (1, 1, 10)])
@pytest.mark.parametrize("kernel", [3, 7])
def test_one_channel_convolutions_are_torchs(shape: tuple[int, ...], kernel: int) -> None:
    rng = np.random.default_rng(kernel)
    x = torch.from_numpy(rng.standard_normal(shape)).requires_grad_()
    plain = functional.conv2d if len(shape) == 4 else functional.conv1d
    ours = OneChannel(kernel, len(shape) - 2, bias=True).double()
    with torch.no_grad():
        ours.weight.copy_(torch.from_numpy(rng.standard_normal(ours.weight.shape)))
        ours.bias.fill_(0.3)
    wanted = plain(x, ours.weight, ours.bias, padding=kernel // 2)
    found = ours(x)
    torch.testing.assert_close(found, wanted)
    weights = torch.from_numpy(rng.standard_normal(shape))
    inputs = [x, ours.weight, ours.bias]
    for own, theirs in zip(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((wanted * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(own, theirs)


def test_the_prior_counts_bits() -> None:
    design = Design("resnet", 2, 2, 1, bounded=False)
    prior = with_tensors(design, initial_tensors(design, 0)).prior
    noise = torch.rand(1, 4, 50, 50, generator=torch.Generator().manual_seed(0)) - 0.5
    bits = [prior.bits([size * torch.ones_like(noise) + noise]).item() for size in (0, 2, 5)]
    assert 0 < bits[0] < bits[1] < bits[2]
    with torch.no_grad():
        prior.log_scale.fill_(-4)  # all but certain that it is zero
    assert prior.bits([0.2 * noise]).item() < 0.1 * bits[0]
