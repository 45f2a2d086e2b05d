"""Memory, lent as files that live only in RAM, which the kernel itself takes back.

Like a room whose floor belongs to us: whoever is inside when we take the floor away is out, with
every key, copy and window he may have made.

Rules. A lease is a memfd, its pages reserved when it is made, sealed GROW and SEAL but never
SHRINK: so we can cut it to nothing at any time, and nobody can stop that or grow it again. Holders
can cut it too, so it is never mapped here; only pread and pwrite, or a hostile holder would end us
with SIGBUS. Asking for too much inside a memory cgroup is answered with SIGKILL and not with an
error, so the budget is looked at first: our own cap, what the machine has, what each cgroup above
us allows.

Pages that a holder had pinned in the kernel (a pipe, a registered buffer) outlive the cut, and no
number about the file shows it. So only a lease whose descriptor never left this agent is measured
as `freed`; of an exported one the most that can be said is `detached`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from grafos_core import failure
from services.runtime.clock import SYSTEM
from services.runtime.faults import fault

PAGE_BYTES: Final = 4096
NAME_PREFIX: Final = "grafos:"
"""A memfd's name is `grafos:<incarnation>:<lease id>`: what is left behind can be found again."""
HEADROOM_BYTES: Final = 64 << 20
"""Never lent out of what the machine or a cgroup has left: teardown itself needs some memory."""
CHUNK_BYTES: Final = 1 << 20
CANARY_BYTES: Final = 64 * 1024
LOOK_MS: Final = 100
"""How long a look at the machine's free memory counts."""

# Source: include/uapi/linux/fcntl.h; not in Python 3.11's fcntl everywhere.
F_ADD_SEALS, F_GET_SEALS = 1033, 1034
SEAL_SEAL, SEAL_SHRINK, SEAL_GROW = 1, 2, 4

Evidence = dict[str, int | bool | str]


class MemoryDevice:
    """The memory that this agent may lend, and what it has lent of it."""

    def __init__(
        self,
        capacity_bytes: int,
        *,
        proc: Path = Path("/proc"),
        cgroups: Path = Path("/sys/fs/cgroup"),
        headroom_bytes: int = HEADROOM_BYTES,
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self._proc, self._cgroups, self._headroom_bytes = proc, cgroups, headroom_bytes
        self._lock = threading.Lock()
        self._lent: dict[int, int] = {}
        """Bytes by inode number, from the reservation to the erase."""
        self._pending_bytes = 0
        """Promised and not yet counted by the kernel."""
        self._looked_ms, self._looked_room, self._looked_booked = -LOOK_MS, 0, 0

    def create(self, lease_id: str, incarnation: str, size_bytes: int) -> int:
        """A descriptor of `size_bytes` zeroed bytes that are really there."""
        if size_bytes <= 0 or size_bytes % PAGE_BYTES:
            raise failure.of("RANGE", f"memory: a positive multiple of {PAGE_BYTES} bytes")
        self._reserve(size_bytes)
        try:
            fault("memory.create")
            fd = _sealed_memfd(f"{NAME_PREFIX}{incarnation}:{lease_id}", size_bytes)
        except OSError as error:
            self._give_back(size_bytes)
            raise _refusal(error) from None
        with self._lock:
            self._pending_bytes -= size_bytes
            self._lent[os.fstat(fd).st_ino] = size_bytes
        return fd

    def erase(self, fd: int, *, scrub: bool = False) -> None:
        """Take every page back, whoever maps it. Doing it again does nothing.

        With `scrub` the bytes are zeroed first, so that even a page pinned elsewhere reads zeros.
        """
        fault("memory.erase")
        status = os.fstat(fd)
        if scrub:
            _zero(fd, status.st_size)
        os.ftruncate(fd, 0)
        with self._lock:
            self._lent.pop(status.st_ino, None)

    def measure(self, fd: int, *, exported: bool) -> Evidence:
        """What the kernel says of the memory, asked for by its name in /proc and not by the fd."""
        fault("memory.measure")
        return measure(fd, exported=exported)

    def lent_bytes(self) -> int:
        with self._lock:
            return sum(self._lent.values())

    def free_bytes(self) -> int:
        """The largest lease that could be made now."""
        with self._lock:
            return self._free_bytes()

    def selftest(self) -> None:
        """Make, write, read, erase and measure a canary that is no part of the capacity."""
        fd = _sealed_memfd(f"{NAME_PREFIX}selftest", CANARY_BYTES)
        try:
            pattern = os.urandom(CANARY_BYTES)
            os.pwrite(fd, pattern, 0)
            if os.pread(fd, CANARY_BYTES, 0) != pattern:
                raise failure.of("TORN", "memory: the canary reads otherwise than it was written")
            os.ftruncate(fd, 0)
            if not measure(fd, exported=False)["clean"]:
                raise failure.of("IO", "memory: the canary did not go")
        finally:
            os.close(fd)

    def _reserve(self, size_bytes: int) -> None:
        with self._lock:
            if size_bytes > self.capacity_bytes:
                raise failure.of("CAPACITY", f"memory: this node lends {self.capacity_bytes} bytes")
            free_bytes = self._free_bytes()
            if size_bytes > free_bytes:
                free_bytes = self._free_bytes(afresh=True)
            if size_bytes > free_bytes:
                raise failure.of("NO_CAPACITY", f"memory: {max(0, free_bytes)} bytes are free")
            self._pending_bytes += size_bytes

    def _give_back(self, size_bytes: int) -> None:
        with self._lock:
            self._pending_bytes -= size_bytes

    def _free_bytes(self, *, afresh: bool = False) -> int:
        """The machine is looked at now and then, for a look reads a dozen files: what was lent
        since counts as taken, what came back not as there. Who would be refused looks `afresh`."""
        booked_bytes = sum(self._lent.values()) + self._pending_bytes
        now_ms = SYSTEM.boot_ms()
        if afresh or now_ms - self._looked_ms >= LOOK_MS:
            room_bytes = machine_room_bytes(self._proc, self._cgroups) - self._pending_bytes
            self._looked_ms, self._looked_booked, self._looked_room = (
                now_ms,
                booked_bytes,
                room_bytes - self._headroom_bytes,
            )
        since_bytes = max(0, booked_bytes - self._looked_booked)
        return min(self.capacity_bytes - booked_bytes, self._looked_room - since_bytes)


def measure(fd: int, *, exported: bool) -> Evidence:
    """Evidence for a receipt; `clean` says whether nothing is left as far as a number can show."""
    path = f"/proc/self/fd/{fd}"
    status = os.stat(path)
    other = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        readable = len(os.pread(other, PAGE_BYTES, 0))
    finally:
        os.close(other)
    clean = status.st_size == 0 and status.st_blocks == 0 and readable == 0
    return {
        "st_size": status.st_size,
        "st_blocks": status.st_blocks,
        "readable_bytes": readable,
        "exported": exported,
        "assurance": "detached" if exported else "freed",
        "clean": clean,
    }


def advertised_bytes(
    nodes: int = 1, *, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")
) -> int:
    """The capacity of one of `nodes` agents on this machine, where nobody configured another."""
    room_bytes = machine_room_bytes(proc, cgroups) // 4 // nodes
    return room_bytes - room_bytes % PAGE_BYTES


def machine_room_bytes(proc: Path, cgroups: Path) -> int:
    """What could be allocated before somebody is killed for it."""
    return min([_available_bytes(proc), *_cgroup_rooms(proc, cgroups)])


def _available_bytes(proc: Path) -> int:
    for line in (proc / "meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    raise failure.of("NOT_READY", "memory: the kernel does not say how much is available")


def _cgroup_rooms(proc: Path, cgroups: Path) -> Iterator[int]:
    """The room in each memory cgroup above this process, of either version."""
    for line in (proc / "self" / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory" or "memory" in controllers.split(","):
            roots, names = [cgroups / "memory"], _V1
        elif controllers == "":
            roots, names = [cgroups, cgroups / "unified"], _V2
        else:
            continue
        for root in roots:
            for folder in _upwards(root, path):
                yield from _room(folder, *names)


_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = ("memory.max", "memory.current", "inactive_file")


def _upwards(root: Path, path: str) -> Iterator[Path]:
    """A container may see its own cgroup as the root, so what does not exist is passed over."""
    parts = [part for part in path.split("/") if part and part != ".."]
    for count in range(len(parts), -1, -1):
        yield root.joinpath(*parts[:count])


def _room(folder: Path, limit_name: str, usage_name: str, reclaimable_name: str) -> Iterator[int]:
    try:
        limit = (folder / limit_name).read_text().strip()
        usage_bytes = int((folder / usage_name).read_text())
        stat = (folder / "memory.stat").read_text()
    except OSError:
        return
    if limit == "max":
        return
    reclaimable = dict(line.split(" ", 1) for line in stat.splitlines()).get(reclaimable_name, "0")
    yield int(limit) - usage_bytes + int(reclaimable)


def _sealed_memfd(name: str, size_bytes: int) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size_bytes)
        os.posix_fallocate(fd, 0, size_bytes)
        fcntl.fcntl(fd, F_ADD_SEALS, SEAL_GROW | SEAL_SEAL)
    except OSError:
        os.close(fd)
        raise
    return fd


def _zero(fd: int, size_bytes: int) -> None:
    zeros = memoryview(bytes(CHUNK_BYTES))
    for offset in range(0, size_bytes, CHUNK_BYTES):
        try:
            os.pwrite(fd, zeros[: size_bytes - offset], offset)
        except PermissionError:
            return  # a holder cut it shorter meanwhile, and what is gone needs no zeros


def _refusal(error: OSError) -> failure.FabricError:
    if error.errno in (errno.ENOMEM, errno.ENOSPC, errno.EDQUOT):
        return failure.of("NO_CAPACITY", "memory: the kernel has no more")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return failure.of("NO_CAPACITY", "memory: no more open files")
    return failure.of("IO", "memory")
