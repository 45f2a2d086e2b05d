"""A chain of audit records of your own, linked and sealed as the fabric's are.

    assembler = ChainAssembler(prior_anchor, signer)
    record = assembler.seal(AuditEvent(kind=AuditEventKind.LeasePreempted, identity=…, …))
    durable.set_audit_anchor(record.current_event_hash)
    collector.append(record)

Each record holds the hash of the one before; a seal is a signature over the last hash. Who keeps
the last hash in a safe place, the anchor, can tell later that nothing before it was changed, taken
out or put in. The chain itself is the fabric's own, `grafos_core.chain`.

Rules. `sequence` counts the records of one chain from 1 and has no gap; left out, it is the next
one. After a restart the anchor's hash alone does not say which number it had, so the first event
must say its own (or the anchor is a whole record or `Anchor`). One signer writes one chain: the
chain's name is derived from its key. A collector that refuses a record has changed nothing.
"""

from __future__ import annotations

import base64
import enum
import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from grafos import _clock
from grafos_core import chain, codec, failure
from grafos_core.chain import GENESIS

ORIGIN_DEFAULT: Final = "sdk"
SCHEMA: Final = 1
ANCHOR_FILE_BYTES_MAX: Final = 4_096


class AuditEventKind(enum.Enum):
    """What happened; the value is the kind that stands in the record."""

    LeaseAllocated = "lease.granted"
    LeaseBound = "lease.bound"
    LeaseRenewed = "lease.renewed"
    LeaseAttached = "lease.attached"
    LeaseReleased = "lease.released"
    LeaseRevoked = "lease.revoked"
    LeasePreempted = "lease.preempted"
    LeaseExpired = "lease.expired"
    LeaseFenced = "lease.fenced"
    FenceCleared = "lease.cleared"
    LeaseBurnt = "lease.burnt"
    AdmissionDenied = "lease.denied"
    NodeDrained = "node.mode"
    EdgeRewritten = "edge.rewritten"


class PreemptionReason(enum.Enum):
    """Why a lease was taken from its holder for another's sake."""

    QuotaPressure = "quota_pressure"
    HigherPriority = "higher_priority"
    Maintenance = "maintenance"
    Operator = "operator"


class AuditEventData:
    """What an event carries besides; one class per kind that carries something."""

    @dataclass(frozen=True, slots=True)
    class EdgeRewritten:
        """An edge of a resource graph as it is from now on, in its canonical bytes."""

        edge_id: int | str
        edge_record_bytes: bytes

        def to_body(self) -> dict[str, Any]:
            return {"edge_id": self.edge_id, "edge_record_bytes": self.edge_record_bytes}

    @dataclass(frozen=True, slots=True)
    class Lease:
        """The lease that the event is about."""

        lease_id: str
        epoch: int = 0

        def to_body(self) -> dict[str, Any]:
            return {}


EventData = AuditEventData.EdgeRewritten | AuditEventData.Lease


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEvent:
    """What is to be recorded."""

    kind: AuditEventKind
    identity: object
    """Who it happened to or who did it; its text is recorded, a SPIFFE id as a rule."""
    reason: PreemptionReason | None = None
    sequence: int | None = None
    """The number that this record must get; None: the next one."""
    timestamp: int | None = None
    """Wall clock in milliseconds; None: now."""
    event_data: EventData | None = None


class Signer(Protocol):
    """Who seals."""

    @property
    def key_id(self) -> str: ...

    def sign(self, message: bytes) -> bytes: ...


class Ed25519Signer:
    """Seals with an Ed25519 key; without one given it makes its own."""

    def __init__(self, key: ed25519.Ed25519PrivateKey | None = None) -> None:
        self._key = key or ed25519.Ed25519PrivateKey.generate()
        self.public_key: bytes = self._key.public_key().public_bytes(
            serialization.Encoding.Raw, serialization.PublicFormat.Raw
        )
        self.key_id = hashlib.sha256(self.public_key).hexdigest()[:16]

    def sign(self, message: bytes) -> bytes:
        return self._key.sign(message)


class NullSigner:
    """Seals with nothing: records are linked, but nobody answers for them."""

    key_id = ""
    public_key = b""

    def sign(self, message: bytes) -> bytes:
        return b""


@dataclass(frozen=True, slots=True)
class Anchor:
    """The last record's hash, and its number where that is known."""

    hash: bytes = GENESIS
    number: int | None = None

    def __post_init__(self) -> None:
        if type(self.hash) is not bytes or len(self.hash) != 32:
            raise failure.of("CHAIN", "an anchor is a hash of 32 bytes")


@dataclass(frozen=True, slots=True)
class SealedRecord:
    """One record with its seal. Never changes; its bytes are what is hashed, kept and sent."""

    record: chain.Record
    seal: chain.Seal

    @property
    def prev_event_hash(self) -> bytes:
        return self.record.prev_hash

    @property
    def current_event_hash(self) -> bytes:
        return self.record.hash

    @property
    def sequence(self) -> int:
        return self.record.number

    @property
    def kind(self) -> AuditEventKind:
        return AuditEventKind(self.record.kind)

    @property
    def identity(self) -> str:
        return str(self.record.body.get("identity", ""))

    @property
    def reason(self) -> PreemptionReason | None:
        found = self.record.body.get("reason")
        return PreemptionReason(found) if found else None

    @property
    def timestamp(self) -> int:
        return self.record.wall_ms

    @property
    def event_data(self) -> EventData | None:
        data = self.record.body.get("data")
        if data:
            return AuditEventData.EdgeRewritten(**data)
        if self.record.lease_id:
            return AuditEventData.Lease(self.record.lease_id, self.record.epoch)
        return None

    def to_bytes(self) -> bytes:
        """Record and seal in the canonical encoding."""
        return codec.encode([self.record.data, self.seal.key_id, self.seal.signature])

    @classmethod
    def from_bytes(cls, data: bytes) -> SealedRecord:
        """What `to_bytes` wrote. Proves nothing by itself: that is the collector's part."""
        parts: Any = codec.decode(data)
        if type(parts) is not list or [type(each) for each in parts] != [bytes, str, bytes]:
            raise failure.of("ENCODING", "not a sealed record")
        record = chain.parse(parts[0])
        return cls(record, chain.Seal(record.number, record.hash, parts[1], parts[2]))

    def to_json(self) -> str:
        """One line for people and for export; `bytes` holds what can be verified."""
        return json.dumps(
            {
                "sequence": self.sequence,
                "kind": self.kind.name,
                "identity": self.identity,
                "reason": self.reason.name if self.reason else None,
                "timestamp": self.timestamp,
                "prev_event_hash": self.prev_event_hash.hex(),
                "current_event_hash": self.current_event_hash.hex(),
                "bytes": base64.b64encode(self.to_bytes()).decode("ascii"),
            },
            separators=(",", ":"),
        )


class ChainAssembler:
    """The writing end of one chain. Thread-safe."""

    def __init__(
        self,
        prior_anchor: bytes | Anchor | SealedRecord | None,
        signer: Signer,
        *,
        origin: str = ORIGIN_DEFAULT,
    ) -> None:
        self._anchor, self._signer, self._origin = _anchor_of(prior_anchor), signer, origin
        self._chain: chain.Chain | None = None
        self._lock = threading.Lock()

    @property
    def anchor(self) -> Anchor:
        """Where the chain stands."""
        return self._anchor

    def seal(self, event: AuditEvent) -> SealedRecord:
        """The event's record, linked to the one before and sealed; the chain has moved on to it.

        Raises:
            Incompatible: code GAP for a sequence that is not the next; ENCODING for content that
                cannot be recorded. The chain has not moved then.
        """
        with self._lock:
            writer = self._chain or self._begin(event)
            if event.sequence not in (None, writer.number + 1):
                raise chain.gap(writer.number, writer.head, event.sequence or 0)
            record = self._draft(writer, event)
            seal = self._sealed(record)
            writer.advance(record)
            self._chain, self._anchor = writer, Anchor(record.hash, record.number)
            return SealedRecord(record, seal)

    def _begin(self, event: AuditEvent) -> chain.Chain:
        """The chain as the anchor left it; a bare hash takes its number from the first event."""
        number = self._anchor.number
        if number is None:
            if event.sequence is None:
                raise failure.of("CHAIN", "after a bare hash the first event states its sequence")
            number = event.sequence - 1
        if (number == 0) != (self._anchor.hash == GENESIS) or not 0 <= number < chain.NUMBER_MAX:
            raise chain.gap(0, self._anchor.hash, number + 1)
        return chain.Chain(
            self._origin, incarnation_of(self._signer.key_id), 0, self._anchor.hash, number
        )

    def _draft(self, writer: chain.Chain, event: AuditEvent) -> chain.Record:
        about = event.event_data if isinstance(event.event_data, AuditEventData.Lease) else None
        return writer.draft(
            event.kind.value,
            wall_ms=_clock.wall_ms() if event.timestamp is None else event.timestamp,
            boottime_ns=_clock.boot_ns(),
            lease_id=about.lease_id if about else "",
            epoch=about.epoch if about else 0,
            body={
                "identity": str(event.identity),
                "reason": event.reason.value if event.reason else None,
                "data": event.event_data.to_body() if event.event_data else None,
            },
        )

    def _sealed(self, record: chain.Record) -> chain.Seal:
        message = chain.seal_bytes(record.incarnation, record.number, record.hash)
        signature = self._signer.sign(message)
        return chain.Seal(record.number, record.hash, self._signer.key_id, signature)


class DurableAnchor:
    """One hash that survives a crash: a small file, replaced as a whole and synced; or memory."""

    def __init__(self, path: Path | str | None = None) -> None:
        self._path = Path(path) if path is not None else None
        self._anchor = self._load() if self._path is not None else Anchor(number=0)

    def audit_anchor(self) -> Anchor:
        """Where the chain stood when it was last set; the beginning if it never was."""
        return self._anchor

    def set_audit_anchor(self, anchor: bytes | Anchor | SealedRecord) -> None:
        """Durable when this returns."""
        new = _anchor_of(anchor)
        if self._path is not None:
            _replace(self._path, _anchor_file(new))
        self._anchor = new

    def _load(self) -> Anchor:
        assert self._path is not None
        try:
            with self._path.open("rb") as file:
                data = file.read(ANCHOR_FILE_BYTES_MAX)
        except FileNotFoundError:
            return Anchor(number=0)
        except OSError as error:
            raise failure.of("STORAGE", f"{self._path.name}: {error.strerror}") from None
        return _anchor_from_file(data)


class Collector:
    """The reading end: takes records that link to what it has, and nothing else. Thread-safe."""

    def __init__(
        self,
        public_keys: Iterable[bytes] = (),
        *,
        anchor: Anchor | None = None,
        durable: DurableAnchor | None = None,
    ) -> None:
        """
        Args:
            public_keys: Ed25519 keys whose seals are believed. None at all: seals are not looked
                at, only the links are.
            anchor: where to begin; by default where `durable` stands, or at the beginning.
            durable: set to each record's hash before `append` returns.
        """
        self._keys = {hashlib.sha256(key).hexdigest()[:16]: key for key in public_keys}
        self._durable = durable
        self._anchor = anchor or (durable.audit_anchor() if durable else Anchor(number=0))
        self._records: list[SealedRecord] = []
        self._lock = threading.Lock()

    @property
    def anchor(self) -> Anchor:
        return self._anchor

    @property
    def records(self) -> list[SealedRecord]:
        with self._lock:
            return list(self._records)

    def append(self, record: SealedRecord) -> None:
        """Verify and keep one record.

        Raises:
            Incompatible: code GAP; records are missing before this one.
            Fenced: code CHAIN; it does not link, or its bytes and its hash differ. Code FORK:
                another record stands at this number.
            Denied: code SEAL_KEY.
        """
        with self._lock:
            self._check(record)
            anchor = Anchor(record.current_event_hash, record.sequence)
            if self._durable is not None:
                self._durable.set_audit_anchor(anchor)
            self._records.append(record)
            self._anchor = anchor

    def counts_by_kind(self) -> dict[AuditEventKind, int]:
        return dict(Counter(record.kind for record in self.records))

    def export(self) -> Iterator[str]:
        """All records as JSON lines."""
        return (record.to_json() for record in self.records)

    def _check(self, record: SealedRecord) -> None:
        again = chain.parse(record.record.data)  # what it says of itself is not taken on trust
        if again != record.record or record.seal.hash != again.hash:
            raise failure.of("CHAIN", f"record {again.number}: its bytes and its hash differ")
        number = self._anchor.number
        if number is None:
            number = again.number - 1
        self._check_not_forked(again, number)
        before = self._records[-1].record if self._records else None
        chain.check_link(again, prev=self._anchor.hash, number=number, before=before)
        if self._keys:
            chain.check_seal(record.seal, again.incarnation, self._verify)

    def _check_not_forked(self, record: chain.Record, number: int) -> None:
        index = record.number - (number - len(self._records)) - 1
        if 0 <= index < len(self._records) and self._records[index].record.hash != record.hash:
            raise failure.of("FORK", f"record {record.number}")

    def _verify(self, key_id: str, message: bytes, signature: bytes) -> bool:
        key = self._keys.get(key_id)
        if key is None:
            return False
        try:
            ed25519.Ed25519PublicKey.from_public_bytes(key).verify(signature, message)
        except InvalidSignature:
            return False
        return True


def records(lines: Iterable[str]) -> Iterator[chain.Record]:
    """The records of an export, one by one; `grafos audit verify` says whether it is whole."""
    for line in lines:
        value = json.loads(line)
        if value.get("type") == "record":
            yield chain.parse(base64.b64decode(value["record"]))


def incarnation_of(key_id: str) -> str:
    """The chain's own name in its records: one signer, one chain."""
    return hashlib.sha256(b"grafos-sdk-chain-v1\0" + key_id.encode()).hexdigest()[:32]


def _anchor_of(value: bytes | Anchor | SealedRecord | None) -> Anchor:
    if isinstance(value, Anchor):
        return value
    if isinstance(value, SealedRecord):
        return Anchor(value.current_event_hash, value.sequence)
    if value is None or value == GENESIS:
        return Anchor(number=0)
    return Anchor(bytes(value))


def _anchor_file(anchor: Anchor) -> bytes:
    body = {"v": SCHEMA, "hash": anchor.hash.hex(), "number": anchor.number}
    text = json.dumps(body, sort_keys=True)
    return f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n".encode()


def _anchor_from_file(data: bytes) -> Anchor:
    text, _, check = data.decode("ascii", "replace").partition("\n")
    if hashlib.sha256(text.encode()).hexdigest() != check.strip():
        raise failure.of("STORAGE", "the anchor's file is damaged: not guessed at")
    fields = json.loads(text)
    if fields.get("v") != SCHEMA:
        raise failure.of("VERSION", "the anchor's file is of another version")
    return Anchor(bytes.fromhex(fields["hash"]), fields["number"])


def _replace(path: Path, data: bytes) -> None:
    """The old content or the new one, after a crash at any instant."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise failure.of("STORAGE", f"{path.name}: {error.strerror}") from None
