"""Model, data, training and test: nothing here knows of Flower or of codecs."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Rows = tuple[Tensor, Tensor]

HELD_OUT = 360
BATCH = 16


class Net(nn.Sequential):
    """A small convolutional network with batch normalisation; 85,130 parameters."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )


@cache
def _digits() -> Rows:
    """1,797 images of 8 x 8, shipped with scikit-learn, in an order of our own."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    pixels = torch.tensor(images[order] / 16, dtype=torch.float32)
    return pixels.view(-1, 1, 8, 8), torch.tensor(labels[order])


def held_out() -> Rows:
    """What nobody trains on."""
    images, labels = _digits()
    return images[:HELD_OUT], labels[:HELD_OUT]


def partition(index: int, count: int) -> Rows:
    """One client's rows: half of them of any digit, half of few."""
    images, labels = _digits()
    rest = torch.arange(HELD_OUT, len(labels))
    mixed, sorted_ = rest[::2], rest[1::2]
    sorted_ = sorted_[labels[sorted_].argsort(stable=True)]
    own = torch.cat([mixed.tensor_split(count)[index], sorted_.tensor_split(count)[index]])
    return images[own], labels[own]


def train(model: nn.Module, rows: Rows, *, epochs: int, lr: float, seed: int) -> float:
    """Train in place; the mean loss of the last epoch."""
    images, labels = rows
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    model.train()
    losses: list[float] = []
    for _ in range(epochs):
        losses = []
        for batch in torch.randperm(len(labels), generator=generator).split(BATCH):
            optimizer.zero_grad()
            loss = cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.inference_mode()
def test(model: nn.Module, rows: Rows) -> tuple[float, float]:
    """Mean loss and accuracy."""
    images, labels = rows
    model.eval()
    logits = model(images)
    accuracy = (logits.argmax(1) == labels).float().mean()
    return cross_entropy(logits, labels).item(), accuracy.item()
