"""Which leases' memory was ever handed out as a descriptor: the guest list that survives us.

When an agent and its warden die together, the next agent must know which memory may still be in
somebody's hands. Only what left the agent can be; the rest died with the agent's own processes.

    header   magic, the machine's boot id        slot   a lease id, since when; or zeros

Beside each lease stands when the oldest process that was given its descriptor had begun (field 22
of /proc/<pid>/stat). Whoever has the memory is such a process or was born of one, so nobody older
can have it, unless a holder passed it on: of that a receipt says no more than `detached` anyway.

Rules. A lease is written down before its descriptor leaves. That costs one pwrite and no sync: the
list must outlive processes, which the page cache does, and need not outlive the machine, for what
is handed out does not. So a list of an earlier boot of the machine is void, and rightly empty.
Where there is no list, or no whole one, everything that may have been handed out counts as such.
All room is taken beforehand: a full disk keeps nobody from his memory.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection
from heapq import heapify, heappop, heappush
from pathlib import Path
from typing import Final

from grafos_core import failure
from grafos_core.failure import invariant
from grafos_core.gate import SLICES_MAX

BOOT_ID_PATH: Final = Path("/proc/sys/kernel/random/boot_id")
MAGIC: Final = b"grafos-exports-v2\0"
HEADER_BYTES: Final = 64
_SLOT: Final = struct.Struct("<16sQ")
SLOT_BYTES: Final = _SLOT.size
FREE: Final = bytes(SLOT_BYTES)
FILE_BYTES: Final = HEADER_BYTES + SLICES_MAX * SLOT_BYTES
ANY_AGE: Final = 0
"""In the place of a process's beginning: not known, so it may have been any."""


class Exports:
    """The list of this state folder. Not thread-safe."""

    def __init__(self, path: Path, suspects: Collection[str], boot_id: str | None = None) -> None:
        """`suspects`: leases of earlier agents that may have been handed out, and are not over."""
        if boot_id is None:
            boot_id = BOOT_ID_PATH.read_text().strip()
        header = (MAGIC + boot_id.encode()).ljust(HEADER_BYTES, b"\0")
        invariant(len(header) == HEADER_BYTES, "a boot id is a short text")
        listed = _read(path, header)
        kept = {each: ANY_AGE if listed is None else listed[each] for each in sorted(suspects)
                if listed is None or each in listed}  # fmt: skip
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.posix_fallocate(self._fd, 0, FILE_BYTES)
        self._slots = {lease_id: slot for slot, lease_id in enumerate(kept)}
        self._since = kept
        self._free = list(range(len(kept), SLICES_MAX))
        heapify(self._free)
        self._begin(header)

    def __contains__(self, lease_id: str) -> bool:
        """Whether its descriptor may have left the agent."""
        return lease_id in self._slots

    def since(self, lease_id: str) -> int | None:
        """When the oldest process that was given it had begun, in ticks; None: it never left."""
        return self._since.get(lease_id)

    def add(self, lease_id: str, since_ticks: int = ANY_AGE) -> None:
        """From now on it counts as handed out, to a process that began then. Idempotent."""
        before = self._since.get(lease_id)
        if before is not None and before <= since_ticks:
            return
        slot = self._slots.get(lease_id, -1)
        if slot < 0:
            invariant(bool(self._free), "no more is handed out than is lent")
            slot = heappop(self._free)
        self._write(slot, _SLOT.pack(bytes.fromhex(lease_id), since_ticks))
        self._slots[lease_id], self._since[lease_id] = slot, since_ticks

    def remove(self, lease_id: str) -> None:
        """Its memory is proved back."""
        slot = self._slots.pop(lease_id, None)
        if slot is not None:
            del self._since[lease_id]
            self._write(slot, FREE)
            heappush(self._free, slot)

    def close(self) -> None:
        os.close(self._fd)

    def _begin(self, header: bytes) -> None:
        """The header goes last: before it the list is not whole, and nobody believes it."""
        known = (_SLOT.pack(bytes.fromhex(each), since) for each, since in self._since.items())
        slots = b"".join(known).ljust(FILE_BYTES - HEADER_BYTES, b"\0")
        self._put(bytes(HEADER_BYTES), 0)
        self._put(slots, HEADER_BYTES)
        self._put(header, 0)
        os.fdatasync(self._fd)  # else a crash of the machine leaves one that nobody believes

    def _write(self, slot: int, data: bytes) -> None:
        self._put(data, HEADER_BYTES + slot * SLOT_BYTES)

    def _put(self, data: bytes, offset: int) -> None:
        try:
            written = os.pwrite(self._fd, data, offset)
        except OSError as error:
            raise failure.of("STORAGE", f"the list of exports: {error.strerror}") from error
        if written != len(data):
            raise failure.of("STORAGE", "the list of exports: a short write")


def _read(path: Path, header: bytes) -> dict[str, int] | None:
    """The leases on a list of this boot of the machine; None where there is no list to believe."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    if len(data) != FILE_BYTES or not data.startswith(MAGIC):
        return None
    if data[:HEADER_BYTES] != header:
        return {}  # the machine was started anew: nothing of what was handed out is left
    slots = _SLOT.iter_unpack(data[HEADER_BYTES:])
    return {lease_id.hex(): since for lease_id, since in slots if any(lease_id)}
