"""Moves a holder's bytes in and out of a lease, and only while the lease is really his.

Like a clerk at a counter who looks at the register, hands the parcel over, and looks again before
he lets go of it: if the entry was struck out in between, the parcel goes back.

Rules. Every operation asks the gate page before the first byte and again after the last; bytes
read are given out, and bytes written are acknowledged, only if both answers were "open". While
bytes move the operation counts as in flight in the gate page, so that a teardown can wait for it.
A lease that is not the caller's is answered exactly like one that never was. A lease that has
ended is answered with the cause of its end: the table of ended leases is bounded, and its oldest
entries give way. A share of a lease is a lease in all of this, but for one thing more: each look at
the gate is a look at the share, too.
"""

from __future__ import annotations

import errno
import hmac
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Protocol

from grafos_core import failure
from grafos_core.failure import FabricError
from grafos_core.lease import BLOCK_BYTES, EPOCH_MAX, Kind, check_lease_id
from grafos_core.sharebook import Entry
from grafos_proto.wire import word
from services.nodeagent.gatepage import GatePage, Verdict, Watch
from services.runtime.faults import fault

CHUNK_BYTES_MAX: Final = 196_608
"""Of one unary call or one message of a stream: fits gRPC's 256 KiB with room for its envelope."""
READ_STREAM_BYTES_MAX: Final = 1 << 30
"""Protects the pool from calls that never end."""
WRITE_STREAM_BYTES_MAX: Final = 4 << 20
"""A stream is kept in memory until its last message has come, and only then applied: a holder that
disconnects in mid-stream has written nothing."""
WRITE_STREAMS_BYTES_MAX: Final = 64 << 20
"""Of all write streams that are under way."""
QUIET_S: Final = 0.25
"""How long a teardown waits for the operations in flight; a pread of a chunk takes about 50 µs."""
ENDED_MAX: Final = 65_536
"""Ended leases whose cause is remembered; about 30 MB. The cause of an older one is forgotten."""
CAUSE_WAIT_S: Final = 0.25
"""How long an operation that met a closed gate waits to be told why. Then it says `FENCED`."""
NS_PER_MS: Final = 1_000_000


class Storage(Protocol):
    """The bytes of one lease, whatever they lie on. Offsets are the lease's own."""

    def read(self, offset: int, length: int) -> bytes: ...

    def write(self, offset: int, data: bytes | memoryview) -> None: ...

    def flush(self) -> None: ...

    def raise_deadline(self, deadline_ms: int) -> None:
        """Later only; boottime."""

    def close(self) -> None:
        """Forget descriptors and keys. Idempotent."""


class MemoryStorage:
    """A memfd, by pread and pwrite only: a mapping would die of SIGBUS when it is truncated."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._word = threading.Lock()
        """The kernel's lock tells other processes apart, not our own threads."""

    def read(self, offset: int, length: int) -> bytes:
        data = os.pread(self.descriptor, length, offset)
        while len(data) < length:
            part = os.pread(self.descriptor, length - len(data), offset + len(data))
            if not part:
                raise failure.of("EXTENT", "the memory was cut short")
            data += part
        return data

    def read_into(self, offset: int, view: memoryview) -> None:
        """As `read`, for large pieces: into memory that is there already."""
        while view:
            count = os.preadv(self.descriptor, [view], offset)
            if not count:
                raise failure.of("EXTENT", "the memory was cut short")
            view, offset = view[count:], offset + count

    def write(self, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            try:
                written = os.pwrite(self.descriptor, view, offset)
            except PermissionError:  # beyond the end of a memfd that must not grow
                raise failure.of("EXTENT", "the memory was cut short") from None
            view, offset = view[written:], offset + written

    def swap(self, offset: int, expected: int, new: int) -> int:
        """What the word was; `new` stands there now if that was `expected`."""
        with self._word:
            return word.swap(self.descriptor, offset, expected, new)

    def add(self, offset: int, amount: int) -> int:
        """What the word was before."""
        with self._word:
            return word.add(self.descriptor, offset, amount)

    def flush(self) -> None:
        """Memory is as stable as it gets."""

    def raise_deadline(self, deadline_ms: int) -> None:
        """Memory has no key that runs out."""

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


@dataclass(slots=True)
class OpenLease:
    """A bound lease, as far as moving its bytes goes."""

    lease_id: str
    slot: int
    epoch: int
    generation: int
    kind: Kind
    size_bytes: int
    holder_key: str
    """SHA-256 of the holder's TLS public key, base64url."""
    deadline_ms: int
    """Boottime; for what is told to the holder. The gate page decides."""
    session: str
    descriptor: bool
    """Whether the memfd itself may be handed to a local holder."""
    ops: frozenset[str]
    """What its token allows: `read`, `write`."""
    storage: Storage
    handed: bool = False
    """Control counts the memfd as handed out to this session already."""
    share: Entry | None = None
    """Of what somebody was given by the holder: only this part, only as long."""
    whole: OpenLease | None = None
    """Of a share, the lease that it is of."""

    @property
    def granule_bytes(self) -> int:
        return BLOCK_BYTES if self.kind is Kind.BLOCK else 1


@dataclass(frozen=True, slots=True)
class Ended:
    """Why operations on a lease that is gone fail, and who may be told."""

    holder_key: str
    cause: FabricError


class FindShare(Protocol):
    """The shares that were shown here."""

    def find(self, lease_id: str, epoch: int, digest: str, key: str) -> OpenLease:
        """As a lease of its own; refused if the one with this key has not shown it."""


class LeaseTable:
    """What is open here, and what has ended. Thread-safe; lookups are one dictionary access."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._open: dict[str, OpenLease] = {}
        self._ended: OrderedDict[str, Ended] = OrderedDict()

    def open(self, lease: OpenLease) -> None:
        """Take a lease up, in place of the one of the same id, if any."""
        with self._lock:
            self._open[lease.lease_id] = lease
            self._ended.pop(lease.lease_id, None)

    def opened(self, lease_id: str) -> OpenLease | None:
        return self._open.get(lease_id)

    def shut(self, lease_id: str) -> OpenLease | None:
        """Forget an open lease; the caller closes its storage once nothing is in flight."""
        with self._lock:
            return self._open.pop(lease_id, None)

    def remember(self, lease_id: str, ended: Ended) -> None:
        with self._lock:
            self._ended[lease_id] = ended
            self._ended.move_to_end(lease_id)
            while len(self._ended) > ENDED_MAX:
                self._ended.popitem(last=False)
            self._lock.notify_all()

    def open_leases(self) -> list[OpenLease]:
        with self._lock:
            return list(self._open.values())

    def find(self, lease_id: str, holder_key: str) -> OpenLease:
        """The open lease, if it is this holder's; else the cause of its end, or `NOT_FOUND`."""
        lease = self._open.get(check_lease_id(lease_id))
        if lease is None:
            raise self._cause(lease_id, holder_key) or failure.of("NOT_FOUND")
        if not hmac.compare_digest(lease.holder_key, holder_key):
            raise failure.of("NOT_FOUND")
        return lease

    def cause_of_end(self, lease: OpenLease) -> FabricError:
        """Why the gate of `lease` is closed; waits a little for whoever closed it to say so."""
        with self._lock:
            self._lock.wait_for(lambda: lease.lease_id in self._ended, CAUSE_WAIT_S)
            told = self._cause(lease.lease_id, lease.holder_key)
        return told or failure.of("FENCED", lease_id=lease.lease_id, epoch=lease.epoch)

    def _cause(self, lease_id: str, holder_key: str) -> FabricError | None:
        ended = self._ended.get(lease_id)
        if ended is None or not hmac.compare_digest(ended.holder_key, holder_key):
            return None
        return failure.from_fields(type(ended.cause).__name__, ended.cause.fields())


class ShareWatch:
    """As the gate's own `Watch`, and at each look at a share, too."""

    def __init__(self, data: DataPath, share: Entry, watch: Watch) -> None:
        self._data, self._share, self._watch = data, share, watch

    def is_open(self, now_ns: int) -> bool:
        share = self._share
        is_in_force = share.cause is None and now_ns < share.deadline_ns
        return is_in_force and self._watch.is_open(now_ns)

    def enter(self) -> None:
        self._watch.enter()
        self._data.count_share(self._share, 1)

    def leave(self) -> None:
        self._data.count_share(self._share, -1)
        self._watch.leave()


class DataPath:
    """Reads and writes, each between two looks at the gate page."""

    def __init__(
        self,
        gate: GatePage,
        table: LeaseTable,
        boottime_ns: Callable[[], int],
        device_failed: Callable[[str, str], None],
        shares: FindShare | None = None,
    ) -> None:
        self._gate, self.table, self.boottime_ns = gate, table, boottime_ns
        self._shares = shares
        self._device_failed = device_failed
        """Told of a lease whose device fails, and how: it is not to be trusted further."""
        self._count = threading.Condition()
        self.waiting = 0
        """Teardowns that wait for an operation to leave."""

    def read(
        self,
        holder_key: str,
        lease_id: str,
        epoch: int,
        *,
        offset: int,
        length: int,
        share: str = "",
    ) -> tuple[bytes, int]:
        """The bytes, and the milliseconds that the lease has left."""
        if length > CHUNK_BYTES_MAX:
            raise failure.of("CHUNK", f"at most {CHUNK_BYTES_MAX} bytes at a time")
        lease = self._find(holder_key, lease_id, epoch, share, "read")
        check_range(lease, offset, length)
        with self._in_flight(lease):
            self.check_open(lease)
            data = self._moved(lease, lambda: read_from(lease.storage, offset, length))
            return data, self.check_open(lease)

    def write(
        self,
        holder_key: str,
        lease_id: str,
        epoch: int,
        *,
        offset: int,
        data: bytes,
        flush: bool,
        share: str = "",
    ) -> int:
        """Write all of `data`; the milliseconds that the lease has left."""
        if len(data) > CHUNK_BYTES_MAX:
            raise failure.of("CHUNK", f"at most {CHUNK_BYTES_MAX} bytes at a time")
        lease = self._find(holder_key, lease_id, epoch, share, "write")
        check_range(lease, offset, len(data))
        with self._in_flight(lease):
            self.check_open(lease)
            self._moved(lease, lambda: write_to(lease.storage, offset, data, flush=flush))
            return self.check_open(lease)

    def check_read(
        self,
        holder_key: str,
        lease_id: str,
        epoch: int,
        *,
        offset: int,
        length: int,
        share: str = "",
    ) -> None:
        """Refuse a stream whose end lies outside the lease before its first byte."""
        if length > READ_STREAM_BYTES_MAX:
            raise failure.of("RANGE", f"at most {READ_STREAM_BYTES_MAX} bytes in one stream")
        check_range(self._find(holder_key, lease_id, epoch, share, "read"), offset, length)

    def in_flight(self, slot: int) -> int:
        return self._gate.in_flight(slot)

    def wait_quiet(self, slot: int) -> int:
        """Wait, but not for long, until nothing is in flight; how many operations still are."""
        return self._wait_quiet(lambda: self._gate.in_flight(slot))

    def wait_shares_quiet(self, shares: Sequence[Entry]) -> int:
        """The same for operations under any of these shares."""
        return self._wait_quiet(lambda: sum(each.in_flight for each in shares))

    def _wait_quiet(self, in_flight: Callable[[], int]) -> int:
        with self._count:
            self.waiting += 1  # before the first look: whoever leaves after it says so
            try:
                self._count.wait_for(lambda: in_flight() == 0, QUIET_S)
            finally:
                self.waiting -= 1
            return in_flight()

    def find(self, holder_key: str, lease_id: str, epoch: int, share: str = "") -> OpenLease:
        """The open lease, if it is this holder's and this its epoch; or one that he was given."""
        if not 1 <= epoch <= EPOCH_MAX:
            raise failure.of("EPOCH_RANGE")
        if share:
            if self._shares is None:
                raise failure.of("NOT_FOUND")
            return self._shares.find(lease_id, epoch, share, holder_key)
        lease = self.table.find(lease_id, holder_key)
        if epoch != lease.epoch:
            raise failure.of("EPOCH_STALE", lease_id=lease_id, epoch=lease.epoch)
        return lease

    def _find(
        self, holder_key: str, lease_id: str, epoch: int, share: str, operation: str
    ) -> OpenLease:
        lease = self.find(holder_key, lease_id, epoch, share)
        check_right(lease, operation)
        return lease

    def watch(self, lease: OpenLease) -> Watch | ShareWatch:
        watch = self._gate.watch(lease.slot, bytes.fromhex(lease.lease_id), lease.epoch)
        return watch if lease.share is None else ShareWatch(self, lease.share, watch)

    def check_open(self, lease: OpenLease) -> int:
        """The milliseconds that it has left; refuses with the cause of its end."""
        now_ns = self.boottime_ns()
        verdict = self._gate.verdict(lease.slot, bytes.fromhex(lease.lease_id), lease.epoch, now_ns)
        if verdict is Verdict.OPEN:
            deadline_ms = lease.deadline_ms
            if lease.share is not None:
                end = lease.share.end(now_ns)
                if end is not None:
                    raise end
                deadline_ms = min(deadline_ms, lease.share.deadline_ns // NS_PER_MS)
            return max(0, deadline_ms - now_ns // NS_PER_MS)
        if verdict is Verdict.EXPIRED:
            raise failure.of("LEASE_EXPIRED", lease_id=lease.lease_id, epoch=lease.epoch)
        raise self.table.cause_of_end(lease)

    def _moved(self, lease: OpenLease, move: Callable[[], bytes | None]) -> bytes:
        try:
            return move() or b""
        except (OSError, FabricError) as error:
            raise self.failed(lease, error) from None

    def failed(self, lease: OpenLease, error: OSError | FabricError) -> FabricError:
        """Why bytes could not be moved: that the lease ended under it, and not how it failed."""
        self.check_open(lease)
        if isinstance(error, OSError):
            return self._refusal(error, lease)
        if error.code == "IO":
            self._device_failed(lease.lease_id, error.detail)
        return error

    def _refusal(self, error: OSError, lease: OpenLease) -> FabricError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return failure.of("DISK", lease_id=lease.lease_id)
        self._device_failed(lease.lease_id, errno.errorcode.get(error.errno or 0, "unknown"))
        return failure.of("IO", lease_id=lease.lease_id, epoch=lease.epoch)

    def enter(self, lease: OpenLease) -> None:
        """Something is in flight now; then look at the gate, and `leave` in any case."""
        self._gate.enter(lease.slot)
        if lease.share is not None:
            self.count_share(lease.share, 1)

    def leave(self, lease: OpenLease) -> None:
        if lease.share is not None:
            self.count_share(lease.share, -1)
        self._gate.leave(lease.slot)
        if self.waiting:
            self.tell_waiting()

    def count_share(self, share: Entry, by: int) -> None:
        """Operations in flight under it, more or fewer."""
        with self._count:
            share.in_flight += by

    def tell_waiting(self) -> None:
        """Something has left."""
        with self._count:
            self._count.notify_all()

    @contextmanager
    def _in_flight(self, lease: OpenLease) -> Generator[None, None, None]:
        self.enter(lease)
        try:
            yield
        finally:
            self.leave(lease)


def check_right(lease: OpenLease, operation: str) -> None:
    """Whether the lease's token allows it."""
    if operation not in lease.ops:
        raise failure.of("SCOPE", lease_id=lease.lease_id)


def check_range(lease: OpenLease, offset: int, length: int) -> None:
    """Both numbers come as u64 from the wire, so their sum cannot wrap here."""
    if offset % lease.granule_bytes or length % lease.granule_bytes:
        raise failure.of("EXTENT", f"offset and length: multiples of {lease.granule_bytes}")
    if offset + length > lease.size_bytes:
        raise failure.of("EXTENT", f"the lease ends at {lease.size_bytes}")


def check_payload(data: bytes, *, length: int, checksum: int | None) -> None:
    """What was announced must be what came."""
    if length != len(data):
        raise failure.of("LENGTH", f"{length} announced, {len(data)} came")
    if checksum is not None and checksum != zlib.crc32(data):
        raise failure.of("CHECKSUM")


def read_from(storage: Storage, offset: int, length: int) -> bytes:
    data = storage.read(offset, length)
    fault("front.read")
    return data


def write_to(storage: Storage, offset: int, data: bytes | memoryview, *, flush: bool) -> None:
    storage.write(offset, data)
    fault("front.write")
    if flush:
        storage.flush()
