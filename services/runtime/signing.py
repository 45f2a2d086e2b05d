"""Ed25519: a service's own signing key, and the checking of everybody else's signatures.

Rules. The private key lies in the service's own folder in a file of mode 0600 and is never printed.
A key's id is the first 16 hexadecimal digits of its public key's SHA-256, so nobody can choose it.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from grafos_core import failure
from grafos_core.jws import VerifySignature
from grafos_proto.wire.credentials import read_private, write_file

KEY_ID_CHARS: Final = 16
PUBLIC_KEY_BYTES: Final = 32


class SigningKey:
    """One private key and what others know of it."""

    def __init__(self, secret: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(secret)
        self.public_key = self._key.public_key().public_bytes_raw()
        self.key_id = key_id_of(self.public_key)

    @classmethod
    def load(cls, path: Path) -> SigningKey:
        """The key in this file."""
        secret = read_private(path)
        if len(secret) != 32:
            raise failure.of("STORAGE", f"{path.name} holds no Ed25519 key")
        return cls(secret)

    @classmethod
    def make(cls, path: Path) -> SigningKey:
        """A fresh key, durable in this file before it is used."""
        secret = Ed25519PrivateKey.generate().private_bytes_raw()
        write_file(path, secret, mode=0o600)
        return cls(secret)

    def sign(self, message: bytes) -> bytes:
        return self._key.sign(message)


def key_id_of(public_key: bytes) -> str:
    """The id under which a public key is known. Refuses what is no Ed25519 key."""
    if len(public_key) != PUBLIC_KEY_BYTES:
        raise failure.of("RANGE", f"an Ed25519 public key has {PUBLIC_KEY_BYTES} bytes")
    return hashlib.sha256(public_key).hexdigest()[:KEY_ID_CHARS]


def verify(public_key: bytes, message: bytes, signature: bytes) -> bool:
    """Whether this key signed this message. Never raises."""
    key = _loaded(public_key)
    if key is None:
        return False
    try:
        key.verify(signature, message)
    except InvalidSignature:
        return False
    return True


def verifier(public_key: bytes) -> VerifySignature:
    return functools.partial(verify, public_key)


@functools.lru_cache(maxsize=1024)
def _loaded(public_key: bytes) -> Ed25519PublicKey | None:
    try:
        return Ed25519PublicKey.from_public_bytes(public_key)
    except ValueError:
        return None
