"""Reading and proving certificates: whose it is, over which key, until when.

Rules. TLS keys are P-256, because gRPC's TLS takes no Ed25519 certificate; tokens and receipts are
signed with Ed25519 keys, which never stand in a certificate. A token is bound to a key, not to a
certificate: the thumbprint is the SHA-256 of the SubjectPublicKeyInfo, so that a certificate
renewed over the same key keeps every lease. No clock is read here; whoever decides says `now_ms`.

    root (years, may be offline) ── signs ──► intermediate ── signs ──► leaf (an hour)
    the bundle that peers trust               └───── the chain that a peer presents ─────┘
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from grafos_core import failure, spiffe
from grafos_core.spiffe import Identity

PEM_BYTES_MAX = 16_384
"""A chain of three P-256 certificates has about 2,500 bytes."""
CHAIN_CERTIFICATES_MAX = 3
PARSED_MAX = 1_024
"""Certificates whose parsed form is kept: about the peers of one service."""

_UNREADABLE = (
    ValueError,
    TypeError,
    OverflowError,
    UnsupportedAlgorithm,
    InvalidSignature,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.UnsupportedGeneralNameType,
)

PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey
TlsKey = ec.EllipticCurvePrivateKey


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a decision needs to know of one certificate."""

    identity: Identity
    thumbprint: str
    """Of its key; see `thumbprint`."""
    not_before_ms: int
    not_after_ms: int

    def check_fresh(self, now_ms: int) -> None:
        """Refuse unless the certificate is in force; ask at every call, not per connection."""
        if now_ms >= self.not_after_ms:
            raise failure.of("CERT_EXPIRED")
        if now_ms < self.not_before_ms:
            raise failure.of("IDENTITY", "the certificate is not valid yet")


def new_tls_key() -> TlsKey:
    """A fresh P-256 key."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: TlsKey) -> bytes:
    """A private key as it is stored: PKCS #8, not encrypted, for a file of mode 0600."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def load_key(pem: bytes) -> TlsKey:
    """The P-256 key in `pem`. The refusal carries nothing of what was read."""
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise failure.of("IDENTITY", "the private key cannot be read") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp256r1":
        raise failure.of("IDENTITY", "the private key is not a P-256 key")
    return key


def public_der(key: PublicKey) -> bytes:
    """The SubjectPublicKeyInfo, in DER."""
    return key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def thumbprint(key: PublicKey) -> str:
    """SHA-256 of the SubjectPublicKeyInfo, base64url without padding: 43 characters."""
    return base64url(hashlib.sha256(public_der(key)).digest())


def base64url(data: bytes) -> str:
    """RFC 4648, section 5, without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of a whole certificate, in hexadecimal: what pins an authority."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def pem_of(*certificates: x509.Certificate) -> bytes:
    """Certificates, one after the other."""
    return b"".join(each.public_bytes(serialization.Encoding.PEM) for each in certificates)


def load_certificates(pem: bytes) -> list[x509.Certificate]:
    """All certificates in `pem`, at least one, in their order."""
    if len(pem) > PEM_BYTES_MAX:
        raise failure.of("MESSAGE_SIZE", "certificates")
    with _readable("the certificate"):
        return x509.load_pem_x509_certificates(pem)


@functools.lru_cache(maxsize=PARSED_MAX)
def parse(pem: bytes) -> Certificate:
    """What the first certificate in `pem` says. Parsed once per certificate, not once per call."""
    return _read(load_certificates(pem)[0])


def _read(leaf: x509.Certificate) -> Certificate:
    """Not kept: so what strangers send does not push the certificates of peers out of memory."""
    identity, key = identity_of(leaf), _p256(leaf)
    with _readable("the certificate"):
        begin, end = leaf.not_valid_before_utc, leaf.not_valid_after_utc
    return Certificate(identity, thumbprint(key), _ms(begin), _ms(end))


def not_after_ms(pem: bytes) -> int:
    """The end of the first certificate's life, milliseconds of the wall clock."""
    return parse(pem).not_after_ms


def identity_of(certificate: x509.Certificate) -> Identity:
    """The one SPIFFE id in a certificate; none or two are refused."""
    ids = _uris(certificate)
    if len(ids) != 1:
        raise failure.of("IDENTITY", "a certificate has exactly one SPIFFE id")
    try:
        return spiffe.parse_id(ids[0])
    except failure.Incompatible as refusal:
        raise failure.of("IDENTITY", refusal.detail) from None


def trust_domain_of(root: x509.Certificate) -> str:
    """The trust domain that a root certificate stands for."""
    match _uris(root):
        case [uri] if uri.startswith(spiffe.SCHEME):
            return spiffe.check_trust_domain(uri.removeprefix(spiffe.SCHEME))
    raise failure.of("IDENTITY", "the root certificate names no trust domain")


def verify_chain(chain_pem: bytes, bundle_pem: bytes, now_ms: int) -> Certificate:
    """What the leaf of `chain_pem` says, once it is proved to come from a root in `bundle_pem`.

    For the places where no TLS library has looked: files, the identity socket, local sockets.
    """
    chain = load_certificates(chain_pem)
    if len(chain) > CHAIN_CERTIFICATES_MAX:
        raise failure.of("IDENTITY", "the chain is too long")
    leaf = _read(chain[0])
    leaf.check_fresh(now_ms)
    below = chain[0]
    for authority in chain[1:]:
        _check_issued(below, by=authority, now_ms=now_ms)
        below = authority
    _check_anchored(below, load_certificates(bundle_pem), leaf.identity.trust_domain, now_ms)
    return leaf


def prove(key: TlsKey, domain: str, message: bytes) -> bytes:
    """A signature that shows possession of `key`, good for one purpose, its `domain`, only."""
    return key.sign(_framed(domain, message), ec.ECDSA(hashes.SHA256()))


def check_proof(certificate: x509.Certificate, domain: str, message: bytes, proof: bytes) -> None:
    """Refuse unless `proof` was made by `prove` with the key of `certificate`."""
    try:
        _p256(certificate).verify(proof, _framed(domain, message), ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise failure.of("IDENTITY", "the proof of the key is wrong") from None


def signing_request(key: TlsKey) -> bytes:
    """A request for a certificate over `key`. It names nobody: the authority decides who asks."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def requested_key(csr_pem: bytes) -> ec.EllipticCurvePublicKey:
    """The key that a request is for, once the request proves possession of it."""
    if len(csr_pem) > PEM_BYTES_MAX:
        raise failure.of("MESSAGE_SIZE", "certificate request")
    with _readable("the certificate request"):
        request = x509.load_pem_x509_csr(csr_pem)
        signed = request.is_signature_valid
        key = request.public_key()
    if not signed or not isinstance(key, ec.EllipticCurvePublicKey):
        raise failure.of("IDENTITY", "the certificate request does not prove a P-256 key")
    return check_curve(key)


def check_curve(key: ec.EllipticCurvePublicKey) -> ec.EllipticCurvePublicKey:
    """Give the key back if it is on P-256."""
    if key.curve.name != "secp256r1":
        raise failure.of("IDENTITY", "the key is not a P-256 key")
    return key


def _check_issued(below: x509.Certificate, *, by: x509.Certificate, now_ms: int) -> None:
    with _readable("the chain"):
        below.verify_directly_issued_by(by)
        is_authority = by.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        begin_ms, end_ms = _ms(by.not_valid_before_utc), _ms(by.not_valid_after_utc)
    if not is_authority:
        raise failure.of("IDENTITY", "the chain passes through a certificate that may not sign")
    if not begin_ms <= now_ms < end_ms:
        raise failure.of("CERT_EXPIRED", "an authority in the chain is not in force")


def _check_anchored(
    below: x509.Certificate, roots: list[x509.Certificate], trust_domain: str, now_ms: int
) -> None:
    with _readable("the issuer in the certificate"):
        issuer = below.issuer
    for root in roots:
        if root.subject == issuer and trust_domain_of(root) == trust_domain:
            return _check_issued(below, by=root, now_ms=now_ms)
    raise failure.of("IDENTITY", "the chain does not lead to this fabric's root")


def _uris(certificate: x509.Certificate) -> list[str]:
    with _readable("the names in the certificate"):
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return names.get_values_for_type(x509.UniformResourceIdentifier)


def _p256(certificate: x509.Certificate) -> ec.EllipticCurvePublicKey:
    with _readable("the key in the certificate"):
        key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise failure.of("IDENTITY", "the key is not a P-256 key")
    return check_curve(key)


@contextmanager
def _readable(what: str) -> Generator[None, None, None]:
    """Everything that the library says of what strangers made, in our own words."""
    try:
        yield
    except _UNREADABLE:
        raise failure.of("IDENTITY", f"{what} cannot be read or does not prove itself") from None


def _framed(domain: str, message: bytes) -> bytes:
    return domain.encode("ascii") + b"\0" + message


def _ms(moment: datetime) -> int:
    return int(moment.timestamp()) * 1000
