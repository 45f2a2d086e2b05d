"""A load on the fabric that knows what it may read: every byte it writes says whose it is.

    acquire ─► all zeros? ─► write, read, renew, … ─► release | hand on to another | let it expire

Rules. A pattern carries lease, epoch, place and a number that rises; a read must give what was last
written there under this lease, or, where the write's answer was lost, what it would have replaced.
Anything else is noted as wrong. Typed failures are welcome, whatever they say; a failure without a
type, an internal error or an operation that takes for ever is noted as wrong. What a service has
told us is written down after it was told and never before. Dice are seeded; real time is not.
"""

from __future__ import annotations

import queue
import random
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from grafos import BlockBuilder, MemBuilder
from grafos._block import BlockLease
from grafos._connection import Fabric
from grafos._memory import MemLease
from grafos_core.failure import FabricError, InternalError
from tests.chaos.laws import Told

CHUNK_BYTES: Final = 64
BLOCK_BYTES: Final = 4096
OPERATION_S_MAX: Final = 30.0
"""Beyond this it counts as hung: ten seconds is the longest deadline of a single call."""
PAUSE_S: Final = 0.02
EASY_PAUSE_S: Final = 0.25
LONG_S: Final = 30
LONG_NODE: Final = "n1"
"""Whose agent is the one that dies."""
NOTHING_DONE: Final = frozenset({"NO_CAPACITY", "NO_EXTENT", "QUOTA", "NODE_NOT_READY"})
"""Refused by a look at a table; not counted as operations."""


@dataclass(slots=True)
class Note:
    """One line of what a load has to say."""

    what: str
    """`done`, `failed`, `told`, `wrong`, `zombie`."""
    text: str = ""
    told: Told | None = None


class Journal:
    """What happened, in order. `say` may be called by many threads."""

    def __init__(self, say: Callable[[Note], None]) -> None:
        self.say = say

    def done(self, verb: str) -> None:
        self.say(Note("done", verb))

    def failed(self, verb: str, refused: FabricError) -> None:
        self.say(Note("failed", f"{verb} {refused.code}"))

    def told(self, told: Told) -> None:
        self.say(Note("told", told.verb, told))

    def wrong(self, text: str) -> None:
        self.say(Note("wrong", text))


def pattern(lease_id: str, epoch: int, place: int, number: int, length: int) -> bytes:
    """Bytes that say of which lease, epoch and place they are, and which writing they are."""
    head = bytes.fromhex(lease_id) + b"".join(n.to_bytes(8, "big") for n in (epoch, place, number))
    return (head * (length // len(head) + 1))[:length]


@dataclass(slots=True)
class Held:
    """A lease in a worker's hands, and what may be read from it."""

    lease: MemLease | BlockLease
    places: int
    number: int = 0
    may_be: dict[int, set[bytes]] = field(default_factory=dict)
    """By place, what a read may give; a place that is missing reads as zeros."""

    @property
    def chunk_bytes(self) -> int:
        return CHUNK_BYTES if isinstance(self.lease, MemLease) else BLOCK_BYTES

    def write(self, place: int) -> None:
        length = self.chunk_bytes
        self.number += 1
        data = pattern(self.lease.lease_id, self.lease.epoch, place, self.number, length)
        before = self.may_be.setdefault(place, {bytes(length)})
        before.add(data)
        if isinstance(self.lease, MemLease):
            self.lease.mem().write(place * length, data)
        else:
            self.lease.block().write_block(place, data)
        self.may_be[place] = {data}

    def read(self, place: int) -> str:
        """What is wrong with what was read; empty: nothing."""
        length = self.chunk_bytes
        if isinstance(self.lease, MemLease):
            data = self.lease.mem().read(place * length, length)
        else:
            data = self.lease.block().read_block(place)
        good = self.may_be.get(place, {bytes(length)})
        if data in good:
            return ""
        whose = "other bytes" if any(data) else "zeros"
        name = f"{self.lease.kind} lease {self.lease.lease_id}, place {place}"
        return f"law 4: {name}: read {whose}, not what was written: {data[:40].hex()}"


@dataclass(slots=True)
class HandedOn:
    """A detached lease on its way to whoever attaches it."""

    lease_id: str
    kind: str
    places: int
    number: int
    may_be: dict[int, set[bytes]]


class Worker:
    """Leases, uses and gives back, over and over, until it is told to stop.

    Beside the short leases it has a long one, for as long as that lives: so whatever dies,
    something is held while it is dead, and used again when its successor is there.
    """

    def __init__(
        self, fabric: Fabric, journal: Journal, seed: str, handed_on: queue.Queue[HandedOn]
    ) -> None:
        self._fabric, self._journal, self._handed_on = fabric, journal, handed_on
        self._dice = random.Random(seed)
        self._long: Held | None = None
        self._stop, self._easy = threading.Event(), threading.Event()

    def ease(self) -> None:
        """Enough was done to prove something; go on, but leave room for others."""
        self._easy.set()

    def stop(self) -> None:
        self._stop.set()

    def run(self) -> None:
        while not self._stop.is_set():
            if self._easy.is_set():
                self._stop.wait(EASY_PAUSE_S)
            try:
                self._cycle()
            except Exception as surprise:  # whatever it is, it has no type that users could catch
                self._journal.wrong(f"untyped: {type(surprise).__name__}: {surprise}")
        if self._long is not None:
            self._release(self._long)

    def _cycle(self) -> None:
        self._use_long()
        held = self._attach() if self._dice.random() < 0.5 else None
        held = held or self._acquire()
        if held is None:
            self._stop.wait(PAUSE_S)
            return
        for _ in range(self._dice.randint(3, 8)):
            if not self._use(held):
                break
        self._part_with(held)

    def _use_long(self) -> None:
        held = self._long
        if held is None:
            builder = (
                MemBuilder().min_bytes(4096)
                if self._dice.random() < 0.7
                else BlockBuilder().min_blocks(1)
            )
            self._long = self._taken(builder.where(node=LONG_NODE).lease_secs(LONG_S), places=1)
        elif held.lease.valid:
            self._try("write", lambda: held.write(0))
            self._read(held, 0)
        else:
            self._release(held)
            self._long = None

    def _acquire(self) -> Held | None:
        dice = self._dice
        builder: Any
        if dice.random() < 0.5:
            pages = dice.choice((1, 1, 2, 16, 64))
            builder, places = MemBuilder().min_bytes(pages * 4096), pages * 64
        else:
            places = dice.choice((1, 2, 8, 32))
            builder = BlockBuilder().min_blocks(places)
        return self._taken(builder.lease_secs(dice.choice((2, 5, 20))), places)

    def _taken(self, builder: Any, places: int) -> Held | None:
        """A new lease, whose bytes must all be zeros."""
        lease = self._try("acquire", builder.fabric(self._fabric).acquire)
        if lease is None:
            return None
        self._tell("acquire", lease)
        held = Held(lease, places)
        for place in {0, self._dice.randrange(places), places - 1}:
            self._read(held, place)
        return held

    def _attach(self) -> Held | None:
        try:
            coming = self._handed_on.get_nowait()
        except queue.Empty:
            return None
        builder: Any = MemBuilder() if coming.kind == "mem" else BlockBuilder()
        lease = self._try("attach", lambda: builder.fabric(self._fabric).attach(coming.lease_id))
        if lease is None:
            return None
        self._tell("attach", lease)
        held = Held(lease, coming.places, coming.number, coming.may_be)
        for place in list(coming.may_be)[:4]:
            self._read(held, place)
        return held

    def _use(self, held: Held) -> bool:
        """One operation; whether the lease goes on."""
        drawn, place = self._dice.random(), self._dice.randrange(held.places)
        if drawn < 0.45:
            self._try("write", lambda: held.write(place))
        elif drawn < 0.85:
            written = list(held.may_be)
            self._read(held, self._dice.choice(written) if written else place)
        elif self._try("renew", held.lease.renew) is not None:
            self._tell("renew", held.lease)
        return held.lease.valid and not self._stop.is_set()

    def _read(self, held: Held, place: int) -> None:
        wrong = self._try("read", lambda: held.read(place))
        if wrong:
            self._journal.wrong(wrong)

    def _part_with(self, held: Held) -> None:
        drawn = self._dice.random()
        if drawn < 0.15 and held.lease.valid:
            if self._detach(held):
                return
        elif drawn < 0.2:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)
                del held.lease  # nobody holds it: given back at the next call
            self._journal.done("forget")
            return
        self._release(held)

    def _release(self, held: Held) -> None:
        receipt = self._try("release", held.lease.release)
        if receipt is None:
            return
        lease = held.lease
        self._journal.told(
            Told(
                "release", lease.lease_id, lease.node_id, lease.epoch,
                credited=receipt.credited, record_number=receipt.record_number,
                record_hash=receipt.record_hash,
            )
        )  # fmt: skip

    def _detach(self, held: Held) -> bool:
        lease = held.lease

        def detach() -> bool:
            lease.detach()
            return True

        self._tell("detach", lease)
        if not self._try("detach", detach):
            return False
        self._handed_on.put(
            HandedOn(lease.lease_id, lease.kind, held.places, held.number, held.may_be)
        )
        return True

    def _tell(self, verb: str, lease: MemLease | BlockLease) -> None:
        self._journal.told(Told(verb, lease.lease_id, lease.node_id, lease.epoch, lease.generation))

    def _try(self, verb: str, operation: Callable[[], Any]) -> Any:
        """What it gave; None where it was refused with a type."""
        begun = time.monotonic()
        try:
            found = operation()
        except InternalError as broken:
            self._journal.wrong(f"{verb}: internal error: {broken}")
            return None
        except FabricError as refused:
            if refused.code not in NOTHING_DONE:
                self._journal.failed(verb, refused)
            return None
        finally:
            took_s = time.monotonic() - begun
            if took_s > OPERATION_S_MAX:
                self._journal.wrong(f"{verb} took {took_s:.1f} s")
        self._journal.done(verb)
        return found
