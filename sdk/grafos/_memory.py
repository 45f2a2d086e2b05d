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
from typing import TYPE_CHECKING, Any, ClassVar, Final, NoReturn

from grafos._builder import Builder
from grafos._clock import boot_ns
from grafos._lease import Lease, not_there_yet
from grafos_core import failure
from grafos_core.failure import FabricError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

_pread, _pwrite, _lseek = os.pread, os.pwrite, os.lseek
_END: Final = os.SEEK_END


class Memory:
    """The descriptor of a lease's memory; closed when the last operation has let go of it."""

    __slots__ = ("fd", "size")

    def __init__(self, fd: int, size: int) -> None:
        self.fd, self.size = fd, size

    def __del__(self) -> None:
        os.close(self.fd)


class MemLease(Lease):
    """A lease on memory."""

    __slots__ = ("_memory",)
    kind: ClassVar[str] = "mem"
    _memory: Memory | None

    def mem(self) -> FabricMem:
        """The handle to the bytes."""
        return FabricMem(self)

    def _take_memory(self, fd: int | None) -> None:
        self._memory = None if fd is None else Memory(fd, self._size_bytes)

    def _is_cut(self) -> bool:
        memory = self._memory
        return memory is not None and _lseek(memory.fd, 0, _END) != memory.size

    def _let_go(self) -> None:
        self._memory = None


class FabricMem:
    """Bytes 0 to `arena_size` of a lease. Thread-safe; two writes to one place may mix."""

    __slots__ = ("_lease",)

    def __init__(self, lease: MemLease) -> None:
        self._lease = lease

    @property
    def arena_size(self) -> int:
        """In bytes; at least what was asked for."""
        return self._lease._size_bytes

    @property
    def path(self) -> str:
        """How the bytes travel: `shared` within one machine, else `rpc`."""
        return "rpc" if self._lease._memory is None else "shared"

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
            view[:] = self._read_far(offset, len(view))
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

    def compare_and_swap(self, *_: Any, **__: Any) -> NoReturn:
        """Not there yet."""
        raise not_there_yet("compare_and_swap")

    def fetch_add(self, *_: Any, **__: Any) -> NoReturn:
        """Not there yet."""
        raise not_there_yet("fetch_add")

    def map(self, *_: Any, **__: Any) -> NoReturn:
        """Not there yet."""
        raise not_there_yet("map")

    def __reduce__(self) -> NoReturn:
        self._lease.__reduce__()

    def _read_far(self, offset: int, length: int) -> bytes:
        lease = self._lease
        lease._look()
        if offset < 0 or length < 0 or offset + length > lease._size_bytes:
            raise self._outside(offset, length)
        try:
            data = lease._grip.node.read(
                lease.lease_id, lease.epoch, offset=offset, length=length,
                timeout_ms=lease._operation_ms(),
            )  # fmt: skip
        except FabricError as refused:
            raise lease._failed_operation(refused) from None
        if boot_ns() >= lease._until_ns:
            raise lease._verdict()
        return data

    def _write_far(self, offset: int, data: bytes | memoryview) -> None:
        lease = self._lease
        lease._look()
        if offset < 0 or offset + len(data) > lease._size_bytes:
            raise self._outside(offset, len(data))
        try:
            lease._grip.node.write(
                lease.lease_id, lease.epoch, offset=offset, data=data,
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


class MemBuilder(Builder[MemLease]):
    """Asks for memory: `MemBuilder().min_bytes(4096).acquire()`."""

    __slots__ = ()
    kind = "mem"
    lease_class = MemLease
    amount_option = "min_bytes"

    def min_bytes(self, count: int) -> MemBuilder:
        """At least this many bytes; rounded up to whole pages."""
        return self._with_amount(count)
