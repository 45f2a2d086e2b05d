"""What a virtual node leases: memory that is a file of the kernel's, and blocks in a table.

Memory is made as the agent makes it: a file without a name that cannot grow, and that the end of a
lease cuts to nothing, so that whoever still has it reads nothing. Blocks that were never written
are zeros. Both say, when they are measured, what is there and not what should be.
"""

from __future__ import annotations

import fcntl
import os
from typing import Any, Final

from grafos_core import failure
from grafos_core.lease import Kind

BLOCK_BYTES: Final = 4096
_SEALS: Final = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class MemorySlice:
    """Bytes of one lease."""

    kind: Final = Kind.MEM

    def __init__(self, amount: int) -> None:
        self.size_bytes = amount
        self._fd = os.memfd_create("grafos-testing", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, amount)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError as error:
            os.close(self._fd)
            raise failure.of("NO_CAPACITY", f"memory: {error.strerror}") from None

    def descriptor(self) -> int:
        """Another descriptor of the same bytes, for the holder to keep."""
        return os.open(f"/proc/self/fd/{self._fd}", os.O_RDWR | os.O_CLOEXEC)

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._fd, length, offset)

    def write(self, offset: int, data: bytes) -> None:
        os.pwrite(self._fd, data, offset)

    def erase(self) -> None:
        os.ftruncate(self._fd, 0)

    def measure(self) -> dict[str, Any]:
        return {"size_bytes": os.fstat(self._fd).st_size}

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class BlockSlice:
    """Blocks of one lease."""

    kind: Final = Kind.BLOCK

    def __init__(self, amount: int) -> None:
        self.size_bytes = amount * BLOCK_BYTES
        self._blocks: dict[int, bytes] = {}

    def read(self, offset: int, length: int) -> bytes:
        first, count = offset // BLOCK_BYTES, length // BLOCK_BYTES
        zeros = bytes(BLOCK_BYTES)
        return b"".join(self._blocks.get(first + each, zeros) for each in range(count))

    def write(self, offset: int, data: bytes) -> None:
        for start in range(0, len(data), BLOCK_BYTES):
            self._blocks[(offset + start) // BLOCK_BYTES] = data[start : start + BLOCK_BYTES]

    def erase(self) -> None:
        self._blocks.clear()

    def measure(self) -> dict[str, Any]:
        return {"blocks_written": len(self._blocks)}

    def close(self) -> None:
        self._blocks.clear()


Slice = MemorySlice | BlockSlice


def make(kind: Kind, amount: int) -> Slice:
    if kind is Kind.MEM:
        return MemorySlice(amount)
    failure.invariant(kind is Kind.BLOCK, f"a virtual node has no {kind}")
    return BlockSlice(amount)
