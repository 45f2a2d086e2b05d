"""The wall time that has certainly passed, so that a clock that was set back gives nobody more.

Whoever was handed a letter with today's date knows that yesterday is over, whatever his own clock
shows. From that letter on he counts by a watch that cannot be set, a little slowly, to be sure.

Rules: only what the control plane has signed is believed, and nothing of it that lies ahead of the
own wall clock by more than clocks may differ: one service that jumped ahead must not stop every
node.
"""

from __future__ import annotations

from grafos_core.lease import CLOCK_ERROR_MS, rate_margin_ms
from grafos_core.node_effects import Instant


class TimeFloor:
    """Wall time that has certainly passed, learnt from what the control plane signed."""

    __slots__ = ("_at_boot_ms", "_floor_ms")

    def __init__(self, floor_ms: int, now: Instant) -> None:
        self._floor_ms = floor_ms
        self._at_boot_ms = now.boot_ms

    def floor_ms(self, now: Instant) -> int:
        passed_ms = now.boot_ms - self._at_boot_ms
        return self._floor_ms + passed_ms - rate_margin_ms(passed_ms)

    def learn(self, issued_ms: int, now: Instant) -> None:
        """A signed instant; one from far ahead is not believed, it would stop this node."""
        if issued_ms <= now.wall_ms + CLOCK_ERROR_MS and issued_ms > self.floor_ms(now):
            self._floor_ms, self._at_boot_ms = issued_ms, now.boot_ms

    def now_ms(self, now: Instant) -> int:
        return max(now.wall_ms, self.floor_ms(now))

    def regressed(self, now: Instant) -> bool:
        """Whether the wall clock stands where it cannot stand."""
        return now.wall_ms < self.floor_ms(now) - CLOCK_ERROR_MS
