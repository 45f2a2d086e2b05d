"""Signed slips of JSON: how everything is written that one party signs and another must believe.

A form that leaves room for choice leaves room for tricks. So a slip is refused unless every byte
of it is as we ourselves would have written it: it is a JWS (RFC 7515), but no general library for
those is asked, for they accept much that is refused here.

    slip       base64url(header) . base64url(claims) . base64url(signature)
    1 shape    ASCII, at most 4 KiB, three segments
    2 header   equals, byte for byte, one that we wrote: one per purpose and key in force. This one
               look-up settles alg, typ, crit, jku, jwk, x5u and kid (RFC 8725, section 3.1);
               a header is never interpreted
    3 signed   by that header's key, over both segments as they came
    4 claims   canonical JSON: writing them again gives the same bytes

Cheap checks come before dear ones, and nothing is parsed before its signature is known. Each
purpose has its own `typ` and its own keys, so no slip passes for one of another purpose. What
follows, the types of the claims and their meaning, is the purpose's: see token.py and receipt.py,
which read claims one by one with the functions at the end.
"""

from __future__ import annotations

import binascii
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from grafos_core import failure

LEASE: Final = "grafos-lease+jwt"
SHARE: Final = "grafos-share+jwt"
RECEIPT: Final = "grafos-receipt+jwt"
REVOKE: Final = "grafos-revoke+jwt"
CLEAR: Final = "grafos-clear+jwt"
READY: Final = "grafos-ready+jwt"
TYPES: Final = frozenset({LEASE, SHARE, RECEIPT, REVOKE, CLEAR, READY})

TOKEN_BYTES_MAX: Final = 4096
"""Protects the parser; a lease token of ours has about 1100."""
SAFE_INT_MAX: Final = 2**53 - 1
"""Beyond it JSON numbers differ between languages, so such numbers travel as decimal strings."""
INT_DIGITS_MAX: Final = 20
"""Protects `int`, whose cost grows with the square of the digits."""
NESTING_COUNT_MAX: Final = 16
"""Brackets in one token. Protects the parser's stack; ours have about five."""

Sign = Callable[[bytes], bytes]
VerifySignature = Callable[[bytes, bytes], bool]
"""(message, signature) → whether the key signed the message; never raises."""

_BASE64URL = re.compile(rb"[A-Za-z0-9_-]+")
_U64 = re.compile(r"0|[1-9][0-9]{0,19}")
_TEXT = re.compile(r"[A-Za-z0-9:/._+-]{1,512}")
HEX_128: Final = re.compile(r"[0-9a-f]{32}")


def refuse(code: str, detail: str = "") -> NoReturn:
    raise failure.of(code, detail)


# Letters -------------------------------------------------------------------------------------


def to_base64url(data: bytes) -> bytes:
    """Base64 for URLs, without padding (RFC 7515, section 2)."""
    plain = binascii.b2a_base64(data, newline=False).rstrip(b"=")
    return plain.translate(_TO_URL)


def from_base64url(segment: bytes) -> bytes:
    """The bytes of which `segment` is the one encoding; Python's decoder alone is lenient."""
    if not _BASE64URL.fullmatch(segment) or len(segment) % 4 == 1:
        refuse("TOKEN_ENCODING", "base64url")
    data = binascii.a2b_base64(segment.translate(_FROM_URL) + b"=" * (-len(segment) % 4))
    if to_base64url(data) != segment:
        refuse("TOKEN_ENCODING", "bits after the end")
    return data


_TO_URL: Final = bytes.maketrans(b"+/", b"-_")
_FROM_URL: Final = bytes.maketrans(b"-_", b"+/")


def canonical(value: object) -> bytes:
    """JSON with sorted names, no spaces and nothing but ASCII."""
    return _write_json(value).encode()


_write_json = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        refuse("TOKEN_PAYLOAD", "a name is there twice")
    return found


def _no_float(_: str) -> NoReturn:
    refuse("TOKEN_CLAIM", "a number that is not an integer")


def _short_int(digits: str) -> int:
    if len(digits) > INT_DIGITS_MAX:
        refuse("TOKEN_CLAIM", "a number of too many digits")
    return int(digits)


_parse_json = json.JSONDecoder(
    object_pairs_hook=_no_duplicates,
    parse_float=_no_float,
    parse_constant=_no_float,
    parse_int=_short_int,
).decode


def parse_canonical(raw: bytes) -> dict[str, Any]:
    """The map that `raw` is the canonical form of."""
    if raw.count(b"[") + raw.count(b"{") > NESTING_COUNT_MAX:
        refuse("TOKEN_PAYLOAD", "nested too much")
    try:
        value = _parse_json(raw.decode("ascii"))
    except ValueError:
        refuse("TOKEN_PAYLOAD", "not JSON")
    if type(value) is not dict or canonical(value) != raw:
        refuse("TOKEN_PAYLOAD", "not a canonical map")
    if b"\\u" in raw:  # an escape may hide half a character, which no text can hold
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            refuse("TOKEN_PAYLOAD", "text that is not Unicode")
    return value


# Keys and signatures -------------------------------------------------------------------------


def header(typ: str, kid: str) -> bytes:
    """The one header of this purpose and key, as it stands in the token."""
    return to_base64url(canonical({"alg": "EdDSA", "kid": kid, "typ": typ}))


@dataclass(frozen=True, slots=True)
class Key:
    """One verification key, for one purpose."""

    typ: str
    kid: str
    owner: str
    verify: VerifySignature


class Keys:
    """The verification keys in force, per purpose. One that is retired is as one never known."""

    def __init__(self) -> None:
        self._by_header: dict[bytes, Key] = {}

    def add(self, typ: str, kid: str, verify: VerifySignature, *, owner: str = "") -> None:
        """`owner` is in whose name the key may speak, where the claims name a speaker."""
        failure.invariant(typ in TYPES, f"{typ} is no purpose of ours")
        self._by_header[header(typ, kid)] = Key(typ, kid, owner, verify)

    def retire(self, typ: str, kid: str) -> None:
        self._by_header.pop(header(typ, kid), None)

    def key_ids(self, typ: str) -> list[str]:
        return sorted(key.kid for key in self._by_header.values() if key.typ == typ)

    def find(self, typ: str, segment: bytes) -> Key:
        """The key that a token's first segment names."""
        found = self._by_header.get(segment)
        if found is None or found.typ != typ:
            unknown_key = found is None and _is_ours_but_for_key(typ, segment)
            refuse("TOKEN_KEY_UNKNOWN" if unknown_key else "TOKEN_HEADER")
        return found


def _is_ours_but_for_key(typ: str, segment: bytes) -> bool:
    """Only chooses the words of a refusal that has been decided already."""
    try:
        kid = parse_canonical(from_base64url(segment)).get("kid")
    except failure.FabricError:
        return False
    return type(kid) is str and header(typ, kid) == segment


def mint(typ: str, kid: str, claims: Mapping[str, Any], sign: Sign) -> str:
    """A token. `sign` makes an Ed25519 signature with the key that `kid` names."""
    failure.invariant(typ in TYPES, f"{typ} is no purpose of ours")
    payload = canonical(dict(claims))
    parse_canonical(payload)  # what could not be read is not signed
    message = header(typ, kid) + b"." + to_base64url(payload)
    token = message + b"." + to_base64url(sign(message))
    if len(token) > TOKEN_BYTES_MAX:
        refuse("TOKEN_ENCODING", "too long")
    return token.decode("ascii")


def verify(token: str | bytes, typ: str, keys: Keys) -> dict[str, Any]:
    """The claims of a token of purpose `typ`, signed by a key in force: steps 1 to 4."""
    return verify_owned(token, typ, keys)[0]


def verify_owned(token: str | bytes, typ: str, keys: Keys) -> tuple[dict[str, Any], str]:
    """As `verify`; and in whose name the key may speak."""
    segments = segments_of(token)
    key = _signed_by(segments, typ, keys)
    return parse_canonical(from_base64url(segments[1])), key.owner


def segments_of(token: str | bytes) -> list[bytes]:
    """Step 1: its three segments, none of them looked into."""
    raw = as_ascii(token)
    segments = raw.split(b".")
    if len(raw) > TOKEN_BYTES_MAX or len(segments) != 3:
        refuse("TOKEN_ENCODING", "three segments, at most 4 KiB")
    return segments


def check_signature(token: str | bytes, typ: str, keys: Keys) -> None:
    """Steps 1 to 3, for who wants to know no more."""
    _signed_by(segments_of(token), typ, keys)


def _signed_by(segments: list[bytes], typ: str, keys: Keys) -> Key:
    key = keys.find(typ, segments[0])
    signature = from_base64url(segments[2])
    if not key.verify(segments[0] + b"." + segments[1], signature):
        refuse("TOKEN_SIGNATURE")
    return key


def as_ascii(token: str | bytes) -> bytes:
    if len(token) > TOKEN_BYTES_MAX or not token.isascii():
        refuse("TOKEN_ENCODING", "ASCII, at most 4 KiB")
    return token.encode() if isinstance(token, str) else bytes(token)


# Claims, each of exactly its type ------------------------------------------------------------


def exactly(claims: Mapping[str, Any], names: frozenset[str]) -> None:
    """Neither a claim too few nor one too many: a new claim is a new `typ`."""
    if claims.keys() != names:
        refuse("TOKEN_CLAIM", "not exactly the claims of this purpose")


def text(claims: Mapping[str, Any], name: str, form: re.Pattern[str] = _TEXT) -> str:
    value = claims[name]
    if type(value) is not str or not form.fullmatch(value):
        refuse("TOKEN_CLAIM", name)
    return value


def number(claims: Mapping[str, Any], name: str, at_most: int = SAFE_INT_MAX) -> int:
    value = claims[name]
    if type(value) is not int or not 0 <= value <= at_most:  # `type is`: True is no number here
        refuse("TOKEN_CLAIM", name)
    return value


def number_or_none(claims: Mapping[str, Any], name: str) -> int | None:
    return None if claims[name] is None else number(claims, name)


def u64(claims: Mapping[str, Any], name: str) -> int:
    return u64_text(claims[name], name)


def u64_text(value: object, name: str) -> int:
    """Epochs, amounts and offsets travel as decimal strings."""
    if type(value) is not str or not _U64.fullmatch(value) or int(value) >= 1 << 64:
        refuse("TOKEN_CLAIM", name)
    return int(value)


def flag(claims: Mapping[str, Any], name: str) -> bool:
    value = claims[name]
    if type(value) is not bool:
        refuse("TOKEN_CLAIM", name)
    return value


def table(claims: Mapping[str, Any], name: str, names: frozenset[str]) -> dict[str, Any]:
    value = claims[name]
    if type(value) is not dict or value.keys() != names:
        refuse("TOKEN_CLAIM", name)
    return value
