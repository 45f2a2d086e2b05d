"""Asking for a certificate: the client's side of the identity socket and of the join listener.

A program makes its own key, which never leaves it, and asks for a certificate over it. On the
fabric's own machine it asks through a unix socket, where the kernel tells the other side who is
asking; a machine that joins asks over TLS and shows a join token.

Rules. One message is four bytes of length, big-endian, and that many bytes of canonical JSON (keys
sorted, no spaces, ASCII), at most 64 KiB. One connection carries one question and its answer and
has two seconds for both. What came back is believed only when it is proved: the certificate must be
over our key and lead to the root that came with it; a join token pins that root by its fingerprint,
and is not shown to anybody before the pin was compared.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import os
import socket
import ssl
import struct
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from cryptography.x509 import Certificate as X509

from grafos_core import failure, spiffe
from grafos_core.failure import FabricError
from grafos_core.spiffe import Identity, Role
from grafos_proto.wire import certificates
from grafos_proto.wire.certificates import TlsKey
from grafos_proto.wire.credentials import Credentials, IdentityFiles

VERSION = 1
MESSAGE_BYTES_MAX = 65_536
EXCHANGE_MS_MAX = 2_000
"""For connecting, asking and being answered, all together. A signature takes less than 1 ms."""
LENGTH = struct.Struct(">I")
RENEW_DOMAIN = "grafos-renew-v1"
PIN_CHARS = 32
"""128 bits of the root's SHA-256: enough against another certificate made to match it."""
SECRET_CHARS_MAX = 128
RETRY_MS_MIN, RETRY_MS_MAX = 1_000, 60_000

Message = dict[str, Any]


def encode(message: Message) -> bytes:
    """One message with its length in front."""
    body = json.dumps(message, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
    if len(body) > MESSAGE_BYTES_MAX:
        raise failure.of("MESSAGE_SIZE", "identity message")
    return LENGTH.pack(len(body)) + body


def decode(body: bytes) -> Message:
    """One message without its length. Only what `encode` would write is accepted.

    Half a surrogate pair can be written in JSON and in no encoding: such text is refused as well.
    """
    try:
        message = json.loads(body)
        json.dumps(message, ensure_ascii=False).encode("utf-8")
        canonical = isinstance(message, dict) and encode(message)[LENGTH.size :] == body
    except (ValueError, RecursionError):
        canonical = False
    if not canonical:
        raise failure.of("ENCODING", "identity message")
    if type(message.get("v")) is not int or message["v"] != VERSION:
        raise failure.of("VERSION", f"the identity protocol here is version {VERSION}")
    return dict(message)


def request_identity(
    socket_path: str,
    key: TlsKey,
    want: Literal["operator"] | None = None,
    *,
    secret: str | None = None,
    now_ms: int,
) -> Credentials:
    """A first certificate from the identity socket.

    Without more, it is that of a holder: this process, as the kernel names it. An operator's is for
    the user who runs the fabric, and for root. A service or node that the fabric's supervisor has
    started shows the `secret` that it was handed.
    """
    message: Message = {"v": VERSION, "op": "issue", "csr": _request(key)}
    if want is not None:
        message["want"] = want
    if secret is not None:
        message["secret"] = secret
    return _credentials(_ask_socket(socket_path, message), key, None, now_ms)


def renew_identity(socket_path: str, credentials: Credentials, *, now_ms: int) -> Credentials:
    """The same identity over the same key, by the identity socket."""
    answer = _ask_socket(socket_path, _renewal(credentials))
    return _credentials(answer, credentials.key, credentials, now_ms)


def renew_over_network(address: str, credentials: Credentials, *, now_ms: int) -> Credentials:
    """The same identity over the same key, by the join listener at `host:port`."""
    root = certificates.load_certificates(credentials.bundle_pem)[0]
    answer = _ask_pinned(address, root, _renewal(credentials))
    return _credentials(answer, credentials.key, credentials, now_ms)


def join(address: str, token: str, key: TlsKey, *, now_ms: int) -> Credentials:
    """The certificate of a node that joins with `token` by the join listener at `host:port`."""
    pin = parse_token(token).pin
    offered = _text(_ask_anyone(address, {"v": VERSION, "op": "root"}), "bundle").encode()
    root = certificates.load_certificates(offered)[0]
    if not hmac.compare_digest(certificates.fingerprint(root)[:PIN_CHARS], pin):
        raise failure.of("JOIN_TOKEN", "this is not the fabric that made the token")
    answer = _ask_pinned(
        address, root, {"v": VERSION, "op": "join", "token": token, "csr": _request(key)}
    )
    return _credentials(answer, key, None, now_ms, bundle_pem=certificates.pem_of(root))


@dataclass(frozen=True, slots=True, repr=False)
class JoinToken:
    """`<node id>.<secret>.<pin of the root>`; without a repr, because the secret is one."""

    node_id: str
    secret: str
    pin: str

    def text(self) -> str:
        return f"{self.node_id}.{self.secret}.{self.pin}"


def parse_token(text: str) -> JoinToken:
    """The parts of a join token; the refusal repeats none of them."""
    parts = text.split(".") if len(text) <= 256 and text.isascii() else []
    if len(parts) != 3 or not parts[1] or len(parts[2]) != PIN_CHARS:
        raise failure.of("JOIN_TOKEN", "not of the form <node id>.<secret>.<pin>")
    return JoinToken(spiffe.check_identifier(parts[0], what="node id"), parts[1], parts[2])


def read_spawn_secret(descriptor: int) -> str:
    """The secret that the supervisor left in an inherited pipe; closes the pipe.

    A pipe, because the environment and the arguments of a process can be read from outside it.
    """
    with os.fdopen(descriptor, "rb") as pipe:
        secret = pipe.read(SECRET_CHARS_MAX + 1)
    if not 0 < len(secret) <= SECRET_CHARS_MAX or not secret.isascii():
        raise failure.of("IDENTITY", "no secret came with this process")
    return secret.decode("ascii")


class Renewal:
    """Renews one process's certificate at about half of its life. Thread-free: call `tick`.

    A renewal that fails changes nothing and is tried again, after 1 s, 2 s, 4 s, … at most 60 s.
    """

    def __init__(
        self,
        files: IdentityFiles,
        renew: Callable[[Credentials, int], Credentials],
        *,
        now_ms: int,
        jitter: Callable[[], float],
    ) -> None:
        """`renew(credentials, now_ms)` asks; `jitter()`, -0.1 to 0.1, spreads the askers."""
        self._files, self._renew, self._jitter = files, renew, jitter
        self._retry_ms = RETRY_MS_MIN
        self.last_failure: FabricError | None = None
        self.due_ms = self._half_life(now_ms)

    def tick(self, now_ms: int) -> bool:
        """Renew if that is due; True if new credentials are in force. Blocks 2 s at the most."""
        if now_ms < self.due_ms:
            return False
        try:
            self._files.save(self._renew(self._files(), now_ms))
        except FabricError as refusal:
            self.last_failure = refusal
            self.due_ms = now_ms + self._retry_ms
            self._retry_ms = min(self._retry_ms * 2, RETRY_MS_MAX)
            return False
        self.last_failure, self._retry_ms = None, RETRY_MS_MIN
        self.due_ms = self._half_life(now_ms)
        return True

    def _half_life(self, now_ms: int) -> int:
        """Counted from when we got or found it, since certificates are dated back a little."""
        life_ms = self._files().certificate.not_after_ms - now_ms
        return now_ms + max(0, int(life_ms * (0.5 + self._jitter())))


def peer_name(trust_domain: str) -> str:
    """The DNS name of the authority's own service, which the join listener proves to be."""
    return spiffe.server_name(Identity(trust_domain, Role.SERVICE, None, "identity"))


def _request(key: TlsKey) -> str:
    return certificates.signing_request(key).decode("ascii")


def _renewal(credentials: Credentials) -> Message:
    key = credentials.key
    csr = _request(key)
    proof = certificates.prove(key, RENEW_DOMAIN, csr.encode() + credentials.chain_pem)
    return {
        "v": VERSION, "op": "renew", "csr": csr, "proof": proof.hex(),
        "chain": credentials.chain_pem.decode("ascii"),
    }  # fmt: skip


def _credentials(
    answer: Message,
    key: TlsKey,
    before: Credentials | None,
    now_ms: int,
    *,
    bundle_pem: bytes | None = None,
) -> Credentials:
    """What was answered, proved. A renewal must not change the root nor the identity."""
    if before is not None:
        bundle_pem = before.bundle_pem
    made = Credentials(
        certificates.key_pem(key),
        _text(answer, "chain").encode(),
        bundle_pem or _text(answer, "bundle").encode(),
    ).check(now_ms)
    if before is not None and made.identity != before.identity:
        raise failure.of("IDENTITY", "the renewal is for somebody else")
    return made


def _text(answer: Message, name: str) -> str:
    value = answer.get(name)
    if not isinstance(value, str) or not value.isascii():
        raise failure.of("ENCODING", f"the answer has no {name}")
    return value


def _ask_socket(path: str, message: Message) -> Message:
    with _mapped(), socket.socket(socket.AF_UNIX) as connection:
        exchange = _Exchange(connection)
        connection.settimeout(exchange.left_s())
        connection.connect(path)
        return exchange.ask(message)


def _ask_anyone(address: str, message: Message) -> Message:
    """For what needs no trust: the answer proves itself, or is compared with a pin."""
    context = _context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return _ask_tls(address, context, None, message)


def _ask_pinned(address: str, root: X509, message: Message) -> Message:
    context = _context()
    context.load_verify_locations(cadata=certificates.pem_of(root).decode("ascii"))
    return _ask_tls(address, context, peer_name(certificates.trust_domain_of(root)), message)


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def _ask_tls(
    address: str, context: ssl.SSLContext, server_name: str | None, message: Message
) -> Message:
    started = time.monotonic()
    with _mapped(), socket.create_connection(_split(address), EXCHANGE_MS_MAX / 1000) as plain:
        with context.wrap_socket(plain, server_hostname=server_name) as connection:
            return _Exchange(connection, started).ask(message)


class _Exchange:
    """One question and its answer on a connected socket, within one deadline.

    The deadline is kept by a clock that never goes back: it decides nothing but when to give up.
    """

    def __init__(self, connection: socket.socket, started: float | None = None) -> None:
        self._connection = connection
        self._end = (started or time.monotonic()) + EXCHANGE_MS_MAX / 1000

    def left_s(self) -> float:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def ask(self, message: Message) -> Message:
        self._connection.settimeout(self.left_s())
        self._connection.sendall(encode(message))
        (length,) = LENGTH.unpack(self._receive(LENGTH.size))
        if length > MESSAGE_BYTES_MAX:
            raise failure.of("MESSAGE_SIZE", "identity answer")
        answer = decode(self._receive(length))
        if "code" in answer:
            raise _refusal(answer)
        return answer

    def _receive(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            self._connection.settimeout(self.left_s())
            part = self._connection.recv(count - len(data))
            if not part:
                raise failure.of("UNREACHABLE", "the identity service closed the connection")
            data += part
        return bytes(data)


def _refusal(answer: Message) -> FabricError:
    code, detail = answer.get("code"), answer.get("detail")
    retry_after_ms = answer.get("retry_after_ms")
    if not isinstance(code, str) or code not in failure.CODES or not isinstance(detail, str):
        return failure.of("ENCODING", "the identity service's refusal")
    return failure.of(
        code, detail, retry_after_ms=retry_after_ms if type(retry_after_ms) is int else None
    )


@contextmanager
def _mapped() -> Generator[None, None, None]:
    """What the operating system says about connections, in our own words."""
    try:
        yield
    except TimeoutError:
        raise failure.of("DEADLINE", "the identity service did not answer in time") from None
    except ssl.SSLCertVerificationError as error:
        expired = error.verify_code == 10  # X509_V_ERR_CERT_HAS_EXPIRED
        code = "CERT_EXPIRED" if expired else "IDENTITY"
        raise failure.of(code, "the identity service did not prove itself") from None
    except OSError as error:
        raise failure.of("UNREACHABLE", f"identity service: {error.strerror or 'closed'}") from None


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    is_number = port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65_535
    if not host.isascii() or not host or not is_number:
        raise failure.of("INVALID", "an address has the form host:port")
    if ":" in host or "[" in host:
        return _bare(host), int(port)
    return host, int(port)


def _bare(bracketed: str) -> str:
    """The IPv6 address within its brackets."""
    host = bracketed[1:-1]
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        host = ""
    if not host or bracketed != f"[{host}]":
        raise failure.of("INVALID", "an IPv6 address has the form [host]:port")
    return host
