"""The ledger's time: the wall clock, made so that it never goes back and never leaps.

Rules. Time begins no earlier than the latest event that is on disk, the floor. While the wall clock
is behind what was already given out, time stands still; when it leaps ahead, time goes on at the
pace of the boot-time clock instead. In both cases `why` says so, and the ledger promises nothing
new: a lease must not become longer because a clock was set, and what is free must not seem ended.
Nor does it for some seconds after: nodes that were heard before a step back would seem to have
been heard just now.
A leap that lasts is believed at the next start, which is a person's decision.
"""

from __future__ import annotations

from typing import Final

from grafos_core.lease import CLOCK_ERROR_MS, rate_margin_ms
from grafos_core.lessor import EVIDENCE_MS_MAX
from services.runtime.clock import Instant

HOLD_MS: Final = EVIDENCE_MS_MAX + 2 * CLOCK_ERROR_MS
"""By then everything that was heard before is too old, although time may stand still for the second
part of it: a clock that is within its error of the floor is in order."""


class LedgerTime:
    def __init__(self, floor_ms: int) -> None:
        self._now_ms = floor_ms
        self._trusted: Instant | None = None
        """When the wall clock was in order. It stays at a reading that the wall clock has fallen
        behind of since, which may then come back to where it should be."""
        self._held_until_ms: int | None = None
        self.why = ""
        """Why nothing new is promised; empty: the clock is in order."""

    def read(self, now: Instant) -> int:
        """The ledger's time at this instant."""
        right_ms = self._right_ms(now)
        if right_ms is not None and now.wall_ms > right_ms + CLOCK_ERROR_MS:
            self._distrust(now, f"the wall clock leapt ahead by {now.wall_ms - right_ms} ms")
            self._now_ms = max(self._now_ms, right_ms)
        elif now.wall_ms < self._now_ms - CLOCK_ERROR_MS:
            behind_ms = self._now_ms - now.wall_ms
            self._distrust(now, f"the wall clock is {behind_ms} ms behind the time floor")
        else:
            self._trust(now, right_ms)
        return self._now_ms

    def _distrust(self, now: Instant, why: str) -> None:
        self.why = why
        if self._trusted is not None:
            self._held_until_ms = now.boot_ms + HOLD_MS

    def _trust(self, now: Instant, right_ms: int | None) -> None:
        self._now_ms = max(self._now_ms, now.wall_ms)
        trusted = self._trusted
        passed_ms = 0 if trusted is None else now.boot_ms - trusted.boot_ms
        if right_ms is None or now.wall_ms >= right_ms - rate_margin_ms(passed_ms):
            self._trusted = now
        is_held = self._held_until_ms is not None and now.boot_ms < self._held_until_ms
        self.why = "the wall clock was set, and what was heard before has no age" if is_held else ""

    def _right_ms(self, now: Instant) -> int | None:
        """What the wall clock would show had it gone on since then like the boot-time clock."""
        trusted = self._trusted
        return None if trusted is None else trusted.wall_ms + now.boot_ms - trusted.boot_ms
