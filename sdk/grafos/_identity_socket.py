"""Where certificates are asked for: a unix socket for local programs, a TLS port for new machines.

One question and one answer per connection, in the format of grafos_proto.wire.identity. What the
answer is, is decided in _identity_issuer.py; this file owns sockets and nothing else.

Rules. Poll-driven: `poll` does what can be done now and never waits for a peer; a peer gets two
seconds for its question and its answer, 256 are served at a time and at most 64 of one user or
address, so that none of them keeps the others out. The socket is 0600 in a folder of 0700. Who asks
there is what the kernel recorded at connect; a process that ended in the meantime gets nothing, for
its number may be another's already.

    HANDSHAKE (TLS only) ──► READING ──► answer ──► WRITING ──► closed
"""

from __future__ import annotations

import os
import select
import selectors
import socket
import ssl
import stat
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from grafos._identity_issuer import IdentityIssuer, LocalPeer
from grafos_core import failure
from grafos_core.failure import FabricError
from grafos_proto.wire.credentials import make_private_directory
from grafos_proto.wire.identity import (
    EXCHANGE_MS_MAX,
    LENGTH,
    MESSAGE_BYTES_MAX,
    VERSION,
    Message,
    decode,
    encode,
)

PEERS_MAX, PEERS_EACH_MAX = 256, 64
ACCEPTS_MAX = 64
"""Per listener and poll, so that a flood of connections does not starve those already here."""
SOCKET_PATH_BYTES_MAX = 107
"""What a unix socket's address has room for (unix(7))."""
_SO_PEERPIDFD = 77
_CREDENTIALS = struct.Struct("3i")


@dataclass(slots=True)
class Listener:
    """A listening socket, how a connection to it begins, and how its questions are answered."""

    listening: socket.socket
    welcome: Callable[[socket.socket, object, int], Guest]
    """(connection, address, now_ms): who came; refuses by a FabricError or OSError."""


@dataclass(frozen=True, slots=True)
class Guest:
    """A connection whose peer is known."""

    connection: socket.socket
    peer: str
    """What counts as one peer in the limits: a user or an address."""
    answer: Callable[[Message, int, int], Message]
    """(request, now_ms, elapsed_ms)"""


class IdentityServer:
    """Serves all listeners from whichever thread calls `poll`, always the same one."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._guests: dict[int, _Conversation] = {}
        self._clean_up = ExitStack()

    def add(self, listener: Listener) -> None:
        listener.listening.setblocking(False)
        self._selector.register(listener.listening, selectors.EVENT_READ, listener)
        self._clean_up.callback(listener.listening.close)

    def on_close(self, act: Callable[[], None]) -> None:
        """Have `act` called by `close`."""
        self._clean_up.callback(act)

    def poll(self, now_ms: int, elapsed_ms: int, *, wait_ms: int = 0) -> None:
        """Do what can be done; wait at most `wait_ms` for there to be something.

        `now_ms` is the wall clock, for certificates; `elapsed_ms` a clock that never goes back.
        """
        for key, _ in self._selector.select(wait_ms / 1000):
            if isinstance(key.data, Listener):
                self._accept(key.data, now_ms, elapsed_ms)
            else:
                self._step(key.data, now_ms, elapsed_ms)
        for late in [each for each in self._guests.values() if each.end_ms <= elapsed_ms]:
            self._dismiss(late)

    def serve_until(self, stop: threading.Event, now_ms: Callable[[], int]) -> None:
        """The body of a thread that does nothing else. Notices `stop` within 100 ms."""
        while not stop.is_set():
            self.poll(now_ms(), time.monotonic_ns() // 1_000_000, wait_ms=100)

    def close(self) -> None:
        """Dismiss everybody and close the listeners."""
        for conversation in list(self._guests.values()):
            self._dismiss(conversation)
        self._selector.close()
        self._clean_up.close()

    def _accept(self, listener: Listener, now_ms: int, elapsed_ms: int) -> None:
        for _ in range(ACCEPTS_MAX):
            try:
                connection, address = listener.listening.accept()
            except OSError:  # nobody left, or he went away again
                return
            connection.setblocking(False)
            try:
                guest = listener.welcome(connection, address, now_ms)
            except (FabricError, OSError):
                connection.close()
                continue
            if self._is_full_for(guest.peer):
                guest.connection.close()
                continue
            conversation = _Conversation(guest, elapsed_ms + EXCHANGE_MS_MAX)
            self._guests[conversation.fileno] = conversation
            self._selector.register(conversation.fileno, selectors.EVENT_READ, conversation)

    def _is_full_for(self, peer: str) -> bool:
        present = Counter(each.guest.peer for each in self._guests.values())
        return present.total() >= PEERS_MAX or present[peer] >= PEERS_EACH_MAX

    def _step(self, conversation: _Conversation, now_ms: int, elapsed_ms: int) -> None:
        try:
            conversation.step(now_ms, elapsed_ms)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError) as wants:
            writing = conversation.is_answered or isinstance(wants, ssl.SSLWantWriteError)
            if isinstance(wants, ssl.SSLWantReadError):
                writing = False
            interest = selectors.EVENT_WRITE if writing else selectors.EVENT_READ
            self._selector.modify(conversation.fileno, interest, conversation)
            return
        except OSError:  # reset, end of file, a failed handshake: there is nobody to tell
            pass
        self._dismiss(conversation)

    def _dismiss(self, conversation: _Conversation) -> None:
        self._selector.unregister(conversation.fileno)
        del self._guests[conversation.fileno]
        conversation.guest.connection.close()


class _Conversation:
    """One question and its answer, in as many steps as the peer makes necessary."""

    def __init__(self, guest: Guest, end_ms: int) -> None:
        self.guest, self.end_ms = guest, end_ms
        self.fileno = guest.connection.fileno()
        self.is_answered = False
        self._is_shaken = not isinstance(guest.connection, ssl.SSLSocket)
        self._received = bytearray()
        self._outgoing = b""

    def step(self, now_ms: int, elapsed_ms: int) -> None:
        """Go on; returns when the answer is sent, raises BlockingIOError or its like before."""
        if not self._is_shaken:
            assert isinstance(self.guest.connection, ssl.SSLSocket)
            self.guest.connection.do_handshake()
            self._is_shaken = True
        while not self.is_answered:
            self._read()
            self._answer_if_complete(now_ms, elapsed_ms)
        while self._outgoing:
            sent = self.guest.connection.send(self._outgoing)
            self._outgoing = self._outgoing[sent:]

    def _read(self) -> None:
        part = self.guest.connection.recv(LENGTH.size + MESSAGE_BYTES_MAX - len(self._received))
        if not part:
            raise ConnectionResetError
        self._received += part

    def _answer_if_complete(self, now_ms: int, elapsed_ms: int) -> None:
        if len(self._received) < LENGTH.size:
            return
        (length,) = LENGTH.unpack_from(self._received)
        body = bytes(self._received[LENGTH.size :])
        if length <= MESSAGE_BYTES_MAX and len(body) < length:
            return
        try:
            if length > MESSAGE_BYTES_MAX or len(body) > length:
                raise failure.of("MESSAGE_SIZE", "identity message")
            answer = self.guest.answer(decode(body), now_ms, elapsed_ms)
        except FabricError as refusal:
            answer = {"v": VERSION, "code": refusal.code, "detail": refusal.detail}
            if refusal.retry_after_ms is not None:
                answer["retry_after_ms"] = refusal.retry_after_ms
        self._outgoing, self.is_answered = encode(answer), True


def add_identity_socket(
    server: IdentityServer, path: Path, issuer: IdentityIssuer, *, shared: bool = False
) -> None:
    """Listen for local programs at `path`.

    With `shared`, other users of this machine may ask too (folder 0711, socket 0666) and get the
    identities of their own users; that is for services that run as users of their own.
    """

    def welcome(connection: socket.socket, _address: object, _now_ms: int) -> Guest:
        peer = local_peer(connection)

        def answer(request: Message, now_ms: int, elapsed_ms: int) -> Message:
            return issuer.answer_local(peer, request, now_ms=now_ms, elapsed_ms=elapsed_ms)

        return Guest(connection, f"uid {peer.uid}", answer)

    server.add(Listener(_bind_unix(path, shared=shared), welcome))
    server.on_close(lambda: path.unlink(missing_ok=True))


def add_join_listener(
    server: IdentityServer, host: str, port: int, issuer: IdentityIssuer, *, now_ms: int
) -> int:
    """Listen for machines that join; gives the port, which is a free one where 0 was asked for."""
    identity = _ListenerIdentity(issuer)
    identity.context(now_ms)

    def welcome(connection: socket.socket, address: object, now_ms: int) -> Guest:
        assert isinstance(address, tuple)
        host = str(address[0])

        def answer(request: Message, now_ms: int, elapsed_ms: int) -> Message:
            return issuer.answer_remote(host, request, now_ms=now_ms, elapsed_ms=elapsed_ms)

        wrapped = identity.context(now_ms).wrap_socket(
            connection, server_side=True, do_handshake_on_connect=False
        )
        return Guest(wrapped, f"address {host}", answer)

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=PEERS_MAX)
    except OSError as error:
        raise failure.of("UNREACHABLE", f"cannot listen there: {error.strerror}") from None
    server.add(Listener(listening, welcome))
    return int(listening.getsockname()[1])


class _ListenerIdentity:
    """The TLS side of the join listener; takes a new certificate when the old one is half used."""

    def __init__(self, issuer: IdentityIssuer) -> None:
        self._issuer = issuer
        self._context: ssl.SSLContext | None = None
        self._due_ms = 0

    def context(self, now_ms: int) -> ssl.SSLContext:
        if self._context is None or now_ms >= self._due_ms:
            files = self._issuer.authority.own_credentials(now_ms=now_ms)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.num_tickets = 0  # one question per connection: there is nothing to resume
            context.load_cert_chain(files.chain_path, files.key_path)
            self._context = context
            self._due_ms = now_ms + (files().certificate.not_after_ms - now_ms) // 2
        return self._context


def local_peer(connection: socket.socket) -> LocalPeer:
    """Who is at the other end of a unix socket, if that process still lives.

    The start time is read while a descriptor holds the process; if it is alive after that, the
    number was its own all the time.
    """
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _gid = _CREDENTIALS.unpack(packed)
    if pid <= 0:
        raise failure.of("ATTESTATION", "the program is not visible from here")
    descriptor = _peer_descriptor(connection, pid)
    try:
        start_ticks = _start_ticks(pid)
        ended = select.poll()
        ended.register(descriptor, select.POLLIN)
        if ended.poll(0):
            raise failure.of("ATTESTATION", "the program that asked has ended")
    finally:
        os.close(descriptor)
    return LocalPeer(uid, pid, start_ticks)


def _peer_descriptor(connection: socket.socket, pid: int) -> int:
    """A pidfd of the peer: from the socket itself since Linux 6.5, before that by its number."""
    try:
        return connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:
        return os.pidfd_open(pid)


def _start_ticks(pid: int) -> int:
    """When the process started, in clock ticks since boot: field 22 of proc(5)'s stat.

    The second field, the name, may hold anything, so fields are counted from its closing bracket.
    """
    text = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    return int(text.rpartition(")")[2].split()[19])


def _bind_unix(path: Path, *, shared: bool) -> socket.socket:
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
        raise failure.of("RANGE", f"a socket's path has at most {SOCKET_PATH_BYTES_MAX} bytes")
    if shared:
        path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
        path.parent.chmod(0o711)
    else:
        make_private_directory(path.parent)
    _remove_stale(path)
    listening = socket.socket(socket.AF_UNIX)
    try:
        listening.bind(str(path))
        path.chmod(0o666 if shared else 0o600)
        listening.listen(PEERS_MAX)
    except OSError as error:
        listening.close()
        raise failure.of("STORAGE", f"identity socket: {error.strerror}") from None
    return listening


def _remove_stale(path: Path) -> None:
    """Remove the socket of a process that is gone; refuse to take one that is listened on."""
    if not path.exists() or not stat.S_ISSOCK(path.stat().st_mode):
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return path.unlink(missing_ok=True)
        except OSError:
            pass  # full or slow: somebody is there
    raise failure.of("INVALID", "another process listens on the identity socket")
