"""Disk blocks, lent as a stretch of one big file, all of it written in a cipher of its own.

Like lockers in one long wall: the wall is built once, so no locker can turn out to be missing, and
what lies in a locker is readable only with a key that exists nowhere but in this machine's memory.
Dropping the key empties the locker at once; the sweeping follows.

Rules. The file is allocated whole when it is made. Reads and writes go past the page cache where
the file system lets them, else through it with a sync after each write, and `mode` says which.
Erasing keeps the space reserved. Measuring reads through a descriptor of its own. Behind the
advertised size lies a canary for the self-test. Which extent is free is not known here.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from grafos_core import failure
from grafos_core.lease import BLOCK_BYTES
from services.runtime.faults import fault

CANARY_BLOCKS: Final = 16
TRANSFER_BLOCKS: Final = 64
"""Moved by one system call; each thread that moves blocks keeps a buffer of this size."""
MEASURE_BYTES: Final = 1 << 20

# Source: include/uapi/linux/falloc.h.
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 0x01, 0x02, 0x10
_UNSUPPORTED: Final = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

Evidence = dict[str, int | bool | str]
Result = TypeVar("Result")


class BlockDevice:
    """The file, opened by one process. Any thread may use it."""

    def __init__(self, path: Path, size_bytes: int, *, direct: bool = True) -> None:
        """Make the file, or take up one of this size. With `direct` unset it goes the slow way."""
        failure.invariant(size_bytes > 0 and size_bytes % BLOCK_BYTES == 0, "whole blocks")
        self.path, self.size_bytes = path, size_bytes
        self.block_count = size_bytes // BLOCK_BYTES
        self._local = threading.local()
        self._fd = _allocated(path, (self.block_count + CANARY_BLOCKS) * BLOCK_BYTES)
        self._direct_fd = self._probed() if direct else None

    @property
    def mode(self) -> str:
        """`direct`, or `buffered` where the file system does not let us past its cache."""
        return "buffered" if self._direct_fd is None else "direct"

    def close(self) -> None:
        for fd in (self._fd, self._direct_fd):
            if fd is not None:
                os.close(fd)

    def buffer(self) -> mmap.mmap:
        """This thread's, page-aligned as the direct way demands; `TRANSFER_BLOCKS` long."""
        if not hasattr(self._local, "buffer"):
            self._local.buffer = mmap.mmap(-1, TRANSFER_BLOCKS * BLOCK_BYTES)
        buffer: mmap.mmap = self._local.buffer
        return buffer

    def read_into_buffer(self, block: int, count: int) -> mmap.mmap:
        """Fill the first `count` blocks of this thread's buffer."""
        self._check(block, count, at_once=TRANSFER_BLOCKS)
        return typed("read", lambda: self._read(block, count))

    def write_from_buffer(self, block: int, count: int) -> None:
        """Write the first `count` blocks of this thread's buffer."""
        self._check(block, count, at_once=TRANSFER_BLOCKS)
        typed("write", lambda: self._write(block, count))

    def flush(self) -> None:
        """Everything written so far is on stable storage when this returns."""

        def sync() -> None:
            fault("block.flush")
            os.fdatasync(self._fd)

        typed("sync", sync)

    def erase(self, block: int, count: int) -> str:
        """Zero an extent, durably, and say how: `zero_range`, `punch_hole` or `written`."""
        self._check(block, count)
        fault("block.erase")
        offset, length = block * BLOCK_BYTES, count * BLOCK_BYTES
        if _fallocate(self._fd, _ZERO_RANGE | _KEEP_SIZE, offset, length):
            how = "zero_range"
        elif _fallocate(self._fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length):
            os.posix_fallocate(self._fd, offset, length)  # the space stays ours
            how = "punch_hole"
        else:
            _write_zeros(self._fd, offset, length)
            how = "written"
        os.fdatasync(self._fd)
        return how

    def measure(self, block: int, count: int) -> Evidence:
        """Read an extent back through a descriptor of its own; `clean` if it is all zeros."""
        self._check(block, count)
        fault("block.measure")
        direct = os.O_DIRECT if self._direct_fd is not None else 0
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | direct)
        try:
            same_file = os.fstat(fd).st_ino == os.fstat(self._fd).st_ino
            read_bytes, dirty_blocks = _count_dirty(fd, block * BLOCK_BYTES, count * BLOCK_BYTES)
        finally:
            os.close(fd)
        return {
            "read_bytes": read_bytes,
            "dirty_blocks": dirty_blocks,
            "mode": self.mode,
            "clean": same_file and dirty_blocks == 0 and read_bytes == count * BLOCK_BYTES,
        }

    def selftest(self) -> None:
        """Write, read, erase and measure the canary behind the advertised size."""
        pattern = os.urandom(CANARY_BLOCKS * BLOCK_BYTES)
        self.buffer()[: len(pattern)] = pattern
        typed("write", lambda: self._write(self.block_count, CANARY_BLOCKS))
        self.flush()
        read = typed("read", lambda: self._read(self.block_count, CANARY_BLOCKS))
        if read[: len(pattern)] != pattern:
            raise failure.of("TORN", "block: the canary reads otherwise than it was written")
        offset, length = self.block_count * BLOCK_BYTES, len(pattern)
        if not _fallocate(self._fd, _ZERO_RANGE | _KEEP_SIZE, offset, length):
            _write_zeros(self._fd, offset, length)
        self.flush()
        if any(typed("read", lambda: self._read(self.block_count, CANARY_BLOCKS))[:length]):
            raise failure.of("IO", "block: the canary did not go")

    def _check(self, block: int, count: int, at_once: int | None = None) -> None:
        """Beyond the file's lent part lies the canary, and beyond an extent another holder."""
        if block < 0 or count <= 0 or block + count > self.block_count:
            raise failure.of("EXTENT", f"block: the device has {self.block_count} blocks")
        failure.invariant(at_once is None or count <= at_once, "fits the buffer")

    def _read(self, block: int, count: int) -> mmap.mmap:
        fault("block.read")
        buffer, length = self.buffer(), count * BLOCK_BYTES
        fd = self._fd if self._direct_fd is None else self._direct_fd
        with memoryview(buffer) as whole, whole[:length] as part:
            if os.preadv(fd, [part], block * BLOCK_BYTES) != length:
                raise OSError(errno.EIO, "short read")
        return buffer

    def _write(self, block: int, count: int) -> None:
        fault("block.write")
        length = count * BLOCK_BYTES
        fd = self._fd if self._direct_fd is None else self._direct_fd
        with memoryview(self.buffer()) as whole, whole[:length] as part:
            if os.pwritev(fd, [part], block * BLOCK_BYTES) != length:
                raise OSError(errno.EIO, "short write")
        if self._direct_fd is None:
            os.fdatasync(self._fd)  # or a teardown would wait for all of it, later

    def _probed(self) -> int | None:
        """A descriptor that goes past the cache, if a read of one block through it works."""
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            with memoryview(self.buffer()) as whole, whole[:BLOCK_BYTES] as part:
                os.preadv(fd, [part], self.block_count * BLOCK_BYTES)
        except OSError:
            os.close(fd)
            return None
        return fd


def typed(what: str, move: Callable[[], Result]) -> Result:
    """Do it; a device's own errors become failures that a holder may read."""
    try:
        return move()
    except OSError as error:
        if error.errno in _FULL:
            raise failure.of("DISK", f"block: {what}") from None
        raise failure.of("IO", f"block: {what}") from None


def _allocated(path: Path, size_bytes: int) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if os.fstat(fd).st_size not in (0, size_bytes):
            raise failure.of("VERSION", "block: the file on disk has another size than configured")
        os.posix_fallocate(fd, 0, size_bytes)
        os.fdatasync(fd)
    except OSError as error:
        os.close(fd)
        code = "DISK" if error.errno in _FULL else "IO"
        raise failure.of(code, "block: the file cannot be allocated") from None
    except failure.FabricError:
        os.close(fd)
        raise
    return fd


def _fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
    """Whether the file system can do it; that it can and fails is an error."""
    if _LIBC.fallocate(fd, mode, offset, length) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number))


def _write_zeros(fd: int, offset: int, length: int) -> None:
    zeros = memoryview(bytes(MEASURE_BYTES))
    end = offset + length
    while offset < end:
        offset += os.pwrite(fd, zeros[: end - offset], offset)


def _count_dirty(fd: int, offset: int, length: int) -> tuple[int, int]:
    """Bytes read, and how many of their blocks are not zero."""
    zeros, zero_block = bytes(MEASURE_BYTES), bytes(BLOCK_BYTES)
    read_bytes = dirty_blocks = 0
    with mmap.mmap(-1, MEASURE_BYTES) as buffer:
        while read_bytes < length:
            wanted = min(MEASURE_BYTES, length - read_bytes)
            with memoryview(buffer) as whole, whole[:wanted] as part:
                count = os.preadv(fd, [part], offset + read_bytes)
            if count <= 0:
                break
            if buffer[:count] != zeros[:count]:
                dirty_blocks += sum(
                    buffer[at : at + BLOCK_BYTES] != zero_block[: count - at]
                    for at in range(0, count, BLOCK_BYTES)
                )
            read_bytes += count
    return read_bytes, dirty_blocks
