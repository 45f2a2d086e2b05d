"""Hands a lease's memory to a program on this machine: the descriptor itself, over a unix socket.

A holder that was told a secret when it bound comes to this socket, shows the secret, and is given
the memfd. It keeps the connection open for as long as it lives and hears of its leases on it; when
the process dies the kernel closes the connection and, through the pidfd, says that it is gone.

    holder → {"v": 1, "secret": "<32 hex>", "session": "<32 hex>"}      one packet
    agent  → {"v": 1, "lease_id": …, "descriptor": true} + descriptor
             {"v": 1, "failure": {"class": …, "code": …, …}}            refused, and the end
             {"v": 1, "notice": {"lease_id", "kind", "reason", "grace_ms", "failure"}}  any time

Rules. The socket is SOCK_SEQPACKET, a message is one packet of JSON; anybody on the machine may
connect, the secret is what counts: 128 random bits, good once, for five seconds, for the user
whose lease it is (SO_PEERCRED, where the holder's name says which user that is). A wrong one ends
the connection. One connection serves all leases of a process. The descriptor that leaves is an
open file description of its own, so that locks taken on it are the holder's. Control has marked
the lease as exported before the descriptor leaves. Leases without a descriptor use the same
handshake. To a process that control watches already, and that asked for it, the descriptor is sent
by itself, before the answer to the bind: it need not come for it.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import selectors
import socket
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from grafos_core import failure
from grafos_core.failure import FabricError
from services.nodeagent.sessions import News, Sessions, session_key

VERSION: Final = 1
SECRET_BYTES: Final = 16
SECRET_MS: Final = 5_000
OFFERS_MAX: Final = 4_096
CONNECTIONS_MAX: Final = 1_024
PACKET_BYTES_MAX: Final = 1_024
"""Of a holder's message; a well-formed one has about 110 bytes."""
WAITING_MAX: Final = 64
"""Packets of one connection that wait for an answer; more, and it is closed."""
WORKERS: Final = 2
_SO_PEERPIDFD: Final = 77
"""Linux 6.5; not among the names of Python 3.11."""
_UCRED = struct.Struct("3i")


@dataclass(frozen=True, slots=True)
class Offer:
    """What a secret is good for."""

    lease_id: str
    holder_key: str
    session: str
    """As the holder numbers it."""
    uid: int | None
    """The only user who may come with it; None where the holder's name does not say."""
    until_ms: int


class Offers:
    """Secrets that were given out and not used yet, one per lease. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._offers: dict[bytes, Offer] = {}
        self._latest: dict[str, bytes] = {}
        """By lease."""

    def add(self, offer: Offer, now_ms: int) -> bytes:
        """A secret for it; an earlier one for the same lease is void from now on."""
        secret = secrets.token_bytes(SECRET_BYTES)
        with self._lock:
            self._forget_old(now_ms)
            self._offers.pop(self._latest.pop(offer.lease_id, b""), None)
            if len(self._offers) >= OFFERS_MAX:
                raise failure.of("RATE", "too many hand-overs wait", retry_after_ms=SECRET_MS)
            self._offers[secret] = offer
            self._latest[offer.lease_id] = secret
        return secret

    def redeem(self, secret: bytes, session: str, *, uid: int, now_ms: int) -> Offer:
        """What `secret` was good for; it is used up by the first who shows it, right or wrong."""
        with self._lock:
            offer = self._forget(secret)
        if offer is None or now_ms >= offer.until_ms or session != offer.session:
            raise failure.of("HOLDER_MISMATCH", "the secret is not good, or not any more")
        if offer.uid not in (None, uid):
            raise failure.of("HOLDER_MISMATCH", "the lease is another user's")
        return offer

    def _forget_old(self, now_ms: int) -> None:
        for secret, offer in list(self._offers.items()):
            if offer.until_ms > now_ms:
                break
            self._forget(secret)

    def _forget(self, secret: bytes) -> Offer | None:
        offer = self._offers.pop(secret, None)
        if offer is not None:
            self._latest.pop(offer.lease_id, None)
        return offer


class Desk(Protocol):
    """What stands behind the socket."""

    def hand_over(self, offer: Offer, pidfd: int) -> int | None:
        """Tell control who holds `offer.lease_id`; a descriptor of his own, or None for none.

        Returns only once the lease counts as exported. The caller closes both descriptors.
        """


class LocalHolder:
    """One process at the other end of the socket. The lock orders joining before leaving."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.waiting = 0
        """Packets that wait for an answer; counted by the selector's thread and the workers."""
        self._lock = threading.Lock()
        self._sessions: set[str] = set()
        self._closed = False

    def join(self, sessions: Sessions, name: str) -> None:
        with self._lock:
            if self._closed:
                raise failure.of("HOLDER_MISMATCH", "the process is gone")
            if name not in self._sessions:
                sessions.join(name, self)
                self._sessions.add(name)

    def close(self, sessions: Sessions) -> None:
        with self._lock:
            self._closed = True
            joined, self._sessions = self._sessions, set()
        self.sock.close()
        for name in joined:
            sessions.leave(name, self)

    def count(self, change: int) -> int:
        with self._lock:
            self.waiting += change
            return self.waiting

    def tell(self, news: News) -> None:
        with suppress(OSError):  # full or gone: the next operation says it
            self.send({"notice": notice_fields(news)})

    def push(self, lease_id: str, descriptor: int) -> bool:
        try:
            self.send({"lease_id": lease_id, "descriptor": True}, descriptor)
        except OSError:  # full or gone: he may come for it
            return False
        return True

    def send(self, message: dict[str, Any], descriptor: int | None = None) -> None:
        packet = json.dumps({"v": VERSION, **message}, separators=(",", ":")).encode()
        fds = [] if descriptor is None else [descriptor]
        socket.send_fds(self.sock, [packet], fds, socket.MSG_NOSIGNAL)


class HandoverServer:
    """The socket and its one thread; what may wait for control runs in two more."""

    def __init__(
        self, offers: Offers, sessions: Sessions, desk: Desk, boottime_ms: Callable[[], int]
    ) -> None:
        self._offers, self._sessions, self._desk = offers, sessions, desk
        self._boottime_ms = boottime_ms
        self._selector = selectors.DefaultSelector()
        self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="handover")
        self._thread = threading.Thread(target=self._run, name="handover", daemon=True)
        self._stop, self._stopped = socket.socketpair()

    def start(self, path: Path) -> None:
        """Listen at `path`, which others of this machine may reach, but not write beside."""
        path.parent.mkdir(mode=0o711, exist_ok=True)
        path.parent.chmod(0o711)
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.setblocking(False)
        listener.bind(os.fspath(path))
        path.chmod(0o666)
        listener.listen(64)
        self._selector.register(listener, selectors.EVENT_READ, None)
        self._selector.register(self._stopped, selectors.EVENT_READ, None)
        self._thread.start()

    def stop(self) -> None:
        """End every connection, and listen no more."""
        self._stop.close()
        self._thread.join()
        self._workers.shutdown()
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            if key.data is None:
                key.fileobj.close()
            else:
                self._close(key.data)
        self._selector.close()

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                assert isinstance(key.fileobj, socket.socket)
                if key.fileobj is self._stopped:
                    return
                if key.data is None:
                    self._accept(key.fileobj)
                else:
                    self._receive(key.data)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError:  # gone before it was taken, or no descriptor left: others are served
            return
        if len(self._selector.get_map()) > CONNECTIONS_MAX:
            sock.close()
            return
        sock.setblocking(False)
        self._selector.register(sock, selectors.EVENT_READ, LocalHolder(sock))

    def _receive(self, holder: LocalHolder) -> None:
        try:
            packet = holder.sock.recv(PACKET_BYTES_MAX + 1)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if not packet or holder.count(+1) > WAITING_MAX:
            self._close(holder)
            return
        self._workers.submit(self._answer, holder, packet)

    def _answer(self, holder: LocalHolder, packet: bytes) -> None:
        try:
            self._serve(holder, packet)
        except FabricError as refusal:
            self._refuse(holder, refusal)
        except OSError:  # the holder is gone; its end of file closes the rest
            return
        finally:
            holder.count(-1)

    def _serve(self, holder: LocalHolder, packet: bytes) -> None:
        secret, session = _parsed(packet)
        uid, pid = _peer(holder.sock)
        offer = self._offers.redeem(secret, session, uid=uid, now_ms=self._boottime_ms())
        name = session_key(offer.holder_key, session)
        pidfd = peer_pidfd(holder.sock, pid)
        descriptor = None
        try:
            holder.join(self._sessions, name)
            descriptor = self._desk.hand_over(offer, pidfd)
            answer = {"lease_id": offer.lease_id, "descriptor": descriptor is not None}
            holder.send(answer, descriptor)
        finally:
            os.close(pidfd)
            if descriptor is not None:
                os.close(descriptor)

    def _refuse(self, holder: LocalHolder, refusal: FabricError) -> None:
        with suppress(OSError):
            holder.send({"failure": failure_fields(refusal)})
            holder.sock.shutdown(socket.SHUT_RDWR)  # the selector sees the end and closes

    def _close(self, holder: LocalHolder) -> None:
        self._selector.unregister(holder.sock)
        holder.close(self._sessions)


def peer_pidfd(sock: socket.socket, pid: int) -> int:
    """A pidfd of the process that connected; refused where it cannot be told from a successor."""
    try:
        return sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:  # an older kernel: look at the process before and after
        pass
    try:
        started = _start_ticks(pid)
        pidfd = os.pidfd_open(pid)
    except OSError:
        raise failure.of("HOLDER_MISMATCH", "the process is gone") from None
    if _has_ended(pidfd) or started != _start_ticks_or_none(pid):
        os.close(pidfd)
        raise failure.of("HOLDER_MISMATCH", "the process is gone")
    return pidfd


def _has_ended(pidfd: int) -> bool:
    """By poll: an agent has a descriptor per lease, and select takes no number above 1,023."""
    watched = select.poll()
    watched.register(pidfd, select.POLLIN)
    return bool(watched.poll(0))


def failure_fields(cause: FabricError) -> dict[str, Any]:
    """A failure as the holder's side makes it again: `failure.from_fields(class, fields)`."""
    return {"class": type(cause).__name__, **cause.fields()}


def own_description(descriptor: int) -> int:
    """The same file, opened anew: a duplicate would share its locks with us."""
    return os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)


def notice_fields(news: News) -> dict[str, Any]:
    """What a holder is told, as JSON's types."""
    cause = None if news.cause is None else failure_fields(news.cause)
    return {
        "lease_id": news.lease_id, "kind": news.kind, "reason": news.reason,
        "grace_ms": news.grace_ms, "failure": cause,
    }  # fmt: skip


def _parsed(packet: bytes) -> tuple[bytes, str]:
    refusal = failure.of("INVALID", "expected version, secret and session")
    if len(packet) > PACKET_BYTES_MAX:
        raise refusal
    try:
        message = json.loads(packet)
    except (ValueError, RecursionError):
        raise refusal from None
    if not isinstance(message, dict) or message.get("v") != VERSION:
        raise refusal
    secret, session = message.get("secret"), message.get("session")
    if not isinstance(secret, str) or not isinstance(session, str):
        raise refusal
    try:
        return bytes.fromhex(secret), session
    except ValueError:
        raise refusal from None


def _peer(sock: socket.socket) -> tuple[int, int]:
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _ = _UCRED.unpack(credentials)
    return uid, pid


def _start_ticks(pid: int) -> str:
    text = Path(f"/proc/{pid}/stat").read_text()
    return text.rpartition(")")[2].split()[19]


def _start_ticks_or_none(pid: int) -> str | None:
    try:
        return _start_ticks(pid)
    except OSError:
        return None
