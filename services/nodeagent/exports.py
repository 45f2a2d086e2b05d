"""Which leases' memory was ever handed out as a descriptor: the guest list that survives us.

When an agent and its warden die together, the next agent must know which memory may still be in
somebody's hands. Only what left the agent can be; the rest died with the agent's own processes.

    header   magic, the machine's boot id              slot   16 bytes: a lease id, or zeros

Rules. A lease is written down before its descriptor leaves. That costs one pwrite and no sync: the
list must outlive processes, which the page cache does, and need not outlive the machine, for what
is handed out does not. So a list of an earlier boot of the machine is void, and rightly empty.
Where there is no list, or no whole one, everything that may have been handed out counts as such.
All room is taken beforehand: a full disk keeps nobody from his memory.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from heapq import heapify, heappop, heappush
from pathlib import Path
from typing import Final

from grafos_core import failure
from grafos_core.failure import invariant
from grafos_core.gate import SLICES_MAX

BOOT_ID_PATH: Final = Path("/proc/sys/kernel/random/boot_id")
MAGIC: Final = b"grafos-exports-v1\0"
HEADER_BYTES: Final = 64
ID_BYTES: Final = 16
FREE: Final = bytes(ID_BYTES)
FILE_BYTES: Final = HEADER_BYTES + SLICES_MAX * ID_BYTES


class Exports:
    """The list of this state folder. Not thread-safe."""

    def __init__(self, path: Path, suspects: Collection[str], boot_id: str | None = None) -> None:
        """`suspects`: leases of earlier agents that may have been handed out, and are not over."""
        if boot_id is None:
            boot_id = BOOT_ID_PATH.read_text().strip()
        header = (MAGIC + boot_id.encode()).ljust(HEADER_BYTES, b"\0")
        invariant(len(header) == HEADER_BYTES, "a boot id is a short text")
        listed = _read(path, header)
        kept = set(suspects) if listed is None else listed & set(suspects)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.posix_fallocate(self._fd, 0, FILE_BYTES)
        self._slots = {lease_id: slot for slot, lease_id in enumerate(sorted(kept))}
        self._free = list(range(len(kept), SLICES_MAX))
        heapify(self._free)
        self._begin(header)

    def __contains__(self, lease_id: str) -> bool:
        """Whether its descriptor may have left the agent."""
        return lease_id in self._slots

    def add(self, lease_id: str) -> None:
        """From now on it counts as handed out. Idempotent."""
        if lease_id in self._slots:
            return
        invariant(bool(self._free), "no more is handed out than is lent")
        slot = heappop(self._free)
        self._write(slot, bytes.fromhex(lease_id))
        self._slots[lease_id] = slot

    def remove(self, lease_id: str) -> None:
        """Its memory is proved back."""
        slot = self._slots.pop(lease_id, None)
        if slot is not None:
            self._write(slot, FREE)
            heappush(self._free, slot)

    def close(self) -> None:
        os.close(self._fd)

    def _begin(self, header: bytes) -> None:
        """The header goes last: before it the list is not whole, and nobody believes it."""
        ids = [bytes.fromhex(lease_id) for lease_id in self._slots]
        slots = b"".join(ids).ljust(FILE_BYTES - HEADER_BYTES, b"\0")
        self._put(bytes(HEADER_BYTES), 0)
        self._put(slots, HEADER_BYTES)
        self._put(header, 0)
        os.fdatasync(self._fd)  # else a crash of the machine leaves one that nobody believes

    def _write(self, slot: int, data: bytes) -> None:
        self._put(data, HEADER_BYTES + slot * ID_BYTES)

    def _put(self, data: bytes, offset: int) -> None:
        try:
            written = os.pwrite(self._fd, data, offset)
        except OSError as error:
            raise failure.of("STORAGE", f"the list of exports: {error.strerror}") from error
        if written != len(data):
            raise failure.of("STORAGE", "the list of exports: a short write")


def _read(path: Path, header: bytes) -> set[str] | None:
    """The leases on a list of this boot of the machine; None where there is no list to believe."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    if len(data) != FILE_BYTES or not data.startswith(MAGIC):
        return None
    if data[:HEADER_BYTES] != header:
        return set()  # the machine was started anew: nothing of what was handed out is left
    ids = (data[at : at + ID_BYTES] for at in range(HEADER_BYTES, FILE_BYTES, ID_BYTES))
    return {each.hex() for each in ids if each != FREE}
