"""Ed25519 keys of a virtual fabric, drawn from its dice: the same seed, the same signatures."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A private key and what others need to know of it."""

    key_id: str
    public: bytes
    private: Ed25519PrivateKey

    @staticmethod
    def draw(dice: random.Random) -> SigningKey:
        private = Ed25519PrivateKey.from_private_bytes(dice.randbytes(32))
        public = private.public_key().public_bytes_raw()
        return SigningKey(hashlib.sha256(public).hexdigest()[:16], public, private)

    def sign(self, message: bytes) -> bytes:
        return self.private.sign(message)

    def verify(self, message: bytes, signature: bytes) -> bool:
        try:
            self.private.public_key().verify(signature, message)
        except InvalidSignature:
            return False
        return True


def hex_of(dice: random.Random) -> str:
    """128 random bits, as ids, nonces and incarnations are written."""
    return f"{dice.getrandbits(128):032x}"
