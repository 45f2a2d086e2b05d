"""An audit chain: every record holds the hash of the one before, so the past cannot be rewritten.

Whoever knows the last hash knows, by recomputing, that not one byte of any earlier record was
changed, taken out or put in. A seal is a signature over that last hash: it says who wrote it all.

    record 1          record 2          record 3
    prev: 32 zeros ┌─ prev: hash 1 ┌─── prev: hash 2
    …              │  …            │    …                 seal: (3, hash 3), signed
       hash 1 ─────┘     hash 2 ───┘       hash 3 ◄───────────┘

Rules. A record is written once, in the codec's encoding, and from then on hashed, stored and sent
as those bytes. Numbers begin at 1 and have no gaps. One chain has one origin and one incarnation;
its boot epoch never falls. The chain knows nothing of what the kinds mean: `EventKind` lists those
of ledger, agent and collector for their sake.
"""

from __future__ import annotations

import enum
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from grafos_core import codec, failure

GENESIS: Final = bytes(32)
"""What the first record links to."""
RECORD_BYTES_MAX: Final = 64 * 1024
"""Protects the collector's memory: one append carries at most a batch of these."""
BATCH_RECORDS_MAX: Final = 64
"""Records under one seal, and so what recovery may roll forward."""
NUMBER_MAX: Final = 2**63 - 1
"""Fits the signed 64 bits of SQLite and of every language that reads the protos."""
EPOCH_MAX: Final = 2**64 - 1
LEASE_ID_CHARS_MAX: Final = 64

_RECORD_DOMAIN: Final = b"grafos-chain-v1\0"
_SEAL_DOMAIN: Final = b"grafos-seal-v1\0"
_KIND = re.compile(r"[a-z._]{1,64}")
_ORIGIN = re.compile(r"[a-z0-9-]{1,63}")
_INCARNATION = re.compile(r"[0-9a-f]{32}")

VerifySeal = Callable[[str, bytes, bytes], bool]
"""(key id, message, signature) → whether that key signed that message; False for unknown keys."""


class EventKind(enum.StrEnum):
    """What is recorded. The part before the dot says whose event it is about."""

    LEDGER_STARTED = "ledger.started"
    LEASE_GRANTED = "lease.granted"
    LEASE_BOUND = "lease.bound"
    LEASE_RENEWED = "lease.renewed"
    LEASE_ATTACHED = "lease.attached"
    LEASE_ENDING = "lease.ending"
    LEASE_SIGNED = "lease.signed"
    """Its token was signed once more, by another key."""
    LEASE_REVOKE_SOONER = "lease.revoke_sooner"
    LEASE_REVOKING = "lease.revoking"
    """What its node has told of a revocation that is under way."""
    LEASE_UNCONFIRMED = "lease.unconfirmed"
    LEASE_RELEASED = "lease.released"
    """The credit: capacity is free again, on a receipt."""
    LEASE_FENCED = "lease.fenced"
    LEASE_CLEARED = "lease.cleared"
    LEASE_BURNT = "lease.burnt"
    LEASE_DENIED = "lease.denied"
    NODE_REGISTERED = "node.registered"
    NODE_LOST = "node.lost"
    NODE_MODE = "node.mode"
    NODE_FORGOTTEN = "node.forgotten"
    TENANT_QUOTA = "tenant.quota"
    KEY_PUBLISHED = "key.published"
    KEY_REVOKED = "key.revoked"

    AGENT_FORMATTED = "agent.formatted"
    AGENT_STARTED = "agent.started"
    AGENT_TABLES = "agent.tables"
    """What a spool segment begins with: floors, open binds and fences, whole."""
    AGENT_BOUND = "agent.bound"
    AGENT_EXTENDED = "agent.extended"
    AGENT_ATTACHED = "agent.attached"
    AGENT_TEARDOWN_BEGIN = "agent.teardown_begin"
    AGENT_TEARDOWN_END = "agent.teardown_end"
    AGENT_FENCED = "agent.fenced"
    AGENT_CLEARED = "agent.cleared"
    AGENT_BURNT = "agent.burnt"
    AGENT_WARDEN_LOST = "agent.warden_lost"
    AGENT_WARDEN_STARTED = "agent.warden_started"
    AGENT_CLOCK = "agent.clock"
    AGENT_READY = "agent.ready"

    AUDIT_COUNTERSIGNED = "audit.countersigned"
    """The collector's own: the heads of other chains as it knows them."""


@dataclass(frozen=True, slots=True)
class Record:
    """One event. `data` is the record; everything else is read from it or computed of it."""

    data: bytes
    hash: bytes
    number: int
    kind: str
    lease_id: str
    """Empty where the event is about no lease."""
    epoch: int
    """Fence epoch of the lease; 0 where there is none."""
    body: dict[Any, Any]
    origin: str
    """Node id, or the service's name."""
    incarnation: str
    """32 hexadecimal digits, made when the origin's storage was formatted."""
    boot_epoch: int
    wall_ms: int
    boottime_ns: int
    prev_hash: bytes


def record_hash(data: bytes) -> bytes:
    """SHA-256 of the record's bytes as they are, in a domain of its own."""
    return hashlib.sha256(_RECORD_DOMAIN + data).digest()


class Chain:
    """The writing end of one chain: knows the last record's number and hash, and nothing else."""

    def __init__(
        self,
        origin: str,
        incarnation: str,
        boot_epoch: int,
        head: bytes = GENESIS,
        number: int = 0,
    ) -> None:
        if not _ORIGIN.fullmatch(origin) or not _INCARNATION.fullmatch(incarnation):
            raise failure.of("IDENTIFIER", "origin: a-z, 0-9, '-'; incarnation: 32 hex digits")
        failure.invariant(0 <= boot_epoch <= NUMBER_MAX, "a boot epoch fits 63 bits")
        failure.invariant(0 <= number <= NUMBER_MAX, "a record number fits 63 bits")
        failure.invariant(len(head) == 32, "a head has 32 bytes")
        failure.invariant((head == GENESIS) == (number == 0), "only an empty chain has no head")
        self.origin, self.incarnation, self.boot_epoch = origin, incarnation, boot_epoch
        self._incarnation_bytes = bytes.fromhex(incarnation)
        self._head, self._number = head, number

    @property
    def head(self) -> bytes:
        return self._head

    @property
    def number(self) -> int:
        return self._number

    def append(
        self,
        kind: str,
        *,
        wall_ms: int,
        boottime_ns: int,
        lease_id: str = "",
        epoch: int = 0,
        body: Mapping[Any, Any] | None = None,
    ) -> Record:
        """The next record; the chain has moved on to it."""
        record = self.draft(
            kind,
            wall_ms=wall_ms,
            boottime_ns=boottime_ns,
            lease_id=lease_id,
            epoch=epoch,
            body=body,
        )
        self.advance(record)
        return record

    def draft(
        self,
        kind: str,
        *,
        wall_ms: int,
        boottime_ns: int,
        lease_id: str = "",
        epoch: int = 0,
        body: Mapping[Any, Any] | None = None,
    ) -> Record:
        """The record that would be next; the chain moves only when it is told to `advance`."""
        number = self._number + 1
        failure.invariant(number <= NUMBER_MAX, "record numbers are used up")
        kind, lease_id, content = str(kind), str(lease_id), dict(body or {})
        _check_ranges(kind, lease_id, epoch, wall_ms, boottime_ns)
        data = codec.encode(
            {
                1: self.origin,
                2: self._incarnation_bytes,
                3: self.boot_epoch,
                4: number,
                5: wall_ms,
                6: boottime_ns,
                7: self._head,
                8: kind,
                9: lease_id,
                10: epoch,
                11: content,
            }
        )
        if len(data) > RECORD_BYTES_MAX:
            raise failure.of("ENCODING", "the record is too large")
        return Record(
            data, record_hash(data), number, kind, lease_id, epoch, content, self.origin,
            self.incarnation, self.boot_epoch, wall_ms, boottime_ns, self._head,
        )  # fmt: skip

    def advance(self, record: Record) -> None:
        """Take a drafted record as the last one, when it is certain to be stored."""
        follows = record.number == self._number + 1 and record.prev_hash == self._head
        failure.invariant(follows, "a chain moves on by exactly one linked record")
        self._head, self._number = record.hash, record.number


def _check_ranges(kind: str, lease_id: str, epoch: int, wall_ms: int, boottime_ns: int) -> None:
    if not _KIND.fullmatch(kind):
        raise failure.of("ENCODING", "kind: 1 to 64 of a-z, '.' and '_'")
    if len(lease_id) > LEASE_ID_CHARS_MAX:
        raise failure.of("ENCODING", "lease id too long")
    if not 0 <= epoch <= EPOCH_MAX:
        raise failure.of("ENCODING", "an epoch has 64 bits")
    if not (0 <= wall_ms <= NUMBER_MAX and 0 <= boottime_ns <= NUMBER_MAX):
        raise failure.of("ENCODING", "an instant has 63 bits")


_TYPES: Final[dict[codec.Value, type]] = {
    1: str, 2: bytes, 3: int, 4: int, 5: int, 6: int, 7: bytes, 8: str, 9: str, 10: int, 11: dict,
}  # fmt: skip
_FIELDS: Final = list(_TYPES)


def parse(data: bytes) -> Record:
    """Read a record from outside: exactly the fields above, each of exactly its type."""
    if len(data) > RECORD_BYTES_MAX:
        raise failure.of("ENCODING", "the record is too large")
    value: Any = codec.decode(data)
    if type(value) is not dict or list(value) != _FIELDS:
        raise failure.of("ENCODING", "not exactly the fields of a record")
    for key, kind in _TYPES.items():
        if type(value[key]) is not kind:
            raise failure.of("ENCODING", f"field {key!r} has the wrong type")
    origin, incarnation, boot_epoch, number, wall_ms, boottime_ns, prev, kind_text, lease_id = (
        value[key] for key in _FIELDS[:9]
    )
    if not _ORIGIN.fullmatch(origin) or len(incarnation) != 16 or len(prev) != 32:
        raise failure.of("ENCODING", "origin, incarnation or link is not well formed")
    if not 0 <= boot_epoch <= NUMBER_MAX or number < 0:
        raise failure.of("ENCODING", "boot epoch or number out of range")
    _check_ranges(kind_text, lease_id, value[10], wall_ms, boottime_ns)
    return Record(
        data, record_hash(data), number, kind_text, lease_id, value[10], value[11], origin,
        incarnation.hex(), boot_epoch, wall_ms, boottime_ns, prev,
    )  # fmt: skip


def check_link(record: Record, *, prev: bytes, number: int, before: Record | None = None) -> None:
    """Refuse `record` unless it comes right after (`number`, `prev`) and, if known, `before`."""
    if record.number > NUMBER_MAX:
        raise failure.of("CHAIN", "the record's number is beyond the last there can be")
    if record.number > number + 1:
        raise gap(number, prev, record.number)
    if record.number <= number:
        raise failure.of("CHAIN", f"record {record.number} after record {number}")
    if record.prev_hash != prev:
        raise failure.of("CHAIN", f"record {record.number} links to another record {number}")
    if before is None:
        return
    if (record.origin, record.incarnation) != (before.origin, before.incarnation):
        raise failure.of("CHAIN", f"record {record.number} is of another chain")
    if record.boot_epoch < before.boot_epoch:
        raise failure.of("CHAIN", f"the boot epoch falls at record {record.number}")


def gap(number: int, head: bytes, offered: int) -> failure.FabricError:
    """The refusal that tells the sender from where to send again."""
    return failure.of(
        "GAP",
        f"record {number + 1} is expected, {offered} came",
        details={"expected_number": str(number + 1), "expected_head": head.hex()},
    )


def verify(
    records: Iterable[bytes], *, prev: bytes = GENESIS, number: int = 0
) -> tuple[bytes, int]:
    """Check records that follow (`number`, `prev`); the head and number they lead to."""
    before: Record | None = None
    for data in records:
        record = parse(data)
        check_link(record, prev=prev, number=number, before=before)
        prev, number, before = record.hash, record.number, record
    return prev, number


@dataclass(frozen=True, slots=True)
class Seal:
    """A signature over one record's hash, and by the links over all records before it."""

    number: int
    hash: bytes
    key_id: str
    signature: bytes


def seal_bytes(incarnation: str, number: int, hash: bytes) -> bytes:
    """What is signed. Every part has a fixed width, so no two seals are the same bytes."""
    failure.invariant(_INCARNATION.fullmatch(incarnation) is not None, "an incarnation is 128 bits")
    failure.invariant(0 < number <= NUMBER_MAX and len(hash) == 32, "a seal names a record")
    return _SEAL_DOMAIN + bytes.fromhex(incarnation) + number.to_bytes(8, "big") + hash


def check_seal(seal: Seal, incarnation: str, verify: VerifySeal) -> None:
    """Refuse a seal that its key did not make for this incarnation."""
    if not 0 < seal.number <= NUMBER_MAX or len(seal.hash) != 32:
        raise failure.of("CHAIN", "the seal names no record")
    if not verify(seal.key_id, seal_bytes(incarnation, seal.number, seal.hash), seal.signature):
        raise failure.of("SEAL_KEY", f"the seal of record {seal.number}")


SEALED_AT_ONCE: Final = frozenset(
    {
        EventKind.AGENT_FORMATTED,
        EventKind.AGENT_BOUND,
        EventKind.AGENT_TEARDOWN_END,
        EventKind.AGENT_FENCED,
        EventKind.AGENT_CLEARED,
        EventKind.AGENT_BURNT,
    }
)
"""Somebody waits for these: a holder, or the ledger for its receipt. A teardown's begin is sealed
with its end, as one batch."""


@dataclass(frozen=True, slots=True)
class SealPolicy:
    """When written records must be sealed: by count, by age, or because somebody waits."""

    records_max: int = BATCH_RECORDS_MAX
    interval_ms: int = 1_000
    at_once: frozenset[str] = SEALED_AT_ONCE

    def __post_init__(self) -> None:
        failure.invariant(0 < self.records_max <= BATCH_RECORDS_MAX, "a seal covers a batch")
        failure.invariant(self.interval_ms > 0, "a seal's interval is a duration")

    def due(self, kinds: Iterable[str], *, oldest_ms: int, now_ms: int) -> bool:
        """Whether the unsealed records, of these kinds and the first made at `oldest_ms`, wait."""
        waiting = list(kinds)
        if not waiting:
            return False
        old = now_ms >= self.due_at_ms(oldest_ms)
        return old or len(waiting) >= self.records_max or not self.at_once.isdisjoint(waiting)

    def due_at_ms(self, oldest_ms: int) -> int:
        """When a record made at `oldest_ms` is sealed at the latest."""
        return oldest_ms + self.interval_ms
