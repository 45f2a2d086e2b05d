"""Finds memory that was lent by an agent and a warden who are both dead, and takes it back.

A holder's descriptor or mapping keeps a lease's memory alive though nobody watches it any more. But
the kernel lists what every process has open, and the memory carries its lease's name: so the next
agent goes from door to door.

Rules. Only before this agent lends anything itself: its own memory bears the same incarnation.
What is found is truncated where it is found. What is seen and cannot be reached is reported, and so
is every process whose doors are closed to us: in both cases nothing is proved.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from services.nodeagent.devices.memory import NAME_PREFIX


@dataclass(frozen=True, slots=True)
class Orphan:
    """The memory of one lease that was found alive."""

    lease_id: str
    fd: int | None
    """Truncated, and the caller's from now on; None where it could not be reached."""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Orphans:
    found: tuple[Orphan, ...]
    unreadable: tuple[tuple[int, int], ...]
    """(process id, user id) of each process that we have no right to look into."""


def recover_leftovers(incarnation: str, proc: Path = Path("/proc")) -> Orphans:
    """Truncate everything that an agent of this incarnation lent, wherever it is still held."""
    name = re.compile(rf"/memfd:{re.escape(NAME_PREFIX + incarnation)}:([0-9a-f]{{32}})\b")
    reached: dict[str, Orphan] = {}
    missed: dict[str, Orphan] = {}
    unreadable = []
    for process in _processes(proc):
        try:
            for lease_id, path in _doors(process, name):
                if lease_id not in reached:
                    orphan = _taken(lease_id, path)
                    (missed if orphan.fd is None else reached)[lease_id] = orphan
        except PermissionError:
            unreadable.append((int(process.name), _uid(process)))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked, and what it held went with it
    left = [orphan for lease_id, orphan in missed.items() if lease_id not in reached]
    return Orphans((*reached.values(), *left), tuple(unreadable))


def _processes(proc: Path) -> Iterator[Path]:
    for name in os.listdir(proc):
        if name.isdecimal() and int(name) != os.getpid():
            yield proc / name


def _uid(process: Path) -> int:
    try:
        return process.stat().st_uid
    except FileNotFoundError:
        return -1


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
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return Orphan(lease_id, None, os.strerror(error.errno or 0))
    try:
        os.ftruncate(fd, 0)
    except OSError as error:
        os.close(fd)
        return Orphan(lease_id, None, os.strerror(error.errno or 0))
    return Orphan(lease_id, fd)
