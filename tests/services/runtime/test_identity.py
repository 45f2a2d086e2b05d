"""Certificates at work: real gRPC servers and channels, real handshakes, real expiry."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent import futures
from pathlib import Path
from typing import cast

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from grafos._authority import Authority
from grafos._identity_issuer import IdentityIssuer, spawn_pipe
from grafos._identity_socket import IdentityServer, add_identity_socket
from grafos_core import failure, spiffe
from grafos_core.spiffe import Identity, Role
from grafos_proto.wire import certificates, credentials
from grafos_proto.wire.credentials import Credentials, IdentityFiles, PeerChannel
from services.runtime import identity

METHOD = "/grafos.test.Echo/Who"
LEDGER = spiffe.parse_id("spiffe://grafos.local/service/ledger")
HOLDER = spiffe.parse_id("spiffe://grafos.local/tenant/t/holder/h")
CALL_BOUND_S = 5.0


def wall_ms() -> int:
    return time.time_ns() // 1_000_000


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.init(tmp_path / "ca", now_ms=wall_ms())


def make(
    authority: Authority,
    who: Identity,
    *,
    ttl_ms: int = 3_600_000,
    now_ms: int | None = None,
    key: certificates.TlsKey | None = None,
) -> Credentials:
    key = key or certificates.new_tls_key()
    at_ms = wall_ms() if now_ms is None else now_ms
    chain = authority.issue(key.public_key(), who, ttl_ms=ttl_ms, now_ms=at_ms)
    return Credentials(certificates.key_pem(key), chain, authority.bundle_pem)


class Server:
    """Answers with who called, or with the code for which the caller is refused."""

    def __init__(self, provider: credentials.Provider) -> None:
        self.shift_ms = 0
        """Added to the clock by which the server judges certificates."""

        def who(_request: bytes, context: grpc.ServicerContext) -> bytes:
            try:
                called = identity.caller(context, wall_ms() + self.shift_ms)
            except failure.Denied as refusal:
                context.abort(grpc.StatusCode.UNAUTHENTICATED, refusal.code)
            return f"{called.identity} {called.thumbprint}".encode()

        self._server = grpc.server(futures.ThreadPoolExecutor(2))
        _, service, method = METHOD.split("/")
        handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            method: grpc.unary_unary_rpc_method_handler(who)
        }
        handler = grpc.method_handlers_generic_handler(service, handlers)
        self._server.add_generic_rpc_handlers([handler])
        port = self._server.add_secure_port("127.0.0.1:0", identity.server_credentials(provider))
        self.address = f"127.0.0.1:{port}"
        self._server.start()

    def close(self) -> None:
        self._server.stop(None).wait(CALL_BOUND_S)


@pytest.fixture
def server(authority: Authority) -> Generator[Server, None, None]:
    shown = make(authority, LEDGER)
    with contextlib.closing(Server(lambda: shown)) as server:
        yield server


def call(channel: grpc.Channel) -> str:
    ask: Callable[..., bytes] = channel.unary_unary(METHOD)
    return ask(b"", timeout=CALL_BOUND_S).decode()


def outcome(
    address: str, channel_credentials: grpc.ChannelCredentials, peer: Identity = LEDGER
) -> tuple[str, str]:
    options: Sequence[tuple[str, str]] = [credentials.server_name_option(peer)]
    with grpc.secure_channel(address, channel_credentials, options) as channel:
        try:
            return "OK", call(channel)
        except grpc.RpcError as refusal:
            ended = cast(grpc.Call, refusal)
            return ended.code().name, ended.details()


def test_a_caller_is_known_by_its_certificate(authority: Authority, server: Server) -> None:
    holder = make(authority, HOLDER)
    status, answer = outcome(server.address, credentials.channel_credentials(holder))
    assert (status, answer) == ("OK", f"{HOLDER} {holder.thumbprint}")


def test_no_certificate_a_foreign_one_an_expired_one_and_an_early_one_end_in_the_handshake(
    authority: Authority, server: Server, tmp_path: Path
) -> None:
    stranger = Authority.init(tmp_path / "other", now_ms=wall_ms())
    foreign = make(stranger, HOLDER)
    mixed = Credentials(foreign.key_pem, foreign.chain_pem, authority.bundle_pem)
    expired = make(authority, HOLDER, ttl_ms=1_000, now_ms=wall_ms() - 2_000)
    early = make(authority, HOLDER, now_ms=wall_ms() + 120_000)
    nobody = grpc.ssl_channel_credentials(authority.bundle_pem)
    shown = [nobody, *map(credentials.channel_credentials, (mixed, expired, early))]
    for each in shown:
        assert outcome(server.address, each)[0] == "UNAVAILABLE"
    assert outcome(server.address, credentials.channel_credentials(make(authority, HOLDER)))[0] == (
        "OK"
    )


def test_a_client_refuses_a_server_of_another_fabric_of_another_name_or_that_is_a_holder(
    authority: Authority, server: Server, tmp_path: Path
) -> None:
    foreign = Authority.init(tmp_path / "other", now_ms=wall_ms())
    ours = credentials.channel_credentials(make(authority, HOLDER))
    theirs = credentials.channel_credentials(make(foreign, HOLDER))
    audit = spiffe.parse_id("spiffe://grafos.local/service/audit")
    node = spiffe.parse_id("spiffe://grafos.local/node/ledger")
    assert outcome(server.address, theirs)[0] == "UNAVAILABLE"
    for other in (audit, node):
        assert outcome(server.address, ours, other)[0] == "UNAVAILABLE"
    posing = make(authority, HOLDER)
    with contextlib.closing(Server(lambda: posing)) as impostor:
        assert outcome(impostor.address, ours)[0] == "UNAVAILABLE"


def test_a_certificate_that_runs_out_on_an_open_connection_is_refused_at_the_next_call(
    authority: Authority, server: Server
) -> None:
    holder = make(authority, HOLDER)
    options = [credentials.server_name_option(LEDGER)]
    secure = credentials.channel_credentials(holder)
    with grpc.secure_channel(server.address, secure, options) as channel:
        assert call(channel)
        server.shift_ms = 3_600_000
        with pytest.raises(grpc.RpcError) as refusal:
            call(channel)
        ended = cast(grpc.Call, refusal.value)
        assert ended.code() is grpc.StatusCode.UNAUTHENTICATED
        assert ended.details() == "CERT_EXPIRED"


def test_a_server_shows_its_renewed_certificate_without_a_restart(authority: Authority) -> None:
    key = certificates.new_tls_key()
    shown = [make(authority, LEDGER, key=key)]
    with contextlib.closing(Server(lambda: shown[-1])) as server:
        before = leaf_shown_by(server, authority)
        assert leaf_shown_by(server, authority) == before
        shown.append(make(authority, LEDGER, ttl_ms=7_200_000, key=key))
        after = leaf_shown_by(server, authority)
    assert after != before
    assert after.thumbprint == before.thumbprint
    assert after.not_after_ms - before.not_after_ms == pytest.approx(3_600_000, abs=2_000)


def leaf_shown_by(server: Server, authority: Authority) -> certificates.Certificate:
    """What a fresh handshake meets, read by another TLS library than gRPC's."""
    context = ssl.create_default_context(cadata=authority.bundle_pem.decode())
    host, port = server.address.split(":")
    context.set_alpn_protocols(["h2"])
    with socket.create_connection((host, int(port)), CALL_BOUND_S) as plain:
        name = spiffe.server_name(LEDGER)
        with context.wrap_socket(plain, server_hostname=name) as connection:
            shown = connection.getpeercert(binary_form=True)
    assert shown is not None
    return certificates.parse(ssl.DER_cert_to_PEM_cert(shown).encode())


def test_a_peer_channel_follows_renewals_and_lets_the_calls_before_finish(
    authority: Authority, server: Server
) -> None:
    key = certificates.new_tls_key()
    shown = [make(authority, HOLDER, key=key)]
    with contextlib.closing(PeerChannel(server.address, lambda: shown[-1], LEDGER)) as peer:
        first = peer.get()
        assert first is peer.get()
        call(first)
        shown.append(make(authority, HOLDER, ttl_ms=7_200_000, key=key))
        server.shift_ms = 3_600_000  # the first certificate has run out, the second has not
        assert peer.get() is not first
        assert call(peer.get()).endswith(shown[0].thumbprint)
        with pytest.raises(grpc.RpcError):
            call(first)
        shown.append(make(authority, HOLDER, ttl_ms=7_300_000, key=key))
        peer.get()
        with pytest.raises(ValueError, match="closed channel"):
            call(first)


def test_tls_with_names_works_over_a_unix_socket_too(authority: Authority, tmp_path: Path) -> None:
    shown = make(authority, LEDGER)
    server = grpc.server(futures.ThreadPoolExecutor(1))
    path = f"unix:{tmp_path}/s"
    server.add_secure_port(path, identity.server_credentials(lambda: shown))
    server.start()
    try:
        secure = credentials.channel_credentials(make(authority, HOLDER))
        assert outcome(path, secure)[0] == "UNIMPLEMENTED"  # the handshake went through
        wrong = spiffe.parse_id("spiffe://grafos.local/service/audit")
        assert outcome(path, secure, wrong)[0] == "UNAVAILABLE"
    finally:
        server.stop(None).wait(CALL_BOUND_S)


def test_a_call_without_a_certificate_or_with_a_strange_one_is_refused(
    authority: Authority,
) -> None:
    leaf = make(authority, HOLDER)
    for shown in ([], [leaf.chain_pem, leaf.chain_pem], [b"x"], [authority.bundle_pem]):
        with pytest.raises(failure.Denied) as refusal:
            identity.caller_of({"x509_pem_cert": shown}, wall_ms())
        assert refusal.value.code == "IDENTITY"
    with pytest.raises(failure.Denied):
        identity.caller_of({}, wall_ms())
    called = identity.caller_of({"x509_pem_cert": [leaf.chain_pem]}, wall_ms())
    assert identity.check_role(called, Role.NODE, Role.HOLDER) is called
    with pytest.raises(failure.Denied) as refused:
        identity.check_role(called, Role.NODE, Role.OPERATOR)
    assert refused.value.code == "ROLE"


def test_a_certificate_is_parsed_once(authority: Authority) -> None:
    leaf = make(authority, HOLDER)
    certificates.parse.cache_clear()
    for _ in range(100):
        identity.caller_of({"x509_pem_cert": [leaf.chain_pem]}, wall_ms())
    assert certificates.parse.cache_info().misses == 1


def test_a_service_gets_its_first_certificate_and_keeps_its_key_over_restarts(
    authority: Authority, tmp_path: Path
) -> None:
    issuer = IdentityIssuer(authority, operator_uid=0)
    with serving(tmp_path / "run" / "i.sock", issuer) as path:
        made = []
        for _ in range(2):
            secret = issuer.expect(Role.SERVICE, "ledger", elapsed_ms=time.monotonic_ns() // 10**6)
            files = IdentityFiles(tmp_path / "ledger")
            pipe = spawn_pipe(secret)
            made.append(identity.first_identity(files, path, pipe, now_ms=wall_ms()))
            assert files() is made[-1]
    assert made[0].identity == made[1].identity == LEDGER
    assert made[0].thumbprint == made[1].thumbprint
    assert made[0].chain_pem != made[1].chain_pem


@contextlib.contextmanager
def serving(path: Path, issuer: IdentityIssuer) -> Generator[str, None, None]:
    server, stop = IdentityServer(), threading.Event()
    add_identity_socket(server, path, issuer)
    thread = threading.Thread(target=server.serve_until, args=(stop, wall_ms))
    thread.start()
    try:
        yield str(path)
    finally:
        stop.set()
        thread.join(CALL_BOUND_S)
        server.close()


def test_keys_of_another_kind_or_that_others_can_read_are_not_loaded(
    authority: Authority, tmp_path: Path
) -> None:
    files = IdentityFiles(tmp_path / "me")
    files.save(make(authority, HOLDER))
    assert files.key_path.stat().st_mode & 0o777 == 0o600
    files.key_path.chmod(0o644)
    attempts: list[Callable[[], object]] = [files.load, files.key]
    for attempt in attempts:
        with pytest.raises(failure.Denied):
            attempt()
    other = ec.generate_private_key(ec.SECP384R1())
    pem = other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with pytest.raises(failure.Denied):
        certificates.load_key(pem)


def test_a_folder_that_lacks_a_file_says_which(tmp_path: Path) -> None:
    with pytest.raises(failure.Denied, match=r"tls\.key"):
        IdentityFiles(tmp_path).load()
