"""The streams that data connections run on, and how long each waits.

    UnixPipe   the kernel bounds each wait, so that an operation is one call to receive, one to send

Rules. A wait ends after `TICK_S` at the latest, so that whoever waits can see what time it is.
"""

from __future__ import annotations

import socket
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

    def receive(self, room: memoryview) -> int:
        return self._sock.recv_into(room)

    def send(self, data: bytes | memoryview) -> int:
        return self._sock.send(data, socket.MSG_NOSIGNAL)

    def send_at_once(self, data: bytes) -> int:
        return self._sock.send(data, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)

    def wake(self) -> None:
        """Whoever has news has sent it, or will when it has the turn to send."""

    def shut(self) -> None:
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:  # it was over already
            return

    def close(self) -> None:
        self._sock.close()
