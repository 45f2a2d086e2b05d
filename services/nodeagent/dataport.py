"""The door for holders who move bytes: one connection per process, and then no more ceremony.

Whoever comes proves the key of his certificate once, as on every local socket; from then on the
connection is his, and each of its operations is held against the leases of that key.

    accept ──► greeting: both prove their keys ──► requests and answers (dataport_line.py)
               on the network: TLS 1.3, both certificates

Rules. Anybody may connect; who has not proved a key within two seconds is shown out,
and a user has a bounded number of such. A holder whose name says which user it is must be that
user. Connections are counted in all and for each key, and so is the memory that large frames
borrow. Each connection has a thread of its own, and nothing that it does can hold up another, the
gate, or a teardown.
"""

from __future__ import annotations

import functools
import os
import socket
import ssl
import struct
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from grafos_core import failure, spiffe
from grafos_core.failure import FabricError
from grafos_core.spiffe import Role
from grafos_proto.wire import tls
from grafos_proto.wire.certificates import Certificate
from grafos_proto.wire.credentials import Provider
from services.nodeagent.datapath import DataPath
from services.nodeagent.dataport_line import AGE_MS_MAX, Line, Pipe
from services.nodeagent.dataport_pipe import TlsPipe, UnixPipe
from services.nodeagent.dataport_work import Work
from services.nodeagent.sessions import Sessions
from services.nodeagent.shares import Shares
from services.runtime.clock import Clock
from services.runtime.limits import Limits
from services.runtime.local_greeting import greeted

CONNECTIONS_MAX: Final = 1_024
CONNECTIONS_PER_USER_MAX: Final = 512
"""Of one user of this machine, whose processes are a holder each."""
CONNECTIONS_PER_HOLDER_MAX: Final = 8
STRANGERS_PER_USER_MAX: Final = 16
"""Connections of one user that have proved nothing yet."""
BORROWED_BYTES_MAX: Final = 64 << 20
"""Of frames above 64 KiB that are under way, of all connections together."""
HANDSHAKE_S: Final = 2.0
BACKLOG: Final = 64
ACCEPT_PAUSE_S: Final = 0.1
_UCRED: Final = struct.Struct("3i")


class Room:
    """Bytes that all connections may borrow together. Thread-safe."""

    def __init__(self, bytes_max: int = BORROWED_BYTES_MAX) -> None:
        self._left = bytes_max
        self._lock = threading.Lock()

    def borrow(self, count: int) -> bool:
        with self._lock:
            if count > self._left:
                return False
            self._left -= count
            return True

    def give_back(self, count: int) -> None:
        with self._lock:
            self._left += count


@dataclass(frozen=True, slots=True)
class Terms:
    """What a greeting holds a holder to."""

    trust_domain: str
    clock: Clock
    limits: Limits = field(default_factory=lambda: Limits(connection_age_ms_max=AGE_MS_MAX))


Greeted = tuple[Pipe, Certificate]


class DataPort:
    """The sockets and their connections."""

    def __init__(
        self,
        data: DataPath,
        sessions: Sessions,
        provider: Provider,
        terms: Terms,
        shares: Shares | None = None,
    ) -> None:
        self._data, self._sessions, self._shares = data, sessions, shares
        self._provider, self._terms = provider, terms
        self._room = Room()
        self._lock = threading.Lock()
        self._lines: set[Line] = set()
        self._threads: set[threading.Thread] = set()
        self._strangers: Counter[int | str] = Counter()
        self._users: Counter[int | str] = Counter()
        self._holders: Counter[str] = Counter()
        self._listeners: list[socket.socket] = []
        self._stopped = threading.Event()
        self._context: ssl.SSLContext | None = None
        self._shown = b""
        """The certificate that the context shows."""

    def listen_unix(self, path: Path) -> None:
        """Others of this machine may reach it, but not write beside it."""
        path.parent.mkdir(mode=0o711, exist_ok=True)
        path.parent.chmod(0o711)
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(os.fspath(path))
        path.chmod(0o666)
        listener.listen(BACKLOG)
        self._listen(listener, self._take_local)

    def listen_tls(self, host: str, port: int) -> int:
        """For holders on other machines; the number of the port that it is. 0 takes any."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            raise failure.of("UNREACHABLE", f"data port: {error.strerror}") from None
        self._listen(listener, self._take_remote)
        number: int = listener.getsockname()[1]
        return number

    def stop(self) -> None:
        """Let nobody in, end every connection, leave no thread."""
        self._stopped.set()
        with self._lock:
            lines = list(self._lines)
        for listener in self._listeners:
            try:
                listener.shutdown(socket.SHUT_RDWR)
            except OSError:  # it never listened
                pass
        for line in lines:
            line.shut()
        while True:
            with self._lock:
                threads = list(self._threads)
            if not threads:
                break
            for thread in threads:
                thread.join()
        for listener in self._listeners:
            listener.close()

    def connections(self) -> int:
        with self._lock:
            return len(self._lines)

    def _listen(self, listener: socket.socket, take: Callable[[socket.socket], None]) -> None:
        self._listeners.append(listener)
        self._start(lambda: self._accept(listener, take), "data-accept")

    def _accept(self, listener: socket.socket, take: Callable[[socket.socket], None]) -> None:
        while not self._stopped.is_set():
            try:
                sock, _ = listener.accept()
            except OSError:  # stopped; or no descriptor is left, which may pass
                self._stopped.wait(ACCEPT_PAUSE_S)
                continue
            take(sock)

    def _take_local(self, sock: socket.socket) -> None:
        said = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        uid: int = _UCRED.unpack(said)[1]

        def greet() -> Greeted | None:
            holder = self._greeted(sock, uid)
            return None if holder is None else (UnixPipe(sock), holder)

        self._take(sock, uid, greet)

    def _take_remote(self, sock: socket.socket) -> None:
        try:
            address: str = sock.getpeername()[0]
        except OSError:  # gone
            sock.close()
            return
        self._take(sock, address, lambda: self._shaken(sock))

    def _take(
        self, sock: socket.socket, user: int | str, greet: Callable[[], Greeted | None]
    ) -> None:
        """`user`: of this machine, or another machine's address."""
        with self._lock:
            if (
                len(self._threads) >= CONNECTIONS_MAX
                or self._users[user] >= CONNECTIONS_PER_USER_MAX
                or self._strangers[user] >= STRANGERS_PER_USER_MAX
            ):
                sock.close()
                return
            self._strangers[user] += 1
            self._users[user] += 1
        self._start(lambda: self._receive(sock, user, greet), "data")

    def _receive(
        self, sock: socket.socket, user: int | str, greet: Callable[[], Greeted | None]
    ) -> None:
        try:
            try:
                greeted = greet()
            finally:
                self._count_out(self._strangers, user)
            if greeted is not None:
                self._serve(*greeted)
        finally:
            sock.close()
            self._count_out(self._users, user)

    def _serve(self, pipe: Pipe, holder: Certificate) -> None:
        """Until the connection ends. Whoever has too many already is not served."""
        key, shares = holder.thumbprint, self._shares
        show = None
        if shares is not None:
            show = functools.partial(shares.show, key=key, name=str(holder.identity))
        work = Work(self._data, key, show)
        line = Line(pipe, holder, work, self._sessions, self._room, self._terms.clock)
        with self._lock:
            if self._holders[key] >= CONNECTIONS_PER_HOLDER_MAX or self._stopped.is_set():
                pipe.close()
                return
            self._holders[key] += 1
            self._lines.add(line)
        try:
            line.run()
        finally:
            with self._lock:
                self._lines.discard(line)
            self._count_out(self._holders, key)

    def _count_out(self, counter: Counter[Any], who: Any) -> None:
        with self._lock:
            counter[who] -= 1
            if not counter[who]:
                del counter[who]

    def _greeted(self, sock: socket.socket, uid: int) -> Certificate | None:
        def check(leaf: Certificate) -> None:
            check_holder(leaf, uid)

        return greeted(sock, self._provider, self._terms, check)

    def _shaken(self, sock: socket.socket) -> Greeted | None:
        """A TLS connection and who its handshake proved."""
        ours = self._provider()
        with self._lock:
            if self._shown != ours.chain_pem:
                self._context, self._shown = tls.server_context(ours), ours.chain_pem
            context = self._context
        assert context is not None
        try:
            sock.settimeout(HANDSHAKE_S)
            made = context.wrap_socket(sock, server_side=True)
        except (OSError, ValueError):  # no certificate, no TLS, nothing at all
            return None
        try:
            holder = tls.shown(made)
            holder.check_fresh(self._terms.clock.wall_ms())
            if holder.identity.trust_domain != self._terms.trust_domain:
                raise failure.of("IDENTITY", "trust domain")
            check_holder(holder, None)
            return TlsPipe(made), holder
        except (OSError, FabricError):
            made.close()
            return None

    def _start(self, run: Callable[[], None], name: str) -> None:
        def runs() -> None:
            try:
                run()
            finally:
                with self._lock:
                    self._threads.discard(thread)

        thread = threading.Thread(target=runs, name=name, daemon=True)
        with self._lock:
            self._threads.add(thread)
        thread.start()


def check_holder(certificate: Certificate, uid: int | None) -> None:
    """Only holders have leases; one whose name says a user is that user."""
    if certificate.identity.role is not Role.HOLDER:
        raise failure.of("ROLE", certificate.identity.role.value)
    named = spiffe.uid_of_local_holder(certificate.identity)
    if uid is not None and named not in (None, uid):
        raise failure.of("HOLDER_MISMATCH", "the certificate is another user's")
