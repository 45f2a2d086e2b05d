"""The certificate authority of a fabric: who signs that a key belongs to a name.

`grafos up` makes one for itself on its first start, for development; `grafos ca init` makes one on
purpose, whose root key can then be taken away and kept offline.

Rules. Nothing is signed for a key whose possession was not proved. A leaf lives an hour and never
outlives the intermediate that signs it; there is no revocation list, because an hour is short and a
token is revoked at the node. A leaf may serve only if it is a node's or a service's: a holder's
certificate cannot pass for a service. Each file is replaced as a whole, and `authority.json`, with
the schema's version, is written last: a folder without it is no authority, and `init` may begin
again.

    authority.json                 schema, trust domain, life of an intermediate
    root.crt, root.key             ten years; the key is needed for new intermediates only
    intermediate.pem               key and certificate; 30 days in development, else 24 hours
    own/                           the certificate that the join listener shows
    join-tokens.json               see _join_tokens.py
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from grafos._join_tokens import TTL_MS_DEFAULT as JOIN_TTL_MS_DEFAULT
from grafos._join_tokens import JoinTokens, load_schema, locked
from grafos_core import failure, spiffe
from grafos_core.spiffe import Identity, Role
from grafos_proto.wire import certificates
from grafos_proto.wire import identity as wire
from grafos_proto.wire.certificates import TlsKey
from grafos_proto.wire.credentials import (
    Credentials,
    IdentityFiles,
    make_private_directory,
    read_private,
    write_file,
)

SCHEMA = 1
DAY_MS = 86_400_000
TRUST_DOMAIN_DEFAULT = "grafos.local"
ROOT_TTL_MS = 3_653 * DAY_MS
"""Ten years."""
INTERMEDIATE_TTL_MS_DEVELOPMENT = 30 * DAY_MS
INTERMEDIATE_TTL_MS_PRODUCTION = DAY_MS
LEAF_TTL_MS_DEFAULT = 3_600_000
LEAF_TTL_MS_MAX = 30 * DAY_MS
BACKDATE_MS = 60_000
"""So that a peer whose clock is a little behind accepts what was signed just now."""


@dataclass(frozen=True, slots=True)
class _Signer:
    """A certificate that may sign others, with its key."""

    certificate: x509.Certificate
    key: TlsKey = field(repr=False)

    @property
    def not_after_ms(self) -> int:
        return int(self.certificate.not_valid_after_utc.timestamp()) * 1000


class Authority:
    """One fabric's authority, in one folder. Holds the intermediate's key, never the root's."""

    def __init__(
        self,
        directory: Path,
        trust_domain: str,
        *,
        root: x509.Certificate,
        signer: _Signer,
        signer_ttl_ms: int,
    ) -> None:
        self._directory, self.trust_domain = directory, trust_domain
        self._root, self._signer, self._signer_ttl_ms = root, signer, signer_ttl_ms
        self.tokens = JoinTokens(directory)

    @classmethod
    def init(
        cls,
        directory: Path,
        *,
        now_ms: int,
        trust_domain: str = TRUST_DOMAIN_DEFAULT,
        root_directory: Path | None = None,
        intermediate_ttl_ms: int = INTERMEDIATE_TTL_MS_DEVELOPMENT,
    ) -> Authority:
        """Make root and intermediate. With `root_directory` the root's key is put there instead."""
        spiffe.check_trust_domain(trust_domain)
        make_private_directory(directory)
        with locked(directory / "authority"):
            if (directory / "authority.json").exists():
                raise failure.of("INVALID", "this folder holds an authority already")
            root = _make_root(trust_domain, now_ms)
            away = root_directory or directory
            make_private_directory(away)
            write_file(away / "root.key", certificates.key_pem(root.key), mode=0o600)
            write_file(directory / "root.crt", certificates.pem_of(root.certificate), mode=0o644)
            _make_intermediate(directory, root, intermediate_ttl_ms, now_ms)
            settings = {
                "schema": SCHEMA, "trust_domain": trust_domain,
                "intermediate_ttl_ms": intermediate_ttl_ms,
            }  # fmt: skip
            text = json.dumps(settings, sort_keys=True, indent=1).encode()
            write_file(directory / "authority.json", text, mode=0o600)
        return cls.open(directory, now_ms=now_ms)

    @classmethod
    def open(cls, directory: Path, *, now_ms: int) -> Authority:
        """The authority in this folder; renews its intermediate if that is due and possible."""
        settings = load_schema(read_private(directory / "authority.json"), SCHEMA, "authority")
        root = _load_certificate(directory / "root.crt")
        authority = cls(
            directory,
            certificates.trust_domain_of(root),
            root=root,
            signer=_load_signer(directory),
            signer_ttl_ms=int(settings["intermediate_ttl_ms"]),
        )
        authority.refresh(now_ms)
        return authority

    @classmethod
    def for_development(cls, directory: Path, *, now_ms: int) -> Authority:
        """The authority in this folder, made now if there is none."""
        if not (directory / "authority.json").exists():
            try:
                return cls.init(directory, now_ms=now_ms)
            except failure.Incompatible:
                if not (directory / "authority.json").exists():
                    raise  # else another process was faster: its authority is ours too
        return cls.open(directory, now_ms=now_ms)

    @property
    def bundle_pem(self) -> bytes:
        """What all members trust."""
        return certificates.pem_of(self._root)

    @property
    def pin(self) -> str:
        """What a join token carries of the root."""
        return certificates.fingerprint(self._root)[: wire.PIN_CHARS]

    @property
    def not_after_ms(self) -> int:
        """Until when it can sign without the root."""
        return self._signer.not_after_ms

    def refresh(self, now_ms: int) -> bool:
        """In the second half of the intermediate's life take up the one that an operator has made
        meanwhile, or make one if the root's key is here; True if there is a new one now."""
        due_ms = self._signer.not_after_ms - self._signer_ttl_ms // 2
        if now_ms < due_ms:
            return False
        before_ms, self._signer = self._signer.not_after_ms, _load_signer(self._directory)
        if self._signer.not_after_ms > before_ms:
            return True
        if not (self._directory / "root.key").exists():
            return False
        self.renew(self._directory, now_ms)
        return True

    def renew(self, root_directory: Path, now_ms: int) -> None:
        """A new intermediate, now. What the old one signed stays good for its time.

        Raises:
            Denied: IDENTITY, if the root's key is not there or is another authority's.
        """
        key = certificates.load_key(read_private(root_directory / "root.key"))
        if certificates.thumbprint(key.public_key()) != certificates.thumbprint(
            certificates.check_curve(cast(ec.EllipticCurvePublicKey, self._root.public_key()))
        ):
            raise failure.of("IDENTITY", "that root key is another authority's")
        root = _Signer(self._root, key)
        with locked(self._directory / "authority"):
            self._signer = _make_intermediate(self._directory, root, self._signer_ttl_ms, now_ms)

    def issue(
        self,
        key: ec.EllipticCurvePublicKey,
        identity: Identity,
        *,
        ttl_ms: int = LEAF_TTL_MS_DEFAULT,
        now_ms: int,
    ) -> bytes:
        """The chain (leaf, intermediate) for a key whose possession the caller has checked."""
        if not 1_000 <= ttl_ms <= LEAF_TTL_MS_MAX:
            raise failure.of("RANGE", f"a certificate lives 1,000 to {LEAF_TTL_MS_MAX} ms")
        if identity.trust_domain != self.trust_domain:
            raise failure.of("IDENTITY", "this authority signs for its own trust domain only")
        self.refresh(now_ms)
        if now_ms >= self._signer.not_after_ms:
            raise failure.of(
                "CERT_EXPIRED", "the intermediate ran out: `grafos ca renew --root-dir DIR`"
            )
        not_after_ms = min(now_ms + ttl_ms, self._signer.not_after_ms)
        leaf = _leaf(self._signer, certificates.check_curve(key), identity, now_ms, not_after_ms)
        return certificates.pem_of(leaf, self._signer.certificate)

    def sign_request(
        self, csr_pem: bytes, identity: Identity, *, ttl_ms: int = LEAF_TTL_MS_DEFAULT, now_ms: int
    ) -> bytes:
        """The chain for a request that proves its key. Of the request only the key is used."""
        key = certificates.requested_key(csr_pem)
        return self.issue(key, identity, ttl_ms=ttl_ms, now_ms=now_ms)

    def check_renewal(
        self, csr_pem: bytes, chain_pem: bytes, proof: bytes, *, now_ms: int
    ) -> Identity:
        """Whose renewal this is: the presented certificate is ours, in force, and its key asks."""
        leaf = certificates.verify_chain(chain_pem, self.bundle_pem, now_ms)
        presented = certificates.load_certificates(chain_pem)[0]
        certificates.check_proof(presented, wire.RENEW_DOMAIN, csr_pem + chain_pem, proof)
        if certificates.thumbprint(certificates.requested_key(csr_pem)) != leaf.thumbprint:
            raise failure.of("IDENTITY", "a renewal is over the same key")
        return leaf.identity

    def own_credentials(self, *, now_ms: int) -> IdentityFiles:
        """What the join listener shows: the identity `/service/identity`, renewed at half-life."""
        files = IdentityFiles(self._directory / "own")
        try:
            files.load().check(now_ms + LEAF_TTL_MS_DEFAULT // 2)
        except failure.Denied:  # missing, of an earlier authority, or in its second half
            identity = Identity(self.trust_domain, Role.SERVICE, None, "identity")
            key = files.key()
            chain = self.issue(key.public_key(), identity, now_ms=now_ms)
            files.save(Credentials(certificates.key_pem(key), chain, self.bundle_pem))
        return files


def ca_init(
    directory: Path,
    *,
    now_ms: int,
    trust_domain: str = TRUST_DOMAIN_DEFAULT,
    root_directory: Path | None = None,
    intermediate_ttl_ms: int = INTERMEDIATE_TTL_MS_PRODUCTION,
) -> Authority:
    """`grafos ca init`."""
    return Authority.init(
        directory, now_ms=now_ms, trust_domain=trust_domain, root_directory=root_directory,
        intermediate_ttl_ms=intermediate_ttl_ms,
    )  # fmt: skip


def ca_renew(directory: Path, root_directory: Path, *, now_ms: int) -> Authority:
    """`grafos ca renew`; a fabric that runs takes it up by itself."""
    authority = Authority.open(directory, now_ms=now_ms)
    authority.renew(root_directory, now_ms)
    return authority


def identity_issue(
    ca_directory: Path,
    spiffe_id: str,
    out_directory: Path,
    *,
    ttl_ms: int = LEAF_TTL_MS_DEFAULT,
    now_ms: int,
) -> Credentials:
    """`grafos identity issue`: key (kept if there is one) and certificate in a folder."""
    identity = spiffe.parse_id(spiffe_id)
    authority = Authority.open(ca_directory, now_ms=now_ms)
    files = IdentityFiles(out_directory)
    key = files.key()
    chain = authority.issue(key.public_key(), identity, ttl_ms=ttl_ms, now_ms=now_ms)
    files.save(Credentials(certificates.key_pem(key), chain, authority.bundle_pem))
    return files()


def node_token(
    ca_directory: Path, node_id: str, *, ttl_ms: int = JOIN_TTL_MS_DEFAULT, now_ms: int
) -> str:
    """`grafos node token`: what the machine that is to become `node_id` joins with."""
    authority = Authority.open(ca_directory, now_ms=now_ms)
    return authority.tokens.create(node_id, authority.pin, ttl_ms=ttl_ms, now_ms=now_ms)


def node_join(address: str, token: str, out_directory: Path, *, now_ms: int) -> Credentials:
    """`grafos node join`: on the machine that joins; its key never leaves it."""
    files = IdentityFiles(out_directory)
    files.save(wire.join(address, token, files.key(), now_ms=now_ms))
    return files()


def _make_root(trust_domain: str, now_ms: int) -> _Signer:
    key = certificates.new_tls_key()
    name = _name(f"grafos root {secrets.token_hex(8)}")
    builder = _authority_builder(key, trust_domain, path_length=1)
    builder = _in_force(builder, now_ms, now_ms + ROOT_TTL_MS)
    builder = builder.subject_name(name).issuer_name(name)
    return _Signer(builder.sign(key, hashes.SHA256()), key)


def _make_intermediate(directory: Path, root: _Signer, ttl_ms: int, now_ms: int) -> _Signer:
    """Key and certificate go into one file, so that no crash leaves two that do not match."""
    key = certificates.new_tls_key()
    trust_domain = certificates.trust_domain_of(root.certificate)
    builder = _authority_builder(key, trust_domain, path_length=0)
    builder = _in_force(builder, now_ms, min(now_ms + ttl_ms, root.not_after_ms))
    builder = builder.subject_name(_name(f"grafos intermediate {secrets.token_hex(8)}"))
    builder = builder.issuer_name(root.certificate.subject).add_extension(
        _issuer_key(root), critical=False
    )
    signer = _Signer(builder.sign(root.key, hashes.SHA256()), key)
    pair = certificates.key_pem(key) + certificates.pem_of(signer.certificate)
    write_file(directory / "intermediate.pem", pair, mode=0o600)
    return signer


def _leaf(
    signer: _Signer,
    key: ec.EllipticCurvePublicKey,
    identity: Identity,
    now_ms: int,
    not_after_ms: int,
) -> x509.Certificate:
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(str(identity))]
    uses = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if identity.role in (Role.NODE, Role.SERVICE):
        names.append(x509.DNSName(spiffe.server_name(identity)))
        uses.append(ExtendedKeyUsageOID.SERVER_AUTH)
    builder = x509.CertificateBuilder().public_key(key)
    builder = _in_force(builder, now_ms, not_after_ms)
    builder = builder.subject_name(_name(f"grafos {identity.role.value}"))
    builder = builder.issuer_name(signer.certificate.subject)
    for extension, critical in (
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_key_usage(signs_certificates=False), True),
        (x509.ExtendedKeyUsage(uses), False),
        (x509.SubjectAlternativeName(names), False),
        (x509.SubjectKeyIdentifier.from_public_key(key), False),
        (_issuer_key(signer), False),
    ):
        builder = builder.add_extension(extension, critical=critical)
    return builder.sign(signer.key, hashes.SHA256())


def _authority_builder(
    key: TlsKey, trust_domain: str, *, path_length: int
) -> x509.CertificateBuilder:
    uri = x509.UniformResourceIdentifier(f"{spiffe.SCHEME}{trust_domain}")
    return (
        x509.CertificateBuilder()
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectAlternativeName([uri]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _in_force(
    builder: x509.CertificateBuilder, now_ms: int, not_after_ms: int
) -> x509.CertificateBuilder:
    """Whole seconds, as certificates have them; rounded so that none lives longer than asked."""
    return (
        builder.serial_number(x509.random_serial_number())
        .not_valid_before(_moment(now_ms - BACKDATE_MS))
        .not_valid_after(_moment(not_after_ms))
    )


def _moment(ms: int) -> datetime:
    return datetime.fromtimestamp(ms // 1000, UTC)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _issuer_key(signer: _Signer) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.key.public_key())


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _load_certificate(path: Path) -> x509.Certificate:
    try:
        return certificates.load_certificates(path.read_bytes())[0]
    except OSError as error:
        raise failure.of("STORAGE", f"{path.name}: {error.strerror}") from None


def _load_signer(directory: Path) -> _Signer:
    pair = read_private(directory / "intermediate.pem")
    return _Signer(certificates.load_certificates(pair)[0], certificates.load_key(pair))
