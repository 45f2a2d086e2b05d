"""The agent's book: one chain of sealed records, durable before anybody is told of them.

It puts together what others decide: the chain links, the state adds up, the surface says what to
write where, the store writes. Nobody else appends.

Rules. A batch is sealed with the node's key and is on stable storage when `append` returns. A
segment goes only when the collector has all of it and nothing in it is still needed to recover: the
bind of a lease that is not proved back, the facts of a receipt that is not credited. Batches that
the collector has not acknowledged are kept in memory up to a bound; older ones are read again.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from grafos_core import surface
from grafos_core.chain import BATCH_RECORDS_MAX, Chain, EventKind, Record, Seal, seal_bytes
from grafos_core.node_effects import Instant
from grafos_core.receipt import Outcome
from grafos_core.recollection import CREDITED, PROVING, Recollection
from grafos_core.surface_state import SurfaceState
from services.nodeagent.store import Store
from services.runtime import signing

KEPT_MAX: Final = 4_096
"""Batches kept for the collector; about 10 MB."""
NS_PER_MS: Final = 1_000_000

Event = tuple[str, str, int, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Sealed:
    """A batch as the collector gets it."""

    records: tuple[Record, ...]
    seal: Seal


class Book:
    """Opened once per boot. Any thread may call; the lock is held while the disk writes."""

    def __init__(self, store: Store, node_id: str) -> None:
        self._store = store
        self._key = store.signing_key()
        self.public_key = self._key.public_key().public_bytes_raw()
        self.key_id = signing.key_id_of(self.public_key)
        self._surface, found = store.start(self._verify)
        self._state: SurfaceState = found.state
        self.recollection = Recollection(found.state, found.batches)
        slot = self._surface.slot
        self.incarnation, self.boot_epoch = slot.incarnation, slot.boot_epoch
        self.rolled_forward = found.rolled_forward
        self._chain = Chain(node_id, slot.incarnation, slot.boot_epoch, found.head, found.number)
        self._lock = threading.Lock()
        self._kept = deque((Sealed(b.records, b.seal) for b in found.batches), KEPT_MAX)
        self._needed = dict(self.recollection.needed)
        """Record number by lease: of what recovery would have to know."""
        self.on_sealed: Callable[[], None] = lambda: None
        """Called when there is more for the collector."""

    @property
    def head(self) -> bytes:
        return self._chain.head

    @property
    def number(self) -> int:
        return self._chain.number

    @property
    def time_floor_ms(self) -> int:
        return self._surface.slot.time_floor_ms

    @property
    def is_full(self) -> bool:
        """There is room for endings and for nothing else."""
        return self._store.full or self._surface.is_full()

    def make_room(self) -> None:
        """Try once more to have the next segments ready: what filled the disk may be gone."""
        with self._lock:
            if self._store.full:
                self._store.prepare(self._surface.segment)

    def sign(self, message: bytes) -> bytes:
        return self._key.sign(message)

    def append(self, events: Sequence[Event], *, now: Instant, time_floor_ms: int) -> list[Record]:
        """Make these records durable, in this order; as few syncs as their number allows."""
        written: list[Record] = []
        with self._lock:
            for at in range(0, len(events), BATCH_RECORDS_MAX):
                part = events[at : at + BATCH_RECORDS_MAX]
                written += self._append(part, now, time_floor_ms)
        self.on_sealed()
        return written

    def note_revocation(self, number: int) -> None:
        """The list with this number was accepted; a lower one is refused from now on."""
        with self._lock:
            if number > self._surface.slot.revocation_number:
                self._store.perform(self._surface.note(revocation_number=number))

    def batches_after(self, number: int, batches_max: int) -> list[Sealed]:
        """Batches with records beyond `number`, oldest first."""
        with self._lock:
            kept = [batch for batch in self._kept if batch.seal.number > number]
            if number >= self._chain.number:
                return []
        if kept and kept[0].records[0].number <= number + 1:
            return kept[:batches_max]
        return self._read_again(number, batches_max)

    def acknowledged(self, number: int) -> None:
        """The collector has everything up to here."""
        with self._lock:
            while self._kept and self._kept[0].seal.number <= number:
                self._kept.popleft()
            needed = min(self._needed.values(), default=number + 1)
            self._store.perform(self._surface.acknowledged(min(number, needed - 1)))

    def oldest_unacknowledged_ms(self) -> int | None:
        """Wall clock of the oldest record that the collector has not."""
        with self._lock:
            return self._kept[0].records[0].wall_ms if self._kept else None

    def close(self) -> None:
        with self._lock:
            self._store.close()

    def _append(self, events: Sequence[Event], now: Instant, time_floor_ms: int) -> list[Record]:
        if self._surface.should_roll():
            self._begin_segment(now)
        records = [self._record(event, now) for event in events]
        for record in records:
            self._state.fold(record)
        floor_ms = max(time_floor_ms, self._surface.slot.time_floor_ms)
        seal = self._seal(records)
        self._store.perform(self._surface.append(records, seal, time_floor_ms=floor_ms))
        self._kept.append(Sealed(tuple(records), seal))
        for record in records:
            self._note_needed(record)
        return records

    def _begin_segment(self, now: Instant) -> None:
        records = [
            self._record((EventKind.AGENT_TABLES, "", 0, body), now)
            for body in self._state.tables()
        ]
        seal, tables_hash = self._seal(records), self._state.tables_hash()
        self._store.perform(self._surface.begin_segment(records, seal, tables_hash))
        self._kept.append(Sealed(tuple(records), seal))

    def _record(self, event: Event, now: Instant) -> Record:
        kind, lease_id, epoch, body = event
        return self._chain.append(
            kind,
            wall_ms=now.wall_ms,
            boottime_ns=now.boot_ms * NS_PER_MS,
            lease_id=lease_id,
            epoch=epoch,
            body=body,
        )

    def _seal(self, records: Sequence[Record]) -> Seal:
        last = records[-1]
        message = seal_bytes(self.incarnation, last.number, last.hash)
        return Seal(last.number, last.hash, self.key_id, self._key.sign(message))

    def _verify(self, key_id: str, message: bytes, signature: bytes) -> bool:
        return key_id == self.key_id and signing.verify(self.public_key, message, signature)

    def _note_needed(self, record: Record) -> None:
        if record.kind in PROVING or record.kind == EventKind.AGENT_BOUND:
            self._needed[record.lease_id] = record.number
        elif record.kind == CREDITED and record.body["outcome"] != Outcome.FENCED:
            self._needed.pop(record.lease_id, None)

    def _read_again(self, number: int, batches_max: int) -> list[Sealed]:
        found: list[Sealed] = []
        folder = self._store.folder / "surface"
        for path in sorted(folder.glob("spool.*"), key=lambda path: int(path.suffix[1:])):
            for batch in surface.read_batches(path.read_bytes()):
                if batch.seal.number > number:
                    found.append(Sealed(batch.records, batch.seal))
                if len(found) >= batches_max:
                    return found
        return found
