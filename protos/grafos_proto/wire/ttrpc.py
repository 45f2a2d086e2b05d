"""Calls between processes of one machine: ttRPC on a unix socket, a tenth of what gRPC costs.

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
import secrets
import socket
import struct
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from google.protobuf.message import DecodeError, Message

from grafos_core import failure
from grafos_core.failure import FabricError
from grafos_core.spiffe import Identity
from grafos_proto.v1 import ttrpc_pb2
from grafos_proto.wire import certificates
from grafos_proto.wire.ttrpc_frames import (
    CLIENT_DOMAIN,
    DATA,
    DATA_BYTES_MAX,
    GREETING,
    NEVER,
    NO_DATA,
    NONCE_BYTES,
    REMOTE_CLOSED,
    REMOTE_OPEN,
    REQUEST,
    RESPONSE,
    SERVER_DOMAIN,
    SUFFIX,
    TIMEOUT_S_MAX,
    VERSION,
    Broken,
    Frame,
    Frames,
    failure_of,
    transcript,
)

HANDSHAKE_S: Final = 5.0
IDLE_MAX: Final = 16
"""Connections kept open beside the ones in use."""
AGE_PART: Final = 0.5
"""Of the age at which the server ends a connection; we leave it then."""
AGE_GRACE_S: Final = 5.0
"""A server that has not ended a connection so long after its age has stopped."""
_TIMEVAL: Final = struct.Struct("ll")

Metadata = Sequence[tuple[str, str]]


class Channel:
    """Calls to one process of this machine, by the part of grpc.Channel that stubs use."""

    def __init__(self, path: str, credentials: Any, peer: Identity) -> None:
        """`path`: of the gRPC socket. `credentials`: ours; `peer`: the only one we will talk to."""
        self._path, self._credentials, self._peer = path + SUFFIX, credentials, peer
        self._idle: deque[_Connection] = deque()
        self._busy: set[_Connection] = set()
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

    def take(self, deadline: float) -> _Connection:
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

    def give_back(self, connection: _Connection) -> None:
        """Keep it for the next call, and let go of the one that has waited longest for one."""
        connection.is_new = False
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

    def drop(self, connection: _Connection) -> None:
        """Takes no lock, since a collected stream comes here from whatever was running."""
        self._busy.discard(connection)
        connection.close()

    def forget(self) -> None:
        """In a forked child: what is open is the parent's; ours will be connections of our own."""
        self._lock = threading.Lock()
        self._idle.clear()
        self._busy.clear()

    def _opened(self, deadline: float) -> _Connection:
        made = _Connection.open(self._path, self._credentials, self._peer, deadline)
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
        try:
            if self._streams:
                return self._answers(connection, request, deadline)
            if self._many:
                self._send_all(connection, request, deadline)
            payload = connection.answer(deadline)
        except BaseException:
            self._channel.drop(connection)
            raise
        self._channel.give_back(connection)
        if isinstance(payload, FabricError):
            raise payload
        return self._decode(payload)

    def _begin(self, payload: bytes, deadline: float, metadata: Metadata | None) -> _Connection:
        """A connection that has taken the request."""
        while True:
            connection = self._channel.take(deadline)
            try:
                connection.begin(self._envelope(payload, deadline, metadata), self._flags, deadline)
                return connection
            except _Stale:  # each is dropped, so this ends with a new one
                self._channel.drop(connection)
            except BaseException:
                self._channel.drop(connection)
                raise

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

    def _send_all(self, connection: _Connection, requests: Iterable[Any], deadline: float) -> None:
        """All requests, unless the server answers before it has them all."""
        for each in requests:
            if connection.has_news():
                return
            connection.go_on(self._encode(each), deadline)
        connection.go_on(b"", deadline, REMOTE_CLOSED | NO_DATA)

    def _answers(self, connection: _Connection, requests: Any, deadline: float) -> _Answers:
        answers = _Answers(self._channel, connection, self._decode, deadline)
        if self._many:
            sending = threading.Thread(
                target=self._send_beside, args=(connection, requests, deadline), daemon=True
            )
            connection.is_shared = True
            sending.start()
        return answers

    def _send_beside(self, connection: _Connection, requests: Any, deadline: float) -> None:
        """Send while another thread reads the answers; what fails, fails there."""
        try:
            for each in requests:
                connection.go_on(self._encode(each), deadline)
            connection.go_on(b"", deadline, REMOTE_CLOSED | NO_DATA)
        except FabricError:
            return  # the end of the call is for whoever reads to tell
        except BaseException:
            connection.shut()
            raise


class _Answers:
    """The answers of a call that streams them. `cancel` from any thread."""

    def __init__(
        self, channel: Channel, connection: _Connection, decode: Any, deadline: float
    ) -> None:
        self._channel, self._connection = channel, connection
        self._decode, self._deadline = decode, deadline
        self._over = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._over:
            raise StopIteration
        try:
            payload = self._connection.next_data(self._deadline)
        except BaseException:
            self._end()
            raise
        if isinstance(payload, bytes):
            return self._decode(payload)
        self._end()
        if payload is not None:
            raise payload
        raise StopIteration

    def cancel(self) -> bool:
        """End the call; who waits for the next answer gets UNREACHABLE."""
        self._connection.shut()
        return True

    def _end(self) -> None:
        self._over = True
        if self._connection.is_clean:
            self._channel.give_back(self._connection)
        else:
            self._channel.drop(self._connection)

    def __del__(self) -> None:
        if not self._over:
            self._over = True
            self._connection.shut()
            self._channel.drop(self._connection)


class _Stale(Exception):
    """A connection that was kept has ended before it took the request."""


class _Connection:
    """One proved connection; one call at a time."""

    def __init__(self, frames: Frames) -> None:
        self._frames = frames
        self._stream = -1
        self.leave_at = self._end_at = NEVER
        self.is_new = True
        self.is_clean = True
        """No call is under way, and none was given up."""
        self.is_shared = False
        """Another thread may still be sending on it: it is not kept."""
        _connections.add(self)

    @classmethod
    def open(cls, path: str, credentials: Any, peer: Identity, deadline: float) -> _Connection:
        """Connect and prove each other.

        Raises:
            Disconnected: nobody listens or answers; DEADLINE where it was ours that passed.
            Denied: it is somebody else, or does not believe us.
        """
        until = min(deadline, time.monotonic() + HANDSHAKE_S)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        made = cls(Frames(sock))
        try:
            left_us = max(1, int((until - time.monotonic()) * 1e6))
            # What bounds connect(2) of a unix socket; it is not looked at after that.
            patience = _TIMEVAL.pack(*divmod(left_us, 1_000_000))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
            sock.connect(path)
            made._greet(credentials, peer, until)
        except OSError as error:
            made.close()
            if deadline <= time.monotonic():
                raise failure.of("DEADLINE") from None
            raise failure.of("UNREACHABLE", error.strerror or "nobody listens") from None
        except failure.DeadlineExceeded:
            made.close()
            if deadline <= time.monotonic():
                raise
            raise failure.of("UNREACHABLE", "no greeting") from None
        except BaseException:
            made.close()
            raise
        return made

    def begin(self, envelope: bytes, flags: int, deadline: float) -> None:
        if len(envelope) > DATA_BYTES_MAX:
            raise failure.of("MESSAGE_SIZE", "request")
        self.is_clean = False
        self._stream += 2
        self._send(REQUEST, envelope, deadline, flags)

    def go_on(self, payload: bytes, deadline: float, flags: int = 0) -> None:
        if len(payload) > DATA_BYTES_MAX:
            raise failure.of("MESSAGE_SIZE", "request")
        self._send(DATA, payload, deadline, flags)

    def has_news(self) -> bool:
        return self._frames.has_news()

    def answer(self, deadline: float) -> bytes | FabricError:
        """The response to the call that was begun, or the refusal."""
        frame = self._receive(deadline)
        if frame.kind != RESPONSE:
            raise failure.of("UNREACHABLE", "not an answer")
        return self._opened(frame.data)

    def next_data(self, deadline: float) -> bytes | FabricError | None:
        """The next answer of a stream, or the refusal; None: that was all."""
        frame = self._receive(deadline)
        if frame.kind == RESPONSE:
            last = self._opened(frame.data)
            return last if isinstance(last, FabricError) else None
        if frame.flags & NO_DATA and frame.flags & REMOTE_CLOSED:
            self.is_clean = not self.is_shared
            return None
        return frame.data

    def shut(self) -> None:
        """Wake whoever waits on it; from any thread."""
        self.is_shared = True
        self.is_clean = False
        self._frames.shut()

    def close(self) -> None:
        self.is_clean = False
        self._frames.close()

    def forget(self) -> None:
        self._frames.forget()

    def _call(self, method: str, request: Message, deadline: float) -> bytes:
        """One call of the greeting."""
        envelope = ttrpc_pb2.TtrpcRequest(
            service=GREETING, method=method, payload=request.SerializeToString()
        )
        self.begin(envelope.SerializeToString(), 0, deadline)
        payload = self.answer(deadline)
        if isinstance(payload, FabricError):
            raise payload
        return payload

    def _greet(self, credentials: Any, peer: Identity, deadline: float) -> None:
        hello = ttrpc_pb2.LocalHelloRequest(
            version=VERSION, nonce=secrets.token_bytes(NONCE_BYTES), chain_pem=credentials.chain_pem
        )
        try:
            said = ttrpc_pb2.LocalHelloResponse.FromString(self._call("Hello", hello, deadline))
        except DecodeError:
            raise failure.of("IDENTITY", "not a greeting") from None
        now_ms = time.time_ns() // 1_000_000
        other = certificates.verify_chain(said.chain_pem, credentials.bundle_pem, now_ms)
        if other.identity != peer:
            raise failure.of("IDENTITY", f"expected {peer}, met {other.identity}")
        digest = transcript(hello, said.nonce, said.chain_pem)
        leaf = certificates.load_certificates(said.chain_pem)[0]
        certificates.check_proof(leaf, SERVER_DOMAIN, digest, said.proof)
        proof = certificates.prove(credentials.key, CLIENT_DOMAIN, digest)
        self._call("Prove", ttrpc_pb2.LocalProveRequest(proof=proof), deadline)
        now, age_s = time.monotonic(), said.connection_age_ms / 1000
        self.leave_at, self._end_at = now + age_s * AGE_PART, now + age_s + AGE_GRACE_S

    def _send(self, kind: int, data: bytes, deadline: float, flags: int) -> None:
        try:
            self._frames.send(self._stream, kind, data, flags, until=min(deadline, self._end_at))
        except TimeoutError:
            raise self._too_late(deadline) from None
        except OSError:
            if kind == REQUEST and not self.is_new:
                raise _Stale from None
            raise failure.of("UNREACHABLE", "the connection broke") from None

    def _receive(self, deadline: float) -> Frame:
        """The next frame of our call."""
        until = min(deadline, self._end_at)
        try:
            while True:
                frame = self._frames.receive(until)
                if frame.stream == self._stream:
                    return frame
        except TimeoutError:
            raise self._too_late(deadline) from None
        except (OSError, Broken):
            raise failure.of("UNREACHABLE", "the connection broke") from None

    def _too_late(self, deadline: float) -> FabricError:
        if deadline <= self._end_at:
            return failure.of("DEADLINE")
        return failure.of("UNREACHABLE", "the connection is too old")

    def _opened(self, data: bytes) -> bytes | FabricError:
        try:
            response = ttrpc_pb2.TtrpcResponse.FromString(data)
        except DecodeError:
            raise failure.of("UNREACHABLE", "not an answer") from None
        self.is_clean = not self.is_shared
        return failure_of(response.status) if response.status.code else response.payload


def greet(frames: Frames, credentials: Any, peer: Identity, deadline: float) -> None:
    """Prove each other on a connection that speaks another protocol afterwards.

    Raises:
        Disconnected: nobody answers there.
        Denied: it is not `peer`, or it does not believe us.
    """
    _Connection(frames)._greet(credentials, peer, deadline)


def _as_it_is(message: bytes) -> bytes:
    return message


def _in_child() -> None:
    """Copies that a child kept open would hide the parent's death from the server."""
    for connection in list(_connections):
        connection.forget()
    for channel in list(_channels):
        channel.forget()


_channels: weakref.WeakSet[Channel] = weakref.WeakSet()
_connections: weakref.WeakSet[_Connection] = weakref.WeakSet()
os.register_at_fork(after_in_child=_in_child)
