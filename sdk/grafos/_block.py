"""Leased blocks: numbered pieces of 4096 bytes on a node's disk, unreadable once the lease ends.

    with BlockBuilder().min_blocks(1024).acquire() as lease:
        lease.block().write_block(0, sector)

Each lease's blocks are encrypted by the node under a key of their own, which goes with the lease;
a block that was never written reads as zeros. All operations go to the node, which checks the
lease before and after each of them, and each block's integrity when it is read.

Rules. Data is whole blocks. A write is on stable storage after `flush()`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final, NoReturn

from grafos._builder import Builder
from grafos._clock import boot_ns
from grafos._lease import Lease
from grafos_core import failure
from grafos_core.failure import FabricError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from grafos._share import SharedLease

BLOCK_BYTES: Final = 4096


class BlockLease(Lease):
    """A lease on blocks."""

    __slots__ = ()
    kind: ClassVar[str] = "block"

    def block(self) -> FabricBlock:
        """The handle to the blocks."""
        return FabricBlock(self)

    def _take_memory(self, fd: int | None) -> None:
        failure.invariant(fd is None, "blocks have no descriptor")


class FabricBlock:
    """Blocks 0 to `num_blocks` of a lease. Thread-safe."""

    __slots__ = ("_lease",)
    block_size = BLOCK_BYTES

    def __init__(self, lease: BlockLease | SharedLease) -> None:
        self._lease = lease

    @property
    def num_blocks(self) -> int:
        """At least what was asked for."""
        return self._lease._size_bytes // BLOCK_BYTES

    def read_block(self, index: int) -> bytes:
        """The 4096 bytes of one block."""
        return self.read_blocks(index, 1)

    def write_block(self, index: int, data: ReadableBuffer) -> None:
        """Write one block: exactly 4096 bytes."""
        view = memoryview(data).cast("B")
        if len(view) != BLOCK_BYTES:
            raise self._refusal("LENGTH", f"a block has {BLOCK_BYTES} bytes, not {len(view)}")
        self.write_blocks(index, view)

    def read_blocks(self, index: int, count: int) -> bytes:
        """`count` blocks from `index` on.

        Raises:
            LeaseExpired, Revoked, Fenced: the lease is over; no byte of it is given out. Fenced
                with code TORN or IO: a block is not what was last written, or the disk failed.
            Incompatible: code EXTENT; not all of it lies within the lease.
        """
        lease = self._lease
        lease._look()
        self._check_range(index, count)
        try:
            data = lease._grip.node.read(
                lease._target, lease.epoch, offset=index * BLOCK_BYTES,
                length=count * BLOCK_BYTES, timeout_ms=lease._operation_ms(),
            )  # fmt: skip
        except FabricError as refused:
            raise lease._failed_operation(refused) from None
        if boot_ns() >= lease._until_ns:
            raise lease._verdict()
        return data

    def write_blocks(self, index: int, data: ReadableBuffer) -> None:
        """Write whole blocks from `index` on."""
        view = memoryview(data).cast("B")
        if len(view) % BLOCK_BYTES:
            raise self._refusal("LENGTH", f"whole blocks of {BLOCK_BYTES} bytes, not {len(view)}")
        self._write(index, view, flush=False)

    def flush(self) -> None:
        """Returns when everything written so far is on stable storage."""
        self._write(0, memoryview(b""), flush=True)

    def __reduce__(self) -> NoReturn:
        self._lease.__reduce__()

    def _write(self, index: int, data: memoryview, *, flush: bool) -> None:
        lease = self._lease
        lease._look()
        self._check_range(index, len(data) // BLOCK_BYTES)
        try:
            lease._grip.node.write(
                lease._target, lease.epoch, offset=index * BLOCK_BYTES, data=data,
                timeout_ms=lease._operation_ms(), flush=flush,
            )  # fmt: skip
        except FabricError as refused:
            raise lease._failed_operation(refused) from None
        if boot_ns() >= lease._until_ns:
            raise lease._verdict()

    def _check_range(self, index: int, count: int) -> None:
        if index < 0 or count < 0 or index + count > self.num_blocks:
            raise self._refusal("EXTENT", f"blocks {index} to {index + count} of {self.num_blocks}")

    def _refusal(self, code: str, detail: str) -> FabricError:
        lease = self._lease
        return failure.of(code, detail, lease_id=lease.lease_id, epoch=lease.epoch)


class BlockBuilder(Builder[BlockLease]):
    """Asks for blocks: `BlockBuilder().min_blocks(1024).acquire()`."""

    __slots__ = ()
    kind = "block"
    lease_class = BlockLease
    amount_option = "min_blocks"

    def min_blocks(self, count: int) -> BlockBuilder:
        """At least this many blocks of 4096 bytes."""
        return self._with_amount(count)
