"""What was released under a budget, and the key its noise comes from: on its owner's disk.

::

    privacy.json   {"format", "version", "key": 64 hex digits, "releases": [[round, digest], ...]}

The noise of a release is a function of key, round and values. A round that is repeated after a
crash with the same values is then the same release, to the bit, and costs nothing more; with other
values the noise is fresh and it is another release, which the ledger counts. Reusing noise for
other values would give away their difference; not counting would spend what nobody has.
"""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path

from cgfedllm.adapter import Float32Array
from cgfedllm.errors import CheckpointError, PrivacyError
from cgfedllm.privacy.noise import KEY_BYTES, Float64Array, gaussians, uniforms
from cgfedllm.seeding import derive_seed
from cgfedllm.storage import read_json, write_json

FILE = "privacy.json"
"""Name of a ledger in its owner's folder."""

_FORMAT = "cgfedllm-privacy-ledger"
_VERSION = 1


class Ledger:
    """Releases of one owner in one run.

    Parameters
    ----------
    path : Path
        The file; made at the first release.
    limit : int
        Releases the budget allows.
    seed : int or None
        None: the key is drawn from the operating system and kept in the file. A number: the key is
        derived from it, so that a run can be repeated, and hides nothing from whoever knows it.
    owner : str
        Whose noise it is; with a seed, owners need different keys.

    Raises
    ------
    PrivacyError
        If the file is damaged: what was spent is then unknown.
    """

    def __init__(self, path: Path, limit: int, *, seed: int | None = None, owner: str = "") -> None:
        self._path = path
        self._limit = limit
        self._releases: list[tuple[int, str]] = []
        self._key = secrets.token_bytes(KEY_BYTES)
        if path.exists():
            self._read()
        if seed is not None:
            label = f"{derive_seed(seed, 'privacy', owner)}"
            self._key = hashlib.blake2b(label.encode(), digest_size=KEY_BYTES).digest()

    @property
    def releases(self) -> int:
        """How many there were."""
        return len(self._releases)

    def noise(self, values: Float32Array | Float64Array, round: int) -> Float64Array:
        """Standard normal numbers for one release, noted before they are handed out.

        Parameters
        ----------
        values : ndarray
            What is going to be hidden by them.
        round : int
            Of the run.

        Returns
        -------
        ndarray, float64
            As many as values, flat.

        Raises
        ------
        PrivacyError
            If the budget is spent.
        StorageError
            If the release cannot be noted.
        """
        content = hashlib.blake2b(values.tobytes(), key=self._key, digest_size=16)
        release = (round, content.hexdigest())
        if release not in self._releases:
            if len(self._releases) >= self._limit:
                raise PrivacyError(
                    f"the privacy budget is spent: {self._limit} releases were allowed and made "
                    f"(round {round} would be another; a round repeated with other values counts "
                    "again). Start a run with a budget of its own"
                )
            self._releases.append(release)
            self._write()
        return gaussians(self._key, values.size, "noise", round, content.digest())

    def uniforms(self, count: int, round: int) -> Float64Array:
        """Numbers between 0 and 1 for a secret draw of a round, the same when it is repeated."""
        if not self._path.exists():
            self._write()  # a repeated round must find the key
        return uniforms(self._key, count, "draw", round)

    def _read(self) -> None:
        try:
            tree = read_json(self._path)
            if (tree["format"], tree["version"]) != (_FORMAT, _VERSION):
                raise ValueError("another format")
            self._key = bytes.fromhex(tree["key"])
            self._releases = [(int(number), str(digest)) for number, digest in tree["releases"]]
            if len(self._key) != KEY_BYTES:
                raise ValueError("no key")
        except (CheckpointError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise PrivacyError(
                f"{self._path} is damaged ({error}), so what was spent of the privacy budget is "
                "unknown; start a new run with a budget of its own"
            ) from None

    def _write(self) -> None:
        tree = {
            "format": _FORMAT,
            "version": _VERSION,
            "key": self._key.hex(),
            "releases": [list(release) for release in self._releases],
        }
        write_json(self._path, tree, private=True)
