"""Signatures with TLS keys in the form that slips have: ES256 (RFC 7518, section 3.4).

Rules. A public key is its point, 65 bytes: 4, x, y; a signature is r and s, 32 bytes each. What is
no point on P-256 and what is no signature verifies as false, and nothing here raises on input.
"""

from __future__ import annotations

import functools
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)

from grafos_core.share import Signer
from grafos_proto.wire.certificates import TlsKey

KEYS_MAX: Final = 1_024
"""Points that are kept as keys: about the holders who share at one node."""
_ALGORITHM: Final = ec.ECDSA(hashes.SHA256())


def point_of(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(
        serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
    )


def signer(key: TlsKey) -> Signer:
    """The key as the core takes it."""
    return Signer(point_of(key.public_key()), functools.partial(sign, key))


def sign(key: TlsKey, message: bytes) -> bytes:
    r, s = decode_dss_signature(key.sign(message, _ALGORITHM))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def verify(point: bytes, message: bytes, signature: bytes) -> bool:
    """Whether the key of `point` signed this message. Never raises."""
    key = _loaded(point)
    if key is None or len(signature) != 64:
        return False
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    try:
        key.verify(encode_dss_signature(r, s), message, _ALGORITHM)
    except InvalidSignature:
        return False
    return True


@functools.lru_cache(maxsize=KEYS_MAX)
def _loaded(point: bytes) -> ec.EllipticCurvePublicKey | None:
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point)
    except ValueError:
        return None
