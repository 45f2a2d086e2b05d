"""One page of memory that tells three processes, at any instant, which leases are open.

Like a railway signal with two arms, each moved by another signalman: the line is clear only while
both arms say so, either man alone can stop all traffic at once, and an arm that is just moving
counts as stop.

Rules. Control and warden write, each its own cell of a slot, and never the other's. A lease is open
only where both cells name the same lease and epoch and say open; its deadline is the earlier of
the two. A cell stands under a sequence number, odd while it is written, and under a check word over
all of it, so that a reader sees a half-written cell on any processor; it looks a few times more
and then takes it for closed. A writer that dies in the middle leaves its cell closed. Front counts
what it has in flight in a third cell. The page is sealed: nobody can cut it short, so mapping it
is safe.

    header   magic · version · slots · all closed by control · all closed by warden      64 B
    slot     control cell │ warden cell │ front cell │ unused                        4 × 64 B
    cell     sequence · state · epoch · deadline ns · lease id (16 B) · check             64 B
"""

from __future__ import annotations

import enum
import fcntl
import mmap
import os
import threading
from typing import Final

from grafos_core import failure

MAGIC: Final = int.from_bytes(b"GRAFGATE", "little")
VERSION: Final = 1
SLOTS_MAX: Final = 1 << 20
"""256 MiB of page; protects against a nonsensical size, not a goal."""
TORN_READS_MAX: Final = 64
"""A write takes microseconds. A writer that needs longer was stopped in the middle, or is dead."""

_WORD: Final = 8
_HEADER_WORDS, _SLOT_WORDS, _CELL_WORDS = 8, 32, 8
_CLOSED_BY_CONTROL, _CLOSED_BY_WARDEN = 3, 4
_CONTROL, _WARDEN, _FRONT = 0, 8, 16
_SEQUENCE, _STATE, _EPOCH, _DEADLINE, _LEASE, _CHECK = 0, 1, 2, 3, 4, 6
_MASK: Final = (1 << 64) - 1
_MULTIPLIERS: Final = (
    0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9,
    0xD6E8FEB86659FD93, 0xA0761D6478BD642F, 0xE7037ED1A0B428DB,
)  # fmt: skip
"""Odd and unrelated: a mixture of two states of a cell has the check word of neither."""

# Not named by Python 3.11's fcntl in every build. Source: include/uapi/linux/fcntl.h.
_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034
_SEAL_SEAL, _SEAL_SHRINK, _SEAL_GROW = 1, 2, 4
_SEALS: Final = _SEAL_SEAL | _SEAL_SHRINK | _SEAL_GROW


class CellState(enum.IntEnum):
    FREE = 0
    OPEN = 1
    CLOSED = 2


class Verdict(enum.Enum):
    """May an operation under this lease and epoch go on, now?"""

    OPEN = "open"
    CLOSED = "closed"
    EXPIRED = "expired"
    STALE = "stale"
    """The slot serves another lease or epoch."""
    FREE = "free"


class GatePage:
    """The page, mapped. Make it with `create`, or take it up with `attach`."""

    def __init__(self, fd: int, slots: int) -> None:
        self.fd = fd
        self.slots = slots
        self._map = mmap.mmap(fd, _page_bytes(slots))
        self._words = memoryview(self._map).cast("Q")
        self._lock = threading.Lock()

    @classmethod
    def create(cls, slots: int) -> GatePage:
        failure.invariant(1 <= slots <= SLOTS_MAX, "a gate page has 1 to 2^20 slots")
        fd = os.memfd_create("grafos-gate", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, _page_bytes(slots))
        os.posix_fallocate(fd, 0, _page_bytes(slots))
        fcntl.fcntl(fd, _F_ADD_SEALS, _SEALS)
        page = cls(fd, slots)
        page._words[1], page._words[2] = VERSION, slots
        page._words[0] = MAGIC
        return page

    @classmethod
    def attach(cls, fd: int) -> GatePage:
        """Map a page that another process made; the descriptor is the page's from now on."""
        if fcntl.fcntl(fd, _F_GET_SEALS) & _SEALS != _SEALS:
            raise failure.of("VERSION", "gate page: not sealed")
        header = os.pread(fd, 3 * _WORD, 0)
        magic, version, slots = (
            int.from_bytes(header[at : at + _WORD], "little") for at in (0, _WORD, 2 * _WORD)
        )
        if magic != MAGIC or version != VERSION:
            raise failure.of("VERSION", f"gate page: version {version}, this program has {VERSION}")
        if not 1 <= slots <= SLOTS_MAX or os.fstat(fd).st_size != _page_bytes(slots):
            raise failure.of("VERSION", "gate page: its size is not what it says")
        return cls(fd, slots)

    def close(self) -> None:
        """Unmap. What stands in the page stays for the others."""
        self._words.release()
        self._map.close()
        os.close(self.fd)

    def write_control(
        self, slot: int, state: CellState, epoch: int, deadline_ns: int, lease_id: bytes
    ) -> None:
        """Only control."""
        self._write(self._cell(slot, _CONTROL), state, epoch, deadline_ns, lease_id)

    def write_warden(
        self, slot: int, state: CellState, epoch: int, deadline_ns: int, lease_id: bytes
    ) -> None:
        """Only the warden."""
        self._write(self._cell(slot, _WARDEN), state, epoch, deadline_ns, lease_id)

    def close_control(self, slot: int) -> None:
        """Only control. The lease and epoch stay readable, so that others see whose end it was."""
        self._close(self._cell(slot, _CONTROL))

    def close_warden(self, slot: int) -> None:
        """Only the warden."""
        self._close(self._cell(slot, _WARDEN))

    def control_deadline_ns(self, slot: int) -> int:
        """Only control, of a cell that it has written."""
        return self._words[self._cell(slot, _CONTROL) + _DEADLINE]

    def close_all_control(self) -> None:
        """One store ends everything on this page, for good: control is going down."""
        self._words[_CLOSED_BY_CONTROL] = 1
        self._fence()

    def close_all_warden(self) -> None:
        """One store ends everything on this page, for good: control is dead, and so is its page."""
        self._words[_CLOSED_BY_WARDEN] = 1
        self._fence()

    def verdict(self, slot: int, lease_id: bytes, epoch: int, now_ns: int) -> Verdict:
        """Whether this lease is open now. All doubts count as closed."""
        if self._words[_CLOSED_BY_CONTROL] or self._words[_CLOSED_BY_WARDEN]:
            return Verdict.CLOSED
        wanted = (epoch, *_lease_words(lease_id))
        deadline_ns = _MASK
        for part in (_CONTROL, _WARDEN):
            cell = self._read(self._cell(slot, part))
            if cell is None:
                return Verdict.CLOSED
            if part == _CONTROL:
                if cell[_STATE] == CellState.FREE:
                    return Verdict.FREE
                if _names(cell) != wanted:
                    return Verdict.STALE
            if cell[_STATE] != CellState.OPEN or _names(cell) != wanted:
                return Verdict.CLOSED
            deadline_ns = min(deadline_ns, cell[_DEADLINE])
        return Verdict.OPEN if now_ns < deadline_ns else Verdict.EXPIRED

    def watch(self, slot: int, lease_id: bytes, epoch: int) -> Watch:
        """For whoever asks about the same lease again and again."""
        return Watch(self, slot, lease_id, epoch)

    def enter(self, slot: int) -> None:
        """Only front: one more operation in flight. Enter first, then ask for the verdict."""
        at = self._cell(slot, _FRONT)
        with self._lock:
            self._words[at] += 1

    def leave(self, slot: int) -> None:
        at = self._cell(slot, _FRONT)
        with self._lock:
            failure.invariant(self._words[at] > 0, "more operations left than entered")
            self._words[at] -= 1

    def in_flight(self, slot: int) -> int:
        return self._words[self._cell(slot, _FRONT)]

    def is_quiet(self, slot: int) -> bool:
        """Only control, after it has closed its cell: nothing is in flight, and what enters from
        now on is refused."""
        self._fence()
        return self.in_flight(slot) == 0

    def reset_in_flight(self) -> None:
        """Only control, and only while no front lives: the dead have nothing in flight."""
        for slot in range(self.slots):
            self._words[self._cell(slot, _FRONT)] = 0

    def _cell(self, slot: int, part: int) -> int:
        failure.invariant(0 <= slot < self.slots, "the slot is on the page")
        return _HEADER_WORDS + slot * _SLOT_WORDS + part

    def _write(self, at: int, state: int, epoch: int, deadline_ns: int, lease_id: bytes) -> None:
        """Each store is one aligned word; the sequence turns even only after the last of them."""
        words = self._words
        with self._lock:
            odd = (words[at + _SEQUENCE] + 1) | 1  # also where a dead writer left it odd
            fields = [odd + 1, int(state), epoch, deadline_ns, *_lease_words(lease_id)]
            words[at + _SEQUENCE] = odd
            for offset, value in enumerate(fields[1:], start=1):
                words[at + offset] = value
            words[at + _CHECK] = _check_word(fields)
            words[at + _SEQUENCE] = odd + 1

    def _close(self, at: int) -> None:
        words = self._words[at : at + _CELL_WORDS].tolist()
        lease_id = b"".join(word.to_bytes(_WORD, "little") for word in words[_LEASE:_CHECK])
        self._write(at, CellState.CLOSED, words[_EPOCH], words[_DEADLINE], lease_id)

    def _read(self, at: int) -> list[int] | None:
        """A cell as it was at one instant; None if it never held still."""
        for _ in range(TORN_READS_MAX):
            cell = self._words[at : at + _CELL_WORDS].tolist()
            if (
                cell[_SEQUENCE] % 2 == 0
                and cell[_SEQUENCE] == self._words[at]
                and (cell[_CHECK] == _check_word(cell[:_CHECK]) or not any(cell))
            ):
                return cell
        return None

    def _fence(self) -> None:
        """Whoever counts what is in flight after this sees all who did not see the store.

        Giving back a lock is an atomic instruction, which no processor lets later loads overtake;
        `enter` and `_write` do the same.
        """
        with self._lock:
            pass


class Watch:
    """Looks at one lease's cells over and over; quick for as long as neither is written.

    A cell that was found open stays as it was found while its sequence number is the same: a writer
    changes that number before anything else.
    """

    __slots__ = (
        "_control", "_deadline_ns", "_front", "_lock", "_named", "_page", "_seen_control",
        "_seen_warden", "_warden", "_words",
    )  # fmt: skip

    def __init__(self, page: GatePage, slot: int, lease_id: bytes, epoch: int) -> None:
        self._page, self._words = page, page._words
        self._named = (slot, lease_id, epoch)
        self._control, self._warden = page._cell(slot, _CONTROL), page._cell(slot, _WARDEN)
        self._front, self._lock = page._cell(slot, _FRONT), page._lock
        self._seen_control = self._seen_warden = -1
        self._deadline_ns = 0

    def is_open(self, now_ns: int) -> bool:
        """As `GatePage.verdict`, which says why not."""
        words = self._words
        if (
            words[self._control] == self._seen_control
            and words[self._warden] == self._seen_warden
            and not words[_CLOSED_BY_CONTROL]
            and not words[_CLOSED_BY_WARDEN]
        ):
            return now_ns < self._deadline_ns
        return self._look(now_ns)

    def enter(self) -> None:
        """As `GatePage.enter`."""
        with self._lock:
            self._words[self._front] += 1

    def leave(self) -> None:
        with self._lock:
            failure.invariant(self._words[self._front] > 0, "more operations left than entered")
            self._words[self._front] -= 1

    def _look(self, now_ns: int) -> bool:
        page, (slot, lease_id, epoch) = self._page, self._named
        cells = page._read(self._control), page._read(self._warden)
        if page.verdict(slot, lease_id, epoch, now_ns) is not Verdict.OPEN:
            return False
        wanted = (epoch, *_lease_words(lease_id))
        if cells[0] and cells[1]:
            control, warden = cells[0], cells[1]
            named = _names(control) == wanted and _names(warden) == wanted
            if named and control[_STATE] == warden[_STATE] == CellState.OPEN:
                self._deadline_ns = min(control[_DEADLINE], warden[_DEADLINE])
                self._seen_control, self._seen_warden = control[_SEQUENCE], warden[_SEQUENCE]
        return True


def _page_bytes(slots: int) -> int:
    return (_HEADER_WORDS + slots * _SLOT_WORDS) * _WORD


def _lease_words(lease_id: bytes) -> tuple[int, int]:
    failure.invariant(len(lease_id) == 16, "a lease id has 16 bytes")
    return int.from_bytes(lease_id[:8], "little"), int.from_bytes(lease_id[8:], "little")


def _names(cell: list[int]) -> tuple[int, int, int]:
    return cell[_EPOCH], cell[_LEASE], cell[_LEASE + 1]


def _check_word(fields: list[int]) -> int:
    sequence, state, epoch, deadline_ns, low, high = fields
    a, b, c, d, e, f = _MULTIPLIERS
    mixed = sequence * a + state * b + epoch * c + deadline_ns * d + low * e + high * f
    return (mixed ^ (mixed >> 64)) & _MASK
