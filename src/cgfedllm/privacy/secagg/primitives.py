"""The cryptography of secure aggregation, each piece from a library.

Key agreement X25519 (RFC 7748), keys HKDF-SHA-256 (RFC 5869), sealing AES-256-GCM, masks AES-256 in
counter mode, secret sharing Shamir's over GF(2^128), a 32-byte secret in two halves.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from cgfedllm.errors import SecureAggregationError

KEY_BYTES = 32
"""Of private and public keys, of seeds and of shares of either."""
_NONCE, _TAG, _HALF = 12, 16, 16


def new_secret() -> bytes:
    """A private key or a seed, from the operating system."""
    return secrets.token_bytes(KEY_BYTES)


def public_key(private: bytes) -> bytes:
    """The public key of a private one."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, public: bytes, session: bytes, purpose: str) -> bytes:
    """A key that only the owners of two key pairs can work out, for one purpose in one session.

    Raises
    ------
    SecureAggregationError
        If the public key is none (a point of low order).
    """
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

    try:
        shared = X25519PrivateKey.from_private_bytes(private).exchange(
            X25519PublicKey.from_public_bytes(public)
        )
    except ValueError as error:
        raise SecureAggregationError(f"a peer's public key cannot be used: {error}") from None
    ends = b"".join(sorted((public_key(private), public)))
    return _derive(shared, session, purpose.encode() + ends)


def mask(secret: bytes, session: bytes, count: int, width: int) -> NDArray[np.uint32]:
    """Numbers of `width` bits that nobody without the secret can tell from random ones.

    Parameters
    ----------
    secret : bytes
        A seed or an agreed key. It makes one stream a session, so it must hide one thing only.
    session : bytes
        Of the round.
    count, width : int
        How many numbers, and their bits, at most 32.
    """
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    key = _derive(secret, session, b"mask")
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(4 * count))
    return np.frombuffer(stream, "<u4").astype(np.uint32) & np.uint32((1 << width) - 1)


def seal(key: bytes, text: bytes, about: bytes) -> bytes:
    """Encrypt and authenticate; `about` is authenticated too and not sent."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    nonce = secrets.token_bytes(_NONCE)
    return nonce + AESGCM(key).encrypt(nonce, text, about)


def sealed_size(length: int) -> int:
    """Bytes that `seal` makes of so many."""
    return _NONCE + length + _TAG


def unseal(key: bytes, sealed: bytes, about: bytes) -> bytes:
    """Inverse of `seal`.

    Raises
    ------
    SecureAggregationError
        If it was not sealed with this key for this purpose, or was changed since.
    """
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    try:
        return AESGCM(key).decrypt(sealed[:_NONCE], sealed[_NONCE:], about)
    except InvalidTag:
        raise SecureAggregationError("a peer's shares are not what it sealed") from None


def split(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Shares of 32 bytes; `threshold` of them give the secret back, fewer tell nothing of it."""
    from Crypto.Protocol.SecretSharing import Shamir

    halves = (
        Shamir.split(threshold, count, half, ssss=False)
        for half in (secret[:_HALF], secret[_HALF:])
    )
    return [first[1] + second[1] for first, second in zip(*halves, strict=True)]


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret of shares, by their place in what `split` gave; exactly the threshold of them."""
    from Crypto.Protocol.SecretSharing import Shamir

    return b"".join(
        Shamir.combine([(place + 1, share[half]) for place, share in shares.items()], ssss=False)
        for half in (slice(None, _HALF), slice(_HALF, None))
    )


def _derive(secret: bytes, session: bytes, info: bytes) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(SHA256(), KEY_BYTES, salt=session, info=b"cgfedllm secagg " + info).derive(secret)
