"""One file of SQLite, opened so that what a transaction said is so: by one hand, synced in full.

Rules. One connection, and nobody else's as long as it lasts: SQLite's own lock and one of ours
beside it. A write-ahead log is kept, and synced at every commit. Folding it into the table is asked
for by name, so that an error there is seen and not passed over. A log that was cut short looks to
SQLite like a crash, and the last transactions are gone without a word: so whoever answers for them
keeps a `Mark` beside the table, of the last one that anybody was told of.
"""

from __future__ import annotations

import binascii
import errno
import fcntl
import os
import sqlite3
import struct
from pathlib import Path
from typing import Final

from grafos_core import failure

_SLOT: Final = struct.Struct("<8sQ32sI12x")
_SLOT_MAGIC: Final = b"grafosAK"
_CHECKED_BYTES: Final = 48


def connect(path: Path) -> sqlite3.Connection:
    """The one connection; every setting that matters was read back."""
    connection = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
    try:
        for name, value, expected in (
            ("locking_mode", "EXCLUSIVE", "exclusive"), ("journal_mode", "WAL", "wal"),
            ("synchronous", "FULL", 2), ("wal_autocheckpoint", "0", 0),
        ):  # fmt: skip
            connection.execute(f"PRAGMA {name}={value}").fetchall()
            found = connection.execute(f"PRAGMA {name}").fetchone()[0]
            if found != expected:
                raise failure.of("STORAGE", f"SQLite keeps {name} at {found}")
        connection.execute("BEGIN IMMEDIATE")  # takes the lock that nobody else gets from here on
        connection.execute("COMMIT")
    except sqlite3.Error as error:
        connection.close()
        if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_BUSY:
            raise failure.of("PRECONDITION", f"another process has {path.name} open") from error
        raise failure.of("STORAGE", f"{path.name} cannot be read: {error}") from error
    except failure.FabricError:
        connection.close()
        raise
    return connection


def is_lost(path: Path) -> bool:
    """Whether a table of no bytes stands beside a log that has some: opening would delete it."""
    log = path.with_name(f"{path.name}-wal")
    is_empty = not path.exists() or path.stat().st_size == 0
    return is_empty and log.exists() and log.stat().st_size > 0


def hold_lock(path: Path, who: str) -> int:
    """A descriptor; as long as it is open nobody else gets one."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise failure.of("PRECONDITION", f"another {who} runs on this folder") from None
    return descriptor


def is_full(error: BaseException) -> bool:
    """Whether a write failed for want of room, and for nothing worse."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL


class Mark:
    """A number and a hash in two slots, written in turn.

    It needs no sync: written after the commit, it is never ahead of it, and need not be abreast.
    """

    def __init__(self, path: Path) -> None:
        self.is_new = not path.exists()
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._turn = 0
        self.number, self.hash = 0, bytes(32)
        slots = [self._read(index) for index in (0, 1)]
        found = [slot for slot in slots if slot is not None]
        if found:
            self.number, self.hash = max(found)
            self._turn = 1 - slots.index(max(found))
        elif os.fstat(self._descriptor).st_size:
            os.close(self._descriptor)
            raise failure.of("STORAGE", f"the file `{path.name}` is damaged")
        else:
            self.is_new = True

    def _read(self, index: int) -> tuple[int, bytes] | None:
        data = os.pread(self._descriptor, _SLOT.size, index * _SLOT.size)
        if len(data) != _SLOT.size:
            return None
        magic, number, hash, checksum = _SLOT.unpack(data)
        if magic != _SLOT_MAGIC or checksum != binascii.crc32(data[:_CHECKED_BYTES]):
            return None
        return number, hash

    def format(self) -> None:
        """Both slots with what is known, synced: from now on a missing file is a damage."""
        if self.is_new:
            self.write(self.number, self.hash)
            self.write(self.number, self.hash)
            os.fsync(self._descriptor)
            self.is_new = False

    def write(self, number: int, hash: bytes) -> None:
        data = _SLOT.pack(_SLOT_MAGIC, number, hash, 0)
        data = _SLOT.pack(_SLOT_MAGIC, number, hash, binascii.crc32(data[:_CHECKED_BYTES]))
        os.pwrite(self._descriptor, data, self._turn * _SLOT.size)
        self._turn = 1 - self._turn
        self.number, self.hash = number, hash

    def close(self) -> None:
        os.close(self._descriptor)
