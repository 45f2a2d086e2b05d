"""Throwaway certificates for a peer, so that it is measured under mutual TLS as we are.

Rules. Keys are P-256, as ours. They live for a day, in the folder of the run, and go with it.
"""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

LIFE: Final = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Pair:
    """A key and its certificate, as files in PEM."""

    key: Path
    certificate: Path


@dataclass(frozen=True, slots=True)
class Certificates:
    root: Path
    server: Pair
    client: Pair


class _Authority:
    """Signs two leaves, then is forgotten."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = _named("measurements")
        usage = x509.BasicConstraints(ca=True, path_length=0)
        builder = _builder(self.name, self.name, self.key.public_key())
        self.certificate = builder.add_extension(usage, critical=True).sign(
            self.key, hashes.SHA256()
        )

    def leaf(self, common_name: str, usage: x509.ObjectIdentifier, folder: Path) -> Pair:
        key = ec.generate_private_key(ec.SECP256R1())
        here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        made = (
            _builder(_named(common_name), self.name, key.public_key())
            .add_extension(here, critical=False)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        pair = Pair(folder / f"{common_name}.key", folder / f"{common_name}.crt")
        _write(
            pair.key,
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
        )
        _write(pair.certificate, made.public_bytes(serialization.Encoding.PEM))
        return pair


def make(folder: Path) -> Certificates:
    """An authority, a server's pair for loopback and a client's pair, as files in `folder`."""
    authority = _Authority()
    root = folder / "root.crt"
    _write(root, authority.certificate.public_bytes(serialization.Encoding.PEM))
    return Certificates(
        root,
        authority.leaf("server", ExtendedKeyUsageOID.SERVER_AUTH, folder),
        authority.leaf("client", ExtendedKeyUsageOID.CLIENT_AUTH, folder),
    )


def _named(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + LIFE)
    )


def _write(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
