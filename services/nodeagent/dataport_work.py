"""What the requests of one data connection do: many small ones between two looks at the gate.

Like a clerk who serves everything on one slip before he looks at the register again: what he took
from the shelves stays on his side of the counter until that second look.

Rules. Requests that follow each other on one lease are a run: the gate is asked before the first
and after the last of them, and only then is any answer of the run given out; if the second look
says no, all of them are refused with the cause. While a run moves bytes it is in flight in the gate
page, and it is never in flight while it waits for the holder's socket. A run is bounded in number
and bytes, and so is the time between the two looks. A read that is larger than a run is a series of
runs, and its verdict comes after the last byte has left.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from grafos_core import failure
from grafos_core.failure import FabricError
from grafos_core.share import CHAIN_BYTES_MAX
from grafos_proto.wire import dataframes as frames
from grafos_proto.wire import word
from grafos_proto.wire.dataframes import GOOD_BYTE, READ, VOID_BYTE, WRITE
from services.nodeagent.datapath import (
    DataPath,
    MemoryStorage,
    OpenLease,
    ShareWatch,
    Storage,
    check_range,
    check_right,
    read_from,
    write_to,
)
from services.nodeagent.gatepage import Watch
from services.runtime.faults import fault

RUN_MAX: Final = 256
RUN_BYTES_MAX: Final = 256 * 1024
"""Of answers; a run ends with the request that goes over it."""
SMALL_BYTES_MAX: Final = 128 * 1024
"""A read of more is a series of runs."""
PIECE_BYTES: Final = 256 * 1024
NEIGHBOURS_MIN, NEIGHBOURS_SPREAD_MAX = 4, 2
"""From so many reads on, whose span is at most so many times their sum, one call reads them all."""

Request = tuple[int, int, int, int, int, int, int]
"""As `frames.REQUEST` unpacks it: length, op, flags, handle, tag, count, offset."""
LENGTH, OP, FLAGS, HANDLE, TAG, COUNT, OFFSET = range(7)
Asked = tuple[Request, memoryview]
"""A request and its payload, which is good until the run is over."""
_PACK: Final = frames.ANSWER.pack
_EMPTY_ANSWER_BYTES: Final = 1


@dataclass(slots=True)
class Held:
    """A lease, or a share of one, under the number that its holder gave it."""

    lease: OpenLease
    watch: Watch | ShareWatch
    can_read: bool
    can_write: bool


class Work:
    """The open handles of one connection. For one thread."""

    def __init__(
        self, data: DataPath, holder_key: str, show: Callable[[str], OpenLease] | None = None
    ) -> None:
        """`show`: what a chain of shares is for this holder."""
        self._data, self._holder_key, self._show = data, holder_key, show
        self._held: dict[int, Held] = {}
        self._scratch: memoryview | None = None
        """Where pieces of large reads are put, one after the other."""

    def rest(self) -> None:
        """Keep nothing that is only needed under load."""
        self._scratch = None

    def open(self, request: Request, payload: memoryview) -> bytes:
        if len(payload) != frames.LEASE_ID_BYTES:
            raise failure.of("LENGTH", f"a lease id has {frames.LEASE_ID_BYTES} bytes")
        return self._opened(request, lambda: self._found(bytes(payload).hex(), request[OFFSET]))

    def open_share(self, request: Request, payload: memoryview) -> bytes:
        if self._show is None:
            raise failure.of("OPTION", "shares")
        if len(payload) > CHAIN_BYTES_MAX:
            raise failure.of("TOKEN_ENCODING", "at most 8 KiB")
        show, text = self._show, bytes(payload).decode("latin-1")
        return self._opened(request, lambda: self._held_as(show(text)))

    def _opened(self, request: Request, find: Callable[[], Held]) -> bytes:
        handle = request[HANDLE]
        if handle in self._held:
            raise failure.of("INVALID", "the handle is in use")
        if len(self._held) >= frames.HANDLES_MAX:
            raise failure.of("STREAMS", "too many handles", retry_after_ms=0)
        held = find()
        left_ms = self._data.check_open(held.lease)
        self._held[handle] = held
        answer = frames.OPEN_ANSWER.pack(held.lease.size_bytes, left_ms)
        return frames.answer(request[TAG], answer)

    def close(self, request: Request) -> bytes:
        """Idempotent."""
        self._held.pop(request[HANDLE], None)
        return frames.answer(request[TAG], b"")

    def is_large(self, request: Request) -> bool:
        return request[COUNT] > SMALL_BYTES_MAX and request[OP] in (READ, WRITE)

    def run(self, asked: Sequence[Asked]) -> list[bytes]:
        """Answers to the first requests of `asked`, which are on one handle; at least to one."""
        data = self._data
        try:
            held = self._current(asked[0][0][HANDLE])
            watch = held.watch
            watch.enter()
            try:
                if not watch.is_open(data.boottime_ns()):
                    data.check_open(held.lease)
                answers = self._perform(held, asked)
                if not watch.is_open(data.boottime_ns()):
                    data.check_open(held.lease)
            finally:
                watch.leave()
                if data.waiting:
                    data.tell_waiting()
        except FabricError as cause:
            return [frames.refusal(request[TAG], cause) for request, _ in asked]
        return answers

    def large(self, request: Request, payload: memoryview) -> Iterator[bytes | memoryview]:
        """A read or write, piece by piece: its answer's bytes in order, at the end the verdict."""
        try:
            held = self._current(request[HANDLE])
            if request[OP] == WRITE:
                yield self._write_large(held, request, payload)
                return
            self._check_read(held, request)
            pieces = self._pieces(held, request)
            first = next(pieces)
        except FabricError as cause:
            yield frames.refusal(request[TAG], cause)
            return
        count, sent = request[COUNT], len(first)
        yield _PACK(count + 1, frames.DATA, 0, 0, request[TAG])
        yield first
        try:
            for piece in pieces:
                sent += len(piece)
                yield piece
            self._look(held)
        except FabricError as cause:
            while sent < count:  # the length was announced
                zeros = bytes(min(PIECE_BYTES, count - sent))
                sent += len(zeros)
                yield zeros
            yield VOID_BYTE + frames.refusal(request[TAG], cause)
            return
        yield GOOD_BYTE

    def _perform(self, held: Held, asked: Sequence[Asked]) -> list[bytes]:
        lease = held.lease
        storage, size, is_plain = lease.storage, lease.size_bytes, lease.granule_bytes == 1
        answers: list[bytes] = []
        add, room = answers.append, RUN_BYTES_MAX
        pread, fd = os.pread, -1
        if type(storage) is MemoryStorage:  # the usual case, without a call more than needed
            fd = storage.descriptor
            if len(asked) >= NEIGHBOURS_MIN and is_plain and held.can_read:
                together = _read_together(fd, size, asked)
                if together:
                    fault("front.read")
                    return together
        for request, payload in asked:
            length, op, _, _, tag, count, offset = request
            try:
                if op == READ and is_plain and held.can_read and not length:
                    if offset + count > size:
                        check_range(lease, offset, count)
                    data = b"" if fd < 0 else pread(fd, count, offset)
                    if len(data) != count or fd < 0:
                        data = read_from(storage, offset, count)
                    add(_PACK(count + 1, 1, 0, 0, tag) + data + GOOD_BYTE)
                    room -= count
                elif op == WRITE and is_plain and held.can_write and length == count:
                    if offset + count > size:
                        check_range(lease, offset, count)
                    write_to(storage, offset, payload, flush=False)
                    add(_PACK(_EMPTY_ANSWER_BYTES, 1, 0, 0, tag) + GOOD_BYTE)
                else:
                    data = self._other(held, request, payload)
                    add(frames.answer(tag, data))
                    room -= len(data)
            except (OSError, FabricError) as error:
                add(frames.refusal(tag, self._data.failed(lease, error)))
            if room <= 0:
                break
        if fd >= 0:
            fault("front.read")
        return answers

    def _other(self, held: Held, request: Request, payload: memoryview) -> bytes:
        op, count, offset = request[OP], request[COUNT], request[OFFSET]
        lease = held.lease
        if op == READ:
            self._check_read(held, request)
            return read_from(lease.storage, offset, count)
        if op == frames.READ_MANY:
            return self._read_many(held, payload)
        check_right(lease, "write")
        if op == WRITE:
            self._check_length(request, count)
            check_range(lease, offset, count)
            write_to(lease.storage, offset, payload, flush=False)
            return b""
        if op == frames.WRITE_MANY:
            return self._write_many(held, count, payload)
        if op == frames.FLUSH:
            self._check_length(request, 0)
            lease.storage.flush()
            return b""
        if op not in (frames.SWAP, frames.ADD):
            raise failure.of("INVALID", "no such operation")
        check_right(lease, "read")
        return self._change_word(lease, request, payload)

    def _change_word(self, lease: OpenLease, request: Request, payload: memoryview) -> bytes:
        storage, offset = lease.storage, request[OFFSET]
        if not isinstance(storage, MemoryStorage):
            raise failure.of("OPTION", "words that several change are of memory")
        word.check_place(offset)
        check_range(lease, offset, word.BYTES)
        if request[OP] == frames.SWAP:
            self._check_length(request, frames.WORDS.size)
            expected, new = frames.WORDS.unpack(payload)
            return frames.WORD.pack(storage.swap(offset, expected, new))
        self._check_length(request, frames.WORD.size)
        return frames.WORD.pack(storage.add(offset, *frames.WORD.unpack(payload)))

    def _read_many(self, held: Held, payload: memoryview) -> bytes:
        lease, total = held.lease, 0
        check_right(lease, "read")
        parts = _parts(payload)
        for offset, length in parts:
            check_range(lease, offset, length)
            total += length
        if total > frames.MANY_BYTES_MAX:
            raise failure.of("CHUNK", f"at most {frames.MANY_BYTES_MAX} bytes in many parts")
        return b"".join([read_from(lease.storage, *part) for part in parts])

    def _write_many(self, held: Held, count: int, payload: memoryview) -> bytes:
        """All parts are looked at before the first is written."""
        table = count * frames.PART.size
        if table > len(payload):
            raise failure.of("LENGTH", "parts")
        parts, at = _parts(payload[:table]), table
        for offset, length in parts:
            check_range(held.lease, offset, length)
            at += length
        if at != len(payload):
            raise failure.of("LENGTH", "parts")
        at = table
        for offset, length in parts:
            write_to(held.lease.storage, offset, payload[at : at + length], flush=False)
            at += length
        return b""

    def _pieces(self, held: Held, request: Request) -> Iterator[bytes | memoryview]:
        """Each between two looks of its own, and not in flight when it is given out."""
        offset, end = request[OFFSET], request[OFFSET] + request[COUNT]
        storage = held.lease.storage
        for at in range(offset, end, PIECE_BYTES):
            with self._one_run(held):
                piece = self._piece(storage, at, min(PIECE_BYTES, end - at))
            yield piece

    def _piece(self, storage: Storage, offset: int, length: int) -> bytes | memoryview:
        if not isinstance(storage, MemoryStorage):
            return read_from(storage, offset, length)
        if self._scratch is None:
            self._scratch = memoryview(bytearray(PIECE_BYTES))
        view = self._scratch[:length]
        storage.read_into(offset, view)
        fault("front.read")
        return view

    def _write_large(self, held: Held, request: Request, payload: memoryview) -> bytes:
        count, offset, lease = request[COUNT], request[OFFSET], held.lease
        check_right(lease, "write")
        self._check_length(request, count)
        check_range(lease, offset, count)
        for at in range(0, count, PIECE_BYTES):
            with self._one_run(held):
                piece = payload[at : at + PIECE_BYTES]
                write_to(lease.storage, offset + at, piece, flush=False)
        return frames.answer(request[TAG], b"")

    @contextmanager
    def _one_run(self, held: Held) -> Generator[None, None, None]:
        self._data.enter(held.lease)
        try:
            self._look(held)
            try:
                yield
            except (OSError, FabricError) as error:
                raise self._data.failed(held.lease, error) from None
            self._look(held)
        finally:
            self._data.leave(held.lease)

    def _check_read(self, held: Held, request: Request) -> None:
        check_right(held.lease, "read")
        self._check_length(request, 0)
        if request[COUNT] > frames.DATA_BYTES_MAX:
            raise failure.of("CHUNK", f"at most {frames.DATA_BYTES_MAX} bytes at a time")
        check_range(held.lease, request[OFFSET], request[COUNT])

    def _check_length(self, request: Request, wanted: int) -> None:
        if request[LENGTH] != wanted:
            raise failure.of("LENGTH", f"{wanted} announced, {request[LENGTH]} came")

    def _current(self, handle: int) -> Held:
        """The lease behind a handle, as control has it now; each time the cause, if it is over."""
        held = self._held.get(handle)
        if held is None:
            raise failure.of("INVALID", "no such handle")
        lease = held.lease
        if self._data.table.opened(lease.lease_id) is (lease.whole or lease):
            return held
        self._data.table.find(lease.lease_id, lease.holder_key)  # or the cause of its end
        share = lease.share.digest if lease.share is not None else ""
        held = self._held[handle] = self._found(lease.lease_id, lease.epoch, share)
        return held

    def _found(self, lease_id: str, epoch: int, share: str = "") -> Held:
        return self._held_as(self._data.find(self._holder_key, lease_id, epoch, share))

    def _held_as(self, lease: OpenLease) -> Held:
        return Held(lease, self._data.watch(lease), "read" in lease.ops, "write" in lease.ops)

    def _look(self, held: Held) -> None:
        if not held.watch.is_open(self._data.boottime_ns()):
            self._data.check_open(held.lease)


def _read_together(fd: int, size: int, asked: Sequence[Asked]) -> list[bytes]:
    """The answers to reads that lie close together; none where they are anything else."""
    lengths, ops, _, _, tags, counts, offsets = zip(*[each[0] for each in asked], strict=True)
    if set(ops) != {READ} or any(lengths):
        return []
    low, high = min(offsets), max(map(operator.add, offsets, counts))
    span, total = high - low, sum(counts)
    if high > size or total > RUN_BYTES_MAX or span > NEIGHBOURS_SPREAD_MAX * total:
        return []
    data = os.pread(fd, span, low)
    if len(data) != span:
        return []
    return [
        _PACK(count + 1, 1, 0, 0, tag) + data[offset - low : offset - low + count] + GOOD_BYTE
        for count, tag, offset in zip(counts, tags, offsets, strict=True)
    ]


def _parts(table: memoryview) -> list[tuple[int, int]]:
    if len(table) % frames.PART.size:
        raise failure.of("LENGTH", "parts")
    if len(table) > frames.PARTS_MAX * frames.PART.size:
        raise failure.of("CHUNK", f"at most {frames.PARTS_MAX} parts")
    return list(frames.PART.iter_unpack(table))
