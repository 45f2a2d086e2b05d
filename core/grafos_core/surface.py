"""The few bytes on disk that decide what a node may do after a power cut, and their order.

It is like a shop's till roll and a slip at the door. The roll (spool) gets every entry; the slip
(head) says how far the roll is good. The roll is written first, then the slip, and only then is
anything handed out. If the lights go out in between, the roll may be one batch longer than the slip
says: that is put right. If the slip names what the roll lacks, somebody lost something: the shop
stays shut until a person has looked.

    append   WriteSpool · SyncSpool · WriteSlot · SyncHead · only now the effect, then the reply

    spool    segments of fixed size, allocated beforehand and filled with zeros
             segment  = batch, batch, …          the first batch repeats the state whole
             batch    = magic, length, [records, seal], sum       at most 64 records
    head     one file of 8 KiB: two slots of 4 KiB, written in turn, never both unsynced

Rules. A batch is whole or it is not there. Formatting writes both slots, else a cut during the very
first write would leave nothing to start from. A failed write or sync is never tried again: the
process halts and recovers from what the disk has. Nothing here writes: effects say what to write.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from grafos_core import chain, codec, failure
from grafos_core.chain import BATCH_RECORDS_MAX, GENESIS, EventKind, Record, Seal, VerifySeal
from grafos_core.surface_state import SurfaceState

SLOT_BYTES: Final = 4096
"""One page, and a multiple of every disk's sector."""
HEAD_BYTES: Final = 2 * SLOT_BYTES
SEGMENT_BYTES: Final = 8 * 1024 * 1024
BATCH_BYTES_MAX: Final = 256 * 1024
"""An ordinary batch. The first of a segment may be as long as the state it repeats needs."""
SUM_BYTES: Final = 16
SCHEMA_VERSION: Final = 1

_SLOT = struct.Struct(">8sIQ16sQQ32s32sQQ")
_SLOT_MAGIC: Final = b"GRAFHEAD"
_SLOT_USED: Final = _SLOT.size + 32
_BATCH = struct.Struct(">4sI")
_BATCH_MAGIC: Final = b"GRB1"


# Slots ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Slot:
    """How far the spool is good, and what no restart may forget."""

    incarnation: str
    boot_epoch: int
    number: int
    """Of the last record."""
    head: bytes
    """Its hash."""
    tables_hash: bytes
    """Of the state with which the segment of the last record begins."""
    time_floor_ms: int = 0
    """The wall clock was here already; it is never believed to be earlier."""
    revocation_number: int = 0
    """Of the last revocation list that was accepted; a lower one is a rollback."""
    serial: int = 0
    """Rises with each write; the valid slot with the higher one counts."""
    version: int = SCHEMA_VERSION


def encode_slot(slot: Slot) -> bytes:
    """The 4096 bytes of a slot: fields, SHA-256 of them, zeros."""
    fields = _SLOT.pack(
        _SLOT_MAGIC, slot.version, slot.serial, bytes.fromhex(slot.incarnation), slot.boot_epoch,
        slot.number, slot.head, slot.tables_hash, slot.time_floor_ms, slot.revocation_number,
    )  # fmt: skip
    return (fields + hashlib.sha256(fields).digest()).ljust(SLOT_BYTES, b"\0")


def decode_slot(data: bytes) -> Slot | None:
    """The slot, or None where it is torn, flipped or was never written."""
    if len(data) != SLOT_BYTES or not data.startswith(_SLOT_MAGIC):
        return None
    fields = data[: _SLOT.size]
    if data[_SLOT.size :] != hashlib.sha256(fields).digest().ljust(SLOT_BYTES - _SLOT.size, b"\0"):
        return None
    _, version, serial, incarnation, boot_epoch, number, head, tables_hash, floor_ms, revocation = (
        _SLOT.unpack(fields)
    )
    return Slot(
        incarnation.hex(), boot_epoch, number, head, tables_hash, floor_ms, revocation, serial,
        version,
    )  # fmt: skip


def newest_slot(head_page: bytes) -> Slot:
    """The slot that counts. None whole, or one of a version that is not ours, is refused."""
    if len(head_page) != HEAD_BYTES:
        raise failure.of("STORAGE", "the head file has not its size")
    halves = (head_page[:SLOT_BYTES], head_page[SLOT_BYTES:])
    whole = [slot for slot in map(decode_slot, halves) if slot is not None]
    if not whole:
        raise failure.of("STORAGE", "no head slot is whole")
    newest = max(whole, key=lambda slot: slot.serial)
    if newest.version != SCHEMA_VERSION:
        side = "older" if newest.version > SCHEMA_VERSION else "newer"
        raise failure.of("VERSION", f"this program is {side} than the node's durable state")
    return newest


# Batches -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Batch:
    """Records that become durable together, closed by the seal of the last."""

    records: tuple[Record, ...]
    seal: Seal
    end: int
    """Where in its segment the next one begins."""


def encode_batch(records: Sequence[Record], seal: Seal) -> bytes:
    """The bytes of a batch in the spool."""
    failure.invariant(0 < len(records) <= BATCH_RECORDS_MAX, "a batch has 1 to 64 records")
    last = records[-1]
    failure.invariant((seal.number, seal.hash) == (last.number, last.hash), "a seal closes a batch")
    payload = codec.encode([[r.data for r in records], seal.key_id, seal.signature])
    frame = _BATCH.pack(_BATCH_MAGIC, len(payload)) + payload
    return frame + _sum(frame)


def _sum(frame: bytes) -> bytes:
    return hashlib.sha256(frame).digest()[:SUM_BYTES]


def read_batches(segment: bytes) -> Iterator[Batch]:
    """The whole batches of a segment, up to the first thing that is none."""
    at = 0
    while (batch := _read_batch(segment, at)) is not None:
        yield batch
        at = batch.end


def _read_batch(segment: bytes, at: int) -> Batch | None:
    if at + _BATCH.size > len(segment):
        return None
    magic, length = _BATCH.unpack_from(segment, at)
    payload_at, end = at + _BATCH.size, at + _BATCH.size + length + SUM_BYTES
    if magic != _BATCH_MAGIC or end > len(segment):
        return None
    if not _sums_up(segment[at : end - SUM_BYTES], segment[end - SUM_BYTES : end]):
        return None
    try:
        value: Any = codec.decode(segment[payload_at : payload_at + length])
        datas, key_id, signature = value
        records = tuple(chain.parse(data) for data in datas)
    except (failure.FabricError, TypeError, ValueError):
        return None
    sealed = type(key_id) is str and type(signature) is bytes
    if not sealed or not 0 < len(records) <= BATCH_RECORDS_MAX:
        return None
    return Batch(records, Seal(records[-1].number, records[-1].hash, key_id, signature), end)


def _sums_up(frame: bytes, sum_read: bytes) -> bool:
    return _sum(frame) == sum_read


# Effects -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WriteSpool:
    """Write `data` at `offset` of this segment. `segment` 0, 1, … names the file."""

    segment: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class SyncSpool:
    """fdatasync of this segment; when it fails, halt."""

    segment: int


@dataclass(frozen=True, slots=True)
class WriteSlot:
    """Write `data`, 4096 bytes, as slot `index` (0 or 1) of the head file."""

    index: int
    data: bytes


@dataclass(frozen=True, slots=True)
class SyncHead:
    """fdatasync of the head file; when it fails, halt."""


@dataclass(frozen=True, slots=True)
class DropSegment:
    """The collector has all of it, and recovery no longer needs it: it may be removed."""

    segment: int


Effect = WriteSpool | SyncSpool | WriteSlot | SyncHead | DropSegment

ORDER: Final = (WriteSpool, SyncSpool, WriteSlot, SyncHead)
"""Of every append. Whatever waits for the records, effect or reply, comes after the last."""


# Writing -------------------------------------------------------------------------------------


def formatted(incarnation: str) -> list[Effect]:
    """Once, at provisioning, when the first segment is allocated: both slots, whole and synced."""
    slot = Slot(incarnation, 0, 0, GENESIS, SurfaceState().tables_hash())
    return [
        WriteSlot(0, encode_slot(slot)),
        WriteSlot(1, encode_slot(replace(slot, serial=1))),
        SyncHead(),
    ]


class Surface:
    """The writing end. Give it sealed batches; perform what it returns, in order, then act."""

    def __init__(
        self,
        slot: Slot,
        *,
        segment: int,
        offset: int,
        segment_bytes: int = SEGMENT_BYTES,
        segments_max: int = 64,
        batch_bytes_max: int = BATCH_BYTES_MAX,
    ) -> None:
        failure.invariant(segments_max >= 3, "one segment in use, one before it, one in reserve")
        failure.invariant(4 * batch_bytes_max <= segment_bytes, "a segment holds several batches")
        self._slot = slot
        self._segment, self._offset = segment, offset
        self._segment_bytes, self._batch_bytes_max = segment_bytes, batch_bytes_max
        self._segments_max = segments_max
        self._ends: dict[int, int] = {}
        """The last record of each finished segment that still exists."""

    @property
    def slot(self) -> Slot:
        """As it was last given out to be written."""
        return self._slot

    @property
    def segment(self) -> int:
        """The one that is written to."""
        return self._segment

    def append(self, records: Sequence[Record], seal: Seal, **noted: int) -> list[Effect]:
        """Make a batch durable. `noted` may raise `time_floor_ms` and `revocation_number`."""
        failure.invariant(not self.should_roll(), "a full segment gets no more batches")
        data = encode_batch(records, seal)
        failure.invariant(len(data) <= self._batch_bytes_max, "a batch is bounded")
        return self._persist(data, records, noted)

    def should_roll(self) -> bool:
        """Whether the next batch must be `begin_segment` with the tables."""
        return self._offset + self._batch_bytes_max > self._segment_bytes

    def begin_segment(
        self, records: Sequence[Record], seal: Seal, tables_hash: bytes
    ) -> list[Effect]:
        """Go on in the next segment, with a batch of the records of `SurfaceState.tables`."""
        if self._segments_used() >= self._segments_max:
            raise failure.of("SPOOL_FULL", "no segment is left")
        are_tables = all(record.kind == EventKind.AGENT_TABLES for record in records)
        failure.invariant(are_tables, "a segment begins with the tables alone")
        data = encode_batch(records, seal)
        failure.invariant(len(data) <= self._segment_bytes // 2, "the tables leave room")
        self._ends[self._segment] = self._slot.number
        self._segment, self._offset = self._segment + 1, 0
        self._slot = replace(self._slot, tables_hash=tables_hash)
        return self._persist(data, records, {})

    def _persist(
        self, data: bytes, records: Sequence[Record], noted: dict[str, int]
    ) -> list[Effect]:
        """The order is the point."""
        head, number = self._slot.head, self._slot.number
        for record in records:
            follows = record.number == number + 1 and record.prev_hash == head
            failure.invariant(follows, "a batch goes on from the last record")
            head, number = record.hash, record.number
        effects: list[Effect] = [
            WriteSpool(self._segment, self._offset, data),
            SyncSpool(self._segment),
            *self._move_slot(number=number, head=head, **noted),
        ]
        self._offset += len(data)
        return effects

    def _move_slot(self, **changes: Any) -> list[Effect]:
        moved = replace(self._slot, serial=self._slot.serial + 1, **changes)
        failure.invariant(moved.time_floor_ms >= self._slot.time_floor_ms, "the time floor rises")
        failure.invariant(
            moved.revocation_number >= self._slot.revocation_number, "revocation numbers rise"
        )
        self._slot = moved
        return [WriteSlot(moved.serial % 2, encode_slot(moved)), SyncHead()]

    def note(self, **noted: int) -> list[Effect]:
        """Make `time_floor_ms` or `revocation_number` durable without a record."""
        return self._move_slot(**noted)

    def _segments_used(self) -> int:
        return len(self._ends) + 1

    def is_full(self) -> bool:
        """No new binds: what is left is the reserve for endings, fences and clears."""
        return self._segments_used() >= self._segments_max - 1

    def acknowledged(self, number: int) -> list[Effect]:
        """The collector has everything up to `number`: which segments may go."""
        gone = [segment for segment, end in self._ends.items() if end <= number]
        for segment in gone:
            del self._ends[segment]
        return [DropSegment(segment) for segment in gone]


# Recovery ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a node knows when it starts again."""

    slot: Slot
    """As read, except that number and head are those of the last record."""
    state: SurfaceState
    batches: tuple[Batch, ...]
    """All that were read, for those that the collector has not acknowledged."""
    segment: int
    offset: int
    """Where the next batch goes."""
    rolled_forward: bool
    """Whether the spool was one batch ahead of the head."""
    ends: dict[int, int]
    """Last record of each segment that is finished."""

    @property
    def number(self) -> int:
        return self.slot.number

    @property
    def head(self) -> bytes:
        return self.slot.head


@dataclass(frozen=True, slots=True)
class _Place:
    """A batch and where it was found."""

    segment: int
    batch: Batch


def recover(
    segments: Sequence[bytes],
    head_page: bytes,
    *,
    first_segment: int = 0,
    verify: VerifySeal | None = None,
) -> Recovered:
    """What the disk holds. `segments` are those that exist, in order, from `first_segment` on.

    At most one batch is rolled forward. A head that names what the spool lacks is never repaired.
    Continue with `resume`, whose effects make durable what was read.
    """
    slot = newest_slot(head_page)
    places = _linked_batches(segments, first_segment, slot, verify)
    reached = _reached_by(slot, places)
    ahead = places[reached:]
    if len(ahead) > 1:
        number = ahead[1].batch.records[0].number
        raise failure.of("STORAGE", f"record {number} is more than one batch ahead of the head")
    state, tables_hash = _folded(places, slot, reached)
    last = places[-1] if places else None
    if last is not None and ahead:
        seal = last.batch.seal
        slot = replace(slot, number=seal.number, head=seal.hash, tables_hash=tables_hash)
    ends = {place.segment: place.batch.seal.number for place in places}
    segment = last.segment if last else first_segment
    ends.pop(segment, None)
    return Recovered(
        slot=slot,
        state=state,
        batches=tuple(place.batch for place in places),
        segment=segment,
        offset=last.batch.end if last else 0,
        rolled_forward=bool(ahead),
        ends=ends,
    )


def _linked_batches(
    segments: Sequence[bytes], first_segment: int, slot: Slot, verify: VerifySeal | None
) -> list[_Place]:
    """Batches that follow one another; what does not follow was never finished."""
    places: list[_Place] = []
    before: Record | None = None
    for index, data in enumerate(segments, first_segment):
        count_before = len(places)
        for batch in read_batches(data):
            if not _follows(batch, before, slot.incarnation, is_first=not places):
                break
            if verify is not None:
                chain.check_seal(batch.seal, slot.incarnation, verify)
            places.append(_Place(index, batch))
            before = batch.records[-1]
        if len(places) == count_before:
            break
    return places


def _follows(batch: Batch, before: Record | None, incarnation: str, *, is_first: bool) -> bool:
    """A first batch is believed: the head's hash, at the end of the links, vouches for it."""
    first = batch.records[0]
    prev, number = first.prev_hash, first.number - 1
    if before is not None:
        prev, number = before.hash, before.number
    if first.incarnation != incarnation or (is_first and (number == 0) != (prev == GENESIS)):
        return False
    try:
        for record in batch.records:
            chain.check_link(record, prev=prev, number=number, before=before)
            prev, number, before = record.hash, record.number, record
    except failure.FabricError:
        return False
    return True


def _reached_by(slot: Slot, places: list[_Place]) -> int:
    """How many batches the head covers."""
    if slot.number == 0:
        if places and places[0].batch.records[0].number != 1:
            raise failure.of("STORAGE", "the spool's first record is missing")
        return 0
    for at, place in enumerate(places, 1):
        seal = place.batch.seal
        if (seal.number, seal.hash) == (slot.number, slot.head):
            return at
    last = places[-1].batch.seal.number if places else 0
    if last < slot.number:
        detail = f"record {last + 1} is missing or damaged; the head names record {slot.number}"
    else:
        detail = f"the head names another record {slot.number} than the spool holds"
    raise failure.of("STORAGE", detail)


def _folded(places: list[_Place], slot: Slot, reached: int) -> tuple[SurfaceState, bytes]:
    """The state after all records, and the hash of the one with which the last segment begins."""
    from_start = not places or places[0].batch.records[0].number == 1
    state = SurfaceState(from_start=from_start)
    tables_hash, in_segment = SurfaceState().tables_hash(), -1
    for at, place in enumerate(places):
        for record in place.batch.records:
            state.fold(record)
        if place.segment != in_segment:
            in_segment = place.segment
            tables_hash = tables_hash if in_segment == 0 else state.tables_hash()
        if at + 1 == reached and tables_hash != slot.tables_hash:
            raise failure.of("STORAGE", f"the tables before record {slot.number} are others")
    return state, tables_hash


def resume(
    recovered: Recovered,
    *,
    segment_bytes: int = SEGMENT_BYTES,
    segments_max: int = 64,
    batch_bytes_max: int = BATCH_BYTES_MAX,
) -> tuple[Surface, list[Effect]]:
    """The writing end of the next boot, and what must be performed before it is used.

    What was read need not be on the disk yet: a killed process leaves pages that were never synced.
    So both files are synced before a slot of the new boot epoch says that it is all there.
    """
    surface = Surface(
        recovered.slot,
        segment=recovered.segment,
        offset=recovered.offset,
        segment_bytes=segment_bytes,
        segments_max=segments_max,
        batch_bytes_max=batch_bytes_max,
    )
    surface._ends.update(recovered.ends)
    boot_epoch = recovered.slot.boot_epoch + 1
    effects = [SyncSpool(recovered.segment), SyncHead(), *surface._move_slot(boot_epoch=boot_epoch)]
    return surface, effects
