"""The one clock of the services.

Rules. Deadlines are kept by the boot-time clock, which never goes back and goes on while the
machine sleeps; the wall clock is for people, for certificates and tokens, and for what crosses
machines. Everything that decides takes its time as an argument; a test passes a clock of its own.
"""

from __future__ import annotations

import time
from typing import NamedTuple, Protocol


class Instant(NamedTuple):
    """One reading of both clocks."""

    boot_ms: int
    wall_ms: int


class Clock(Protocol):
    """Whatever tells the time."""

    def wall_ms(self) -> int: ...

    def boot_ns(self) -> int: ...

    def boot_ms(self) -> int: ...

    def instant(self) -> Instant: ...


class SystemClock:
    """This machine's clocks."""

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def boot_ns(self) -> int:
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def boot_ms(self) -> int:
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000

    def instant(self) -> Instant:
        return Instant(self.boot_ms(), self.wall_ms())


SYSTEM: Clock = SystemClock()
