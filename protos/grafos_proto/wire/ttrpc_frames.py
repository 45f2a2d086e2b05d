"""What both ends of a ttRPC connection have in common: frames, the greeting's transcript, refusals.

    length u32 │ stream u32 │ type u8 │ flags u8 │ data       big-endian, data ≤ 4 MiB

This is ttRPC's framing (containerd's PROTOCOL.md, version 1.2). Rules. A socket never has a
time-out of its own: one number for both directions, set anew for each call, would cost a system
call each time and let whoever reads shorten the patience of whoever writes. Instead every wait says
until when, and only a wait that is needed costs a system call. A frame that was not sent as a whole
was never sent: the other end cannot act on a part of it.
"""

from __future__ import annotations

import hashlib
import select
import socket
import struct
import threading
import time
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

import grpc
from google.protobuf import any_pb2
from google.rpc import status_pb2  # type: ignore[import-untyped]

from grafos_core.failure import FabricError
from grafos_proto.v1 import lease_pb2, ttrpc_pb2
from grafos_proto.wire import failures

SUFFIX: Final = ".t"
"""Where `unix:<path>` is served by gRPC, `<path>.t` is served by ttRPC."""
VERSION: Final = 1
HEADER: Final = struct.Struct(">IIBB")
DATA_BYTES_MAX: Final = 4 << 20
REQUEST, RESPONSE, DATA = 1, 2, 3
REMOTE_CLOSED, REMOTE_OPEN, NO_DATA = 1, 2, 4
NONCE_BYTES: Final = 32
GREETING: Final = "grafos.v1.LocalService"
SERVER_DOMAIN, CLIENT_DOMAIN = "grafos-local-server", "grafos-local-client"
TIMEOUT_S_MAX: Final = 660
"""Of a deadline in a request; longer than any connection lives."""
RECEIVE_BYTES: Final = 64 * 1024
POLL_S_MAX: Final = 86_400.0
"""poll(2) counts milliseconds in 31 bits."""
NEVER: Final = float("inf")
_STATUS: Final[dict[int, grpc.StatusCode]] = {each.value[0]: each for each in grpc.StatusCode}
_AT_ONCE: Final = socket.MSG_DONTWAIT
_QUIETLY: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
"""A program that has SIGPIPE's default action back is not killed by a peer that went."""


class Frame(NamedTuple):
    """One message as it came."""

    stream: int
    kind: int
    flags: int
    data: bytes
    is_oversize: bool = False
    """Its data was over our own limit, and has been thrown away."""


class Broken(Exception):
    """The other end is gone, or does not speak this protocol."""


class Frames:
    """Reads and writes frames on one socket. One thread reads at a time; several may write."""

    def __init__(self, sock: socket.socket, bytes_max: int = DATA_BYTES_MAX) -> None:
        """`bytes_max`: of the data that is taken; what is larger is skipped and told of."""
        self.bytes_max = bytes_max
        self._sock = sock
        self._readable = select.poll()
        self._readable.register(sock.fileno(), select.POLLIN)
        self._buffer = bytearray()
        self._writing, self._ending = threading.Lock(), threading.Lock()
        self._is_closed = False

    def send(
        self,
        stream: int,
        kind: int,
        data: bytes,
        flags: int = 0,
        *,
        until: float = NEVER,
        within_s: float = NEVER,
    ) -> None:
        """Send one frame, by an instant of time.monotonic and not waiting longer than that.

        Raises:
            TimeoutError: the other end does not take it; the connection cannot be used any more.
            OSError: the other end is gone, and has not got this frame.
        """
        whole = HEADER.pack(len(data), stream, kind, flags) + data
        with self._writing:
            sent = self._push(whole)
            if sent < len(whole):
                if within_s != NEVER:
                    until = min(until, time.monotonic() + within_s)
                self._push_rest(memoryview(whole)[sent:], until)

    def receive(self, until: float = NEVER, rest_s: float = NEVER) -> Frame:
        """The next frame. It must be here as a whole by `until`, an instant of time.monotonic; or,
        where `rest_s` is given, must have begun by then and be whole so many seconds later.

        Raises:
            TimeoutError: it was not; `has_begun` says which.
            Broken, OSError: the end, or what is no frame.
        """
        if not self._buffer:
            piece = self._piece(until, RECEIVE_BYTES)
            if len(piece) >= HEADER.size:  # nearly always: one frame, the whole of it
                length, stream, kind, flags = HEADER.unpack_from(piece)
                if len(piece) == HEADER.size + length and length <= self.bytes_max:
                    return Frame(stream, kind, flags, piece[HEADER.size :])
            self._buffer += piece
        if rest_s != NEVER:
            until = time.monotonic() + rest_s
        return self._assembled(until)

    @property
    def has_begun(self) -> bool:
        """Whether a part of the next frame is here already, or more."""
        return bool(self._buffer)

    def has_news(self) -> bool:
        """Whether `receive` would find something at once."""
        return bool(self._buffer or self._readable.poll(0))

    def is_silent(self) -> bool:
        """Whether nothing has come that nobody has read; from any thread."""
        try:
            return not self._sock.recv(1, _AT_ONCE | socket.MSG_PEEK)
        except OSError:  # mostly: would have to wait
            return True

    def shut(self) -> None:
        """Whoever reads or writes wakes up, at both ends; from any thread."""
        with self._ending:
            if self._is_closed:
                return
            try:
                self._sock.shutdown(socket.SHUT_RDWR)
            except OSError:  # it was over already
                return

    def close(self) -> None:
        """Give the descriptor back; when nobody reads or writes any more."""
        with self._ending:
            self._is_closed = True
            self._sock.close()

    def forget(self) -> None:
        """In a forked child: our copy goes, the parent's call goes on. Who held a lock is gone."""
        self._writing, self._ending = threading.Lock(), threading.Lock()
        self._is_closed = True
        self._sock.close()

    def _assembled(self, until: float) -> Frame:
        self._fill(HEADER.size, until)
        length, stream, kind, flags = HEADER.unpack_from(self._buffer)
        if length > DATA_BYTES_MAX:
            raise Broken("a frame of more than 4 MiB")
        whole = HEADER.size + length
        if length > self.bytes_max:
            self._skip(whole, until)
            return Frame(stream, kind, flags, b"", is_oversize=True)
        self._fill(whole, until)
        with memoryview(self._buffer) as view, view[HEADER.size : whole] as part:
            data = bytes(part)
        del self._buffer[:whole]
        return Frame(stream, kind, flags, data)

    def _fill(self, count: int, until: float) -> None:
        while len(self._buffer) < count:
            missing = count - len(self._buffer)
            self._buffer += self._piece(until, max(missing, RECEIVE_BYTES))

    def _skip(self, count: int, until: float) -> None:
        while len(self._buffer) < count:
            count -= len(self._buffer)
            self._buffer.clear()
            self._buffer += self._piece(until, RECEIVE_BYTES)
        del self._buffer[:count]

    def _piece(self, until: float, bytes_max: int) -> bytes:
        while True:
            if self._is_closed:
                raise Broken("closed by ourselves")
            _wait(self._readable, until)
            try:
                piece = self._sock.recv(bytes_max, _AT_ONCE)
            except BlockingIOError:
                continue
            if not piece:
                raise Broken("closed by the other end")
            return piece

    def _push(self, data: bytes | memoryview) -> int:
        try:
            return self._sock.send(data, _QUIETLY)
        except BlockingIOError:
            return 0

    def _push_rest(self, rest: memoryview, until: float) -> None:
        writable = select.poll()
        writable.register(self._sock.fileno(), select.POLLOUT)
        while rest:
            _wait(writable, until)
            rest = rest[self._push(rest) :]


def _wait(poll: select.poll, until: float) -> None:
    """Until there is something to do."""
    if until == NEVER:
        poll.poll()
        return
    while True:
        left_s = until - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        if poll.poll(min(left_s, POLL_S_MAX) * 1000):
            return


def transcript(hello: Any, nonce: bytes, chain_pem: bytes) -> bytes:
    """What both ends sign: everything that was said, with its lengths."""
    parts = (hello.nonce, nonce, hello.chain_pem, chain_pem)
    framed = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    return hashlib.sha256(hello.version.to_bytes(4, "big") + framed).digest()


def response_of(code: int, message: str, details: Iterable[Any]) -> bytes:
    """An encoded response that is a refusal."""
    status = ttrpc_pb2.TtrpcStatus(code=code, message=message, details=details)
    return ttrpc_pb2.TtrpcResponse(status=status).SerializeToString()


def failure_of(status: ttrpc_pb2.TtrpcStatus) -> FabricError:
    """The failure that the other end raised."""
    detail = lease_pb2.FailureDetail()
    for each in status.details:
        if each.Is(detail.DESCRIPTOR) and each.Unpack(detail) and detail.code:
            return failures.failure_of(detail)
    return failures.from_status(_STATUS.get(status.code, grpc.StatusCode.UNKNOWN), status.message)


def details_of(trailers: Iterable[tuple[str, bytes]]) -> list[Any]:
    """The details for a response, from the trailers that gRPC would have carried."""
    details: list[Any] = []
    for name, value in trailers:
        if name == failures.FAILURE_TRAILER:
            packed = any_pb2.Any()
            packed.Pack(lease_pb2.FailureDetail.FromString(value))
            details.insert(0, packed)
        elif name == failures.DETAILS_TRAILER:
            details += status_pb2.Status.FromString(value).details
    return details
