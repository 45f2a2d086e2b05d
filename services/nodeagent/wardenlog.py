"""What a warden took back, as it is handed on to the agent that comes next.

Like the night watchman's report: written down and signed off before he goes on, and handed over in
person, with the keys he took, if he is still there in the morning.

Rules. An entry is on the disk before anybody is told of it. A torn last entry was never told of,
so a reader passes over it. The next agent reads the journals of all wardens that it finds, and asks
those that still live for the descriptors too; when it has sealed what it learned it says `done`,
and the warden ends and removes its files. The folder is its owner's alone.

    <state>/warden/<boot epoch>.journal      length, entry, sum · length, entry, sum · …
    <state>/warden/<boot epoch>.sock         {"op": "fetch", "from": n}  ► {"op": "taken", …} + fds
                                             {"op": "done"}              ► {"op": "bye"}
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import socket
import stat
import struct
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from grafos_core import codec, failure
from services.nodeagent.ipc import Link, LinkClosed, Message, close_all
from services.runtime.faults import fault

BATCH_MAX: Final = 64
"""Entries in one answer, each with at most one descriptor: far below the kernel's 253."""
FETCH_MS_MAX: Final = 5_000
"""A warden may be truncating when it is asked; one that answers nothing for longer is dead."""

_LENGTH = struct.Struct(">I")
_SUM_BYTES: Final = 16
_NAME = re.compile(r"([0-9]{1,19})\.journal")


@dataclass(frozen=True, slots=True)
class Taken:
    """One lease that was taken back, and what was measured right after."""

    lease_id: str
    slot: int
    epoch: int
    cause: str
    """`deadline` or `agent_lost`."""
    device: str
    """`memfd` or `block`; of a block lease the warden closes the gate, the key dies with front."""
    measured: dict[str, Any] = field(default_factory=dict)
    late_us: int = 0
    """From the deadline, or from when the agent was found lost, to the last byte gone."""

    def value(self) -> Message:
        return {
            "lease": self.lease_id, "slot": self.slot, "epoch": self.epoch, "cause": self.cause,
            "device": self.device, "measured": dict(self.measured), "late_us": self.late_us,
        }  # fmt: skip

    @staticmethod
    def of(value: Any) -> Taken:
        return Taken(
            value["lease"], value["slot"], value["epoch"], value["cause"], value["device"],
            value["measured"], value["late_us"],
        )  # fmt: skip


class Journal:
    """The writing end. An error of the disk is raised, and the entry was not written."""

    def __init__(self, folder: Path, boot_epoch: int) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = folder / f"{boot_epoch}.journal"
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._fd = os.open(self.path, flags, 0o600)
        if stat.S_ISREG(os.fstat(self._fd).st_mode):
            os.ftruncate(self._fd, _whole(self.path.read_bytes())[1])  # else what follows is lost
        self.is_inherited = os.fstat(self._fd).st_size > 0
        """A warden of the same boot, now dead, has written here."""

    def append(self, entries: Iterable[Taken]) -> None:
        """On the disk when this returns."""
        fault("warden.journal")
        data = b"".join(_framed(codec.encode(entry.value())) for entry in entries)
        before = os.fstat(self._fd).st_size
        try:
            if os.write(self._fd, data) != len(data):
                raise OSError(errno.ENOSPC, "short write")
            os.fdatasync(self._fd)
        except OSError:
            os.ftruncate(self._fd, before)
            raise

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def _framed(data: bytes) -> bytes:
    return _LENGTH.pack(len(data)) + data + hashlib.sha256(data).digest()[:_SUM_BYTES]


def read_journal(path: Path) -> list[Taken]:
    """The whole entries, in order, up to the first that is not whole."""
    return _whole(path.read_bytes())[0]


def _whole(data: bytes) -> tuple[list[Taken], int]:
    """The entries, and where the last of them ends."""
    entries: list[Taken] = []
    end = 0
    while end + _LENGTH.size <= len(data):
        (length,) = _LENGTH.unpack_from(data, end)
        start = end + _LENGTH.size
        entry, after = data[start : start + length], start + length + _SUM_BYTES
        if hashlib.sha256(entry).digest()[:_SUM_BYTES] != data[start + length : after]:
            break
        try:
            entries.append(Taken.of(codec.decode(entry)))
        except (failure.FabricError, KeyError, TypeError):
            break
        end = after
    return entries, end


def boot_epochs(folder: Path) -> list[int]:
    """Of the wardens that left a journal, the oldest first."""
    if not folder.exists():
        return []
    found = (_NAME.fullmatch(name) for name in os.listdir(folder))
    return sorted(int(match[1]) for match in found if match)


@contextmanager
def short_path(folder: Path, name: str) -> Generator[str, None, None]:
    """A way to name a socket in a folder of any length; addresses end at 107 characters."""
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)


class LivingWarden:
    """A warden that outlived its agent, as the next agent speaks with it."""

    def __init__(self, link: Link) -> None:
        self._link = link

    @classmethod
    def find(cls, folder: Path, boot_epoch: int) -> LivingWarden | None:
        """None where nobody listens any more."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with short_path(folder, f"{boot_epoch}.sock") as path:
                sock.connect(path)
        except OSError:
            sock.close()
            return None
        return cls(Link(sock, fds_max=BATCH_MAX))

    def fetch(self, timeout_ms: int = FETCH_MS_MAX) -> list[tuple[Taken, int | None]]:
        """Everything it took back, each with its memory where it holds it. The fds are ours now."""
        found: list[tuple[Taken, int | None]] = []
        more = True
        while more:
            answer, fds = self._ask({"op": "fetch", "from": len(found)}, timeout_ms)
            left = iter(fds)
            for value in answer["entries"]:
                found.append((Taken.of(value), next(left, None) if value["fd"] else None))
            more = bool(answer["more"])
        return found

    def done(self, timeout_ms: int = FETCH_MS_MAX) -> None:
        """All of it is sealed: the warden closes what it holds, removes its files and ends."""
        try:
            _, fds = self._ask({"op": "done"}, timeout_ms)
            close_all(fds)
        finally:
            self._link.close()

    def close(self) -> None:
        self._link.close()

    def _ask(self, message: Message, timeout_ms: int) -> tuple[Message, list[int]]:
        self._link.send(message)
        received = self._link.receive(timeout_ms)
        if received is None:
            raise LinkClosed("the warden does not answer")
        return received
