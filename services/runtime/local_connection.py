"""One process at the other end of a local socket, and the threads that serve it.

    read a request ──► serve it, answer ──► read the next one          one thread, nobody is woken
                          │
                          └─ it streams, takes long, or more has come: another thread reads on

Rules. Before its greeting is over a connection has a fixed time, and anything but the greeting ends
it. One thread at a time reads; it keeps that role while it serves a call that is over soon, and the
watch of local.py takes the role from it when it is not. A connection has at most as many calls at a
time as gRPC would let it have, and one thread more, so that somebody always reads: its end cancels
its calls. What cannot be read or sent in time ends it. It ends at the same age as a connection of
gRPC, so that what only a greeting checks is checked again.
"""

from __future__ import annotations

import secrets
import socket
import threading
import time
from typing import TYPE_CHECKING, Any, Final, Protocol

from google.protobuf.message import DecodeError

from grafos_core import failure
from grafos_core.failure import FabricError
from grafos_proto.v1 import ttrpc_pb2
from grafos_proto.wire import certificates, failures
from grafos_proto.wire import ttrpc_frames as ttrpc
from grafos_proto.wire.credentials import Provider
from grafos_proto.wire.ttrpc_frames import Broken, Frame, Frames
from services.runtime.clock import Clock
from services.runtime.limits import BUSY_RETRY_MS, Limits
from services.runtime.local_call import Flooded, LocalCall

if TYPE_CHECKING:
    from services.runtime.local import LocalServer

SPARE_READERS: Final = 1
"""Threads of a connection that wait while another one reads."""
ENVELOPE_BYTES_MAX: Final = 16 * 1024
"""Names, deadline and metadata beside the message itself."""
GREETING_BYTES_MAX: Final = 2 * certificates.PEM_BYTES_MAX
SEND_S: Final = 10.0
"""A client that takes no answer for so long is not there."""
SOON_MS: Final = 5
"""A call that takes longer than this is not waited for before reading on."""


class Connection:
    """Made for a socket that was accepted; `start` it once."""

    def __init__(self, server: LocalServer, sock: socket.socket) -> None:
        self.server, self.gate = server, server.gate
        self.leaf_pem = b""
        """The certificate that was proved; empty until then."""
        self._frames = Frames(sock, GREETING_BYTES_MAX)
        self._greeting = Greeting(server.provider)
        self._lock = threading.Lock()
        self._turn, self._idle = threading.Condition(self._lock), threading.Condition(self._lock)
        self._is_read = True
        self._inline: LocalCall | None = None
        """The call that the thread with the reader's role serves meanwhile."""
        self._threads = self._spare = self._serving = 0
        self._calls: dict[int, LocalCall] = {}
        self._last_stream = -1
        self._is_over = self._drains = False
        self.used_ms = self.gate.clock.boot_ms()
        limits = self.gate.limits
        self._age_ms = self.used_ms + limits.connection_age_ms_max
        self._greeted_ms = self.used_ms + limits.handshake_ms_max
        self._end_ms = self._age_ms + limits.connection_age_grace_ms

    def start(self) -> None:
        self._threads = 1
        threading.Thread(target=self._work, name="local-call", daemon=True).start()

    @property
    def is_idle(self) -> bool:
        """Without a call, also one that has not been read yet; it may make room for another one."""
        return not self._serving and not self._frames.has_begun and self._frames.is_silent()

    def look(self, now_ms: int) -> None:
        """From the watch: end what is too old, and read on beside a call that takes long."""
        if now_ms >= (self._end_ms if self.leaf_pem else self._greeted_ms):
            self.shut()
        call = self._inline
        if call is not None and now_ms - call.begun_ms >= SOON_MS:
            with self._lock:
                if self._inline is call:
                    self._pass_turn()

    def drain(self) -> None:
        """Let calls end and take no more."""
        with self._lock:
            self._drains = True
            is_over = self._serving == 0
        if is_over:
            self.shut()

    def wait_idle(self, timeout_s: float) -> None:
        with self._idle:
            self._idle.wait_for(lambda: self._serving == 0, timeout_s)

    def shut(self) -> None:
        """Whoever reads or writes wakes up; the last thread closes."""
        self._frames.shut()

    def send(self, stream: int, kind: int, data: bytes) -> None:
        """An answer, or a part of one. What cannot be sent ends the connection."""
        try:
            self._frames.send(stream, kind, data, within_s=SEND_S)
        except OSError:
            self.shut()
            raise Broken from None

    def refuse(self, stream: int, refused: FabricError) -> None:
        status, message, trailers = failures.to_trailers(refused)
        data = ttrpc.response_of(status.value[0], message, ttrpc.details_of(trailers))
        self.send(stream, ttrpc.RESPONSE, data)

    def answered(self, stream: int) -> None:
        """Right before the answer goes: who has got it may call again."""
        with self._lock:
            self._calls.pop(stream, None)

    def left(self, stream: int) -> None:
        """A call is over, answered or not."""
        self.server.leave()
        with self._lock:
            self._calls.pop(stream, None)
            self._serving -= 1
            is_over = self._drains and self._serving == 0
            if is_over:
                self._idle.notify_all()
        if is_over:
            self.shut()

    # threads

    def _work(self) -> None:
        """One thread. It begins with the reader's role; it ends when it is not needed."""
        try:
            while True:
                call = self._next_call()
                if call is None:
                    self._end()
                    return
                if not self._serve(call):
                    return
        except BaseException:  # whoever had the role is gone with it
            self._end()
            raise
        finally:
            with self._lock:
                self._threads -= 1
                is_last = self._threads == 0
            if is_last:
                self._frames.close()
                self.server.gone(self)

    def _serve(self, call: LocalCall) -> bool:
        """Serve a call; whether the reader's role is ours afterwards."""
        with self._lock:
            self._inline = call
            if call.is_stream or self._frames.has_begun:
                self._pass_turn()
        call.serve()
        with self._lock:
            if self._inline is call:
                self._inline = None
                return True
            return self._take_turn()

    def _take_turn(self) -> bool:
        """Wait until it is ours to read; False: this thread is not needed any more. Locked."""
        while self._is_read and not self._is_over:
            if self._spare >= SPARE_READERS:
                return False
            self._spare += 1
            self._turn.wait()
            self._spare -= 1
        self._is_read = True
        return not self._is_over

    def _pass_turn(self) -> None:
        """Have another thread read while the one with the role serves. Locked."""
        if self._spare:
            self._inline, self._is_read = None, False
            self._turn.notify()
            return
        reading = threading.Thread(target=self._work, name="local-call", daemon=True)
        self._threads += 1
        try:
            reading.start()
        except RuntimeError:  # no thread is left: this one reads on when it has served
            self._threads -= 1
            return
        self._inline = None

    def _end(self) -> None:
        """No more will be read: what is under way is for nobody."""
        self.shut()
        with self._lock:
            self._is_over = True
            calls = list(self._calls.values())
            self._turn.notify_all()
        for each in calls:
            each.cancel()

    # what comes in

    def _next_call(self) -> LocalCall | None:
        """The next request; None: the connection is over."""
        try:
            while True:
                frame = self._receive()
                if frame is None:
                    return None
                call = self._taken(frame)
                if call is not None:
                    return call
        except (OSError, Broken, Flooded):
            return None

    def _receive(self) -> Frame | None:
        """The next frame; None at the age at which a connection ends, or when it stays silent."""
        limits = self.gate.limits
        while True:
            now_ms = self.gate.clock.boot_ms()
            rest_ms, end_ms = limits.first_message_ms_max, self._age_ms
            if not self.leaf_pem:
                rest_ms = self._greeted_ms - now_ms
                end_ms = self._greeted_ms
            elif now_ms >= end_ms and self._serving:
                end_ms = self._end_ms
            wait_ms = min(limits.connection_idle_ms_max, end_ms - now_ms)
            until = time.monotonic() + wait_ms / 1000
            try:
                return self._frames.receive(until, rest_ms / 1000)
            except TimeoutError:
                if self._frames.has_begun or not self._serving:
                    return None
                if self.gate.clock.boot_ms() >= self._end_ms:
                    return None

    def _taken(self, frame: Frame) -> LocalCall | None:
        """What a frame means; the call that it begins."""
        if frame.kind == ttrpc.REQUEST:
            if frame.stream % 2 == 0 or frame.stream <= self._last_stream:
                raise Broken("a stream's number is odd and rises")
            self._last_stream = frame.stream
            if self.leaf_pem:
                return self._request(frame)
            self._greet(frame)
        elif frame.kind == ttrpc.DATA and self.leaf_pem:
            with self._lock:
                call = self._calls.get(frame.stream)
            if call is not None:
                call.put(frame)
        else:
            raise Broken("not for a server")
        return None

    def _request(self, frame: Frame) -> LocalCall | None:
        envelope = None if frame.is_oversize else envelope_of(frame)
        limits = self.gate.limits
        if envelope is None or len(envelope.payload) > limits.receive_bytes_max:
            self.refuse(frame.stream, failure.of("MESSAGE_SIZE", "request"))
            return None
        if envelope.service == ttrpc.GREETING:
            self.refuse(frame.stream, failure.of("IDENTITY", "the greeting is over"))
            raise Broken("greeted twice")
        if self._drains:
            self.refuse(frame.stream, failure.of("RETRY_LATER"))
            return None
        if len(self._calls) >= limits.streams_per_connection_max or not self.server.enter():
            self.refuse(frame.stream, failure.of("STREAMS", retry_after_ms=BUSY_RETRY_MS))
            return None
        call = LocalCall(self, frame, envelope)
        self.used_ms = call.begun_ms
        with self._lock:
            self._calls[frame.stream] = call
            self._serving += 1
        return call

    def _greet(self, frame: Frame) -> None:
        """One of the two calls that make this connection somebody's."""
        try:
            if frame.is_oversize:
                raise failure.of("MESSAGE_SIZE", "greeting")
            envelope = envelope_of(frame)
            if envelope.service != ttrpc.GREETING:
                raise failure.of("IDENTITY", "the connection has proved nobody")
            answer = self._greeting.answer(envelope.method, envelope.payload, self.gate)
        except FabricError as refused:
            self.refuse(frame.stream, refused)
            raise Broken("unproved") from None
        if self._greeting.proved:
            self._frames.bytes_max = self.gate.limits.receive_bytes_max + ENVELOPE_BYTES_MAX
            self.leaf_pem = self._greeting.proved
        data = ttrpc_pb2.TtrpcResponse(payload=answer).SerializeToString()
        self.send(frame.stream, ttrpc.RESPONSE, data)


class Terms(Protocol):
    """What a greeting holds its client to."""

    @property
    def trust_domain(self) -> str: ...

    @property
    def limits(self) -> Limits: ...

    @property
    def clock(self) -> Clock: ...


class Greeting:
    """The server's side of the proof of both keys."""

    def __init__(self, provider: Provider) -> None:
        self._provider = provider
        self._digest = b""
        self._leaf_pem = b""
        self.proved = b""

    def answer(self, method: str, payload: bytes, gate: Terms) -> bytes:
        try:
            if method == "Hello" and not self._digest:
                return self._hello(ttrpc_pb2.LocalHelloRequest.FromString(payload), gate)
            if method == "Prove" and self._digest:
                return self._prove(ttrpc_pb2.LocalProveRequest.FromString(payload))
        except DecodeError:
            raise failure.of("IDENTITY", "not a greeting") from None
        raise failure.of("IDENTITY", "first Hello, then Prove, each once")

    def _hello(self, hello: ttrpc_pb2.LocalHelloRequest, gate: Terms) -> bytes:
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


def envelope_of(frame: Frame) -> Any:
    """The request that a frame carries."""
    try:
        return ttrpc_pb2.TtrpcRequest.FromString(frame.data)
    except DecodeError:
        raise Broken("no envelope") from None
