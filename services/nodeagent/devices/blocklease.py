"""One block lease as its holder's side sees it: sealed blocks, and the table that proves them.

Like letters in sealed envelopes, each numbered and noted in a book: an envelope that was opened,
swapped with its neighbour, or put back from last week does not match the book.

Rules. Every block is encrypted with AES-256-GCM under a random key that only RAM holds, bound to
incarnation, lease, epoch, key number, extent, block and version. A block that does not match its
entry is `TORN`; one that was never written reads zeros. No (key, nonce) is used twice: a nonce is
32 random bits of the process and a 64-bit counter, and each process claims counters of its own in
the shared table before it uses any. The key refuses at its deadline, in a forked child, and once
destroyed. Operations are counted, so that an end can wait for none to be in flight.

The table lives in a memfd that outlives the process: the next one reads on. An entry holds what is
true and, while a write is under way, what is about to be; whoever finds both after a crash accepts
whichever the disk really has.

    header   magic · version · first counter that nobody claimed                     64 B
    entry    true: version u32, nonce 12 B, tag 16 B │ about to be: the same         64 B
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count as counting
from typing import Final, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from grafos_core import failure
from grafos_core.lease import BLOCK_BYTES
from services.nodeagent.devices.block import TRANSFER_BLOCKS, BlockDevice

KEY_BYTES: Final = 32
USES_MAX: Final = 2**32
"""Of one key by one process: 16 TiB written. After that the lease refuses writes."""
OVERLAP_WAIT_S: Final = 5.0
"""For another operation on the same blocks; longer means that the disk hangs."""

_ZERO_BLOCK: Final = bytes(BLOCK_BYTES)
_HEADER = struct.Struct("<8sQQ40x")
_MAGIC, _VERSION = b"GRAFTAGS", 1
_MARK = struct.Struct("<I12s16s")
_NO_MARK: Final = bytes(_MARK.size)
_ENTRY_BYTES: Final = 2 * _MARK.size
_ASSOCIATED = struct.Struct(">16s16sQIQQI")
_F_ADD_SEALS, _F_GET_SEALS, _SEALS = 1033, 1034, 7  # SEAL | SHRINK | GROW: safe to rely on


class Cipher(Protocol):
    """What AESGCM is to us; a recording one is put in its place to prove that nonces differ."""

    def encrypt(self, nonce: bytes, data: bytes, associated_data: bytes | None) -> bytes: ...

    def decrypt(self, nonce: bytes, data: bytes, associated_data: bytes | None) -> bytes: ...


@dataclass(frozen=True, slots=True)
class BlockIdentity:
    """What a block is bound to. A renewal changes none of it."""

    incarnation: str
    lease_id: str
    epoch: int
    key_number: int
    extent_offset: int
    extent_blocks: int

    def associated(self, block: int, version: int) -> bytes:
        return _ASSOCIATED.pack(
            bytes.fromhex(self.incarnation), bytes.fromhex(self.lease_id), self.epoch,
            self.key_number, self.extent_offset, block, version,
        )  # fmt: skip


def new_key() -> bytearray:
    """Derived from nothing, so nothing can make it again."""
    return bytearray(os.urandom(KEY_BYTES))


def wipe(key: bytearray) -> None:
    """Best effort: Python may have copied it. The guarantee is the end of the process."""
    key[:] = bytes(len(key))


def create_tags(identity: BlockIdentity) -> int:
    """The table of a new lease, as a sealed memfd of 64 bytes for each block."""
    size_bytes = _HEADER.size + identity.extent_blocks * _ENTRY_BYTES
    name = f"grafos-tags:{identity.incarnation}:{identity.lease_id}"
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size_bytes)
        os.posix_fallocate(fd, 0, size_bytes)
        os.pwrite(fd, _HEADER.pack(_MAGIC, _VERSION, 0), 0)
        fcntl.fcntl(fd, _F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(fd)
        raise failure.of("NO_CAPACITY", "block: no memory for the lease's table") from None
    return fd


class TagTable:
    """The table, by pread and pwrite; the descriptor is the table's from now on."""

    def __init__(self, fd: int, extent_blocks: int) -> None:
        magic, version, _ = _HEADER.unpack(os.pread(fd, _HEADER.size, 0))
        size_bytes = _HEADER.size + extent_blocks * _ENTRY_BYTES
        sealed = fcntl.fcntl(fd, _F_GET_SEALS) & _SEALS == _SEALS
        if (magic, version) != (_MAGIC, _VERSION) or os.fstat(fd).st_size != size_bytes:
            raise failure.of("VERSION", "block: not the table of this lease")
        failure.invariant(sealed, "a table of tags is sealed")
        self._fd = fd

    def claim_counters(self) -> int:
        """The first of `USES_MAX` counters that no other process has used or will use."""
        _, _, first = _HEADER.unpack(os.pread(self._fd, _HEADER.size, 0))
        os.pwrite(self._fd, _HEADER.pack(_MAGIC, _VERSION, first + USES_MAX), 0)
        return int(first)

    def read(self, block: int, count: int) -> list[tuple[bytes, bytes]]:
        """(true, about to be) of each block."""
        data = os.pread(self._fd, count * _ENTRY_BYTES, _HEADER.size + block * _ENTRY_BYTES)
        return [
            (data[at : at + _MARK.size], data[at + _MARK.size : at + _ENTRY_BYTES])
            for at in range(0, len(data), _ENTRY_BYTES)
        ]

    def write(self, block: int, entries: list[tuple[bytes, bytes]]) -> None:
        data = b"".join(part for entry in entries for part in entry)
        os.pwrite(self._fd, data, _HEADER.size + block * _ENTRY_BYTES)

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _version(mark: bytes) -> int:
    return int(_MARK.unpack(mark)[0])


class BlockKey:
    """The key of one lease in one process, which knows until when it may be used."""

    def __init__(
        self,
        key: bytes | bytearray,
        *,
        first_counter: int,
        deadline_ns: int,
        boottime_ns: Callable[[], int],
        cipher: Callable[[bytes | bytearray], Cipher] = AESGCM,
    ) -> None:
        failure.invariant(len(key) == KEY_BYTES, "a key has 32 bytes")
        self._cipher: Cipher | None = cipher(key)
        self._counters = counting(first_counter)
        self._counter_end = first_counter + USES_MAX
        self._prefix = os.urandom(4)
        self._pid = os.getpid()
        self._deadline_ns, self._boottime_ns = deadline_ns, boottime_ns

    def raise_deadline(self, deadline_ns: int) -> None:
        """Later only."""
        self._deadline_ns = max(self._deadline_ns, deadline_ns)

    def destroy(self) -> None:
        """From here on nobody in this process can read or write a block of this lease."""
        self._cipher = None

    def seal(self, data: bytes, associated: bytes) -> tuple[bytes, bytes]:
        """(nonce, ciphertext and tag). Every call takes a counter, also one that then fails."""
        cipher, counter = self._usable(), next(self._counters)
        if counter >= self._counter_end:
            raise failure.of("DEGRADED", "block: the lease's key is used up")
        nonce = self._prefix + counter.to_bytes(8, "big")
        return nonce, cipher.encrypt(nonce, data, associated)

    def open(self, nonce: bytes, sealed: bytes, associated: bytes) -> bytes | None:
        """None where it was not sealed so."""
        try:
            return self._usable().decrypt(nonce, sealed, associated)
        except InvalidTag:
            return None

    def check(self) -> None:
        """Refuse what could not end well, also where no block needs the key."""
        self._usable()

    def _usable(self) -> Cipher:
        cipher = self._cipher
        if cipher is None:
            raise failure.of("FENCED", "block: the lease's key is gone")
        if os.getpid() != self._pid:
            raise failure.of("FORKED_CHILD", "block: keys are not inherited")
        if self._boottime_ns() >= self._deadline_ns:
            raise failure.of("LEASE_EXPIRED")
        return cipher


class BlockLease:
    """Reads and writes of one lease, in bytes from its beginning. Any thread may call."""

    def __init__(
        self, device: BlockDevice, tags: TagTable, identity: BlockIdentity, key: BlockKey
    ) -> None:
        self.size_bytes = identity.extent_blocks * BLOCK_BYTES
        self._device, self._tags, self._identity, self._key = device, tags, identity, key
        self._changed = threading.Condition()
        self._busy: list[tuple[int, int, bool]] = []
        """(first block, end, writing) of what is in flight."""
        self._ended = False
        self._closed = False

    @property
    def in_flight(self) -> int:
        return len(self._busy)

    def read(self, offset: int, length: int) -> bytes:
        first, blocks = self._range(offset, length)
        return b"".join(
            self._read_blocks(at, min(TRANSFER_BLOCKS, first + blocks - at))
            for at in range(first, first + blocks, TRANSFER_BLOCKS)
        )

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """All or, of each 64 blocks, none: what a failure or a crash leaves is old or new."""
        first, blocks = self._range(offset, len(data))
        with memoryview(data) as view:
            for at in range(first, first + blocks, TRANSFER_BLOCKS):
                skip = (at - first) * BLOCK_BYTES
                self._write_blocks(at, view[skip : skip + TRANSFER_BLOCKS * BLOCK_BYTES])

    def flush(self) -> None:
        with self._operation(0, 0, writing=False):
            self._device.flush()

    def raise_deadline(self, deadline_ns: int) -> None:
        self._key.raise_deadline(deadline_ns)

    def quiesce(self, timeout_ms: int) -> bool:
        """Refuse what comes, wait for what is in flight; whether nothing is left of it."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not self._busy, timeout_ms / 1000)

    def close(self) -> None:
        """Forget key and table. What is still in flight fails. Idempotent."""
        self._key.destroy()
        with self._changed:
            self._ended = True
            self._closed = True
            self._changed.notify_all()
            self._close_if_empty()

    def _range(self, offset: int, length: int) -> tuple[int, int]:
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            raise failure.of("EXTENT", f"the lease ends at {self.size_bytes}")
        if offset % BLOCK_BYTES or length % BLOCK_BYTES:
            raise failure.of("EXTENT", f"offset and length: multiples of {BLOCK_BYTES}")
        return offset // BLOCK_BYTES, length // BLOCK_BYTES

    def _read_blocks(self, first: int, count: int) -> bytes:
        with self._operation(first, count, writing=False):
            entries = self._tags.read(first, count)
            if not any(any(now) or any(then) for now, then in entries):
                return _ZERO_BLOCK * count
            sealed = self._sealed(first, count)
            return b"".join(
                self._opened(first + i, entry, sealed[i])[0] for i, entry in enumerate(entries)
            )

    def _write_blocks(self, first: int, data: memoryview) -> None:
        count = len(data) // BLOCK_BYTES
        with self._operation(first, count, writing=True):
            before = self._settled(first, self._tags.read(first, count))
            buffer, after = self._device.buffer(), []
            for i, mark in enumerate(before):
                block, at = first + i, i * BLOCK_BYTES
                version = _version(mark) + 1
                plain = bytes(data[at : at + BLOCK_BYTES])
                associated = self._identity.associated(block, version)
                nonce, sealed = self._key.seal(plain, associated)
                buffer[at : at + BLOCK_BYTES] = sealed[:BLOCK_BYTES]
                after.append(_MARK.pack(version, nonce, sealed[BLOCK_BYTES:]))
            self._tags.write(first, list(zip(before, after, strict=True)))
            self._device.write_from_buffer(self._identity.extent_offset + first, count)
            self._tags.write(first, [(mark, _NO_MARK) for mark in after])

    def _settled(self, first: int, entries: list[tuple[bytes, bytes]]) -> list[bytes]:
        """The true marks. Where a write was cut off, the disk is asked which one that is."""
        if not any(any(then) for _, then in entries):
            return [now for now, _ in entries]
        sealed = self._sealed(first, len(entries))
        marks = []
        for i, entry in enumerate(entries):
            try:
                marks.append(self._opened(first + i, entry, sealed[i])[1])
            except failure.Fenced as torn:
                if torn.code != "TORN":
                    raise
                marks.append(max(entry, key=_version))  # neither; it is overwritten whole now
        return marks

    def _sealed(self, first: int, count: int) -> list[bytes]:
        buffer = self._device.read_into_buffer(self._identity.extent_offset + first, count)
        return [buffer[i * BLOCK_BYTES : (i + 1) * BLOCK_BYTES] for i in range(count)]

    def _opened(self, block: int, entry: tuple[bytes, bytes], sealed: bytes) -> tuple[bytes, bytes]:
        """The block in the clear, and the mark that it matches."""
        now, then = entry
        for mark in (then, now):
            version, nonce, tag = _MARK.unpack(mark)
            if version:
                plain = self._key.open(
                    nonce, sealed + tag, self._identity.associated(block, version)
                )
                if plain is not None:
                    return plain, mark
        if not any(now) and (not any(then) or sealed == _ZERO_BLOCK):
            return _ZERO_BLOCK, now  # never written, or its first write never arrived
        raise failure.of("TORN", f"block {block}", lease_id=self._identity.lease_id)

    @contextmanager
    def _operation(self, first: int, count: int, *, writing: bool) -> Generator[None, None, None]:
        """In flight, and alone on its blocks: a read beside a write would find a false `TORN`."""
        mine = (first, first + count, writing)
        with self._changed:
            free = self._changed.wait_for(
                lambda: self._ended or self._is_free(mine), OVERLAP_WAIT_S
            )
            if self._ended:
                raise failure.of("FENCED", lease_id=self._identity.lease_id)
            if not free:
                raise failure.of("CONTENDED", "block: another operation does not end")
            self._busy.append(mine)
        try:
            self._key.check()
            yield
        finally:
            with self._changed:
                self._busy.remove(mine)
                self._changed.notify_all()
                self._close_if_empty()

    def _is_free(self, mine: tuple[int, int, bool]) -> bool:
        first, end, writing = mine
        return not any(
            first < other_end and other_first < end and (writing or other_writing)
            for other_first, other_end, other_writing in self._busy
        )

    def _close_if_empty(self) -> None:
        if self._closed and not self._busy:
            self._tags.close()
