"""Calls between processes of one machine: ttRPC on a unix socket, a tenth of what gRPC costs.

The same services and messages as over gRPC, and the same stubs: a `Channel` is what protoc's stubs
take. The framing and the envelope are ttRPC's (containerd's PROTOCOL.md, version 1.2):

    length u32 │ stream u32 │ type u8 │ flags u8 │ data       big-endian, data ≤ 4 MiB

There is no TLS. Instead the socket lies in a folder that only its owner may enter, the server looks
at the user at the other end, and both ends prove the keys of their certificates over one
transcript before the first call (`Hello`, `Prove`; protos/grafos_proto/v1/ttrpc.proto).

Rules. A connection of ours carries one call at a time, so whoever calls also reads the answer and
no other thread is woken; calls at the same time take a connection each. A connection on which a
call was given up, by deadline or cancellation, is closed: that is also how the server learns of it.
A connection is left before the server would end it for its age.
"""

from __future__ import annotations

import hashlib
import secrets
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import status_pb2  # type: ignore[import-untyped]

from grafos_core import failure
from grafos_core.failure import FabricError
from grafos_core.spiffe import Identity
from grafos_proto.v1 import lease_pb2, ttrpc_pb2
from grafos_proto.wire import certificates, failures

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
HANDSHAKE_S: Final = 5.0
IDLE_MAX: Final = 16
"""Connections kept open beside the ones in use."""
AGE_PART: Final = 0.5
"""Of the age at which the server ends a connection; we leave it then."""
RECEIVE_BYTES: Final = 64 * 1024
_NO_DEADLINE: Final = float("inf")
_STATUS: Final[dict[int, grpc.StatusCode]] = {each.value[0]: each for each in grpc.StatusCode}

Metadata = Sequence[tuple[str, str]]


class Frame(NamedTuple):
    """One message as it came."""

    stream: int
    kind: int
    flags: int
    data: bytes


class Broken(Exception):
    """The other end is gone, or does not speak this protocol."""


class Frames:
    """Reads and writes frames on one socket. One thread reads; several may write."""

    def __init__(self, sock: socket.socket, bytes_max: int = DATA_BYTES_MAX) -> None:
        self.sock, self._bytes_max = sock, bytes_max
        self._buffer = bytearray()
        self._writing = threading.Lock()

    def send(self, stream: int, kind: int, data: bytes, flags: int = 0) -> None:
        with self._writing:
            self.sock.sendall(HEADER.pack(len(data), stream, kind, flags) + data)

    def receive(self) -> Frame:
        """The next frame; one whose data is over the limit comes with none, under flag `0xFF`.

        Raises:
            TimeoutError: the socket's time-out, between two pieces.
            Broken: the end, or what is no frame.
        """
        while len(self._buffer) < HEADER.size:
            self._fill()
        length, stream, kind, flags = HEADER.unpack_from(self._buffer)
        if length > DATA_BYTES_MAX:
            raise Broken("a frame of more than 4 MiB")
        whole = HEADER.size + length
        if length > self._bytes_max:
            self._skip(whole)
            return Frame(stream, kind, 0xFF, b"")
        while len(self._buffer) < whole:
            self._fill()
        data = bytes(self._buffer[HEADER.size : whole])
        del self._buffer[:whole]
        return Frame(stream, kind, flags, data)

    @property
    def has_begun(self) -> bool:
        """Whether a part of the next frame is here already."""
        return bool(self._buffer)

    def _fill(self) -> None:
        piece = self.sock.recv(RECEIVE_BYTES)
        if not piece:
            raise Broken("closed by the other end")
        self._buffer += piece

    def _skip(self, count: int) -> None:
        while len(self._buffer) < count:
            count -= len(self._buffer)
            self._buffer.clear()
            self._fill()
        del self._buffer[:count]


def transcript(hello: Any, nonce: bytes, chain_pem: bytes) -> bytes:
    """What both ends sign: everything that was said, with its lengths."""
    parts = (hello.nonce, nonce, hello.chain_pem, chain_pem)
    framed = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    return hashlib.sha256(hello.version.to_bytes(4, "big") + framed).digest()


def response_of(code: int, message: str, details: Iterable[Any]) -> bytes:
    """An encoded response that is a refusal."""
    status = ttrpc_pb2.TtrpcStatus(code=code, message=message, details=details)
    return ttrpc_pb2.TtrpcResponse(status=status).SerializeToString()


class Channel:
    """Calls to one process of this machine, by the part of grpc.Channel that stubs use."""

    def __init__(self, path: str, credentials: Any, peer: Identity) -> None:
        """`path`: of the gRPC socket. `credentials`: ours; `peer`: the only one we will talk to."""
        self._path, self._credentials, self._peer = path + SUFFIX, credentials, peer
        self._idle: deque[_Connection] = deque()
        self._busy: set[_Connection] = set()
        self._lock = threading.Lock()
        self._closed = False

    def unary_unary(self, method: str, *coders: Any, **named: Any) -> _Method:
        return self._method(method, coders, named, streams=False)

    def unary_stream(self, method: str, *coders: Any, **named: Any) -> _Method:
        return self._method(method, coders, named, streams=True)

    def stream_unary(self, method: str, *coders: Any, **named: Any) -> _Method:
        return self._method(method, coders, named, streams=False, many=True)

    def stream_stream(self, method: str, *coders: Any, **named: Any) -> _Method:
        return self._method(method, coders, named, streams=True, many=True)

    def close(self) -> None:
        """End every call, also those of other threads, which close what they call on."""
        with self._lock:
            self._closed = True
            idle, busy = list(self._idle), list(self._busy)
            self._idle.clear()
        for each in idle:
            each.close()
        for each in busy:
            each.shut()

    def _method(
        self, name: str, coders: Any, named: Any, *, streams: bool, many: bool = False
    ) -> _Method:
        encode, decode = (*coders, None, None)[:2]
        encode = named.get("request_serializer", encode)
        decode = named.get("response_deserializer", decode)
        service, _, method = name.lstrip("/").partition("/")
        return _Method(self, service, method, encode, decode, streams, many)

    def take(self, deadline: float) -> _Connection:
        """A connection that is ours until it is given back or shut."""
        while True:
            with self._lock:
                if self._closed:
                    raise failure.of("CLOSED")
                found = self._idle.pop() if self._idle else None
                if found is not None:
                    self._busy.add(found)
            if found is None:
                break
            if found.is_fresh():
                return found
            self.drop(found)
        made = _Connection.open(self._path, self._credentials, self._peer, deadline)
        if not self._add(made):
            made.close()
            raise failure.of("CLOSED")
        return made

    def _add(self, connection: _Connection) -> bool:
        with self._lock:
            if not self._closed:
                self._busy.add(connection)
            return not self._closed

    def give_back(self, connection: _Connection) -> None:
        """For the next call; one whose call was given up is closed."""
        with self._lock:
            self._busy.discard(connection)
            keep = connection.is_clean and not self._closed and len(self._idle) < IDLE_MAX
            if keep:
                self._idle.append(connection)
        if not keep:
            connection.close()

    def drop(self, connection: _Connection) -> None:
        with self._lock:
            self._busy.discard(connection)
        connection.close()


class _Method:
    """One method of a stub: called like gRPC's, failing with our failures."""

    def __init__(
        self, channel: Channel, service: str, method: str, encode: Any, decode: Any,
        streams: bool, many: bool,
    ) -> None:  # fmt: skip
        self._channel, self._service, self._name = channel, service, method
        self._encode, self._decode = encode, decode
        self._streams, self._many = streams, many

    def __call__(
        self,
        request: Any,
        timeout: float | None = None,
        metadata: Metadata | None = None,
        **_: Any,
    ) -> Any:
        """The answer; of a method that streams, an iterator of answers with `cancel()`."""
        deadline = _NO_DEADLINE if timeout is None else time.monotonic() + timeout
        connection = self._channel.take(deadline)
        handed_on = False
        try:
            connection.begin(
                self._envelope(request, timeout, metadata),
                REMOTE_OPEN if self._many else REMOTE_CLOSED if self._streams else 0,
                deadline,
            )
            if self._many:
                for each in request:
                    connection.go_on(self._encode(each), deadline)
                connection.go_on(b"", deadline, REMOTE_CLOSED | NO_DATA)
            if self._streams:
                handed_on = True
                return _Answers(self._channel, connection, self._decode, deadline)
            return self._decode(connection.answer(deadline))
        finally:
            if not handed_on:
                self._channel.give_back(connection)

    def _envelope(self, request: Any, timeout: float | None, metadata: Metadata | None) -> bytes:
        envelope = ttrpc_pb2.TtrpcRequest(
            service=self._service,
            method=self._name,
            payload=b"" if self._many else self._encode(request),
            timeout_nano=0 if timeout is None else max(1, int(timeout * 1e9)),
        )
        for key, value in metadata or ():
            envelope.metadata.add(key=key, value=value)
        return envelope.SerializeToString()


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
        except FabricError:
            self._end()
            raise
        if payload is None:
            self._end()
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
            self.cancel()
            self._end()


class _Connection:
    """One proved connection; one call at a time."""

    def __init__(self, frames: Frames) -> None:
        self._frames = frames
        self._stream = -1
        self._leave_at = _NO_DEADLINE
        self.is_clean = True
        """No call is under way, and none was given up."""

    @classmethod
    def open(cls, path: str, credentials: Any, peer: Identity, deadline: float) -> _Connection:
        """Connect and prove each other. UNREACHABLE where nobody listens, IDENTITY where it is
        somebody else."""
        deadline = min(deadline, time.monotonic() + HANDSHAKE_S)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        made = cls(Frames(sock))
        proved = False
        try:
            made._wait(deadline)
            sock.connect(path)
            made._greet(credentials, peer, deadline)
            proved = True
        except OSError as error:
            raise failure.of("UNREACHABLE", error.strerror or "nobody listens") from None
        finally:
            if not proved:
                sock.close()
        return made

    def is_fresh(self) -> bool:
        """Whether it may carry another call: the other end has neither closed it nor will soon."""
        if time.monotonic() >= self._leave_at:
            return False
        poll = select.poll()
        poll.register(self._frames.sock, select.POLLIN)
        return not poll.poll(0)

    def begin(self, envelope: bytes, flags: int, deadline: float) -> None:
        self.is_clean = False
        self._stream += 2
        self._send(REQUEST, envelope, deadline, flags)

    def go_on(self, payload: bytes, deadline: float, flags: int = 0) -> None:
        self._send(DATA, payload, deadline, flags)

    def answer(self, deadline: float) -> bytes:
        """The response to the call that was begun."""
        frame = self._receive(deadline)
        if frame.kind != RESPONSE:
            raise failure.of("UNREACHABLE", "not an answer")
        return self._opened(frame.data)

    def next_data(self, deadline: float) -> bytes | None:
        """The next answer of a stream; None: that was all."""
        frame = self._receive(deadline)
        if frame.kind == RESPONSE:
            self._opened(frame.data)
            return None
        if frame.flags & NO_DATA and frame.flags & REMOTE_CLOSED:
            self.is_clean = True
            return None
        return frame.data

    def shut(self) -> None:
        """Wake whoever waits on it; from any thread."""
        self.is_clean = False
        try:
            self._frames.sock.shutdown(socket.SHUT_RDWR)
        except OSError:  # it was over already
            return

    def close(self) -> None:
        self.is_clean = False
        self._frames.sock.close()

    def call(self, service: str, method: str, request: Message, deadline: float) -> bytes:
        envelope = ttrpc_pb2.TtrpcRequest(
            service=service, method=method, payload=request.SerializeToString()
        )
        self.begin(envelope.SerializeToString(), 0, deadline)
        return self.answer(deadline)

    def _greet(self, credentials: Any, peer: Identity, deadline: float) -> None:
        hello = ttrpc_pb2.LocalHelloRequest(
            version=VERSION, nonce=secrets.token_bytes(NONCE_BYTES), chain_pem=credentials.chain_pem
        )
        try:
            said = ttrpc_pb2.LocalHelloResponse.FromString(
                self.call(GREETING, "Hello", hello, deadline)
            )
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
        self.call(GREETING, "Prove", ttrpc_pb2.LocalProveRequest(proof=proof), deadline)
        self._leave_at = time.monotonic() + said.connection_age_ms / 1000 * AGE_PART

    def _send(self, kind: int, data: bytes, deadline: float, flags: int) -> None:
        try:
            self._wait(deadline)
            self._frames.send(self._stream, kind, data, flags)
        except TimeoutError:
            raise failure.of("DEADLINE") from None
        except OSError:
            raise failure.of("UNREACHABLE", "the connection broke") from None

    def _receive(self, deadline: float) -> Frame:
        """The next frame of our call."""
        try:
            while True:
                self._wait(deadline)
                frame = self._frames.receive()
                if frame.stream == self._stream:
                    return frame
        except TimeoutError:
            raise failure.of("DEADLINE") from None
        except (OSError, Broken):
            raise failure.of("UNREACHABLE", "the connection broke") from None

    def _opened(self, data: bytes) -> bytes:
        try:
            response = ttrpc_pb2.TtrpcResponse.FromString(data)
        except DecodeError:
            raise failure.of("UNREACHABLE", "not an answer") from None
        self.is_clean = True
        if response.status.code:
            raise failure_of(response.status)
        return response.payload

    def _wait(self, deadline: float) -> None:
        """Let the socket wait until then; between two pieces of one message the time starts anew,
        so what trickles in is bounded by its size, not by the deadline alone."""
        if deadline == _NO_DEADLINE:
            self._frames.sock.settimeout(None)
            return
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        self._frames.sock.settimeout(left_s)


def failure_of(status: ttrpc_pb2.TtrpcStatus) -> FabricError:
    """The failure that the other end raised."""
    detail = lease_pb2.FailureDetail()
    for each in status.details:
        if each.Unpack(detail) and detail.code:
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
