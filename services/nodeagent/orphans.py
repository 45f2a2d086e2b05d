"""Finds memory that was lent by an agent and a warden who are both dead, and takes it back.

A holder's descriptor or mapping keeps a lease's memory alive though nobody watches it any more. But
the kernel lists what every process has open, and the memory carries its lease's name: so the next
agent goes from door to door.

Rules. Memory that this agent lends bears the same incarnation: it looks for all of it only before
it lends anything, and later for leases that are over. What is found is truncated where it is found.
What is seen and cannot be reached is reported, and so is every process whose doors are closed to
us: in both cases nothing is proved.
"""

from __future__ import annotations

import errno
import functools
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.nodeagent.devices.memory import NAME_PREFIX

PROC: Final = Path("/proc")


@dataclass(frozen=True, slots=True)
class Orphan:
    """The memory of one lease that was found alive."""

    lease_id: str
    fd: int | None
    """Truncated, and the caller's from now on; None where it could not be reached."""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Closed:
    """A process that we have no right to look into."""

    pid: int
    """0: processes that `/proc` does not even show us."""
    name: str
    uids: frozenset[int]
    """Real, effective, saved; empty: not known."""
    began_ticks: int | None = None
    """Since the machine's start; None: not known."""

    def may_have(self, uid: int | None, since_ticks: int) -> bool:
        """Whether it may be a process of this user (None: of whichever) that is no older than the
        oldest one that was given the memory."""
        is_young = self.began_ticks is None or self.began_ticks >= since_ticks
        return is_young and (uid is None or not self.uids or uid in self.uids)

    def __str__(self) -> str:
        if not self.pid:
            return "processes that are hidden from us"
        users = ",".join(str(uid) for uid in sorted(self.uids)) or "?"
        return f"process {self.pid} ({self.name}) of user {users}"


@dataclass(frozen=True, slots=True)
class Orphans:
    found: tuple[Orphan, ...]
    closed: tuple[Closed, ...]


def recover_leftovers(
    incarnation: str, proc: Path = PROC, only: Collection[str] | None = None
) -> Orphans:
    """Truncate what an agent of this incarnation lent, wherever it is still held.

    `only`: of these leases; None: of all, which is for an agent that lends nothing yet.
    """
    name = re.compile(rf"/memfd:{re.escape(NAME_PREFIX + incarnation)}:([0-9a-f]{{32}})\b")
    reached: dict[str, Orphan] = {}
    missed: dict[str, Orphan] = {}
    closed = [] if (proc / "1").exists() else [Closed(0, "", frozenset())]
    for process in _processes(proc):
        try:
            for lease_id, path in _doors(process, name):
                if lease_id not in reached and (only is None or lease_id in only):
                    orphan = _taken(lease_id, path)
                    (missed if orphan.fd is None else reached)[lease_id] = orphan
        except PermissionError:
            closed += _closed(process)
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked, and what it held went with it
    left = [orphan for lease_id, orphan in missed.items() if lease_id not in reached]
    return Orphans((*reached.values(), *left), tuple(closed))


def _processes(proc: Path) -> Iterator[Path]:
    for name in os.listdir(proc):
        if name.isdecimal() and int(name) != os.getpid():
            yield proc / name


def _closed(process: Path) -> list[Closed]:
    """It by name, from its status, which everybody may read; nothing if it has ended."""
    try:
        text = (process / "status").read_text(errors="replace")
        began_ticks = start_ticks(process)
    except (FileNotFoundError, ProcessLookupError):
        return []
    except OSError:
        return [Closed(int(process.name), "?", frozenset())]
    fields = {name: rest.strip() for name, _, rest in _partitioned(text)}
    if fields.get("State", "").startswith("Z") and fields.get("Threads") in ("0", "1"):
        return []  # dead and not yet buried: it holds nothing
    uids = frozenset(int(word) for word in fields.get("Uid", "").split()[:3])
    return [Closed(int(process.name), fields.get("Name", "?"), uids, began_ticks)]


def start_ticks(process: Path) -> int:
    """When the process began, in clock ticks since the machine's start (proc_pid_stat(5)), the same
    for every reader: an agent's successor may have another boottime (time_namespaces(7)).

    Raises:
        OSError: it is gone.
    """
    ticks = int((process / "stat").read_text(errors="replace").rpartition(")")[2].split()[19])
    return ticks - _shift_ticks()


@functools.cache
def _shift_ticks() -> int:
    """By how much this process reads all start times too late."""
    try:
        lines = (PROC / "self" / "timens_offsets").read_text().splitlines()
    except OSError:
        return 0  # a kernel without them
    words = next((line.split() for line in lines if line.startswith("boottime")), ["", "0", "0"])
    ticks = os.sysconf("SC_CLK_TCK")
    return int(words[1]) * ticks + int(words[2]) * ticks // 10**9


def began_ticks(pidfd: int) -> int:
    """The same of the process behind a pidfd; 0, as old as can be, where that is not to be seen."""
    try:
        fields = Path("/proc/self/fdinfo", str(pidfd)).read_text().split()
        return start_ticks(PROC / fields[fields.index("Pid:") + 1])
    except (OSError, ValueError):
        return 0


def _partitioned(text: str) -> list[tuple[str, str, str]]:
    return [line.partition(":") for line in text.splitlines()]


def _doors(process: Path, name: re.Pattern[str]) -> Iterator[tuple[str, Path]]:
    """Each way by which this process holds memory of ours: descriptors first, then mappings."""
    for entry in os.listdir(process / "fd"):
        try:
            target = os.readlink(process / "fd" / entry)
        except FileNotFoundError:
            continue  # closed meanwhile
        if match := name.match(target):
            yield match[1], process / "fd" / entry
    # `maps` shows what is mapped also to those who may not follow `map_files`.
    for line in (process / "maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and (match := name.match(fields[5])):
            yield match[1], process / "map_files" / fields[0]


def _taken(lease_id: str, path: Path) -> Orphan:
    """The process itself is named in the path: /proc/<pid>/fd/<n>."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return Orphan(lease_id, None, _why(path, error))
    try:
        os.ftruncate(fd, 0)
    except OSError as error:
        os.close(fd)
        return Orphan(lease_id, None, _why(path, error))
    return Orphan(lease_id, fd)


def _why(path: Path, error: OSError) -> str:
    return f"{errno.errorcode.get(error.errno or 0, 'unknown')} at {path}"
