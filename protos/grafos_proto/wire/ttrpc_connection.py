"""One connection of a client to a local socket: opened, proved, and used for one call at a time.

Rules. Both ends prove themselves before the first call, the server first, so that an impostor gets
nothing that it could use. Every wait ends at the deadline of the call, or soon after the age at
which the server would have ended the connection, whoever has stopped. A forked child closes its
copies and says nothing on them: kept open, they would hide the parent's death from the server.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
import time
import weakref
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
    REQUEST,
    RESPONSE,
    SERVER_DOMAIN,
    VERSION,
    Broken,
    Frame,
    Frames,
    failure_of,
    transcript,
)

HANDSHAKE_S: Final = 5.0
AGE_PART: Final = 0.5
"""Of the age at which the server ends a connection; we leave it then."""
AGE_GRACE_S: Final = 5.0
"""A server that has not ended a connection so long after its age has stopped."""
_TIMEVAL: Final = struct.Struct("ll")


class Stale(Exception):
    """A connection that was kept has ended before it took the request."""


class Connection:
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
        _open.add(self)

    @classmethod
    def open(cls, path: str, credentials: Any, peer: Identity, deadline: float) -> Connection:
        """Connect and prove each other.

        Raises:
            Disconnected: nobody listens or answers; DEADLINE where it was ours that passed.
            Denied: it is somebody else, or does not believe us.
        """
        until = min(deadline, time.monotonic() + HANDSHAKE_S)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        made, is_proved = cls(Frames(sock)), False
        try:
            left_us = max(1, int((until - time.monotonic()) * 1e6))
            # What bounds connect(2) of a unix socket; it is not looked at after that.
            patience = _TIMEVAL.pack(*divmod(left_us, 1_000_000))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
            sock.connect(path)
            made.greet(credentials, peer, until)
            is_proved = True
        except OSError as error:
            if deadline <= time.monotonic():
                raise failure.of("DEADLINE") from None
            raise failure.of("UNREACHABLE", error.strerror or "nobody listens") from None
        finally:
            if not is_proved:
                made.close()
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
        return self.answer(deadline)

    def greet(self, credentials: Any, peer: Identity, deadline: float) -> None:
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
                raise Stale from None
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

    def _opened(self, data: bytes) -> bytes:
        try:
            response = ttrpc_pb2.TtrpcResponse.FromString(data)
        except DecodeError:
            raise failure.of("UNREACHABLE", "not an answer") from None
        self.is_clean = not self.is_shared
        if response.status.code:
            raise failure_of(response.status)
        return response.payload


def _in_child() -> None:
    for connection in list(_open):
        connection.forget()


_open: weakref.WeakSet[Connection] = weakref.WeakSet()
os.register_at_fork(after_in_child=_in_child)
