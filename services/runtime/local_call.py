"""One call over a local socket, as the gate and the servicers see it.

It stands where gRPC has its ServicerContext, and does the part of it that they use. Rules. A call
is answered once, or its connection has ended. Messages of a stream wait in an inbox of a few; then
the connection is not read, which is how a slow handler slows its caller. A stream that broke off
never looks like one that ended: whoever takes its messages is told that the caller is gone.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, cast

import grpc

from grafos_core import failure
from grafos_core.failure import FabricError
from grafos_proto.v1 import ttrpc_pb2
from grafos_proto.wire import ttrpc_frames as ttrpc
from grafos_proto.wire.ttrpc_frames import Broken, Frame
from services.runtime.calls import Handling

if TYPE_CHECKING:
    from services.runtime.local_connection import Connection

INBOX_MAX: Final = 8
"""Messages of one stream that wait for its handler; then the connection is not read."""
INBOX_S: Final = 10.0
"""A handler that takes no message for so long ends the connection."""
WAIT_S_MAX: Final = 3_600.0
NO_DEADLINE_S: Final = 1e18
DEADLINE_S_MAX: Final = 1e8
"""However far away a deadline is, it is one."""


class Flooded(Exception):
    """Messages come, and nobody takes them."""


class _Inbox:
    """Messages of a stream, from the thread that reads to the one that serves."""

    def __init__(self) -> None:
        self._messages: deque[bytes | FabricError] = deque()
        self._changed = threading.Condition()
        self._is_whole = self._is_broken = self._is_left = False

    def put(self, frame: Frame) -> None:
        """Wait for room, as long as somebody may make some."""
        with self._changed:
            if frame.is_oversize:
                self._messages.append(failure.of("MESSAGE_SIZE", "request"))
            elif not frame.flags & ttrpc.NO_DATA:
                if not self._changed.wait_for(self._has_room, INBOX_S):
                    raise Flooded
                self._messages.append(frame.data)
            if frame.flags & ttrpc.REMOTE_CLOSED:
                self._is_whole = True
            self._changed.notify_all()

    def get(self, timeout_s: float) -> bytes | None:
        """The next message; None: that was all."""
        with self._changed:
            if not self._changed.wait_for(self._has_news, timeout_s):
                raise failure.of("DEADLINE")
            if self._is_broken:
                raise grpc.RpcError  # as gRPC says that the caller is gone
            if not self._messages:
                return None
            message = self._messages.popleft()
            self._changed.notify_all()
        if isinstance(message, FabricError):
            raise message
        return message

    def _has_room(self) -> bool:
        return len(self._messages) < INBOX_MAX or self._is_left

    def _has_news(self) -> bool:
        return bool(self._messages) or self._is_whole or self._is_broken

    def break_off(self) -> None:
        with self._changed:
            self._is_broken = self._is_left = True
            self._changed.notify_all()

    def leave(self) -> None:
        """Nobody will take more; what comes is thrown away."""
        with self._changed:
            self._is_left = True
            self._changed.notify_all()


class LocalCall:
    """What the gate, the servicers and failures.py use of grpc.ServicerContext, and the answer."""

    def __init__(self, connection: Connection, frame: Frame, envelope: Any) -> None:
        self._connection, self._envelope = connection, envelope
        self._stream = frame.stream
        self._clock = connection.gate.clock
        self.begun_ms = self._clock.boot_ms()
        timeout_s = NO_DEADLINE_S
        if envelope.timeout_nano:
            timeout_s = min(envelope.timeout_nano / 1e9, DEADLINE_S_MAX)
        self._end_ms = self.begun_ms + timeout_s * 1000
        self._inbox = _Inbox() if frame.flags & ttrpc.REMOTE_OPEN else None
        self._name = f"/{envelope.service}/{envelope.method}"
        self._handling: Handling | None = connection.server.handlings.get(self._name)
        self._callbacks: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._active = True
        self._code: grpc.StatusCode | None = None
        self._message, self._trailers = "", ()

    @property
    def is_stream(self) -> bool:
        """Whether more may come, or go, before it is over."""
        handling = self._handling
        return self._inbox is not None or (
            handling is not None and bool(handling.handler.response_streaming)
        )

    def serve(self) -> None:
        """Handle the call and answer it."""
        try:
            self._answer(self._answer_of_handler())
        except Broken:
            pass  # nobody is there to be answered
        finally:
            self._connection.left(self._stream)
            self._finish()

    def put(self, frame: Frame) -> None:
        """A further message of the caller."""
        too_large = len(frame.data) > self._connection.gate.limits.receive_bytes_max
        if self._inbox is not None:
            self._inbox.put(frame._replace(is_oversize=True) if too_large else frame)

    # as grpc.ServicerContext

    def cancel(self) -> None:
        """Nobody waits any more."""
        if self._inbox is not None:
            self._inbox.break_off()
        self._finish()

    def auth_context(self) -> Mapping[str, list[bytes]]:
        return {"x509_pem_cert": [self._connection.leaf_pem]}

    def time_remaining(self) -> float:
        return (self._end_ms - self._clock.boot_ms()) / 1000

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
        if self._inbox is not None:
            self._inbox.leave()
        for each in callbacks:
            each()

    def _messages(self) -> Iterator[bytes]:
        """The request, or requests, as they come."""
        if self._inbox is None:
            yield self._envelope.payload
            return
        while True:
            data = self._inbox.get(max(0.0, min(self.time_remaining(), WAIT_S_MAX)))
            if data is None:
                return
            yield data

    def _answer_of_handler(self) -> bytes:
        """The encoded response; the answers of a stream have gone before it."""
        handling, context = self._handling, cast(grpc.ServicerContext, self)
        try:
            if handling is None:
                return self._status(grpc.StatusCode.UNIMPLEMENTED, "no such method")
            payload = b""
            if handling.handler.response_streaming:
                self._stream_answers(handling, context)
            else:
                payload = handling.single(self._messages(), context)
            if self._is_sendable(payload):
                return ttrpc_pb2.TtrpcResponse(payload=payload).SerializeToString()
            return self._status(grpc.StatusCode.RESOURCE_EXHAUSTED, "larger than the limit")
        except _Aborted:
            return self._status(self._code, self._message)
        except _TooLarge:
            return self._status(grpc.StatusCode.RESOURCE_EXHAUSTED, "larger than the limit")
        except grpc.RpcError:
            return self._status(grpc.StatusCode.CANCELLED, "cancelled")
        except Broken:
            raise
        except Exception:  # the gate lets pass what its handler has ended itself
            return self._status(self._code, "failed")

    def _stream_answers(self, handling: Handling, context: grpc.ServicerContext) -> None:
        answers = handling.stream(self._messages(), context)
        try:
            for data in answers:
                if not self._is_sendable(data):
                    raise _TooLarge
                self._connection.send(self._stream, ttrpc.DATA, data)
        finally:
            answers.close()

    def _is_sendable(self, data: bytes) -> bool:
        return len(data) <= self._connection.gate.limits.send_bytes_max

    def _status(self, code: grpc.StatusCode | None, message: str) -> bytes:
        status = code or grpc.StatusCode.UNKNOWN
        return ttrpc.response_of(status.value[0], message, ttrpc.details_of(self._trailers))

    def _answer(self, data: bytes) -> None:
        self._connection.answered(self._stream)
        self._connection.send(self._stream, ttrpc.RESPONSE, data)


class _Aborted(Exception):
    """The handler has ended its call with a status."""


class _TooLarge(Exception):
    """An answer is over the limit of what may be sent."""
