"""Leased memory: bytes that are yours until the lease ends, and nobody's before that.

    with MemBuilder().min_bytes(4096).acquire() as lease:
        lease.mem().write(0, b"hello fabric")

On the node's own machine the lease's memory is a file without a name, of which this process has a
descriptor: reading is one system call. The node's fence is the kernel's: it cuts the file to
nothing, and from then on every read is short and every write refused. Elsewhere the same operations
go to the node over the wire.

Rules. Before the first byte the holder's own stop is looked at; after the last one the size of the
file and the stop again, and only then are bytes given out or a write called done. An operation
keeps the descriptor alive while it runs, so that a release beside it never closes it under it, and
its number is never another file's.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Final, NoReturn, TypeVar

from grafos._builder import Builder
from grafos._clock import boot_ns
from grafos._lease import Lease
from grafos_core import failure
from grafos_core.failure import Degraded, FabricError
from grafos_proto.wire import word
from grafos_proto.wire.dataframes import MANY_BYTES_MAX, PARTS_MAX

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

    from grafos._dataport import DataPort
    from grafos._share import SharedLease
    from grafos._view import FabricView

_pread, _pwrite, _lseek = os.pread, os.pwrite, os.lseek
_END: Final = os.SEEK_END
_views_lock = threading.Lock()
_P = TypeVar("_P")


class Memory:
    """The descriptor of a lease's memory; closed when the last operation has let go of it."""

    __slots__ = ("fd", "size", "words")

    def __init__(self, fd: int, size: int) -> None:
        self.fd, self.size = fd, size
        self.words = threading.Lock()
        """The kernel's lock on a word tells processes apart, not our threads."""

    def __del__(self) -> None:
        os.close(self.fd)


class MemLease(Lease):
    """A lease on memory."""

    __slots__ = ("_memory", "_views")
    kind: ClassVar[str] = "mem"
    _memory: Memory | None
    _views: weakref.WeakSet[FabricView]

    def mem(self) -> FabricMem:
        """The handle to the bytes."""
        return FabricMem(self)

    def _take_memory(self, fd: int | None) -> None:
        self._memory = None if fd is None else Memory(fd, self._size_bytes)
        self._views = weakref.WeakSet()

    def _is_cut(self) -> bool:
        memory = self._memory
        return memory is not None and _lseek(memory.fd, 0, _END) != memory.size

    def _let_go(self) -> None:
        self._memory = None
        with _views_lock:
            views = list(self._views)
        for view in views:
            view._guard.put_zeros(view)


class FabricMem:
    """Bytes 0 to `arena_size` of a lease. Thread-safe; two writes to one place may mix."""

    __slots__ = ("_lease",)

    def __init__(self, lease: MemLease | SharedLease) -> None:
        self._lease = lease

    @property
    def arena_size(self) -> int:
        """In bytes; at least what was asked for."""
        return self._lease._size_bytes

    @property
    def path(self) -> str:
        """How the bytes travel: `shared` within one machine, else `port` or `rpc`."""
        if self._lease._memory is not None:
            return "shared"
        return "rpc" if self._lease._grip.node.port is None else "port"

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on.

        Raises:
            LeaseExpired, Revoked, Fenced: the lease is over; no byte of it is given out.
            Incompatible: code EXTENT; not all of it lies within the lease.
        """
        lease = self._lease
        if boot_ns() >= lease._check_ns:
            lease._look()
        memory = lease._memory
        if memory is None:
            return self._read_far(offset, length)
        size = memory.size
        if offset < 0 or length < 0 or offset + length > size:
            raise self._outside(offset, length)
        data = _pread(memory.fd, length, offset)
        if (
            len(data) != length
            or _lseek(memory.fd, 0, _END) != size
            or boot_ns() >= lease._until_ns
        ):
            raise lease._verdict()
        return data

    def readinto(self, offset: int, buffer: WriteableBuffer) -> int:
        """Fill `buffer` from `offset` on; how many bytes that were.

        If the lease ends meanwhile, the buffer is filled with zeros before the failure is raised.
        """
        view = memoryview(buffer).cast("B")
        lease = self._lease
        if boot_ns() >= lease._check_ns:
            lease._look()
        memory = lease._memory
        if memory is None:
            self._fill_far(offset, view)
            return len(view)
        if offset < 0 or offset + len(view) > memory.size:
            raise self._outside(offset, len(view))
        count = os.preadv(memory.fd, [view], offset)
        if (
            count != len(view)
            or _lseek(memory.fd, 0, _END) != memory.size
            or boot_ns() >= lease._until_ns
        ):
            view[:] = bytes(len(view))
            raise lease._verdict()
        return count

    def write(self, offset: int, data: ReadableBuffer) -> None:
        """Write all of `data` from `offset` on.

        Raises:
            LeaseExpired, Revoked, Fenced: the lease is over; how much was written does not matter
                any more, since nobody will read it.
            Incompatible: code EXTENT; not all of it lies within the lease.
        """
        view = data if type(data) is bytes else memoryview(data).cast("B")
        lease = self._lease
        if boot_ns() >= lease._check_ns:
            lease._look()
        memory = lease._memory
        if memory is None:
            self._write_far(offset, view)
            return
        length = len(view)
        if offset < 0 or offset + length > memory.size:
            raise self._outside(offset, length)
        try:
            written = _pwrite(memory.fd, view, offset)
        except OSError:  # EPERM: the file was cut and must not grow
            raise lease._verdict() from None
        if (
            written != length
            or _lseek(memory.fd, 0, _END) != memory.size
            or boot_ns() >= lease._until_ns
        ):
            raise lease._verdict()

    def compare_and_swap(self, offset: int, expected: int, new: int) -> int:
        """Write `new` at `offset` if `expected` stands there; what stood there before.

        For words of 8 bytes, little-endian and unsigned, at multiples of 8. All holders of the
        memory have one arbiter, whichever way they come; a plain write to the same word has none.

        Raises:
            Degraded: code CONTENDED; another one is stopped in the middle of it.
            Disconnected: the answer was lost; whether the word was changed is not known.
            Incompatible: code OPTION; the node can only be reached by calls.
        """
        _check_word(expected)
        _check_word(new)
        memory = self._at_word(offset)
        if memory is not None:
            return self._changed(memory, lambda: word.swap(memory.fd, offset, expected, new))
        lease = self._lease
        return self._changed_far(
            lambda port: port.swap(
                lease._target, lease.epoch, offset=offset, expected=expected, new=new,
                timeout_ms=lease._operation_ms(),
            )
        )  # fmt: skip

    def fetch_add(self, offset: int, n: int) -> int:
        """Add `n`, modulo 2^64, to the word at `offset`; what stood there before.

        See `compare_and_swap`.
        """
        amount = n & word.MASK
        memory = self._at_word(offset)
        if memory is not None:
            return self._changed(memory, lambda: word.add(memory.fd, offset, amount))
        lease = self._lease
        return self._changed_far(
            lambda port: port.add(
                lease._target, lease.epoch, offset=offset, n=amount,
                timeout_ms=lease._operation_ms(),
            )
        )  # fmt: skip

    def read_many(self, parts: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each (offset, length); over the wire, many at a time."""
        if self._lease._memory is not None or self._lease._grip.node.port is None:
            return [self.read(*part) for part in parts]
        found: list[bytes] = []
        for some in _batches(parts, lambda part: part[1]):
            found += self._many_far(some) if len(some) > 1 else [self.read(*some[0])]
        return found

    def write_many(self, parts: Sequence[tuple[int, ReadableBuffer]]) -> None:
        """Write each (offset, data), in this order; over the wire, many at a time."""
        plain = [(offset, memoryview(data).cast("B")) for offset, data in parts]
        port = self._lease._grip.node.port
        if self._lease._memory is not None or port is None:
            for offset, data in plain:
                self.write(offset, data)
            return
        for some in _batches(plain, lambda part: len(part[1])):
            if len(some) > 1:
                self._write_many_far(some)
            else:
                self.write(*some[0])

    def map(self, offset: int = 0, length: int | None = None) -> FabricView:
        """The bytes themselves, mapped into this process: `length` of them, or all, from `offset`.

        For a `with` block, at the end of which is said whether the lease covered all of it.

        Raises:
            Incompatible: code EXTENT, not all of it lies within the lease; code OPTION, the memory
                is on another machine, or this one is not x86-64 Linux.
            LeaseExpired, Revoked, Fenced: the lease is over.
        """
        from grafos._view import FabricView  # what few need

        lease = self._lease
        lease._look()
        size = lease._size_bytes
        wanted = size - offset if length is None else length
        if offset < 0 or wanted <= 0 or offset + wanted > size:
            raise self._outside(offset, wanted)
        memory = lease._memory
        if memory is None or not isinstance(lease, MemLease):
            why = "map: the memory is on another machine, or shared: read and write"
            raise failure.of("OPTION", why)
        view = FabricView(lease, memory, offset, wanted)
        with _views_lock:
            lease._views.add(view)
        if lease._memory is None:  # it ended while we were at it
            view.close()
            raise lease._verdict()
        return view

    def __reduce__(self) -> NoReturn:
        self._lease.__reduce__()

    def _read_far(self, offset: int, length: int) -> bytes:
        lease = self._lease
        if offset < 0 or length < 0 or offset + length > lease._size_bytes:
            raise self._outside(offset, length)
        try:
            data = lease._grip.node.read(
                lease._target, lease.epoch, offset=offset, length=length,
                timeout_ms=lease._operation_ms(),
            )  # fmt: skip
        except FabricError as refused:
            raise lease._failed_operation(refused) from None
        if boot_ns() >= lease._until_ns:
            raise lease._verdict()
        return data

    def _at_word(self, offset: int) -> Memory | None:
        """The descriptor for a change of this word; None: it goes to the node."""
        lease = self._lease
        if boot_ns() >= lease._check_ns:
            lease._look()
        if offset < 0 or offset % word.BYTES or offset + word.BYTES > lease._size_bytes:
            raise self._outside(offset, word.BYTES)
        return lease._memory

    def _changed(self, memory: Memory, change: Callable[[], int]) -> int:
        lease = self._lease
        try:
            with memory.words:
                before = change()
        except Degraded as contended:
            raise lease._failed_operation(contended) from None
        except (FabricError, OSError):  # the file was cut
            raise lease._verdict() from None
        if _lseek(memory.fd, 0, _END) != memory.size or boot_ns() >= lease._until_ns:
            raise lease._verdict()
        return before

    def _changed_far(self, change: Callable[[DataPort], int]) -> int:
        from grafos._dataport import PortDown  # loaded by now: the lease is bound

        lease = self._lease
        try:
            before = change(lease._grip.node.need_port())
        except PortDown as down:
            lost = failure.of("UNREACHABLE", str(down))
            raise lease._failed_operation(lost) from None
        except FabricError as refused:
            raise lease._failed_operation(refused) from None
        if boot_ns() >= lease._until_ns:
            raise lease._verdict()
        return before

    def _many_far(self, parts: list[tuple[int, int]]) -> list[bytes]:
        from grafos._dataport import PortDown  # loaded by now: the lease is bound

        lease = self._lease
        if boot_ns() >= lease._check_ns:
            lease._look()
        for offset, length in parts:
            if offset < 0 or length < 0 or offset + length > lease._size_bytes:
                raise self._outside(offset, length)
        try:
            found = lease._grip.node.need_port().read_many(
                lease._target, lease.epoch, parts, timeout_ms=lease._operation_ms()
            )
        except PortDown:
            return [self.read(*part) for part in parts]
        except FabricError as refused:
            raise lease._failed_operation(refused) from None
        if boot_ns() >= lease._until_ns:
            raise lease._verdict()
        return found

    def _write_many_far(self, parts: list[tuple[int, memoryview]]) -> None:
        from grafos._dataport import PortDown  # loaded by now: the lease is bound

        lease = self._lease
        if boot_ns() >= lease._check_ns:
            lease._look()
        for offset, data in parts:
            if offset < 0 or offset + len(data) > lease._size_bytes:
                raise self._outside(offset, len(data))
        try:
            lease._grip.node.need_port().write_many(
                lease._target, lease.epoch, parts, timeout_ms=lease._operation_ms()
            )
        except PortDown:
            for each in parts:
                self.write(*each)
            return
        except FabricError as refused:
            raise lease._failed_operation(refused) from None
        if boot_ns() >= lease._until_ns:
            raise lease._verdict()

    def _fill_far(self, offset: int, view: memoryview) -> None:
        lease = self._lease
        if offset < 0 or offset + len(view) > lease._size_bytes:
            raise self._outside(offset, len(view))
        try:
            lease._grip.node.read_into(
                lease._target, lease.epoch, offset=offset, view=view,
                timeout_ms=lease._operation_ms(),
            )  # fmt: skip
        except FabricError as refused:
            view[:] = bytes(len(view))
            raise lease._failed_operation(refused) from None
        except BaseException:
            view[:] = bytes(len(view))
            raise
        if boot_ns() >= lease._until_ns:
            view[:] = bytes(len(view))
            raise lease._verdict()

    def _write_far(self, offset: int, data: bytes | memoryview) -> None:
        lease = self._lease
        if offset < 0 or offset + len(data) > lease._size_bytes:
            raise self._outside(offset, len(data))
        try:
            lease._grip.node.write(
                lease._target, lease.epoch, offset=offset, data=data,
                timeout_ms=lease._operation_ms(),
            )  # fmt: skip
        except FabricError as refused:
            raise lease._failed_operation(refused) from None
        if boot_ns() >= lease._until_ns:
            raise lease._verdict()

    def _outside(self, offset: int, length: int) -> FabricError:
        return failure.of(
            "EXTENT",
            f"bytes {offset} to {offset + length} of {self.arena_size}",
            lease_id=self._lease.lease_id,
            epoch=self._lease.epoch,
        )


def _check_word(value: int) -> None:
    if not 0 <= value <= word.MASK:
        raise failure.of("RANGE", "a word is from 0 to 2^64 - 1")


def _batches(parts: Sequence[_P], size: Callable[[_P], int]) -> Iterator[list[_P]]:
    """In their order, as many at a time as go into one frame."""
    some: list[_P] = []
    room = MANY_BYTES_MAX
    for part in parts:
        room -= size(part)
        if some and (room < 0 or len(some) == PARTS_MAX):
            yield some
            some, room = [], MANY_BYTES_MAX - size(part)
        some.append(part)
    if some:
        yield some


class MemBuilder(Builder[MemLease]):
    """Asks for memory: `MemBuilder().min_bytes(4096).acquire()`."""

    __slots__ = ()
    kind = "mem"
    lease_class = MemLease
    amount_option = "min_bytes"

    def min_bytes(self, count: int) -> MemBuilder:
        """At least this many bytes; rounded up to whole pages."""
        return self._with_amount(count)
