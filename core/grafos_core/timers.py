"""Alarm clocks without clocks: for each key the one instant at which it wants to be woken.

Nothing runs by itself. The owner asks `due(now_ms)` when it likes and gets the keys whose instant
has come, earliest first; `next_ms()` says when asking is next worth while. Asking too often does
nothing. The cost of asking grows with what fell due, not with what is set.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from typing import Final, Generic, TypeVar

from grafos_core.failure import invariant

Key = TypeVar("Key", bound=Hashable)

STALE_ENTRIES_MAX: Final = 64
"""Entries of the heap that may be out of date before it is made anew, beside as many as are set."""


class Timers(Generic[Key]):
    """One instant per key. Setting a key again moves it; keys of one instant keep their order."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Key]] = []
        self._set: dict[Key, tuple[int, int]] = {}
        self._count = 0

    def __len__(self) -> int:
        return len(self._set)

    def __contains__(self, key: Key) -> bool:
        return key in self._set

    def set(self, key: Key, at_ms: int) -> None:
        self._count += 1
        self._set[key] = (at_ms, self._count)
        heapq.heappush(self._heap, (at_ms, self._count, key))
        if len(self._heap) > 2 * len(self._set) + STALE_ENTRIES_MAX:
            self._heap = [(at, order, key) for key, (at, order) in self._set.items()]
            heapq.heapify(self._heap)

    def cancel(self, key: Key) -> None:
        self._set.pop(key, None)

    def at_ms(self, key: Key) -> int | None:
        found = self._set.get(key)
        return None if found is None else found[0]

    def due(self, now_ms: int) -> list[Key]:
        """The keys whose instant is `now_ms` or earlier; they are no longer set."""
        found = []
        while self._heap and self._heap[0][0] <= now_ms:
            at_ms, order, key = heapq.heappop(self._heap)
            if self._set.get(key) == (at_ms, order):
                del self._set[key]
                found.append(key)
        return found

    def next_ms(self) -> int | None:
        while self._heap:
            at_ms, order, key = self._heap[0]
            if self._set.get(key) == (at_ms, order):
                return at_ms
            heapq.heappop(self._heap)
        return None

    def check(self) -> None:
        entries = {(at_ms, order, key) for at_ms, order, key in self._heap}
        for key, (at_ms, order) in self._set.items():
            invariant((at_ms, order, key) in entries, f"timer {key!r} is set and never fires")
