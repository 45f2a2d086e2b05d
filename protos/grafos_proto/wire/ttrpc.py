"""Calls between processes of one machine: ttRPC on a unix socket, a seventh of what gRPC costs.

The same services and messages as over gRPC, and the same stubs: a `Channel` is what protoc's stubs
take. There is no TLS. Instead the socket lies in a folder that only its owner may enter, the server
looks at the user at the other end, and both ends prove the keys of their certificates over one
transcript before the first call (`Hello`, `Prove`; protos/grafos_proto/v1/ttrpc.proto).

Rules. A connection of ours carries one call at a time, so whoever calls also reads the answer and
no other thread is woken; calls at the same time take a connection each. A connection on which a
call was given up, by deadline or cancellation, is closed: that is also how the server learns of it.
A connection is left before the server would end it for its age, and no call outlives that age,
whoever has stopped. One that turns out to be closed when a request is sent has carried nothing of
it, so the request goes over another one. A forked child closes its copies and says nothing.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from grafos_core import failure
from grafos_core.failure import FabricError
from grafos_core.spiffe import Identity
from grafos_proto.v1 import ttrpc_pb2
from grafos_proto.wire.ttrpc_connection import Connection, Stale
from grafos_proto.wire.ttrpc_frames import (
    NEVER,
    NO_DATA,
    REMOTE_CLOSED,
    REMOTE_OPEN,
    SUFFIX,
    TIMEOUT_S_MAX,
    Frames,
)

IDLE_MAX: Final = 16
"""Connections kept open beside the ones in use."""

Metadata = Sequence[tuple[str, str]]


class Channel:
    """Calls to one process of this machine, by the part of grpc.Channel that stubs use."""

    def __init__(self, path: str, credentials: Any, peer: Identity) -> None:
        """`path`: of the gRPC socket. `credentials`: ours; `peer`: the only one we will talk to."""
        self._path, self._credentials, self._peer = path + SUFFIX, credentials, peer
        self._idle: deque[Connection] = deque()
        self._busy: set[Connection] = set()
        self._lock = threading.Lock()
        self._closed = False
        _channels.add(self)

    def unary_unary(self, method: str, *coders: Any, **named: Any) -> _Method:
        return self._method(method, coders, named, streams=False)

    def unary_stream(self, method: str, *coders: Any, **named: Any) -> _Method:
        return self._method(method, coders, named, streams=True)

    def stream_unary(self, method: str, *coders: Any, **named: Any) -> _Method:
        return self._method(method, coders, named, streams=False, many=True)

    def stream_stream(self, method: str, *coders: Any, **named: Any) -> _Method:
        return self._method(method, coders, named, streams=True, many=True)

    def close(self) -> None:
        """End every call, also those of other threads."""
        with self._lock:
            self._closed = True
            idle, busy = list(self._idle), list(self._busy)
            self._idle.clear()
        for each in busy:
            each.shut()  # whoever calls on it closes it
        for each in idle:
            each.close()

    def take(self, deadline: float) -> Connection:
        """A connection that is ours until it is given back or dropped."""
        now = time.monotonic()
        while True:
            with self._lock:
                if self._closed:
                    raise failure.of("CLOSED")
                found = self._idle.pop() if self._idle else None
                if found is not None:
                    self._busy.add(found)
            if found is None:
                return self._opened(deadline)
            if now < found.leave_at:
                return found
            self.drop(found)

    def give_back(self, connection: Connection) -> None:
        """Keep it for the next call, and let go of the one that has waited longest for one. One
        whose call was given up is closed."""
        connection.is_new = False
        if not connection.is_clean:
            self.drop(connection)
            return
        surplus = connection
        with self._lock:
            self._busy.discard(connection)
            if not self._closed:
                self._idle.append(connection)
                oldest = self._idle[0]
                if len(self._idle) <= IDLE_MAX and time.monotonic() < oldest.leave_at:
                    return
                surplus = self._idle.popleft()
        surplus.close()

    def drop(self, connection: Connection) -> None:
        """Takes no lock, since a collected stream comes here from whatever was running."""
        self._busy.discard(connection)
        connection.close()

    def forget(self) -> None:
        """In a forked child: what is open is the parent's; ours will be connections of our own."""
        self._lock = threading.Lock()
        self._idle.clear()
        self._busy.clear()

    def _opened(self, deadline: float) -> Connection:
        made = Connection.open(self._path, self._credentials, self._peer, deadline)
        with self._lock:
            if not self._closed:
                self._busy.add(made)
                return made
        made.close()
        raise failure.of("CLOSED")

    def _method(
        self, name: str, coders: Any, named: Any, *, streams: bool, many: bool = False
    ) -> _Method:
        encode, decode = (*coders, None, None)[:2]
        encode = named.get("request_serializer", encode)
        decode = named.get("response_deserializer", decode)
        service, _, method = name.lstrip("/").partition("/")
        return _Method(self, service, method, encode, decode, streams, many)


class _Method:
    """One method of a stub: called like gRPC's, failing with our failures."""

    def __init__(
        self, channel: Channel, service: str, method: str, encode: Any, decode: Any,
        streams: bool, many: bool,
    ) -> None:  # fmt: skip
        self._channel, self._service, self._name = channel, service, method
        self._encode, self._decode = encode or _as_it_is, decode or _as_it_is
        self._streams, self._many = streams, many
        self._flags = REMOTE_OPEN if many else REMOTE_CLOSED if streams else 0

    def __call__(
        self,
        request: Any,
        timeout: float | None = None,
        metadata: Metadata | None = None,
        **_: Any,
    ) -> Any:
        """The answer; of a method that streams, an iterator of answers with `cancel()`."""
        if timeout is not None and timeout <= 0:
            raise failure.of("DEADLINE")
        deadline = NEVER if timeout is None else time.monotonic() + timeout
        payload = b"" if self._many else self._encode(request)
        connection = self._begin(payload, deadline, metadata)
        if self._streams:
            return self._answers(connection, request, deadline)
        try:
            if self._many:
                self._send_all(connection, request, deadline)
            return self._decode(connection.answer(deadline))
        finally:
            self._channel.give_back(connection)

    def _begin(self, payload: bytes, deadline: float, metadata: Metadata | None) -> Connection:
        """A connection that has taken the request."""
        while True:
            connection, has_begun = self._channel.take(deadline), False
            try:
                connection.begin(self._envelope(payload, deadline, metadata), self._flags, deadline)
                has_begun = True
                return connection
            except Stale:  # each is dropped, so this ends with a new one
                continue
            finally:
                if not has_begun:
                    self._channel.drop(connection)

    def _envelope(self, payload: bytes, deadline: float, metadata: Metadata | None) -> bytes:
        nanoseconds = 0
        if deadline != NEVER:
            left_s = min(deadline - time.monotonic(), TIMEOUT_S_MAX)
            nanoseconds = max(1, int(left_s * 1e9))
        envelope = ttrpc_pb2.TtrpcRequest(
            service=self._service, method=self._name, payload=payload, timeout_nano=nanoseconds
        )
        for key, value in metadata or ():
            envelope.metadata.add(key=key, value=value)
        return envelope.SerializeToString()

    def _send_all(self, connection: Connection, requests: Iterable[Any], deadline: float) -> None:
        """All requests, unless the server answers before it has them all."""
        for each in requests:
            if connection.has_news():
                return
            connection.go_on(self._encode(each), deadline)
        connection.go_on(b"", deadline, REMOTE_CLOSED | NO_DATA)

    def _answers(self, connection: Connection, requests: Any, deadline: float) -> _Answers:
        answers = _Answers(self._channel, connection, self._decode, deadline)
        if self._many:
            sending = threading.Thread(
                target=self._send_beside, args=(connection, requests, deadline), daemon=True
            )
            connection.is_shared = True
            sending.start()
        return answers

    def _send_beside(self, connection: Connection, requests: Any, deadline: float) -> None:
        """Send while another thread reads the answers; what fails, fails there."""
        is_whole = False
        try:
            for each in requests:
                connection.go_on(self._encode(each), deadline)
            connection.go_on(b"", deadline, REMOTE_CLOSED | NO_DATA)
            is_whole = True
        except FabricError:
            return  # the end of the call is for whoever reads to tell
        finally:
            if not is_whole:
                connection.shut()


class _Answers:
    """The answers of a call that streams them. `cancel` from any thread."""

    def __init__(
        self, channel: Channel, connection: Connection, decode: Any, deadline: float
    ) -> None:
        self._channel, self._connection = channel, connection
        self._decode, self._deadline = decode, deadline
        self._over = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._over:
            raise StopIteration
        payload, is_over = None, True
        try:
            payload = self._connection.next_data(self._deadline)
            is_over = payload is None
        finally:
            if is_over:
                self._end()
        if payload is None:
            raise StopIteration
        return self._decode(payload)

    def cancel(self) -> bool:
        """End the call; who waits for the next answer gets UNREACHABLE."""
        self._connection.shut()
        return True

    def _end(self) -> None:
        self._over = True
        self._channel.give_back(self._connection)

    def __del__(self) -> None:
        if not self._over:
            self._over = True
            self._connection.shut()
            self._channel.drop(self._connection)


def greet(sock: socket.socket, credentials: Any, peer: Identity, timeout_s: float) -> None:
    """Prove each other on a connection that speaks another protocol afterwards.

    Raises:
        Disconnected: nobody answers there.
        Denied: it is not `peer`, or it does not believe us.
    """
    frames = Frames(sock)
    Connection(frames).greet(credentials, peer, time.monotonic() + timeout_s)
    if frames.has_begun:
        raise failure.of("UNREACHABLE", "spoke before it was asked")


def _as_it_is(message: bytes) -> bytes:
    return message


def _in_child() -> None:
    """What is open is the parent's."""
    for channel in list(_channels):
        channel.forget()


_channels: weakref.WeakSet[Channel] = weakref.WeakSet()
os.register_at_fork(after_in_child=_in_child)
