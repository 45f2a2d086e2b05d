"""The warden takes everything back when a deadline passes or when the agent is gone.

A night watchman with a list of rooms and hours, and a telephone line to the office. At the hour a
room is emptied, whoever is inside and whatever the office is doing. When the office has been silent
for too long, every room is emptied.

    (none) ──hold──► HELD ──take back──► TAKEN ──drop, fetched──► (none)
                      │ ▲                  (journalled; the next agent reads it)
                 drop │ └─ raise: later only
                      ▼
                    (none)

Rules: a deadline is raised, never shortened. What was taken back stays taken. The core decides
what; its shell closes gates, truncates, measures and journals, in the order of what is returned.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from grafos_core.failure import invariant
from grafos_core.lease import LeaseId
from grafos_core.timers import Timers

AGENT_SILENT_MS_MAX: Final = 5_000
"""An agent that says nothing for so long counts as dead; a stopped one must not keep leases."""
HELD_MAX: Final = 8_192
"""Leases held at a time: more than a gate has room for."""


@dataclass(frozen=True, slots=True)
class Held:
    """One lease in the warden's keeping. `deadline_ms` is boottime."""

    lease_id: LeaseId
    slot: int
    epoch: int
    deadline_ms: int


@dataclass(frozen=True, slots=True)
class TakeBack:
    """Close this lease's cell, truncate, measure, journal durably, and then tell the agent."""

    lease_id: LeaseId
    slot: int
    epoch: int
    cause: str
    """`deadline` or `agent_lost`."""
    late_ms: int
    """How long after the deadline this was decided; 0 when it had not passed."""


class WardenCore:
    """Which leases are held until when, and when the agent was heard last."""

    def __init__(self, now_ms: int, *, silent_ms_max: int = AGENT_SILENT_MS_MAX) -> None:
        self._now_ms = now_ms
        self._heard_ms = now_ms
        self._silent_ms_max = silent_ms_max
        self._agent_is_lost = False
        self._held: dict[LeaseId, Held] = {}
        self._taken: dict[LeaseId, TakeBack] = {}
        self._timers: Timers[LeaseId] = Timers()

    @property
    def agent_is_lost(self) -> bool:
        return self._agent_is_lost

    def held(self) -> tuple[Held, ...]:
        return tuple(self._held.values())

    def taken(self) -> tuple[TakeBack, ...]:
        """What was taken back and not dropped since: what the next agent must be told of."""
        return tuple(self._taken.values())

    def hold(
        self, lease_id: str, *, slot: int, epoch: int, deadline_ms: int, now_ms: int
    ) -> list[TakeBack]:
        """Keep watch over a lease. Held again, of the same epoch: the later deadline counts."""
        self._advance(now_ms)
        key = LeaseId(lease_id)
        if key in self._taken and self._taken[key].epoch == epoch:
            return [self._taken[key]]
        known = self._held.get(key)
        invariant(known is None or known.epoch == epoch, f"{key} is held under another epoch")
        invariant(known is not None or len(self._held) < HELD_MAX, "leases held are bounded")
        if known is not None:
            deadline_ms = max(deadline_ms, known.deadline_ms)
        self._held[key] = Held(key, slot, epoch, deadline_ms)
        self._timers.set(key, deadline_ms)
        return self.agent_lost(now_ms) if self._agent_is_lost else self.tick(now_ms)

    def raise_deadline(self, lease_id: str, deadline_ms: int, now_ms: int) -> int | None:
        """The deadline that stands now, never earlier than before; None: not held any more."""
        self._advance(now_ms)
        known = self._held.get(LeaseId(lease_id))
        if known is None or known.deadline_ms <= now_ms:
            return None
        later = replace(known, deadline_ms=max(known.deadline_ms, deadline_ms))
        self._held[known.lease_id] = later
        self._timers.set(known.lease_id, later.deadline_ms)
        return later.deadline_ms

    def drop(self, lease_id: str) -> None:
        """The agent has torn it down, or read of it in the journal. Unknown leases are no error."""
        key = LeaseId(lease_id)
        self._held.pop(key, None)
        self._taken.pop(key, None)
        self._timers.cancel(key)

    def tick(self, now_ms: int) -> list[TakeBack]:
        """What is to be taken back now, in the order of the deadlines; asked again: nothing."""
        self._advance(now_ms)
        if not self._agent_is_lost and now_ms - self._heard_ms >= self._silent_ms_max:
            return self.agent_lost(now_ms)
        return [self._take(key, "deadline") for key in self._timers.due(now_ms)]

    def agent_heard(self, now_ms: int) -> None:
        """Any message of the agent's. Once it is lost, nothing it says brings it back."""
        self._advance(now_ms)
        if not self._agent_is_lost:
            self._heard_ms = now_ms

    def slept(self, duration_ms: int, now_ms: int) -> None:
        """We ourselves did not run for so long, like the whole machine, perhaps: silence meanwhile
        is nobody's. Deadlines are not moved by it."""
        self._advance(now_ms)
        self._heard_ms = min(now_ms, self._heard_ms + duration_ms)

    def agent_lost(self, now_ms: int) -> list[TakeBack]:
        """Take everything back. By end of file, by silence, or by the word of its next agent."""
        self._advance(now_ms)
        self._agent_is_lost = True
        due = [self._take(key, "deadline") for key in self._timers.due(now_ms)]
        return due + [self._take(key, "agent_lost") for key in list(self._held)]

    def timeout_ms(self, now_ms: int) -> int | None:
        """How long nothing will be due; None: for as long as nothing is said."""
        instants = [self._timers.next_ms()]
        if not self._agent_is_lost:
            instants.append(self._heard_ms + self._silent_ms_max)
        known = [at_ms for at_ms in instants if at_ms is not None]
        return max(0, min(known) - now_ms) if known else None

    def _take(self, key: LeaseId, cause: str) -> TakeBack:
        held = self._held.pop(key)
        self._timers.cancel(key)
        late_ms = max(0, self._now_ms - held.deadline_ms)
        self._taken[key] = TakeBack(key, held.slot, held.epoch, cause, late_ms)
        return self._taken[key]

    def _advance(self, now_ms: int) -> None:
        invariant(now_ms >= self._now_ms, "boottime does not go back")
        self._now_ms = now_ms

    def check(self, now_ms: int) -> None:
        """The laws, as they hold right after `tick(now_ms)`."""
        self._timers.check()
        for held in self._held.values():
            invariant(held.deadline_ms > now_ms, f"{held.lease_id} is held past its deadline")
            invariant(self._timers.at_ms(held.lease_id) == held.deadline_ms, "each has its alarm")
        invariant(not (self._held and self._agent_is_lost), "without an agent nothing is held")
        invariant(len(self._timers) == len(self._held), "no alarm without a lease")
        invariant(not self._held.keys() & self._taken.keys(), "what is taken is not held")
