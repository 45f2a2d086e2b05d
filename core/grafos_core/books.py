"""Where the capacity of one node and kind is: free, leased, ending or fenced, and nowhere else.

    free ──grant──► leased ──end──► ending ──receipt──► free
                      │               └──failed──► fenced ──clear──► free
                      └── (burnt before it was bound: through ending as well)

`move` is the only way in which an amount changes its place, and it moves exactly what it takes; so
the sum cannot change and no place can go below zero. `withheld` is no place of its own but what
`free` is called while its node drains or is lost.

Block is also cut in extents: `ExtentMap` knows which blocks are free, first fit, merged when they
come back. Other kinds are mere amounts.
"""

from __future__ import annotations

import bisect
import enum
import itertools
from dataclasses import dataclass

from grafos_core import failure


class Place(enum.Enum):
    FREE = "free"
    LEASED = "leased"
    ENDING = "ending"
    FENCED = "fenced"


@dataclass(frozen=True, slots=True)
class BookView:
    """free + leased + ending + fenced + withheld = total."""

    total: int
    free: int
    leased: int
    ending: int
    fenced: int
    withheld: int
    largest_free_extent: int


class CapacityBook:
    def __init__(self, total: int, *, extents: bool) -> None:
        failure.invariant(total >= 0, "capacity is negative")
        self._places = dict.fromkeys(Place, 0)
        self._places[Place.FREE] = total
        self.total = total
        self._extents = ExtentMap(total) if extents else None

    def amount(self, place: Place) -> int:
        return self._places[place]

    def find(self, amount: int) -> int | None:
        """Where `amount` would go: first block of an extent, 0 for amounts; None: nowhere."""
        if self._places[Place.FREE] < amount:
            return None
        return self._extents.find(amount) if self._extents else 0

    def take(self, offset: int, amount: int) -> None:
        self.move(Place.FREE, Place.LEASED, amount)
        if self._extents:
            self._extents.take(offset, amount)

    def give_back(self, origin: Place, offset: int, amount: int) -> None:
        self.move(origin, Place.FREE, amount)
        if self._extents:
            self._extents.give_back(offset, amount)

    def move(self, origin: Place, target: Place, amount: int) -> None:
        failure.invariant(amount >= 0, "an amount is negative")
        failure.invariant(
            self._places[origin] >= amount, f"{origin.value} holds less than {amount}"
        )
        self._places[origin] -= amount
        self._places[target] += amount

    def resize(self, total: int) -> bool:
        """Offer more, or less where that much is free at the end. False: not possible now."""
        change = total - self.total
        if self._places[Place.FREE] + change < 0:
            return False
        if self._extents and not self._extents.resize(total):
            return False
        self._places[Place.FREE] += change
        self.total = total
        return True

    def least_total(self) -> int:
        """The least that can be offered now: extents end where the last block in use does."""
        if self._extents:
            return self._extents.used_end()
        return self.total - self._places[Place.FREE]

    def view(self, *, available: bool) -> BookView:
        free = self._places[Place.FREE]
        largest = self._extents.largest() if self._extents else free
        return BookView(
            total=self.total,
            free=free if available else 0,
            leased=self._places[Place.LEASED],
            ending=self._places[Place.ENDING],
            fenced=self._places[Place.FENCED],
            withheld=0 if available else free,
            largest_free_extent=largest if available else 0,
        )

    def check(self) -> None:
        """Law 2."""
        failure.invariant(sum(self._places.values()) == self.total, "capacity is not conserved")
        failure.invariant(min(self._places.values()) >= 0, "an amount is negative")
        if self._extents:
            self._extents.check(self._places[Place.FREE])


class ExtentMap:
    """Free runs of blocks, sorted, never touching each other."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._starts: list[int] = [0] if total else []
        self._ends: list[int] = [total] if total else []

    def find(self, length: int) -> int | None:
        for start, end in zip(self._starts, self._ends, strict=True):
            if end - start >= length:
                return start
        return None

    def largest(self) -> int:
        return max((e - s for s, e in zip(self._starts, self._ends, strict=True)), default=0)

    def take(self, start: int, length: int) -> None:
        index = bisect.bisect_right(self._starts, start) - 1
        inside = index >= 0 and start + length <= self._ends[index]
        failure.invariant(inside and length > 0, f"blocks {start}+{length} are not free")
        run_start, run_end = self._starts[index], self._ends[index]
        left, right = (run_start, start), (start + length, run_end)
        kept = [run for run in (left, right) if run[0] < run[1]]
        self._starts[index : index + 1] = [run[0] for run in kept]
        self._ends[index : index + 1] = [run[1] for run in kept]

    def give_back(self, start: int, length: int) -> None:
        end = start + length
        index = bisect.bisect_left(self._starts, start)
        after_previous = index == 0 or self._ends[index - 1] <= start
        before_next = index == len(self._starts) or end <= self._starts[index]
        failure.invariant(
            after_previous and before_next and 0 <= start < end <= self._total,
            f"blocks {start}+{length} are free already",
        )
        joins_next = index < len(self._starts) and self._starts[index] == end
        joins_previous = index > 0 and self._ends[index - 1] == start
        if joins_next:
            end = self._ends[index]
            del self._starts[index], self._ends[index]
        if joins_previous:
            self._ends[index - 1] = end
        else:
            self._starts.insert(index, start)
            self._ends.insert(index, end)

    def resize(self, total: int) -> bool:
        if total > self._total:
            grown_from, self._total = self._total, total
            self.give_back(grown_from, total - grown_from)
        elif total < self._total:
            last_free = bool(self._ends) and self._ends[-1] == self._total
            if not last_free or self._starts[-1] > total:
                return False
            self.take(total, self._total - total)
            self._total = total
        return True

    def used_end(self) -> int:
        """Behind the last block that is not free."""
        last_free = bool(self._ends) and self._ends[-1] == self._total
        return self._starts[-1] if last_free else self._total

    def check(self, free: int) -> None:
        runs = list(zip(self._starts, self._ends, strict=True))
        failure.invariant(sum(e - s for s, e in runs) == free, "extents and free blocks differ")
        for (_, end), (start, _) in itertools.pairwise(runs):
            failure.invariant(end < start, "free extents touch or overlap")
