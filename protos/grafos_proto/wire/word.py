"""A word of eight bytes that several processes change at once, and none of them loses a change.

Like the one pen at a counter: whoever writes a new balance holds the pen from reading the old one
until the new one stands there.

Rules. The arbiter is the kernel: a lock on the word's own bytes, owned by an open file description,
so whoever shares one (the threads of a process) needs a lock of its own around the call. The kernel
drops it when its process dies. Nobody waits in the kernel: after a bounded number of tries the
caller is told `CONTENDED`, since a holder that was stopped inside must hurt only its own lease.
Words are little-endian and lie at multiples of eight. Plain writes to the same word take no lock.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

from grafos_core import failure

BYTES: Final = 8
MASK: Final = (1 << 64) - 1
TRIES_AT_ONCE: Final = 64
"""A holder that runs is out again after a few microseconds."""
TRIES_MAX: Final = TRIES_AT_ONCE + 50
PAUSE_MS: Final = 1
_FLOCK = struct.Struct("hhqqi4x")
"""struct flock of fcntl(2) on 64-bit Linux: type, whence, start, length, pid."""


def check_place(offset: int) -> None:
    if offset % BYTES:
        raise failure.of("EXTENT", f"a word lies at a multiple of {BYTES}")


def swap(fd: int, offset: int, expected: int, new: int) -> int:
    """Write `new` if the word is `expected`; what the word was.

    Raises:
        OSError: the file was cut short under it.
    """
    with locked(fd, offset):
        before = read(fd, offset)
        if before == expected:
            _write(fd, offset, new)
        return before


def add(fd: int, offset: int, amount: int) -> int:
    """Add modulo 2^64; what the word was."""
    with locked(fd, offset):
        before = read(fd, offset)
        _write(fd, offset, before + amount & MASK)
        return before


def read(fd: int, offset: int) -> int:
    data = os.pread(fd, BYTES, offset)
    if len(data) != BYTES:
        raise failure.of("EXTENT", "the memory was cut short")
    return int.from_bytes(data, "little")


@contextmanager
def locked(fd: int, offset: int) -> Generator[None, None, None]:
    """The word is ours alone, among all open file descriptions."""
    taken = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, offset, BYTES, 0)
    for attempt in range(TRIES_MAX):
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, taken)
            break
        except (BlockingIOError, PermissionError):
            if attempt >= TRIES_AT_ONCE:
                select.poll().poll(PAUSE_MS)
    else:
        raise failure.of("CONTENDED", "another holder of the word does not let go of it")
    try:
        yield
    finally:
        left = _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, offset, BYTES, 0)
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, left)


def _write(fd: int, offset: int, value: int) -> None:
    try:
        written = os.pwrite(fd, value.to_bytes(BYTES, "little"), offset)
    except PermissionError:  # beyond the end of a file that must not grow
        written = 0
    if written != BYTES:
        raise failure.of("EXTENT", "the memory was cut short")
