"""The frames of the data port: how a holder's bytes travel when they need not cross gRPC.

    request  length u32 │ op u8 │ flags u8 │ handle u16 │ tag u32 │ count u32 │ offset u64 │ payload
    answer   length u32 │ kind u8 │ flags u8 │ handle u16 │ tag u32 │ data │ verdict u8

All numbers are little-endian; `length` is that of what follows the header. A holder numbers its
leases itself (`handle`), so that opening one and using it need not wait for each other. Requests
are answered in their order, each with its tag. The verdict stands behind the bytes because it is
decided after they were read: data before a verdict that is not GOOD is void, and the refusal with
the same tag follows. Byte for byte: docs/PROTOCOLS.md.
"""

from __future__ import annotations

import json
import struct
from typing import Any, Final

from grafos_core import failure
from grafos_core.failure import FabricError

VERSION: Final = 1
REQUEST: Final = struct.Struct("<IBBHIIQ")
ANSWER: Final = struct.Struct("<IBBHI")
HELLO, OPEN, CLOSE, SHARE = 1, 2, 3, 4
READ, WRITE, FLUSH, SWAP, ADD, READ_MANY, WRITE_MANY = 16, 17, 18, 19, 20, 21, 22
OPS_USING: Final = frozenset({READ, WRITE, FLUSH, SWAP, ADD, READ_MANY, WRITE_MANY})
"""Those on an open handle, which count as one run when they follow each other."""
DATA, REFUSAL, NOTICE = 1, 2, 3
VOID, GOOD = 0, 1
GOOD_BYTE: Final = bytes([GOOD])
VOID_BYTE: Final = bytes([VOID])

DATA_BYTES_MAX: Final = 4 << 20
"""Of one read or write."""
PARTS_MAX: Final = 4_096
"""Of one READ_MANY or WRITE_MANY; also of the handles of a connection."""
MANY_BYTES_MAX: Final = 256 * 1024
"""Of all their bytes together, in an answer."""
PART: Final = struct.Struct("<QI")
"""Offset and length of one part."""
PAYLOAD_BYTES_MAX: Final = DATA_BYTES_MAX + PARTS_MAX * PART.size
HANDLES_MAX: Final = 4_096
LEASE_ID_BYTES: Final = 16
SESSION_CHARS: Final = 32
WORD: Final = struct.Struct("<Q")
WORDS: Final = struct.Struct("<QQ")
"""SWAP: expected, new."""
HELLO_ANSWER: Final = struct.Struct("<HHI")
"""Version, handles that may be open, milliseconds after which the node ends the connection."""
OPEN_ANSWER: Final = struct.Struct("<QQ")
"""Bytes of the lease or share, milliseconds that it has left."""
JSON_BYTES_MAX: Final = 65_536


def request(
    op: int, handle: int, tag: int, *, offset: int = 0, count: int = 0, payload: bytes = b""
) -> bytes:
    """One whole request."""
    return REQUEST.pack(len(payload), op, 0, handle, tag, count, offset) + payload


def answer(tag: int, data: bytes) -> bytes:
    """One whole good answer."""
    return ANSWER.pack(len(data) + 1, DATA, 0, 0, tag) + data + GOOD_BYTE


def refusal(tag: int, cause: FabricError) -> bytes:
    """Why there is no answer with this tag; the same fields as on every other path."""
    return said(REFUSAL, tag, {"class": type(cause).__name__, **cause.fields()})


def said(kind: int, tag: int, fields: dict[str, Any]) -> bytes:
    """A frame of JSON."""
    text = json.dumps(fields, separators=(",", ":")).encode()
    return ANSWER.pack(len(text), kind, 0, 0, tag) + text


def fields_of(text: bytes) -> dict[str, Any]:
    """What `said` said."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise failure.of("ENCODING", "the node's message")
    return fields


def failure_of(fields: Any) -> FabricError:
    """The failure that `refusal` was made of."""
    if not isinstance(fields, dict) or not isinstance(fields.get("class"), str):
        raise failure.of("ENCODING", "the node's refusal")
    rest = dict(fields)
    try:
        return failure.from_fields(rest.pop("class"), rest)
    except TypeError:  # fields that no failure has
        raise failure.of("ENCODING", "the node's refusal") from None
