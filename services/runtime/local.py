"""Where a service is called by processes of the same machine: ttRPC beside each gRPC socket.

A call passes the same gate as over gRPC and reaches the same handler; what is different is what it
costs: it is read, served and answered by one thread. Protocol and greeting:
grafos_proto.wire.ttrpc.

    thread   wait for its turn to read ──► read ──► pass the turn on ──► serve, answer ──► again

Rules. Only processes of our own user, or root, are listened to, and only after both ends have
proved their keys. A connection has at most as many calls at a time as gRPC would let it have; while
all its threads are busy it is not read. Its end, noticed by whoever reads, cancels its calls. It
ends at the same age as a gRPC connection, so that what only a greeting checks is checked again.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any, Final, cast

import grpc
from google.protobuf.message import DecodeError

from grafos_core import failure
from grafos_core.failure import FabricError
from grafos_proto.v1 import ttrpc_pb2
from grafos_proto.wire import certificates, failures, ttrpc
from grafos_proto.wire.credentials import Provider
from grafos_proto.wire.ttrpc import Broken, Frame, Frames
from services.runtime.calls import Gate, Handling
from services.runtime.clock import Clock
from services.runtime.methods import METHODS, UNLISTED, Method

_PEERCRED: Final = struct.Struct("3i")
IDLE_READERS: Final = 1
"""Threads of a connection that wait while another one reads."""
ENVELOPE_BYTES_MAX: Final = 16 * 1024
"""Names, deadline and metadata beside the message itself."""
INBOX_MAX: Final = 8
"""Messages of one stream that wait for its handler; then the connection is not read."""
INBOX_S: Final = 10.0
"""A handler that takes no message for so long ends the connection."""
NO_DEADLINE_S: Final = 1e18
ACCEPT_PAUSE_S: Final = 0.1
BACKLOG: Final = 64


class Handlers:
    """Collects what protoc's `add_…Servicer_to_server` registers."""

    def __init__(self) -> None:
        self.by_name: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Of gRPC's two ways of registering, the one for handlers without names: not needed."""

    def add_registered_method_handlers(
        self, service: str, handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        for method, handler in handlers.items():
            self.by_name[f"/{service}/{method}"] = handler


class LocalServer:
    """One socket."""

    def __init__(
        self,
        path: Path,
        handlers: Handlers,
        methods: Mapping[str, Method],
        gate: Gate,
        provider: Provider,
    ) -> None:
        self.gate, self.provider = gate, provider
        self._path = path
        table = {**METHODS, **methods}
        self.handlings = {
            name: Handling(gate, name, table.get(name, UNLISTED), handler)
            for name, handler in handlers.by_name.items()
        }
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connections: set[Connection] = set()
        self._lock = threading.Lock()
        self.stopping = threading.Event()

    def start(self) -> None:
        self._path.unlink(missing_ok=True)
        self._listener.bind(os.fspath(self._path))
        self._path.chmod(0o600)
        self._listener.listen(BACKLOG)
        threading.Thread(target=self._accept, name="local", daemon=True).start()

    def stop(self, grace_ms: int) -> None:
        """Accept nobody, let calls end within the grace, end the rest."""
        self.stopping.set()
        try:
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError:  # it never listened
            pass
        self._listener.close()
        with self._lock:
            connections = list(self._connections)
        end_ms = self.gate.clock.boot_ms() + grace_ms
        for each in connections:
            each.wait_idle(max(0, end_ms - self.gate.clock.boot_ms()) / 1000)
            each.shut()

    def gone(self, connection: Connection) -> None:
        with self._lock:
            self._connections.discard(connection)

    def _accept(self) -> None:
        while not self.stopping.is_set():
            try:
                sock, _ = self._listener.accept()
            except OSError:  # stopped; or no descriptor is left, which may pass
                self.stopping.wait(ACCEPT_PAUSE_S)
                continue
            if not self._may_come(sock):
                sock.close()
                continue
            connection = Connection(self, sock)
            with self._lock:
                self._connections.add(connection)
            connection.start()

    def _may_come(self, sock: socket.socket) -> bool:
        data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
        _, uid, _ = _PEERCRED.unpack(data)
        with self._lock:
            room = len(self._connections) < self.gate.limits.calls_max
        return room and uid in (os.getuid(), 0)


class Connection:
    """One process at the other end, and the threads that serve it."""

    def __init__(self, server: LocalServer, sock: socket.socket) -> None:
        self.server, self.gate = server, server.gate
        self.frames = Frames(sock, self.gate.limits.receive_bytes_max + ENVELOPE_BYTES_MAX)
        self._sock = sock
        self._lock = threading.Lock()
        self._turn, self._idle = threading.Condition(self._lock), threading.Condition(self._lock)
        self._reading = False
        self._threads = self._waiting = 0
        self._calls: dict[int, _Context] = {}
        self._last_stream = -1
        self._over = False
        self._end_ms = self.gate.clock.boot_ms() + self.gate.limits.connection_age_ms_max
        self._is_graced = False
        self._greeting = _Greeting(server.provider)
        self.leaf_pem = b""

    def start(self) -> None:
        self._threads = 1
        threading.Thread(target=self._work, name="local-call", daemon=True).start()

    def wait_idle(self, timeout_s: float) -> None:
        with self._idle:
            self._idle.wait_for(lambda: not self._calls, timeout_s)

    def shut(self) -> None:
        """Whoever reads or writes wakes up; the last thread closes."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def send(self, stream: int, kind: int, data: bytes) -> None:
        """An answer, or a part of one. What cannot be sent ends the connection."""
        try:
            self.frames.send(stream, kind, data)
        except OSError:
            self.shut()
            raise Broken from None

    def _work(self) -> None:
        """One thread: read in turn, serve, again; until the end, or until there are enough."""
        while self._take_turn():
            called = self._next_call()
            if called is None:
                self._end()
            self._pass_turn()
            if called is not None:
                called.serve()
        with self._lock:
            self._threads -= 1
            is_last = self._threads == 0
        if is_last:
            self._sock.close()
            self.server.gone(self)

    def _take_turn(self) -> bool:
        """Wait until it is ours to read; False: this thread is not needed any more."""
        with self._lock:
            while self._reading and not self._over:
                if self._waiting >= IDLE_READERS:
                    return False
                self._waiting += 1
                self._turn.wait()
                self._waiting -= 1
            self._reading = True
            return not self._over

    def _pass_turn(self) -> None:
        """Have another thread read on while this one serves, as far as there may be more."""
        with self._lock:
            self._reading = False
            if self._waiting:
                self._turn.notify_all() if self._over else self._turn.notify()
                return
            if self._over or self._threads >= self.gate.limits.streams_per_connection_max:
                return
            self._threads += 1
        threading.Thread(target=self._work, name="local-call", daemon=True).start()

    def _next_call(self) -> _Context | None:
        """The next request; None: the connection is over."""
        while True:
            try:
                frame = self._receive()
                if frame is None:
                    return None
                if frame.kind == ttrpc.REQUEST:
                    context = self._request(frame)
                    if context is not None:
                        return context
                elif frame.kind == ttrpc.DATA:
                    self._data(frame)
                else:
                    return None
            except (OSError, Broken, Full):
                return None

    def _receive(self) -> Frame | None:
        """The next frame; None at the age at which a connection ends, or when it stays silent."""
        limits = self.gate.limits
        while True:
            if not self.leaf_pem:
                wait_ms = limits.handshake_ms_max
            elif self.frames.has_begun:
                wait_ms = limits.first_message_ms_max
            else:
                wait_ms = min(limits.connection_idle_ms_max, self._left_ms())
            try:
                self._sock.settimeout(max(1, wait_ms) / 1000)
                return self.frames.receive()
            except TimeoutError:
                if not self.leaf_pem or self.frames.has_begun or self._is_due():
                    return None

    def _is_due(self) -> bool:
        """Whether a silent connection ends now: nobody calls, or the grace of those is over."""
        with self._lock:
            busy = bool(self._calls)
        if not busy or (self._is_graced and self._left_ms() <= 0):
            return True
        if self._left_ms() <= 0:
            self._is_graced = True
            self._end_ms += self.gate.limits.connection_age_grace_ms
        return False

    def _left_ms(self) -> int:
        return self._end_ms - self.gate.clock.boot_ms()

    def _request(self, frame: Frame) -> _Context | None:
        if frame.stream % 2 == 0 or frame.stream <= self._last_stream:
            raise Broken("a stream's number is odd and rises")
        self._last_stream = frame.stream
        if frame.flags == 0xFF:
            self._refuse(frame, failure.of("MESSAGE_SIZE", "request"))
            return None
        try:
            envelope = ttrpc_pb2.TtrpcRequest.FromString(frame.data)
        except DecodeError:
            raise Broken("no envelope") from None
        if envelope.service == ttrpc.GREETING:
            self._greet(frame, envelope)
            return None
        if not self.leaf_pem:
            self._refuse(frame, failure.of("IDENTITY", "the connection has proved nobody"))
            raise Broken("unproved")
        context = _Context(self, frame, envelope)
        with self._lock:
            self._calls[frame.stream] = context
        return context

    def _greet(self, frame: Frame, envelope: Any) -> None:
        """The two calls that make this connection somebody's."""
        try:
            answer = self._greeting.answer(envelope.method, envelope.payload, self.gate)
        except FabricError as refused:
            self._refuse(frame, refused)
            raise Broken("unproved") from None
        self.leaf_pem = self._greeting.proved
        data = ttrpc_pb2.TtrpcResponse(payload=answer).SerializeToString()
        self.send(frame.stream, ttrpc.RESPONSE, data)

    def _refuse(self, frame: Frame, refused: FabricError) -> None:
        status, message, trailers = failures.to_trailers(refused)
        data = ttrpc.response_of(status.value[0], message, ttrpc.details_of(trailers))
        self.send(frame.stream, ttrpc.RESPONSE, data)

    def _data(self, frame: Frame) -> None:
        with self._lock:
            context = self._calls.get(frame.stream)
        if context is not None:
            context.put(frame)

    def left(self, context: _Context) -> None:
        with self._idle:
            self._calls.pop(context.frame.stream, None)
            self._idle.notify_all()

    def _end(self) -> None:
        """No more will be read: what is under way is for nobody."""
        self.shut()
        with self._lock:
            self._over = True
            calls = list(self._calls.values())
        for each in calls:
            each.cancel()


class _Greeting:
    """The server's side of the proof of both keys."""

    def __init__(self, provider: Provider) -> None:
        self._provider = provider
        self._digest = b""
        self._leaf_pem = b""
        self.proved = b""

    def answer(self, method: str, payload: bytes, gate: Gate) -> bytes:
        try:
            if method == "Hello" and not self._digest:
                return self._hello(ttrpc_pb2.LocalHelloRequest.FromString(payload), gate)
            if method == "Prove" and self._digest and not self.proved:
                return self._prove(ttrpc_pb2.LocalProveRequest.FromString(payload))
        except DecodeError:
            raise failure.of("IDENTITY", "not a greeting") from None
        raise failure.of("IDENTITY", "first Hello, then Prove, each once")

    def _hello(self, hello: ttrpc_pb2.LocalHelloRequest, gate: Gate) -> bytes:
        if hello.version != ttrpc.VERSION or len(hello.nonce) != ttrpc.NONCE_BYTES:
            raise failure.of("VERSION", "greeting")
        ours = self._provider()
        now_ms = gate.clock.instant().wall_ms
        leaf = certificates.verify_chain(hello.chain_pem, ours.bundle_pem, now_ms)
        if leaf.identity.trust_domain != gate.trust_domain:
            raise failure.of("IDENTITY", "trust domain")
        self._leaf_pem = hello.chain_pem
        nonce = secrets.token_bytes(ttrpc.NONCE_BYTES)
        self._digest = ttrpc.transcript(hello, nonce, ours.chain_pem)
        return ttrpc_pb2.LocalHelloResponse(
            nonce=nonce,
            chain_pem=ours.chain_pem,
            proof=certificates.prove(ours.key, ttrpc.SERVER_DOMAIN, self._digest),
            connection_age_ms=gate.limits.connection_age_ms_max,
        ).SerializeToString()

    def _prove(self, said: ttrpc_pb2.LocalProveRequest) -> bytes:
        leaf = certificates.load_certificates(self._leaf_pem)[0]
        certificates.check_proof(leaf, ttrpc.CLIENT_DOMAIN, self._digest, said.proof)
        self.proved = certificates.pem_of(leaf)
        return ttrpc_pb2.LocalProveResponse().SerializeToString()


class _Aborted(Exception):
    """The handler has ended its call with a status."""


class _Context:
    """One call: what our gate, gRPC's servicers and failures.py use of grpc.ServicerContext."""

    def __init__(self, connection: Connection, frame: Frame, envelope: Any) -> None:
        self.frame = frame
        self._connection, self._envelope = connection, envelope
        timeout_s = envelope.timeout_nano / 1e9 if envelope.timeout_nano else NO_DEADLINE_S
        self._end_ms = _clock(connection).boot_ms() + timeout_s * 1000
        self._inbox: Queue[bytes | None] | None = None
        if frame.flags & ttrpc.REMOTE_OPEN:
            self._inbox = Queue(INBOX_MAX)
        self._callbacks: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._active = True
        self._code: grpc.StatusCode | None = None
        self._message, self._trailers = "", ()

    def serve(self) -> None:
        """Handle the call and answer it."""
        name = f"/{self._envelope.service}/{self._envelope.method}"
        handling = self._connection.server.handlings.get(name)
        try:
            if handling is None:
                self._answer_status(grpc.StatusCode.UNIMPLEMENTED, "no such method")
            elif handling.handler.response_streaming:
                self._stream(handling)
            else:
                self._answer(handling.single(self._messages(), cast(grpc.ServicerContext, self)))
        except _Aborted:
            self._say(lambda: self._answer_status(self._code, self._message))
        except Broken:
            pass  # nobody is there to be answered
        except Exception:  # the gate lets pass what its handler has ended itself
            self._say(lambda: self._answer_status(grpc.StatusCode.UNKNOWN, "failed"))
        finally:
            self._connection.left(self)
            self._finish()

    def cancel(self) -> None:
        """Nobody waits any more."""
        self.put(Frame(0, ttrpc.DATA, ttrpc.REMOTE_CLOSED | ttrpc.NO_DATA, b""), broken=True)
        self._finish()

    def put(self, frame: Frame, *, broken: bool = False) -> None:
        """A further message of the caller."""
        if self._inbox is None:
            return
        try:
            if not frame.flags & ttrpc.NO_DATA:
                self._inbox.put(frame.data, timeout=INBOX_S)
            if frame.flags & ttrpc.REMOTE_CLOSED:
                self._inbox.put(None, timeout=0 if broken else INBOX_S)
        except Full:
            if not broken:
                raise

    # as grpc.ServicerContext

    def auth_context(self) -> Mapping[str, list[bytes]]:
        return {"x509_pem_cert": [self._connection.leaf_pem]}

    def time_remaining(self) -> float:
        return (self._end_ms - _clock(self._connection).boot_ms()) / 1000

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return tuple((each.key, each.value) for each in self._envelope.metadata)

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        self._trailers = trailing_metadata

    def abort(self, code: grpc.StatusCode, details: str) -> Any:
        self._code, self._message = code, details
        raise _Aborted

    def code(self) -> grpc.StatusCode | None:
        return self._code

    def is_active(self) -> bool:
        return self._active

    def add_callback(self, callback: Callable[[], None]) -> bool:
        with self._lock:
            if self._active:
                self._callbacks.append(callback)
            return self._active

    def _finish(self) -> None:
        with self._lock:
            self._active = False
            callbacks, self._callbacks = self._callbacks, []
        for each in callbacks:
            each()

    def _messages(self) -> Iterator[bytes]:
        """The request, or requests, as they come."""
        if self._inbox is None:
            yield self._envelope.payload
            return
        while True:
            try:
                data = self._inbox.get(timeout=max(0.0, min(self.time_remaining(), 3600)))
            except Empty:
                raise failure.of("DEADLINE") from None
            if data is None:
                if not self._active:
                    raise grpc.RpcError  # as gRPC says that the caller is gone
                return
            yield data

    def _stream(self, handling: Handling) -> None:
        answers = handling.stream(self._messages(), cast(grpc.ServicerContext, self))
        try:
            for data in answers:
                self._connection.send(self.frame.stream, ttrpc.DATA, data)
        finally:
            answers.close()
        self._answer(b"")

    def _answer(self, payload: bytes) -> None:
        data = ttrpc_pb2.TtrpcResponse(payload=payload).SerializeToString()
        self._connection.send(self.frame.stream, ttrpc.RESPONSE, data)

    def _answer_status(self, code: grpc.StatusCode | None, message: str) -> None:
        status = code or grpc.StatusCode.UNKNOWN
        data = ttrpc.response_of(status.value[0], message, ttrpc.details_of(self._trailers))
        self._connection.send(self.frame.stream, ttrpc.RESPONSE, data)

    def _say(self, answer: Callable[[], None]) -> None:
        try:
            answer()
        except Broken:
            return


def _clock(connection: Connection) -> Clock:
    return connection.gate.clock
