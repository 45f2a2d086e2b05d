"""Audit chains as lines of JSON that people can read, and that prove themselves.

Whoever has the file and the public keys can check all of it, and needs nobody's word. Each line is
one object; `type` says which:

    export   the first line: what this is
    key      a public key that seals the records of one chain
    record   one record: what it says, spelt out, and the very bytes that were hashed, in base64
    seal     a signature over one record's hash, and by the links over all before it
    end      the last line: where each chain begins and ends, and how many lines there are

Rules. What is spelt out in a record's line is made from its bytes, and verification makes it again
and compares: nobody can show people one thing and sign another. A line has one way to be written,
so a byte that is changed anywhere is found, be it in a name, a space or a digit.
"""

from __future__ import annotations

import binascii
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from grafos_core import chain, codec, failure
from grafos_core.chain import GENESIS, Record, Seal

VERSION: Final = 1
LINE_CHARS_MAX: Final = 1 << 20
"""A record of 64 KiB takes at most half of it."""
PROBLEMS_MAX: Final = 100
_COUNTERSIGN_DOMAIN: Final = b"grafos-countersign-v1\0"

VerifyKey = Callable[[bytes, bytes, bytes], bool]
"""(public key, message, signature) → whether that key signed that message."""
KeyId = Callable[[bytes], str]
"""The id under which a public key is known."""
_Name = tuple[str, str]


def countersign_bytes(origin: str, incarnation: str, number: int, head: bytes) -> bytes:
    """What a collector signs to say that it has this much of a chain on disk."""
    return _COUNTERSIGN_DOMAIN + codec.encode([origin, incarnation, number, head])


# Writing --------------------------------------------------------------------------------------


def export_line() -> str:
    return _line({"type": "export", "version": VERSION})


def key_line(origin: str, incarnation: str, key_id: str, public_key: bytes) -> str:
    return _line(
        {
            "type": "key", "origin": origin, "incarnation": incarnation, "key_id": key_id,
            "public_key": public_key.hex(),
        }
    )  # fmt: skip


def record_line(record: Record) -> str:
    return _line(
        {
            "type": "record", "origin": record.origin, "incarnation": record.incarnation,
            "number": record.number, "hash": record.hash.hex(), "prev": record.prev_hash.hex(),
            "boot_epoch": record.boot_epoch, "wall_ms": record.wall_ms,
            "boottime_ns": record.boottime_ns, "kind": record.kind, "lease_id": record.lease_id,
            "epoch": record.epoch, "body": _readable(record.body),
            "record": binascii.b2a_base64(record.data, newline=False).decode(),
        }
    )  # fmt: skip


def seal_line(origin: str, incarnation: str, seal: Seal) -> str:
    return _line(
        {
            "type": "seal", "origin": origin, "incarnation": incarnation, "number": seal.number,
            "hash": seal.hash.hex(), "key_id": seal.key_id, "signature": seal.signature.hex(),
        }
    )  # fmt: skip


def end_line(stretches: Mapping[_Name, tuple[int, int, bytes]], lines: int) -> str:
    """`stretches`: (origin, incarnation) → number of the first record, number and hash of the last.
    `lines`: how many the file has, this one with them."""
    chains = [
        [*name, first, number, head.hex()]
        for name, (first, number, head) in sorted(stretches.items())
    ]
    return _line({"type": "end", "chains": chains, "lines": lines})


def lines_of(
    origin: str, incarnation: str, records: Iterable[bytes], seals: Iterable[Seal]
) -> Iterator[str]:
    """Lines of one stretch of a chain, each seal right after its record."""
    by_number = {seal.number: seal for seal in seals}
    for data in records:
        record = chain.parse(data)
        yield record_line(record)
        seal = by_number.get(record.number)
        if seal is not None:
            yield seal_line(origin, incarnation, seal)


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _readable(value: Any) -> Any:
    """Bytes as hexadecimal digits; all else as JSON has it."""
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    if isinstance(value, dict):
        return {str(key): _readable(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_readable(each) for each in value]
    return value


# Verifying ------------------------------------------------------------------------------------


@dataclass(slots=True)
class ChainReport:
    """What the file has of one chain, and how far it is proved."""

    origin: str
    incarnation: str
    first: int = 0
    """The first record's number; beyond 1, what was before is not in the file."""
    number: int = 0
    head: bytes = GENESIS
    sealed: int = 0
    """The last record that a good seal covers."""
    seals: int = 0
    key_ids: set[str] = field(default_factory=set)
    _last: Record | None = None
    _keys: dict[str, bytes] = field(default_factory=dict)


@dataclass(slots=True)
class Report:
    """The verdict. `problems`: (line number from 1, what is wrong), at most 100."""

    chains: dict[_Name, ChainReport] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)
    lines: int = 0

    @property
    def ok(self) -> bool:
        return not self.problems

    def found(self, line: int, what: str) -> None:
        if len(self.problems) < PROBLEMS_MAX:
            self.problems.append((line, what))


def verify_export(
    lines: Iterable[str],
    verify: VerifyKey,
    key_id: KeyId,
    *,
    trusted: Collection[bytes] | None = None,
) -> Report:
    """Recompute everything. With `trusted` only these public keys are believed; without it those in
    the file are, and the report says which they were."""
    work = _Verification(verify, key_id, trusted)
    for text in lines:
        work.take(text.removesuffix("\n"))
    return work.finish()


class _Verification:
    def __init__(self, verify: VerifyKey, key_id: KeyId, trusted: Collection[bytes] | None) -> None:
        self._verify, self._key_id, self._trusted = verify, key_id, trusted
        self._report = Report()
        self._ended = False
        self._readers: dict[str, Callable[[dict[str, Any]], None]] = {
            "export": self._export, "key": self._key, "record": self._record,
            "seal": self._seal, "end": self._end,
        }  # fmt: skip

    def take(self, text: str) -> None:
        """One line. What is wrong with it is noted, and the next one is looked at all the same."""
        self._report.lines += 1
        try:
            value = _parse(text)
            reader = self._readers.get(str(value.get("type")))
            if reader is None:
                raise failure.of("ENCODING", "a line of an unknown type")
            if self._ended:
                raise failure.of("ENCODING", "a line after the end")
            if (self._report.lines == 1) is not (value["type"] == "export"):
                raise failure.of("ENCODING", "the line `export` comes first, and once")
            reader(value)
        except failure.FabricError as refused:
            self._report.found(self._report.lines, refused.detail or str(refused))
        except (KeyError, TypeError, ValueError, AttributeError):
            self._report.found(self._report.lines, "not the fields of a line of this type")

    def finish(self) -> Report:
        report = self._report
        if not self._ended:
            report.found(report.lines, "the line `end` is missing: the file was cut short")
        for each in report.chains.values():
            if each.sealed < each.number:
                name = f"{each.origin}/{each.incarnation}"
                report.found(report.lines, f"{name}: records after {each.sealed} are not sealed")
        return report

    def _export(self, value: dict[str, Any]) -> None:
        if value != {"type": "export", "version": VERSION}:
            raise failure.of("VERSION", f"the file has another version than {VERSION}")

    def _key(self, value: dict[str, Any]) -> None:
        public_key = bytes.fromhex(value["public_key"])
        same = key_line(value["origin"], value["incarnation"], value["key_id"], public_key)
        _check_same(value, same)
        if value["key_id"] != self._key_id(public_key):
            raise failure.of("SEAL_KEY", "the key's id is not made of the key")
        if self._trusted is not None and public_key not in self._trusted:
            raise failure.of("SEAL_KEY", f"key {value['key_id']} is not one of those believed")
        report = self._chain(value)
        if report._last is not None or value["key_id"] in report._keys:
            raise failure.of("ENCODING", "keys come once, before the records of their chain")
        report._keys[value["key_id"]] = public_key

    def _record(self, value: dict[str, Any]) -> None:
        record = chain.parse(binascii.a2b_base64(value["record"], strict_mode=True))
        _check_same(value, record_line(record))
        report = self._chain(value)
        if report._last is None:
            report.first = record.number
            prev, number = record.prev_hash, record.number - 1
            if (number == 0) is not (prev == GENESIS) or number < 0:
                raise failure.of("CHAIN", f"record {record.number} cannot be a first one")
        else:
            prev, number = report.head, report.number
        chain.check_link(record, prev=prev, number=number, before=report._last)
        report.number, report.head, report._last = record.number, record.hash, record

    def _seal(self, value: dict[str, Any]) -> None:
        seal = Seal(
            value["number"], bytes.fromhex(value["hash"]), value["key_id"],
            bytes.fromhex(value["signature"]),
        )  # fmt: skip
        _check_same(value, seal_line(value["origin"], value["incarnation"], seal))
        report = self._chain(value)
        if (seal.number, seal.hash) != (report.number, report.head):
            raise failure.of("CHAIN", f"the seal of record {seal.number} is not over the one above")
        chain.check_seal(seal, report.incarnation, lambda *of: self._signed(report, *of))
        report.sealed, report.seals = seal.number, report.seals + 1
        report.key_ids.add(seal.key_id)

    def _signed(self, report: ChainReport, key_id: str, message: bytes, signature: bytes) -> bool:
        public_key = report._keys.get(key_id)
        return public_key is not None and self._verify(public_key, message, signature)

    def _end(self, value: dict[str, Any]) -> None:
        self._ended = True
        stretches = {
            name: (each.first, each.number, each.head) for name, each in self._report.chains.items()
        }
        if _line(value) != end_line(stretches, self._report.lines):
            raise failure.of("CHAIN", "the file does not hold what its last line says")

    def _chain(self, value: dict[str, Any]) -> ChainReport:
        name = (value["origin"], value["incarnation"])
        found = self._report.chains.get(name)
        if found is None:
            found = self._report.chains[name] = ChainReport(*name)
        return found


def _parse(text: str) -> dict[str, Any]:
    """The object of a line that is written as we would have written it."""
    if len(text) > LINE_CHARS_MAX:
        raise failure.of("ENCODING", "the line is too long")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise failure.of("ENCODING", "the line is not JSON") from None
    if type(value) is not dict or _line(value) != text:
        raise failure.of("ENCODING", "the line is not written in its one way")
    return value


def _check_same(value: dict[str, Any], made: str) -> None:
    if _line(value) != made:
        raise failure.of("CHAIN", "what the line says is not what its bytes say")
