"""Independent seeds for every random choice, derived from the one in the configuration.

A choice is named ("batches", client, epoch), so adding one never shifts another, and a resumed
run needs no saved generator state: it derives the same numbers again.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(seed: int, *labels: str | int) -> int:
    """A 63-bit seed for the choice named by `labels`."""
    text = "\x1f".join([str(seed), *map(str, labels)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *labels: str | int) -> np.random.Generator:
    """A numpy generator for the choice named by `labels`."""
    return np.random.Generator(np.random.Philox(derive_seed(seed, *labels)))
