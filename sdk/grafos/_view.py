"""A view of leased memory: the bytes themselves, mapped into this process while the lease lasts.

    with lease.mem().map() as view:
        numbers = numpy.frombuffer(view.memory, dtype="f8")
        total = numbers.sum()
    # leaving the block raises LeaseExpired if the lease ended meanwhile: then forget `total`

When a lease ends, the node cuts its memory off, and a touch of what was mapped there would kill the
process (SIGBUS). So zeros are put in the place of the view before anybody dies of it: by us when we
hear of the end, else by a signal handler in the middle of the touch. From then on the view shows
zeros, and what is written to it goes nowhere.

Rules. The verdict comes after the bytes: what was read from `memory` counts only once `check` has
returned, or the block was left. `view[…]` checks by itself. Nobody else's bytes ever appear: the
pages of a lease are never given on under the same mapping. The signal handler is machine code and
needs no interpreter lock, since whoever touches the view may hold it, or wait for who does; faults
elsewhere go to the handler that was there before. A forked child has zeros, since the lease is its
parent's. Only for x86-64 Linux on the node's own machine.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import signal
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Final

from grafos._clock import boot_ns
from grafos_core import failure
from grafos_core.failure import FabricError

if TYPE_CHECKING:
    from grafos._memory import MemLease, Memory

VIEWS_MAX: Final = 1_024
"""Open at a time in one process; the handler looks through all of them."""
NOWHERE: Final = -1
"""The number of a view that shows zeros."""
_WORD: Final = 8
_HEAD_WORDS, _RANGE_WORDS = 2, 3
_PROTECTION: Final = mmap.PROT_READ | mmap.PROT_WRITE
_MAP_FIXED: Final = 0x10
_ZEROS: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
_SA_SIGINFO, _SA_ONSTACK, _SA_NODEFER = 0x4, 0x0800_0000, 0x4000_0000
_TABLE_MARK: Final = (0x1122_3344_5566_7788).to_bytes(8, "little")
_HANDLER: Final = bytes.fromhex(
    "415741564155415449bc8877665544332211554889f5534863df48895424d0837e08004c8b76107e2d4531ed"
    "41bf09000000ba03000000eb17496bc5184c01e0488b7810488b70184885ff752a49ffc54d3b2c2472e3498b"
    "4424084883f8017642488b5424d04889ee89df5b5d415c415d415e415fffe04c89f14829f94839f173cb48c7"
    "40200100000041ba320000004983c8ff4531c94c89f80f054839c775aceb52ba0800000031c0488d7c24d845"
    "31c04889d1488d7424d841ba080000004531c9f3abb80d0000004889df4889ca0f05837d08007f1d4531d2b8"
    "ba0000004889d74889d60f054889c74889deb8c80000000f055b5d415c415d415e415fc3"
)
"""What gcc 12 makes of `_view_handler.c`, which says how; the mark stands for the table's place."""


class _SigAction(ctypes.Structure):
    """`struct sigaction` of the C library on x86-64."""

    _fields_: ClassVar = [
        ("handler", ctypes.c_void_p), ("mask", ctypes.c_ulong * 16), ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    ]  # fmt: skip


class Guard:
    """The handler and its table: where this process has views, and which of them were lost."""

    def __init__(self) -> None:
        if platform.machine() != "x86_64" or not os.path.exists("/proc/self/fd"):
            raise failure.of("OPTION", "map: only on x86-64 Linux; read and write work everywhere")
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = [
            ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long,
        ]  # fmt: skip
        self._lock = threading.Lock()
        words = _HEAD_WORDS + _RANGE_WORDS * VIEWS_MAX
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._table = mmap.mmap(-1, words * _WORD, flags=private, prot=_PROTECTION)
        self._words = memoryview(self._table).cast("Q")
        self._words[0] = VIEWS_MAX
        code = _HANDLER.replace(_TABLE_MARK, address_of(self._table).to_bytes(8, "little"))
        self._code = mmap.mmap(-1, mmap.PAGESIZE, flags=private, prot=_PROTECTION)
        self._code[: len(code)] = code
        self._entry = address_of(self._code)
        executable = mmap.PROT_READ | mmap.PROT_EXEC
        if self._libc.mprotect(ctypes.c_void_p(self._entry), mmap.PAGESIZE, executable):
            why = os.strerror(ctypes.get_errno())
            raise failure.of("OPTION", f"map: this system runs no generated code ({why})")

    def arm(self) -> None:
        """Be the handler of SIGBUS, whoever was it before: others may have come after us."""
        with self._lock:
            now = _SigAction()
            self._libc.sigaction(signal.SIGBUS, None, ctypes.byref(now))
            if now.handler == self._entry:
                return
            self._words[1] = now.handler or 0
            ours = _SigAction(self._entry, flags=_SA_SIGINFO | _SA_ONSTACK | _SA_NODEFER)
            self._libc.sigaction(signal.SIGBUS, ctypes.byref(ours), None)

    def watch(self, start: int, length: int) -> int:
        """From now on a fault there is ours; its number."""
        with self._lock:
            for number in range(VIEWS_MAX):
                at = _HEAD_WORDS + number * _RANGE_WORDS
                if self._words[at] == 0:
                    self._words[at + 1], self._words[at + 2] = length, 0
                    self._words[at] = start  # last: the handler believes what has a start
                    return number
        raise failure.of("RATE", f"at most {VIEWS_MAX} views are open at a time")

    def was_lost(self, number: int) -> bool:
        """Whether somebody touched it after the lease's memory was cut off."""
        return self._words[_HEAD_WORDS + number * _RANGE_WORDS + 2] != 0

    def put_zeros(self, view: FabricView) -> None:
        """In the place of what was mapped; after that no fault comes from there. Idempotent."""
        with self._lock:
            number, view._number = view._number, NOWHERE
            if number == NOWHERE:
                return
            at = _HEAD_WORDS + number * _RANGE_WORDS
            start, length = self._words[at], self._words[at + 1]
            self._libc.mmap(start, length, _PROTECTION, _ZEROS, -1, 0)
            self._words[at] = 0


_guard: Guard | None = None
_guard_lock = threading.Lock()


def the_guard() -> Guard:
    """Made once, with the first view."""
    global _guard
    with _guard_lock:
        if _guard is None:
            _guard = Guard()
        _guard.arm()
        return _guard


def address_of(mapped: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapped))


class FabricView:
    """Bytes of a lease, without a copy and without a system call. See the module's rules.

    Not for use by several threads while one of them closes it.
    """

    __slots__ = ("__weakref__", "_at", "_guard", "_lease", "_length", "_map", "_memory", "_number")

    def __init__(self, lease: MemLease, memory: Memory, offset: int, length: int) -> None:
        self._lease, self._memory, self._length = lease, memory, length
        self._number = NOWHERE
        self._guard = the_guard()
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        self._at = offset - start
        try:
            self._map = mmap.mmap(memory.fd, self._at + length, offset=start)
        except (OSError, ValueError):  # it was cut off in this moment
            raise lease._verdict() from None
        pages = -(-(self._at + length) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._number = self._guard.watch(address_of(self._map), pages)

    def __len__(self) -> int:
        return self._length

    @property
    def memory(self) -> memoryview:
        """The bytes, writable, for numpy and the like; zeros once the lease is over. What was read
        of them counts when `check` has returned.

        Raises:
            LeaseExpired, Revoked, Fenced: the lease is over.
        """
        self.check()
        return memoryview(self._map)[self._at : self._at + self._length]

    def __getitem__(self, key: int | slice) -> Any:
        """An int, or a copy of the bytes, which the lease covered when they were read."""
        with self._bytes() as view:
            found: int | bytes = view[key] if isinstance(key, int) else bytes(view[key])
        self.check()
        return found

    def __setitem__(self, key: int | slice, value: Any) -> None:
        """An int, or bytes-like of the slice's length."""
        with self._bytes() as view:
            if isinstance(key, int):
                view[key] = value
            else:
                view[key] = memoryview(value).cast("B")
        self.check()

    def _bytes(self) -> memoryview:
        """For one operation, which is judged after it."""
        if self._number == NOWHERE:
            self.check()
        return memoryview(self._map)[self._at : self._at + self._length]

    def check(self) -> None:
        """Whether all that was done until now was done under the lease.

        Raises:
            LeaseExpired, Revoked, Fenced: the lease is over; what was read may be zeros.
            Disconnected: code CLOSED, the view was closed; FORKED_CHILD, it is the parent's.
        """
        lease = self._lease
        if boot_ns() >= lease._check_ns:
            lease._look()
        if lease._memory is None:
            raise lease._verdict()
        number = self._number
        if number == NOWHERE:
            raise failure.of("CLOSED", "the view", lease_id=lease.lease_id)
        cut = os.lseek(self._memory.fd, 0, os.SEEK_END) != self._memory.size
        if cut or self._guard.was_lost(number) or boot_ns() >= lease._until_ns:
            raise lease._verdict()

    def close(self) -> None:
        """Let go of the bytes. What numpy and others still hold of them shows zeros. Idempotent."""
        self._guard.put_zeros(self)
        try:
            self._map.close()
        except BufferError:  # somebody holds a part: the zeros stay until he lets go
            pass

    def __enter__(self) -> FabricView:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None or not issubclass(kind, FabricError):
                self.check()
        finally:
            self.close()

    def __del__(self) -> None:
        if getattr(self, "_number", NOWHERE) != NOWHERE:
            self.close()

    def __repr__(self) -> str:
        state = "over" if self._number == NOWHERE else f"{self._length} bytes"
        return f"<FabricView of {self._lease.lease_id[:8]}, {state}>"
