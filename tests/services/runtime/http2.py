"""A client that speaks HTTP/2 by hand, for what no well-behaved library would send.

Source: RFC 9113 (frames), RFC 7541 (literal header fields without indexing).
"""

from __future__ import annotations

import socket
import ssl
import struct
import tempfile
from typing import Self

from grafos_proto.wire.credentials import Credentials
from tests.services.runtime.world import node_name

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
END_STREAM, END_HEADERS, ACK = 1, 4, 1
FRAME = struct.Struct(">BHBBI")
"""Length as 8 and 16 bits, type, flags, stream."""


def frame(kind: int, flags: int, stream: int, body: bytes = b"") -> bytes:
    return FRAME.pack(len(body) >> 16, len(body) & 0xFFFF, kind, flags, stream) + body


def literal(name: str, value: str) -> bytes:
    """One header field; both texts shorter than 127 bytes."""
    return b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


def grpc_headers(path: str, *more: tuple[str, str]) -> bytes:
    fields = [
        (":method", "POST"), (":scheme", "https"), (":path", path), (":authority", node_name()),
        ("te", "trailers"), ("content-type", "application/grpc"), *more,
    ]  # fmt: skip
    return b"".join(literal(name, value) for name, value in fields)


def tls_context(credentials: Credentials) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    context.load_verify_locations(cadata=credentials.bundle_pem.decode())
    with tempfile.NamedTemporaryFile() as file:
        file.write(credentials.key_pem + credentials.chain_pem)
        file.flush()
        context.load_cert_chain(file.name)
    return context


class Connection:
    """One connection; what comes back is read only when asked for."""

    def __init__(self, port: int, credentials: Credentials) -> None:
        self._plain = socket.create_connection(("127.0.0.1", port), 5)
        context = tls_context(credentials)
        self._tls = context.wrap_socket(self._plain, server_hostname=node_name())
        self._tls.settimeout(5)
        self._tls.sendall(PREFACE + frame(SETTINGS, 0, 0) + frame(SETTINGS, ACK, 0))
        self._next = 1

    def send(self, data: bytes) -> None:
        self._tls.sendall(data)

    def open_stream(self, path: str, *more: tuple[str, str]) -> int:
        """Headers alone: the message never comes."""
        stream, self._next = self._next, self._next + 2
        self.send(frame(HEADERS, END_HEADERS, stream, grpc_headers(path, *more)))
        return stream

    def ends_within(self, seconds: float) -> bool:
        """Whether the other side closes the connection in this time."""
        self._tls.settimeout(seconds)
        try:
            while self._tls.recv(65_536):
                pass
        except TimeoutError:
            return False
        except OSError:
            return True
        return True

    def close(self) -> None:
        self._tls.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
