"""The clock of a test: it stands still until somebody says how far it should go on.

Rules. All fabrics of a process share it; it is put in the place of the SDK's clock with the first
one, at the same instant each time, and taken away with the last one. It goes from one instant at
which something is due to the next, so that an hour in which nothing happens costs nothing and no
deadline is passed over. Whoever sleeps moves it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Final, Protocol

from grafos import _clock
from grafos._clock import NS_PER_MS
from grafos_core import failure
from grafos_core.node_effects import Instant

BOOT_START_MS: Final = 1_000_000
WALL_START_MS: Final = 1_767_225_600_000
"""2026-01-01, midnight UTC: tests that print an instant print the same one each time."""
ADVANCE_S_MAX: Final = 366 * 86_400


class World(Protocol):
    """What lives by the clock."""

    def next_ms(self) -> int | None:
        """The boottime at which something is due; None: nothing ever."""

    def wake(self) -> None:
        """Do what is due now."""

    def beat(self) -> None:
        """Do what the program's own threads would do now. Called without the lock."""


class VirtualTime:
    """Boottime and wall clock of all virtual fabrics in this process. Thread-safe."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        """Held by whoever changes anything in any of the worlds."""
        self._boot_ns = BOOT_START_MS * NS_PER_MS
        self._worlds: list[World] = []
        self._woken_ms = 0
        self._beating = threading.local()

    @property
    def now_ms(self) -> int:
        """Wall clock, as `lease.expiry_ms` counts."""
        return self.wall_ns() // NS_PER_MS

    @property
    def boot_ms(self) -> int:
        return self._boot_ns // NS_PER_MS

    @property
    def instant(self) -> Instant:
        return Instant(self.boot_ms, self.now_ms)

    def boot_ns(self) -> int:
        return self._boot_ns

    def wall_ns(self) -> int:
        return self._boot_ns + (WALL_START_MS - BOOT_START_MS) * NS_PER_MS

    def sleep(self, seconds: float) -> None:
        """What the SDK does between two attempts."""
        self._go_on_to(self._boot_ns + round(seconds * 1e9))

    def advance(self, seconds: float) -> None:
        """Let so much time pass; whatever falls due meanwhile is done, each at its instant."""
        if not 0 <= seconds <= ADVANCE_S_MAX:
            raise failure.of("RANGE", f"advance: 0 to {ADVANCE_S_MAX} seconds")
        self._go_on_to(self._boot_ns + round(seconds * 1e9))

    def wait_for(self, done: Callable[[], bool], until_ms: int) -> bool:
        """Let time pass until `done`, at most to this boottime; whether it is."""
        while not done():
            if self.boot_ms >= until_ms:
                return False
            self.step(until_ms * NS_PER_MS)
        return True

    def step(self, until_ns: int) -> None:
        """To the next instant at which something is due, and no further than `until_ns`."""
        self._beat()
        self._wake(until_ns)
        self._beat()

    def _wake(self, until_ns: int) -> None:
        with self.lock:
            due = [at_ms for world in self._worlds if (at_ms := world.next_ms()) is not None]
            # What is due and does not become undone must not stop the clock.
            due_ns = max(min(due), self._woken_ms + 1) * NS_PER_MS if due else until_ns
            self._boot_ns = max(self._boot_ns, min(due_ns, until_ns))
            self._woken_ms = self.boot_ms
            for world in list(self._worlds):
                world.wake()

    def join(self, world: World) -> None:
        """Live by this clock from now on; with the first one the whole SDK does."""
        with self.lock:
            if not self._worlds:
                self._boot_ns, self._woken_ms = BOOT_START_MS * NS_PER_MS, 0
                _clock.use(self)
            self._worlds.append(world)

    def leave(self, world: World) -> None:
        with self.lock:
            if world in self._worlds:
                self._worlds.remove(world)
            if not self._worlds:
                _clock.use(None)

    def _go_on_to(self, until_ns: int) -> None:
        while True:
            self.step(until_ns)
            if self._boot_ns >= until_ns:
                return

    def _beat(self) -> None:
        """The threads of the SDK, which here are nobody's; not again while they are at it."""
        if getattr(self._beating, "now", False):
            return
        self._beating.now = True
        try:
            for world in list(self._worlds):
                world.beat()
        finally:
            self._beating.now = False


TIME: Final = VirtualTime()


def _in_child() -> None:
    """A forked child has none of its parent's fabrics, and lives by the machine's clock."""
    TIME.lock = threading.RLock()
    TIME._worlds.clear()
    _clock.use(None)


os.register_at_fork(after_in_child=_in_child)
