"""The ways to the data port of a node: a unix socket on its machine, TLS from everywhere else.

Rules. Whoever connects knows whom he means to meet, and the stream is not his before that one has
proved itself. A wait ends now and then by itself, so that whoever waits can look at the time.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

from grafos import _clock
from grafos_core import failure
from grafos_core.failure import FabricError
from grafos_core.spiffe import Identity

if TYPE_CHECKING:
    from grafos_proto.wire.credentials import Credentials, Provider

TICK_S: Final = 0.05
"""A wait looks at the time this often."""
RECEIVE_BYTES: Final = 64 * 1024
_TIMEVAL: Final = struct.Struct("ll")


class Stream(Protocol):
    """A connected, proved stream. What would wait longer than `TICK_S` raises BlockingIOError."""

    def receive(self, count: int, *, whole: bool = False) -> bytes:
        """At most `count` bytes, empty at the end; `whole`: rather all of them than soon."""

    def receive_into(self, view: memoryview) -> int: ...

    def receive_now(self) -> bytes:
        """What is here; BlockingIOError where nothing is."""

    def send(self, data: bytes | memoryview, *, more: bool = False) -> int:
        """How many bytes were taken; `more`: another part of them follows at once."""

    def close(self) -> None: ...


Connect = Callable[[float], Stream]
"""Makes one, within so many milliseconds."""


class UnixStream:
    """To a node on this machine; the kernel bounds each wait, once and for all."""

    def __init__(self, path: str) -> None:
        self._sock = sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            bound = _TIMEVAL.pack(0, int(TICK_S * 1_000_000))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, bound)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, bound)
            sock.connect(path)
        except BaseException:
            sock.close()
            raise

    def greet(self, provider: Provider, peer: Identity, timeout_ms: float) -> None:
        from grafos_proto.wire import ttrpc  # loads gRPC, which a program may never need

        ttrpc.greet(self._sock, provider(), peer, timeout_ms / 1000)

    def receive(self, count: int, *, whole: bool = False) -> bytes:
        return self._sock.recv(count, socket.MSG_WAITALL if whole else 0)

    def receive_into(self, view: memoryview) -> int:
        return self._sock.recv_into(view, 0, socket.MSG_WAITALL)

    def receive_now(self) -> bytes:
        return self._sock.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT)

    def send(self, data: bytes | memoryview, *, more: bool = False) -> int:
        return self._sock.send(data, socket.MSG_NOSIGNAL | (socket.MSG_MORE if more else 0))

    def close(self) -> None:
        self._sock.close()


def connect_unix(path: str, provider: Provider, peer: Identity) -> Connect:
    """To the port of a node on this machine."""

    def connect(timeout_ms: float) -> Stream:
        stream = UnixStream(path)
        try:
            stream.greet(provider, peer, timeout_ms)
        except BaseException:
            stream.close()
            raise
        return stream

    return connect


class TlsStream:
    """To a node elsewhere."""

    def __init__(
        self, host: str, port: int, ours: Credentials, peer: Identity, timeout_ms: float
    ) -> None:
        from grafos_proto.wire import tls  # loads ssl, which holders on the node's machine spare

        raw = socket.create_connection((host, port), timeout_ms / 1000)
        try:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sock = tls.client_context(ours).wrap_socket(
                raw, server_hostname=tls.server_name(peer)
            )
        except BaseException:
            raw.close()
            raise
        try:
            shown = tls.shown(self._sock)
            if shown.identity != peer:
                raise failure.of("IDENTITY", f"expected {peer}, met {shown.identity}")
            self._sock.settimeout(TICK_S)
        except BaseException:
            self._sock.close()
            raise

    def receive(self, count: int, *, whole: bool = False) -> bytes:
        try:
            return self._sock.recv(count)
        except TimeoutError:
            raise BlockingIOError from None

    def receive_into(self, view: memoryview) -> int:
        try:
            return self._sock.recv_into(view)
        except TimeoutError:
            raise BlockingIOError from None

    def receive_now(self) -> bytes:
        import ssl

        self._sock.settimeout(0)
        try:
            return self._sock.recv(RECEIVE_BYTES)
        except ssl.SSLWantReadError:
            raise BlockingIOError from None
        finally:
            self._sock.settimeout(TICK_S)

    def send(self, data: bytes | memoryview, *, more: bool = False) -> int:
        """What timed out is sent again as it is: TLS has kept its place in it."""
        try:
            return self._sock.send(data)
        except TimeoutError:
            raise BlockingIOError from None

    def close(self) -> None:
        self._sock.close()


def connect_tls(host: str, port: int, provider: Provider, peer: Identity) -> Connect:
    """To the port of a node on another machine."""

    def connect(timeout_ms: float) -> Stream:
        return TlsStream(host, port, provider(), peer, timeout_ms)

    return connect


def first_of(*connects: Connect) -> Connect:
    """The first that works: a path may be there and be another node's."""

    def connect(timeout_ms: float) -> Stream:
        end_ms = _clock.boot_ms() + timeout_ms
        for each in connects[:-1]:
            try:
                return each(max(1, end_ms - _clock.boot_ms()))
            except (OSError, FabricError):
                continue
        return connects[-1](max(1, end_ms - _clock.boot_ms()))

    return connect
