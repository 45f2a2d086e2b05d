"""A local connection that is greeted as in local_connection.py and then speaks something else.

Rules. The greeting has two seconds in all, and is the same on the wire as before a ttRPC call. What
was refused is answered once, and then the connection is not worth keeping.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Final

from grafos_core import failure
from grafos_core.failure import FabricError
from grafos_proto.v1 import ttrpc_pb2
from grafos_proto.wire import certificates, failures
from grafos_proto.wire import ttrpc_frames as ttrpc
from grafos_proto.wire.certificates import Certificate
from grafos_proto.wire.credentials import Provider
from grafos_proto.wire.ttrpc_frames import Broken, Frame, Frames
from services.runtime.local_connection import GREETING_BYTES_MAX, Greeting, Terms, envelope_of

GREETING_S: Final = 2.0


def greeted(
    sock: socket.socket, provider: Provider, terms: Terms, check: Callable[[Certificate], None]
) -> Certificate | None:
    """Who has proved his key and passed `check`; None: nobody, and the connection is over."""
    speaking = Frames(sock, GREETING_BYTES_MAX)
    greeting, until = Greeting(provider), time.monotonic() + GREETING_S
    try:
        while not greeting.proved:
            frame = speaking.receive(until)
            try:
                payload = _answer(greeting, frame, terms, check)
            except FabricError as refused:
                speaking.send(frame.stream, ttrpc.RESPONSE, _refusal(refused), until=until)
                return None
            data = ttrpc_pb2.TtrpcResponse(payload=payload).SerializeToString()
            speaking.send(frame.stream, ttrpc.RESPONSE, data, until=until)
    except (OSError, Broken):
        return None
    return None if speaking.has_begun else certificates.parse(greeting.proved)


def _answer(
    greeting: Greeting, frame: Frame, terms: Terms, check: Callable[[Certificate], None]
) -> bytes:
    envelope = None if frame.is_oversize or frame.kind != ttrpc.REQUEST else envelope_of(frame)
    if envelope is None or envelope.service != ttrpc.GREETING:
        raise failure.of("IDENTITY", "first a greeting")
    payload = greeting.answer(envelope.method, envelope.payload, terms)
    if greeting.proved:
        check(certificates.parse(greeting.proved))
    return payload


def _refusal(refused: FabricError) -> bytes:
    status, message, trailers = failures.to_trailers(refused)
    return ttrpc.response_of(status.value[0], message, ttrpc.details_of(trailers))
