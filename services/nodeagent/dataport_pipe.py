"""The streams that data connections run on, and how long each waits.

    UnixPipe   the kernel bounds each wait, so that an operation is one call to receive, one to send
    TlsPipe    never waits inside TLS, which one thread at a time may use; it waits for the socket,
               and for whoever has news

Rules. A wait ends after `TICK_S` at the latest, so that whoever waits can see what time it is.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import struct
from typing import Final

TICK_S: Final = 1.0
SEND_BUFFER_BYTES: Final = 1 << 20
"""Asked of the kernel, which may give less: so much of a large answer is under way at a time."""
_TIMEVAL: Final = struct.Struct("ll")


class UnixPipe:
    """A stream socket of this machine."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.settimeout(None)
        bound = _TIMEVAL.pack(int(TICK_S), int(TICK_S % 1 * 1_000_000))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, bound)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, bound)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)

    def receive(self, room: memoryview, *, whole: bool = False) -> int:
        return self._sock.recv_into(room, 0, socket.MSG_WAITALL if whole else 0)

    def send(self, data: bytes | memoryview) -> int:
        return self._sock.send(data, socket.MSG_NOSIGNAL)

    def send_at_once(self, data: bytes) -> int:
        return self._sock.send(data, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)

    def wake(self) -> None:
        """Whoever has news has sent it, or will when it has the turn to send."""

    def shut(self) -> None:
        _shut(self._sock)

    def close(self) -> None:
        self._sock.close()


class TlsPipe:
    """A connection of the network whose handshake is over."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self._sock = sock
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._news = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(sock.fileno(), select.POLLIN)
        self._readable.register(self._news, select.POLLIN)
        self._writable.register(sock.fileno(), select.POLLOUT)
        self._tick_ms = int(TICK_S * 1000)

    def receive(self, room: memoryview, *, whole: bool = False) -> int:
        while True:
            try:
                return self._sock.recv_into(room)
            except ssl.SSLWantReadError:
                pass
            ready = self._readable.poll(self._tick_ms)
            if not ready:
                raise BlockingIOError
            if any(descriptor == self._news for descriptor, _ in ready):
                os.eventfd_read(self._news)
                raise BlockingIOError

    def send(self, data: bytes | memoryview) -> int:
        """What was begun must be gone on with, with the same data, until it is taken."""
        while True:
            try:
                return self._sock.send(data)
            except ssl.SSLWantWriteError:
                if not self._writable.poll(self._tick_ms):
                    raise BlockingIOError from None

    def send_at_once(self, data: bytes) -> int:
        raise BlockingIOError  # only the thread that reads may use TLS

    def wake(self) -> None:
        try:
            os.eventfd_write(self._news, 1)
        except OSError:  # closed meanwhile
            return

    def shut(self) -> None:
        _shut(self._sock)

    def close(self) -> None:
        news, self._news = self._news, -1
        if news >= 0:
            os.close(news)
        self._sock.close()


def _shut(sock: socket.socket) -> None:
    try:
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # of TLS too, the stream beneath it
    except OSError:  # it was over already
        return
