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
from collections.abc import Callable
from pathlib import Path
from typing import Final

from grafos_core import failure
from grafos_proto.wire.credentials import write_file

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


def make(path: Path, fill: Callable[[sqlite3.Connection], None]) -> None:
    """A new file, which appears when it is whole: before that a power cut leaves nothing of it."""
    draft = path.with_name(f"{path.name}.new")
    for left in path.parent.glob(f"{draft.name}*"):
        left.unlink()
    connection = connect(draft)
    try:
        fill(connection)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    finally:
        connection.close()
    os.replace(draft, path)
    _sync(path.parent, os.O_RDONLY | os.O_DIRECTORY)


def make_durable(connection: sqlite3.Connection, path: Path) -> None:
    """Call it before anybody is told what is in the table, or that there is one.

    A predecessor that was killed between a write and its sync left transactions that every reader
    finds and the next power cut takes away; after a failed sync the same goes for pages that look
    clean. Folding the log in writes them again; where the disk is full, a sync is what is left.
    """
    try:
        _sync(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        except sqlite3.Error as error:
            if not is_full(error):
                raise
            log = path.with_name(f"{path.name}-wal")
            if log.exists():
                _sync(log, os.O_RDWR)
    except (sqlite3.Error, OSError) as error:
        raise failure.of("STORAGE", f"the log of {path.name} cannot be synced: {error}") from error


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
        self._path, self._descriptor, self._turn = path, -1, 0
        self.number, self.hash = 0, bytes(32)
        self.is_new = not path.exists() or path.stat().st_size == 0
        if not self.is_new:
            self._open()

    def _open(self) -> None:
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        slots = [self._read(index) for index in (0, 1)]
        found = [slot for slot in slots if slot is not None]
        if not found:
            self.close()
            raise failure.of("STORAGE", f"the file `{self._path.name}` is damaged")
        self.number, self.hash = max(found)
        self._turn = 1 - slots.index(max(found))

    def _read(self, index: int) -> tuple[int, bytes] | None:
        data = os.pread(self._descriptor, _SLOT.size, index * _SLOT.size)
        if len(data) != _SLOT.size:
            return None
        magic, number, hash, checksum = _SLOT.unpack(data)
        if magic != _SLOT_MAGIC or checksum != binascii.crc32(data[:_CHECKED_BYTES]):
            return None
        return number, hash

    def format(self) -> None:
        """Both slots with what is known. The file appears whole, or a power cut in between would
        leave one that looks damaged; from now on a missing one is."""
        if self.is_new:
            write_file(self._path, self._slot() * 2, mode=0o600)
            self._open()
            self.is_new = False

    def write(self, number: int, hash: bytes) -> None:
        self.number, self.hash = number, hash
        os.pwrite(self._descriptor, self._slot(), self._turn * _SLOT.size)
        self._turn = 1 - self._turn

    def _slot(self) -> bytes:
        checked = _SLOT.pack(_SLOT_MAGIC, self.number, self.hash, 0)[:_CHECKED_BYTES]
        return _SLOT.pack(_SLOT_MAGIC, self.number, self.hash, binascii.crc32(checked))

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
