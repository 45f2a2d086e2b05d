"""The ledger's time: the wall clock, made so that it never goes back and never leaps.

Rules. Time begins no earlier than the latest event that is on disk, the floor. While the wall clock
is behind what was already given out, time stands still; when it leaps ahead, time goes on at the
pace of the boot-time clock instead. In both cases `why` says so, and the ledger promises nothing
new: a lease must not become longer because a clock was set, and what is free must not seem ended.
A leap that lasts is believed at the next start, which is a person's decision.
"""

from __future__ import annotations

from grafos_core.lease import CLOCK_ERROR_MS
from services.runtime.clock import Instant


class LedgerTime:
    def __init__(self, floor_ms: int) -> None:
        self._now_ms = floor_ms
        self._trusted: Instant | None = None
        """The latest reading at which the wall clock was in order."""
        self.why = ""
        """Why nothing new is promised; empty: the clock is in order."""

    def read(self, now: Instant) -> int:
        """The ledger's time at this instant."""
        right_ms = self._right_ms(now)
        if right_ms is not None and now.wall_ms > right_ms + CLOCK_ERROR_MS:
            self.why = f"the wall clock leapt ahead by {now.wall_ms - right_ms} ms"
            self._now_ms = max(self._now_ms, right_ms)
        elif now.wall_ms < self._now_ms - CLOCK_ERROR_MS:
            self.why = f"the wall clock is {self._now_ms - now.wall_ms} ms behind the time floor"
        else:
            self.why, self._trusted = "", now
            self._now_ms = max(self._now_ms, now.wall_ms)
        return self._now_ms

    def _right_ms(self, now: Instant) -> int | None:
        """What the wall clock would show had it gone on since then like the boot-time clock."""
        trusted = self._trusted
        return None if trusted is None else trusted.wall_ms + now.boot_ms - trusted.boot_ms
