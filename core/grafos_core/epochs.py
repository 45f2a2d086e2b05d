"""Which epochs of a resource are used up: a number that was presented once never counts again.

Two shapes. Of an amount (memory, cores) many leases are live at once, and an older grant may be
bound after a newer one: `EpochWindow` keeps a floor and, above it, every epoch that was used, as
the anti-replay window of IPsec does (RFC 4303, section 3.4.3). Of a disk's blocks each granule has
one holder at a time: `ExtentEpochs` keeps the highest epoch per run of blocks.

Rules: what is refused once is refused for ever. Both shapes are bounded; where a bound is met they
forget details in the safe direction, by refusing more.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, Final

from grafos_core.failure import invariant
from grafos_core.lease import EPOCH_MAX

BURNT_MAX: Final = 4096
"""Used epochs that are remembered one by one; below the oldest of them everything is refused."""
RUNS_MAX: Final = 65_536
"""Runs of blocks with an epoch of their own."""


class EpochWindow:
    """Used epochs of an amount. Acceptable is what is neither below nor in the window."""

    __slots__ = ("_burnt", "_burnt_max", "_floor_seen", "floor")

    def __init__(
        self, floor: int = 1, burnt: Iterable[int] = (), *, burnt_max: int = BURNT_MAX
    ) -> None:
        self.floor = floor
        """The lowest epoch that may still be accepted."""
        self._burnt = sorted({epoch for epoch in burnt if epoch >= floor})
        self._burnt_max = burnt_max
        self._floor_seen = floor
        self._shrink()

    @property
    def burnt(self) -> frozenset[int]:
        return frozenset(self._burnt)

    @property
    def high_water(self) -> int:
        """The highest epoch that was ever used; 0 when none was."""
        return self._burnt[-1] if self._burnt else self.floor - 1

    def refusal(self, epoch: int) -> str:
        """The code of the failure that this epoch meets; empty when it is acceptable."""
        if epoch < self.floor:
            return "EPOCH_STALE"
        at = bisect_left(self._burnt, epoch)
        return "EPOCH_BURNT" if self._burnt[at : at + 1] == [epoch] else ""

    def use(self, epoch: int) -> bool:
        """From now on `epoch` is refused. Whether it was acceptable before."""
        if self.refusal(epoch):
            return False
        insort(self._burnt, epoch)
        self._shrink()
        return True

    def _shrink(self) -> None:
        while len(self._burnt) > self._burnt_max:
            self.floor = self._burnt.pop(0) + 1

    def value(self) -> dict[str, Any]:
        """What `EpochWindow.of` makes the same window of, for durable storage."""
        return {"floor": self.floor, "burnt": list(self._burnt)}

    @classmethod
    def of(cls, value: dict[str, Any]) -> EpochWindow:
        return cls(value["floor"], value["burnt"])

    def check(self) -> None:
        invariant(self.floor >= self._floor_seen, "the floor never falls")
        self._floor_seen = self.floor
        invariant(len(self._burnt) <= self._burnt_max, "the window is bounded")
        invariant(all(a < b for a, b in pairwise(self._burnt)), "the window rises")
        invariant(not self._burnt or self._burnt[0] >= self.floor, "the window is above the floor")
        invariant(self.high_water <= EPOCH_MAX, "epochs have an end")


class ExtentEpochs:
    """The highest epoch used per block, as runs `start <= block < end`; elsewhere none was used."""

    __slots__ = ("_runs", "_runs_max")

    def __init__(
        self, runs: Iterable[tuple[int, int, int]] = (), *, runs_max: int = RUNS_MAX
    ) -> None:
        self._runs: list[tuple[int, int, int]] = sorted(runs)
        self._runs_max = runs_max

    @property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        return tuple(self._runs)

    @property
    def high_water(self) -> int:
        return max((epoch for _, _, epoch in self._runs), default=0)

    def _overlapping(self, start: int, end: int) -> tuple[int, int]:
        """The slice of runs that share a block with `start <= block < end`."""
        first = bisect_right(self._runs, start, key=lambda run: run[1])
        last = bisect_left(self._runs, end, key=lambda run: run[0])
        return first, last

    def refusal(self, start: int, end: int, epoch: int) -> str:
        first, last = self._overlapping(start, end)
        highest = max((run[2] for run in self._runs[first:last]), default=0)
        if epoch < highest:
            return "EPOCH_STALE"
        return "EPOCH_BURNT" if epoch == highest else ""

    def use(self, start: int, end: int, epoch: int) -> bool:
        """No epoch up to `epoch` is accepted there any more. Whether it was acceptable before."""
        acceptable = not self.refusal(start, end, epoch)
        first, last = self._overlapping(start, end)
        pieces: list[tuple[int, int, int]] = []
        at = start
        for run_start, run_end, run_epoch in self._runs[first:last]:
            if run_start < start:
                pieces.append((run_start, start, run_epoch))
            if at < run_start:
                pieces.append((at, run_start, epoch))
            pieces.append((max(run_start, start), min(run_end, end), max(run_epoch, epoch)))
            at = min(run_end, end)
            if run_end > end:
                pieces.append((end, run_end, run_epoch))
        if at < end:
            pieces.append((at, end, epoch))
            pieces.sort()
        self._runs[first:last] = _joined(pieces)
        if len(self._runs) > self._runs_max:
            self._coarsen()
        return acceptable

    def _coarsen(self) -> None:
        """Halve the number of runs: two neighbours, and the gap between, get the higher epoch."""
        runs = self._runs
        self._runs = _joined(
            [
                (runs[i][0], runs[min(i + 1, len(runs) - 1)][1], max(r[2] for r in runs[i : i + 2]))
                for i in range(0, len(runs), 2)
            ]
        )

    def value(self) -> list[list[int]]:
        """What `ExtentEpochs.of` makes the same map of, for durable storage."""
        return [list(run) for run in self._runs]

    @classmethod
    def of(cls, value: Iterable[Iterable[int]]) -> ExtentEpochs:
        return cls((start, end, epoch) for start, end, epoch in value)

    def check(self) -> None:
        invariant(len(self._runs) <= self._runs_max, "the map is bounded")
        for start, end, epoch in self._runs:
            invariant(0 <= start < end and 0 < epoch <= EPOCH_MAX, "a run is a run")
        for before, after in pairwise(self._runs):
            invariant(before[1] <= after[0], "runs are apart")


def _joined(runs: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Neighbours of one epoch as one run."""
    joined: list[tuple[int, int, int]] = []
    for start, end, epoch in runs:
        if joined and joined[-1][1] == start and joined[-1][2] == epoch:
            start = joined.pop()[0]
        joined.append((start, end, epoch))
    return joined
