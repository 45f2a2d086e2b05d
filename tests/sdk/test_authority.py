"""The authority: what it signs, what it refuses, and what survives on disk."""

from __future__ import annotations

import base64
import json
import logging
import os
import random
import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from grafos import _authority
from grafos._authority import DAY_MS, Authority
from grafos_core import failure, spiffe
from grafos_proto.wire import certificates
from grafos_proto.wire.credentials import Credentials, IdentityFiles
from grafos_proto.wire.identity import RENEW_DOMAIN

NOW_MS = 1_700_000_000_000
HOUR_MS = 3_600_000
LEDGER = spiffe.parse_id("spiffe://grafos.local/service/ledger")
HOLDER = spiffe.parse_id("spiffe://grafos.local/tenant/t/holder/h")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.init(tmp_path / "ca", now_ms=NOW_MS)


def test_what_is_issued_leads_to_the_root_and_says_who_over_which_key_until_when(
    authority: Authority,
) -> None:
    key = certificates.new_tls_key()
    chain = authority.issue(key.public_key(), LEDGER, now_ms=NOW_MS)
    leaf = certificates.verify_chain(chain, authority.bundle_pem, NOW_MS)
    assert leaf.identity == LEDGER
    assert leaf.thumbprint == certificates.thumbprint(key.public_key())
    assert leaf.not_after_ms == NOW_MS + HOUR_MS
    assert certificates.not_after_ms(chain) == NOW_MS + HOUR_MS


def test_a_certificate_is_refused_before_its_time_and_from_its_last_instant_on(
    authority: Authority,
) -> None:
    chain = authority.issue(certificates.new_tls_key().public_key(), LEDGER, now_ms=NOW_MS)
    certificates.verify_chain(chain, authority.bundle_pem, NOW_MS + HOUR_MS - 1)
    with pytest.raises(failure.Denied) as late:
        certificates.verify_chain(chain, authority.bundle_pem, NOW_MS + HOUR_MS)
    assert late.value.code == "CERT_EXPIRED"
    with pytest.raises(failure.Denied) as early:
        certificates.verify_chain(chain, authority.bundle_pem, NOW_MS - 61_000)
    assert early.value.code == "IDENTITY"


def test_a_chain_of_another_authority_is_refused(authority: Authority, tmp_path: Path) -> None:
    stranger = Authority.init(tmp_path / "other", now_ms=NOW_MS)
    chain = stranger.issue(certificates.new_tls_key().public_key(), LEDGER, now_ms=NOW_MS)
    with pytest.raises(failure.Denied):
        certificates.verify_chain(chain, authority.bundle_pem, NOW_MS)


def test_a_leaf_cannot_sign_for_anybody(authority: Authority) -> None:
    key = certificates.new_tls_key()
    chain = authority.issue(key.public_key(), LEDGER, now_ms=NOW_MS)
    parent, intermediate = certificates.load_certificates(chain)
    forged = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(parent.subject)
        .public_key(certificates.new_tls_key().public_key())
        .serial_number(1)
        .not_valid_before(parent.not_valid_before_utc)
        .not_valid_after(parent.not_valid_after_utc)
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.UniformResourceIdentifier("spiffe://grafos.local/operator/me")]
            ),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    for chained in ((forged, parent, intermediate), (forged, parent)):
        with pytest.raises(failure.Denied) as refusal:
            certificates.verify_chain(certificates.pem_of(*chained), authority.bundle_pem, NOW_MS)
        assert refusal.value.code == "IDENTITY"


def test_only_nodes_and_services_may_serve(authority: Authority) -> None:
    def uses(identity: spiffe.Identity) -> tuple[bool, list[str]]:
        key = certificates.new_tls_key().public_key()
        leaf = certificates.load_certificates(authority.issue(key, identity, now_ms=NOW_MS))[0]
        extended = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        serves = ExtendedKeyUsageOID.SERVER_AUTH in list(extended)
        return serves, names.get_values_for_type(x509.DNSName)

    assert uses(LEDGER) == (True, ["ledger.service.grafos.local"])
    assert uses(HOLDER) == (False, [])
    assert uses(spiffe.parse_id("spiffe://grafos.local/operator/o")) == (False, [])


def test_a_request_whose_signature_is_wrong_is_not_signed(authority: Authority) -> None:
    request = x509.load_pem_x509_csr(certificates.signing_request(certificates.new_tls_key()))
    der = bytearray(request.public_bytes(Encoding.DER))
    der[-1] ^= 1
    broken = x509.load_der_x509_csr(bytes(der)).public_bytes(Encoding.PEM)
    with pytest.raises(failure.Denied):
        authority.sign_request(broken, LEDGER, now_ms=NOW_MS)


def test_whatever_a_request_is_made_of_the_refusal_is_typed(authority: Authority) -> None:
    good = certificates.signing_request(certificates.new_tls_key())
    for place in range(0, len(good), 7):
        for value in (0, 65, 255):
            hostile = good[:place] + bytes([value]) + good[place + 1 :]
            try:
                authority.sign_request(hostile, HOLDER, now_ms=NOW_MS)
            except failure.FabricError as refusal:
                assert refusal.code in ("IDENTITY", "MESSAGE_SIZE")
    for other in (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .sign(ec.generate_private_key(ec.SECP384R1()), hashes.SHA256()),
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .sign(ed25519.Ed25519PrivateKey.generate(), None),
    ):
        with pytest.raises(failure.Denied):
            authority.sign_request(other.public_bytes(Encoding.PEM), HOLDER, now_ms=NOW_MS)


def test_whatever_bytes_a_chain_or_request_consists_of_the_refusal_is_typed(
    authority: Authority,
) -> None:
    dice = random.Random(1)
    key = certificates.new_tls_key()
    chain = certificates.load_certificates(authority.issue(key.public_key(), HOLDER, now_ms=NOW_MS))
    request = x509.load_pem_x509_csr(certificates.signing_request(key))
    refused = 0
    for number in range(4_000):
        source = chain[0] if number % 2 else request
        der = bytearray(source.public_bytes(Encoding.DER))
        for _ in range(dice.choice((1, 1, 1, 2, 8))):
            der[dice.randrange(len(der))] = dice.randrange(256)
        text = base64.encodebytes(bytes(der)).decode()
        label = "CERTIFICATE" if number % 2 else "CERTIFICATE REQUEST"
        pem = f"-----BEGIN {label}-----\n{text}-----END {label}-----\n".encode()
        try:
            if number % 2:
                pem += certificates.pem_of(chain[1])
                certificates.verify_chain(pem, authority.bundle_pem, NOW_MS)
            else:
                certificates.requested_key(pem)
        except failure.FabricError as refusal:
            assert refusal.code in ("IDENTITY", "CERT_EXPIRED")
            refused += 1
    assert refused > 3_900


def test_lives_out_of_bounds_and_foreign_trust_domains_are_refused(authority: Authority) -> None:
    key = certificates.new_tls_key().public_key()
    for ttl_ms in (-1, 0, 999, 30 * DAY_MS + 1):
        with pytest.raises(failure.Incompatible) as refusal:
            authority.issue(key, HOLDER, ttl_ms=ttl_ms, now_ms=NOW_MS)
        assert refusal.value.code == "RANGE"
    with pytest.raises(failure.Denied):
        authority.issue(key, spiffe.parse_id("spiffe://other/node/n"), now_ms=NOW_MS)


def test_a_renewal_needs_a_certificate_in_force_its_key_and_the_same_key(
    authority: Authority,
) -> None:
    key, other = certificates.new_tls_key(), certificates.new_tls_key()
    chain = authority.issue(key.public_key(), HOLDER, now_ms=NOW_MS)
    csr = certificates.signing_request(key)
    proof = certificates.prove(key, RENEW_DOMAIN, csr + chain)
    assert authority.check_renewal(csr, chain, proof, now_ms=NOW_MS + 1) == HOLDER

    foreign = certificates.prove(other, RENEW_DOMAIN, csr + chain)
    elsewhere = certificates.prove(key, "another-purpose", csr + chain)
    for wrong in (foreign, elsewhere, proof[:-1], b""):
        with pytest.raises(failure.Denied):
            authority.check_renewal(csr, chain, wrong, now_ms=NOW_MS)
    other_csr = certificates.signing_request(other)
    other_proof = certificates.prove(key, RENEW_DOMAIN, other_csr + chain)
    with pytest.raises(failure.Denied):
        authority.check_renewal(other_csr, chain, other_proof, now_ms=NOW_MS)
    with pytest.raises(failure.Denied) as late:
        authority.check_renewal(csr, chain, proof, now_ms=NOW_MS + HOUR_MS)
    assert late.value.code == "CERT_EXPIRED"


def test_a_renewed_certificate_has_the_thumbprint_of_the_old_one(authority: Authority) -> None:
    key = certificates.new_tls_key()
    first = certificates.parse(authority.issue(key.public_key(), HOLDER, now_ms=NOW_MS))
    later = certificates.parse(authority.issue(key.public_key(), HOLDER, now_ms=NOW_MS + HOUR_MS))
    assert first.thumbprint == later.thumbprint
    assert first.not_after_ms < later.not_after_ms


def test_with_the_root_key_offline_the_intermediate_still_signs_and_its_end_is_final(
    tmp_path: Path,
) -> None:
    ca, safe = tmp_path / "ca", tmp_path / "safe"
    _authority.ca_init(ca, now_ms=NOW_MS, root_directory=safe)
    assert not (ca / "root.key").exists()
    key = certificates.new_tls_key().public_key()
    near_end_ms = NOW_MS + DAY_MS - HOUR_MS // 2
    authority = Authority.open(ca, now_ms=near_end_ms)
    chain = authority.issue(key, HOLDER, now_ms=near_end_ms)
    assert certificates.not_after_ms(chain) == NOW_MS + DAY_MS, "no leaf outlives its signer"
    with pytest.raises(failure.Denied) as refusal:
        authority.issue(key, HOLDER, now_ms=NOW_MS + DAY_MS)
    assert refusal.value.code == "CERT_EXPIRED"

    _authority.ca_renew(ca, safe, now_ms=NOW_MS + DAY_MS)  # by an operator, beside us
    chain = authority.issue(key, HOLDER, now_ms=NOW_MS + DAY_MS)
    certificates.verify_chain(chain, authority.bundle_pem, NOW_MS + DAY_MS)


def test_another_authoritys_root_renews_nothing(tmp_path: Path) -> None:
    _authority.ca_init(tmp_path / "ca", now_ms=NOW_MS, root_directory=tmp_path / "safe")
    _authority.ca_init(tmp_path / "other", now_ms=NOW_MS, root_directory=tmp_path / "foreign")
    for wrong in (tmp_path / "foreign", tmp_path):
        with pytest.raises(failure.Denied) as refusal:
            _authority.ca_renew(tmp_path / "ca", wrong, now_ms=NOW_MS)
        assert refusal.value.code == "IDENTITY"


def test_a_development_authority_renews_its_intermediate_by_itself(tmp_path: Path) -> None:
    authority = Authority.for_development(tmp_path / "ca", now_ms=NOW_MS)
    key = certificates.new_tls_key().public_key()
    before = authority.issue(key, HOLDER, ttl_ms=20 * DAY_MS, now_ms=NOW_MS)
    later_ms = NOW_MS + 16 * DAY_MS
    again = Authority.for_development(tmp_path / "ca", now_ms=later_ms)
    after = again.issue(key, HOLDER, now_ms=later_ms)
    first, second = (certificates.load_certificates(chain)[1] for chain in (before, after))
    assert first != second
    for chain in (before, after):
        certificates.verify_chain(chain, again.bundle_pem, later_ms)


def test_an_authority_is_not_made_over_another(authority: Authority, tmp_path: Path) -> None:
    with pytest.raises(failure.Incompatible):
        Authority.init(tmp_path / "ca", now_ms=NOW_MS)
    assert Authority.for_development(tmp_path / "ca", now_ms=NOW_MS).pin == authority.pin


def test_a_making_that_was_interrupted_can_begin_again(tmp_path: Path) -> None:
    first = Authority.init(tmp_path / "ca", now_ms=NOW_MS)
    (tmp_path / "ca" / "authority.json").unlink()  # written last, so this is what a crash leaves
    second = Authority.for_development(tmp_path / "ca", now_ms=NOW_MS)
    assert second.pin != first.pin
    key = certificates.new_tls_key().public_key()
    chain = second.issue(key, HOLDER, now_ms=NOW_MS)
    certificates.verify_chain(chain, second.bundle_pem, NOW_MS)


@pytest.mark.parametrize("name", ["authority.json", "join-tokens.json"])
def test_a_file_of_an_unknown_schema_is_refused_by_name(tmp_path: Path, name: str) -> None:
    ca = tmp_path / "ca"
    Authority.init(ca, now_ms=NOW_MS)
    _authority.node_token(ca, "n1", now_ms=NOW_MS)
    stored = json.loads((ca / name).read_text())
    for schema, code in ((2, "VERSION"), (0, "VERSION"), ("1", "STORAGE"), (None, "STORAGE")):
        (ca / name).write_text(json.dumps({**stored, "schema": schema}))
        with pytest.raises(failure.FabricError) as refusal:
            _authority.node_token(ca, "n2", now_ms=NOW_MS)
        assert refusal.value.code == code
    (ca / name).write_text("{")
    with pytest.raises(failure.FabricError) as refusal:
        _authority.node_token(ca, "n2", now_ms=NOW_MS)
    assert refusal.value.code == "STORAGE"


def test_keys_lie_in_private_files_and_one_that_others_may_read_is_refused(
    authority: Authority, tmp_path: Path
) -> None:
    ca = tmp_path / "ca"
    authority.own_credentials(now_ms=NOW_MS)
    authority.tokens.create("n1", authority.pin, ttl_ms=1_000, now_ms=NOW_MS)
    assert (ca.stat().st_mode & 0o777) == 0o700
    for name in ("root.key", "intermediate.pem", "own/tls.key", "join-tokens.json"):
        assert (ca / name).stat().st_mode & 0o777 == 0o600, name
    os.chmod(ca / "intermediate.pem", 0o640)
    with pytest.raises(failure.Denied):
        Authority.open(ca, now_ms=NOW_MS)


def test_issuing_to_a_folder_keeps_the_key_that_is_there(tmp_path: Path) -> None:
    now_ms = time.time_ns() // 1_000_000
    Authority.init(tmp_path / "ca", now_ms=now_ms)
    args = (tmp_path / "ca", str(HOLDER), tmp_path / "me")
    first = _authority.identity_issue(*args, now_ms=now_ms)
    second = _authority.identity_issue(*args, ttl_ms=2 * HOUR_MS, now_ms=now_ms)
    assert first.thumbprint == second.thumbprint
    assert second.identity == HOLDER
    assert IdentityFiles(tmp_path / "me").load().check(now_ms) == second


def test_credentials_that_do_not_belong_together_are_refused(authority: Authority) -> None:
    key, other = certificates.new_tls_key(), certificates.new_tls_key()
    chain = authority.issue(key.public_key(), HOLDER, now_ms=NOW_MS)
    Credentials(certificates.key_pem(key), chain, authority.bundle_pem).check(NOW_MS)
    with pytest.raises(failure.Denied):
        Credentials(certificates.key_pem(other), chain, authority.bundle_pem).check(NOW_MS)


def test_no_key_is_seen_in_what_is_printed_logged_or_raised(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    key = certificates.new_tls_key()
    pem = certificates.key_pem(key)
    chain = authority.issue(key.public_key(), HOLDER, now_ms=NOW_MS)
    shown = [repr(Credentials(pem, chain, authority.bundle_pem)), repr(authority)]
    for hostile in (pem[:-40], pem.replace(b"M", b"*"), b"x" + pem, pem + pem[:50]):
        try:
            certificates.load_key(hostile)
        except failure.Denied as refusal:
            shown += [str(refusal), repr(refusal.__cause__), repr(refusal.fields())]
    body = [line for line in pem.decode().splitlines() if "-----" not in line]
    for text in [*shown, caplog.text]:
        assert not any(line in text for line in body)


# Join tokens


def test_a_join_token_lets_its_node_in_once(authority: Authority) -> None:
    token = authority.tokens.create("n1", authority.pin, ttl_ms=600_000, now_ms=NOW_MS)
    assert authority.tokens.consume(token, pin=authority.pin, now_ms=NOW_MS) == "n1"
    with pytest.raises(failure.Denied) as refusal:
        authority.tokens.consume(token, pin=authority.pin, now_ms=NOW_MS)
    assert refusal.value.code == "JOIN_TOKEN"


def test_a_join_token_is_refused_late_for_another_node_and_at_another_fabric(
    authority: Authority,
) -> None:
    token = authority.tokens.create("n1", authority.pin, ttl_ms=1_000, now_ms=NOW_MS)
    for text, pin, now_ms in (
        (token, authority.pin, NOW_MS + 1_000),
        (token.replace("n1.", "n2.", 1), authority.pin, NOW_MS),
        (token, "0" * 32, NOW_MS),
        ("n1", authority.pin, NOW_MS),
        ("n1..", authority.pin, NOW_MS),
        (token + "x" * 300, authority.pin, NOW_MS),
    ):
        with pytest.raises(failure.Denied) as refusal:
            authority.tokens.consume(text, pin=pin, now_ms=now_ms)
        assert refusal.value.code == "JOIN_TOKEN"
    assert authority.tokens.consume(token, pin=authority.pin, now_ms=NOW_MS + 999) == "n1"


def test_the_secret_of_a_token_is_not_on_disk(authority: Authority, tmp_path: Path) -> None:
    token = authority.tokens.create("n1", authority.pin, ttl_ms=1_000, now_ms=NOW_MS)
    stored = b"".join(path.read_bytes() for path in (tmp_path / "ca").glob("*") if path.is_file())
    assert token.split(".")[1].encode() not in stored


def test_tokens_are_bounded_in_number_and_life(authority: Authority) -> None:
    def create(now_ms: int) -> str:
        return authority.tokens.create("n", authority.pin, ttl_ms=1_000, now_ms=now_ms)

    entries = {str(n): {"node": "n", "expires_ms": NOW_MS + 1_000} for n in range(256)}
    authority.tokens._store(entries)
    with pytest.raises(failure.RateLimited):
        create(NOW_MS)
    create(NOW_MS + 1_000)  # those before it have run out and are gone
    for ttl_ms in (0, -1, DAY_MS + 1):
        with pytest.raises(failure.Incompatible):
            authority.tokens.create("n", authority.pin, ttl_ms=ttl_ms, now_ms=NOW_MS)
    with pytest.raises(failure.Incompatible) as refusal:
        authority.tokens.create("../n", authority.pin, ttl_ms=1_000, now_ms=NOW_MS)
    assert refusal.value.code == "IDENTIFIER"
