"""What every call passes before and after its handler, in one written order.

    headers    who calls · how much of it · by when · is the certificate in force · may this role
    message    parsed · nothing unknown in it · not empty
    handler    the service's own code
    answer     a typed failure as status and trailers; anything else as INTERNAL and an incident id

Rules. Who calls is decided on the headers, before the message has arrived, so that a caller who
sends headers alone is counted, and is ended when its message does not come. Nothing of an
unexpected exception leaves the process: it is logged under an incident id, and the id is what the
caller gets. A broken invariant is answered in the same way, and then the process halts.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Generator, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError, Message

from grafos_core import failure
from grafos_core.failure import FabricError, InvariantViolation
from grafos_core.spiffe import Identity
from grafos_proto.wire import certificates, failures
from services.runtime import telemetry
from services.runtime.clock import Clock
from services.runtime.limits import Callers, Limits
from services.runtime.logs import Log
from services.runtime.messages import check_known
from services.runtime.methods import Method

NO_DEADLINE_S: Final = 10**9
"""gRPC says 9.2e18 s where the caller set none."""
CHAIN_MAX: Final = 16
"""Exceptions behind one another that are looked at."""
METADATA_ENTRY_BYTES: Final = 32
"""What HTTP/2 counts for each entry beside its name and value (RFC 9113, section 6.5.2)."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Who calls, as its certificate says."""

    identity: Identity
    key_thumbprint: str
    not_after_ms: int


@dataclass(slots=True)
class Call:
    """The call that a thread serves."""

    method: str
    peer: Peer
    deadline_boot_ms: int
    clock: Clock
    traceparent: str = ""


class _Malformed(Exception):
    """Bytes that are no message. The status is INTERNAL, as with gRPC's own parsing."""


_current: ContextVar[Call | None] = ContextVar("call", default=None)


def current() -> Call:
    """The call that this thread serves."""
    call = _current.get()
    if call is None:
        raise InvariantViolation("asked for the caller outside of a call")
    return call


def serving() -> Call | None:
    """Like `current`, for code that also runs on nobody's behalf."""
    return _current.get()


def peer() -> Peer:
    """Who calls."""
    return current().peer


def deadline_left_ms() -> int:
    """What is left of the caller's deadline, or of our own cap; 0: it has passed."""
    call = current()
    return max(0, call.deadline_boot_ms - call.clock.boot_ms())


def check_deadline() -> None:
    """Refuse to go on when the caller no longer waits. Ask right before the effect."""
    if deadline_left_ms() <= 0:
        raise failure.of("DEADLINE")


@dataclass(slots=True)
class Gate:
    """What the calls of one listener have in common."""

    trust_domain: str
    limits: Limits
    callers: Callers
    clock: Clock
    log: Log
    halt: Callable[[], None]
    """Called after a broken invariant was answered; ends the process."""
    meters: telemetry.CallMeters
    patience: Patience

    def admit(self, method: str, policy: Method, context: grpc.ServicerContext) -> Call:
        """The call, if its headers are in order. What was admitted must be `left`."""
        certificate = self._certificate(context)
        now = self.clock.instant()
        self.callers.enter(certificate.identity, now.boot_ms)
        try:
            deadline_boot_ms = now.boot_ms + _time_left_ms(policy, context.time_remaining())
            certificate.check_fresh(now.wall_ms)
            if certificate.identity.role not in policy.roles:
                raise failure.of("ROLE", certificate.identity.role.value)
            traceparent = self._read_metadata(context)
        except FabricError:
            self.callers.leave(certificate.identity)
            raise
        who = Peer(certificate.identity, certificate.thumbprint, certificate.not_after_ms)
        return Call(method, who, deadline_boot_ms, self.clock, traceparent)

    def left(self, call: Call) -> None:
        self.callers.leave(call.peer.identity)

    def _certificate(self, context: grpc.ServicerContext) -> certificates.Certificate:
        pem = context.auth_context().get("x509_pem_cert")
        if not pem:
            raise failure.of("IDENTITY")
        certificate = certificates.parse(pem[0])
        if certificate.identity.trust_domain != self.trust_domain:
            raise failure.of("IDENTITY", "trust domain")
        return certificate

    def _read_metadata(self, context: grpc.ServicerContext) -> str:
        """The trace of the caller. Between its two limits the library may let metadata pass."""
        size, traceparent = 0, ""
        for name, value in context.invocation_metadata() or ():
            size += len(name) + len(value) + METADATA_ENTRY_BYTES
            if name == "traceparent" and isinstance(value, str):
                traceparent = value
        if size > self.limits.metadata_bytes_max:
            raise failure.of("MESSAGE_SIZE", "metadata")
        return traceparent

    def refuse(self, method: str, context: grpc.ServicerContext, error: Exception) -> Any:
        """End the call with what `error` means to its caller."""
        if type(error) is grpc.RpcError:
            raise error  # the caller is gone; gRPC itself says so in this way
        try:
            return failures.abort(context, self._refusal(method, context, error))
        finally:
            _forget_frames(error)

    def _refusal(self, method: str, context: grpc.ServicerContext, error: Exception) -> FabricError:
        """What the caller gets to know, once the rest is logged and counted."""
        if isinstance(error, _Malformed):
            error = failure.of("INTERNAL", "the message cannot be parsed", cause="malformed")
        if isinstance(error, FabricError) and (error.code != "INTERNAL" or error.cause):
            self.meters.refused(method, error)
            return error
        incident_id = getattr(error, "incident_id", "") or secrets.token_hex(8)
        self.log.error("call.failed", error, method=method, incident_id=incident_id)
        internal = failure.of("INTERNAL", incident_id=incident_id)
        self.meters.refused(method, internal)
        if isinstance(error, InvariantViolation) and not context.add_callback(self.halt):
            self.halt()
        return internal


def _forget_frames(error: BaseException) -> None:
    """Let go of the frames that an exception went through.

    One that is still referred to from its own frames, as after `raise self.error`, would keep them,
    with the call that they serve, until the garbage collector comes; and an open call is a stream
    that counts against its connection's limit.
    """
    seen: BaseException | None = error
    for _ in range(CHAIN_MAX):
        if seen is None:
            return
        seen.__traceback__ = None
        seen = seen.__cause__ or seen.__context__


def _time_left_ms(policy: Method, left_s: float) -> int:
    if left_s > NO_DEADLINE_S:
        if policy.mutates:
            raise failure.of("DEADLINE_REQUIRED")
        return policy.deadline_ms_max
    left_ms = int(left_s * 1000)
    if left_ms <= 0:
        raise failure.of("DEADLINE")
    return min(left_ms, policy.deadline_ms_max)


@dataclass(slots=True)
class Patience:
    """Ends calls whose first message does not come. `tick` now and then, from one thread."""

    first_message_ms_max: int
    _waiting: dict[int, tuple[int, grpc.ServicerContext]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def first(self, messages: Iterator[bytes], context: grpc.ServicerContext, now_ms: int) -> bytes:
        """The first message of a call."""
        with self._lock:
            self._waiting[id(context)] = (now_ms + self.first_message_ms_max, context)
        try:
            for message in messages:
                return message
        finally:
            with self._lock:
                self._waiting.pop(id(context), None)
        raise failure.of("EMPTY", "no message came")

    def tick(self, now_ms: int) -> int:
        """End what is overdue; how many that were."""
        with self._lock:
            late = [context for end_ms, context in self._waiting.values() if now_ms >= end_ms]
        for context in late:
            context.cancel()
        return len(late)


@dataclass(frozen=True, slots=True)
class Handling:
    """One method: its handler, and what its calls are held to."""

    gate: Gate
    name: str
    policy: Method
    handler: grpc.RpcMethodHandler[Any, Any]

    def wrapped(self) -> grpc.RpcMethodHandler[bytes, bytes]:
        """The handler that gRPC gets. Requests come to it as bytes, one by one, also where there is
        only one: so it runs when the headers are there, and parsing is ours to answer for."""
        if self.handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(self.stream)
        return grpc.stream_unary_rpc_method_handler(self.single)

    def single(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        """Serve a call that has one answer."""
        call: Call | None = None
        started_ns = self.gate.clock.boot_ns()
        try:
            call = self.gate.admit(self.name, self.policy, context)
            _current.set(call)
            behaviour: Any = self.handler.stream_unary or self.handler.unary_unary
            with telemetry.serving(call.method, call.traceparent):
                request = self._request(messages, context)
                check_deadline()
                return self._serialized(behaviour(request, context))
        except Exception as error:
            if _has_ended(context):
                raise  # the handler has ended the call itself
            self.gate.refuse(self.name, context, error)
            raise
        finally:
            if call is not None:
                self.gate.left(call)
                self.gate.meters.served(self.name, self.gate.clock.boot_ns() - started_ns)

    def stream(
        self, messages: Iterator[bytes], context: grpc.ServicerContext
    ) -> Generator[bytes, None, None]:
        """Serve a call that streams its answers."""
        call: Call | None = None
        try:
            call = self.gate.admit(self.name, self.policy, context)
            _current.set(call)
            behaviour: Any = self.handler.stream_stream or self.handler.unary_stream
            with telemetry.serving(call.method, call.traceparent):
                request = self._request(messages, context)
                for response in behaviour(request, context):
                    check_deadline()
                    yield self._serialized(response)
        except Exception as error:
            if _has_ended(context):
                raise
            self.gate.refuse(self.name, context, error)
            raise
        finally:
            if call is not None:
                self.gate.left(call)

    def _request(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Any:
        first = self.gate.patience.first(messages, context, self.gate.clock.boot_ms())
        if self.handler.request_streaming:
            return self._requests(first, messages)
        return self._parsed(first)

    def _requests(self, first: bytes, messages: Iterator[bytes]) -> Iterator[Any]:
        yield self._parsed(first)
        for data in messages:
            check_deadline()
            yield self._parsed(data)

    def _parsed(self, data: bytes) -> Message:
        if not data and not self.policy.may_be_empty:
            raise failure.of("EMPTY")
        try:
            parse: Any = self.handler.request_deserializer
            message: Message = parse(data)
        except (DecodeError, UnicodeDecodeError, ValueError):
            raise _Malformed from None
        check_known(message)
        return message

    def _serialized(self, response: Message) -> bytes:
        write: Any = self.handler.response_serializer
        return write(response)  # type: ignore[no-any-return]


def _has_ended(context: Any) -> bool:
    """Whether the handler has ended the call itself, by gRPC's own means."""
    return context.code() is not None
