"""One value, one encoding: how audit records are written down, byte for byte.

Two machines that write the same facts must get the same bytes, or their hashes would differ for no
reason. So this codec knows exactly one way to write each value, and refuses to read any other.

    allowed   integers of 64 bits, bytes, text, lists, maps with integer or text keys,
              True, False, None
    refused   floats, tags, indefinite lengths, integers longer than needed, keys out of order
              or twice, text that is not UTF-8, bytes after the end, nesting deeper than 8

It is a subset of CBOR in the deterministic encoding of RFC 8949, section 4.2.1: map keys are
ordered by their encoded bytes. The law: `encode(decode(data)) == data`, or `decode` refuses.
Even so, hash and store bytes as they came; nothing is verified by writing it again.
Every refusal is the failure `ENCODING`, also for a value that has no encoding.
"""

from __future__ import annotations

from typing import Any, Final

from grafos_core import failure

DEPTH_MAX: Final = 8
"""Lists and maps inside each other. Protects the stack; the deepest record of ours has four."""

Value = None | bool | int | bytes | str | list["Value"] | dict["int | str", "Value"]

_UNSIGNED, _NEGATIVE, _BYTES, _TEXT, _LIST, _MAP, _TAG, _SIMPLE = range(8)
"""Major types: the upper three bits of an item's first byte (RFC 8949, section 3.1)."""
_FALSE, _TRUE, _NULL = b"\xf4", b"\xf5", b"\xf6"
_SIMPLE_VALUES: Final[dict[int, bool | None]] = {20: False, 21: True, 22: None}
_ONE_BYTE: Final = tuple(bytes([first]) for first in range(256))
_LEAST: Final = {24: 24, 25: 1 << 8, 26: 1 << 16, 27: 1 << 32}
"""Below these an argument fits the next shorter form, so this form is refused."""


def _refused(why: str) -> failure.FabricError:
    return failure.of("ENCODING", why)


def encode(value: Any) -> bytes:
    """The one encoding of a `Value`; typed `Any` because maps of one value type are no `Value`."""
    parts: list[bytes] = []
    _write(value, DEPTH_MAX, parts)
    return b"".join(parts)


def _write(value: Any, depth: int, parts: list[bytes]) -> None:
    """Frequent types first, by exact type; `_plain` sees to the rest."""
    kind = type(value)
    if kind is str:
        _write_text(value, parts)
    elif kind is int:
        _write_int(value, parts)
    elif kind is bytes:
        parts.append(_head(_BYTES, len(value)))
        parts.append(value)
    elif value is None:
        parts.append(_NULL)
    elif value is True or value is False:
        parts.append(_TRUE if value else _FALSE)
    elif kind is dict or kind is list:
        if depth == 0:
            raise _refused("nested too deep")
        if kind is dict:
            _write_map(value, depth - 1, parts)
            return
        parts.append(_head(_LIST, len(value)))
        for item in value:
            _write(item, depth - 1, parts)
    else:
        _write(_plain(value), depth, parts)


def _plain(value: object) -> str | int:
    """Members of string and integer enumerations are written as what they stand for."""
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    raise _refused("a value of a type that has no encoding")


def _write_int(value: int, parts: list[bytes]) -> None:
    parts.append(_head(_UNSIGNED, value) if value >= 0 else _head(_NEGATIVE, -1 - value))


def _write_text(value: str, parts: list[bytes]) -> None:
    try:
        data = value.encode()
    except UnicodeEncodeError:
        raise _refused("text that is not Unicode") from None
    parts.append(_head(_TEXT, len(data)))
    parts.append(data)


def _write_map(value: dict[Any, Any], depth: int, parts: list[bytes]) -> None:
    items = []
    for key, item in value.items():
        if type(key) is not int and not isinstance(key, str):
            raise _refused("a key that is neither integer nor text")
        written: list[bytes] = []
        _write(key, 0, written)
        items.append((b"".join(written), item))
    items.sort(key=lambda pair: pair[0])
    parts.append(_head(_MAP, len(items)))
    for data, item in items:
        parts.append(data)
        _write(item, depth, parts)


def _head(major: int, argument: int) -> bytes:
    """The shortest form, as the standard demands."""
    if argument < 24:
        return _ONE_BYTE[major << 5 | argument]
    if argument < 1 << 8:
        return _ONE_BYTE[major << 5 | 24] + _ONE_BYTE[argument]
    if argument < 1 << 16:
        return _ONE_BYTE[major << 5 | 25] + argument.to_bytes(2, "big")
    if argument < 1 << 32:
        return _ONE_BYTE[major << 5 | 26] + argument.to_bytes(4, "big")
    if argument < 1 << 64:
        return _ONE_BYTE[major << 5 | 27] + argument.to_bytes(8, "big")
    raise _refused("an integer beyond 64 bits")


def decode(data: bytes) -> Value:
    """The value that `data` is the one encoding of."""
    value, end = _read(data, 0, DEPTH_MAX)
    if end != len(data):
        raise _refused("bytes after the end")
    return value


def _read(data: bytes, at: int, depth: int) -> tuple[Value, int]:
    """The value at `at` and where it ends. Lengths are checked before memory is taken."""
    if at >= len(data):
        raise _refused("shorter than it says")
    major, argument = data[at] >> 5, data[at] & 31
    at += 1
    if major == _SIMPLE:
        if argument not in _SIMPLE_VALUES:
            raise _refused("a float or an unknown simple value")
        return _SIMPLE_VALUES[argument], at
    if argument >= 24:
        argument, at = _read_argument(data, at, argument)
    if major == _UNSIGNED:
        return argument, at
    if major == _NEGATIVE:
        return -1 - argument, at
    if major == _TAG:
        raise _refused("a tag")
    if argument > len(data) - at:  # every item of a list or map takes at least one byte
        raise _refused("shorter than it says")
    if major == _BYTES:
        return data[at : at + argument], at + argument
    if major == _TEXT:
        return _read_text(data[at : at + argument]), at + argument
    if depth == 0:
        raise _refused("nested too deep")
    if major == _LIST:
        return _read_list(data, at, argument, depth - 1)
    return _read_map(data, at, argument, depth - 1)


def _read_argument(data: bytes, at: int, code: int) -> tuple[int, int]:
    if code > 27:
        raise _refused("an indefinite length or a reserved form")
    end = at + (1 << code - 24)
    if end > len(data):
        raise _refused("shorter than it says")
    argument = int.from_bytes(data[at:end], "big")
    if argument < _LEAST[code]:
        raise _refused("an integer longer than needed")
    return argument, end


def _read_text(part: bytes) -> str:
    try:
        return part.decode()
    except UnicodeDecodeError:
        raise _refused("text that is not UTF-8") from None


def _read_list(data: bytes, at: int, count: int, depth: int) -> tuple[Value, int]:
    items: list[Value] = []
    for _ in range(count):
        item, at = _read(data, at, depth)
        items.append(item)
    return items, at


def _read_map(data: bytes, at: int, count: int, depth: int) -> tuple[Value, int]:
    result: dict[int | str, Value] = {}
    before = b""
    for _ in range(count):
        start = at
        key, at = _read(data, at, 0)
        if type(key) is not int and type(key) is not str:
            raise _refused("a key that is neither integer nor text")
        encoded = data[start:at]
        if encoded <= before:
            raise _refused("keys out of order or twice")
        before = encoded
        result[key], at = _read(data, at, depth)
    return result, at
