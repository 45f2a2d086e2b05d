"""Block leases as the front serves them: the one file, opened here too, and a key per open lease.

Rules. The key came over the link from control and lies in this process and in control alone; what
proves the blocks, the table of tags, is a memfd that control keeps too, so that the next front
reads on where this one was killed. Each front claims counters of its own before it encrypts
anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from grafos_core.failure import invariant
from services.nodeagent.datapath import NS_PER_MS
from services.nodeagent.devices.block import BlockDevice
from services.nodeagent.devices.blocklease import (
    BlockIdentity,
    BlockKey,
    BlockLease,
    TagTable,
    wipe,
)
from services.nodeagent.ipc import Message
from services.runtime.clock import SYSTEM

QUIESCE_MS: Final = 250


class BlockStorage:
    """A `Storage` on a block lease."""

    def __init__(self, lease: BlockLease) -> None:
        self._lease = lease

    def read(self, offset: int, length: int) -> bytes:
        return self._lease.read(offset, length)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        self._lease.write(offset, data)

    def flush(self) -> None:
        self._lease.flush()

    def raise_deadline(self, deadline_ms: int) -> None:
        self._lease.raise_deadline(deadline_ms * NS_PER_MS)

    def close(self) -> None:
        self._lease.quiesce(QUIESCE_MS)
        self._lease.close()


class BlockShelf:
    """The file, opened at the first block lease: an agent without blocks has none."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._path, self._size_bytes = path, size_bytes
        self._device: BlockDevice | None = None

    def storage(self, message: Message, fds: list[int]) -> BlockStorage:
        """What control's `open` describes. The one descriptor is the table of tags."""
        invariant(len(fds) == 1, "a block lease comes with its table")
        if self._device is None:
            self._device = BlockDevice(self._path, self._size_bytes)
        tags = TagTable(fds[0], message["extent_blocks"])
        key = bytearray(message["key"])
        made = BlockKey(
            key,
            first_counter=tags.claim_counters(),
            deadline_ns=message["deadline_ms"] * NS_PER_MS,
            boottime_ns=SYSTEM.boot_ns,
        )
        wipe(key)
        return BlockStorage(BlockLease(self._device, tags, _identity(message), made))


def _identity(message: Message) -> BlockIdentity:
    return BlockIdentity(
        message["incarnation"],
        message["lease"],
        message["epoch"],
        message["key_number"],
        message["extent_offset"],
        message["extent_blocks"],
    )
