"""What a holder may believe about its own lease, and when it should ask for more time.

Somebody who rents by the hour and has only a wrist-watch: he looks at it when he asks for the
room, not when the answer comes, allows for a watch that runs slow, and leaves a little early. So he
is always out before the landlord opens the door.

    HELD ──a renewal fails, or is not answered in time──► JEOPARDY ──own stop──► OVER
     ▲                                                       │  │                 ▲
     └──────────────── a renewal is answered ────────────────┘  └─ ended ─────────┤
     └────────────────────── own stop, ended ─────────────────────────────────────┘

Rules: instants are boottime of the holder's own machine. Only an answer of the node moves the stop,
and never to an earlier instant. Jeopardy is told once, as `degraded`, and always before `expired`.
"""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass
from typing import Final

from grafos_core.failure import invariant
from grafos_core.lease import rate_margin_ms
from grafos_core.timers import Timers

MARGIN_MS: Final = 20
"""The longest operation and one tick: what was begun before the stop has ended before the end."""
GUARD_MS_MIN: Final = 50
"""A renewal begins at least this long before the holder's own stop, or three times the last one."""
BACKOFF_MS_MIN: Final = 100
LEASES_MAX: Final = 65_536


@dataclass(frozen=True, slots=True)
class RenewalPolicy:
    """When to renew: after a share of the TTL, a little earlier or later for each lease."""

    renew_at_fraction: float = 0.75
    jitter_fraction: float = 0.10
    """Of the TTL, either way, by the lease's id: many leases of one moment do not renew at once."""
    min_renew_secs: int = 30
    """No renewal earlier than this; TTLs shorter than twice this are not bound by it."""
    max_backoff_secs: int = 5

    def __post_init__(self) -> None:
        earliest = self.renew_at_fraction - self.jitter_fraction
        latest = self.renew_at_fraction + self.jitter_fraction
        if self.jitter_fraction < 0 or not 0 < earliest <= latest < 1:
            raise ValueError("renew_at_fraction ± jitter_fraction must lie between 0 and 1")
        if self.min_renew_secs < 0 or self.max_backoff_secs <= 0:
            raise ValueError("min_renew_secs and max_backoff_secs are durations")

    def renew_after_ms(self, total_ms: int, seed: str) -> int:
        """How long after its start a period of `total_ms` is renewed."""
        fraction = self.renew_at_fraction + self.jitter_fraction * _jitter(seed)
        after_ms = int(total_ms * fraction)
        minimum_ms = self.min_renew_secs * 1000
        return max(after_ms, minimum_ms) if total_ms >= 2 * minimum_ms else after_ms

    def renewal_deadline(self, created_at_ms: int, expires_at_ms: int, jitter_seed: str) -> int:
        """The instant, on the clock of its arguments, at which a renewal is due."""
        total_ms = max(0, expires_at_ms - created_at_ms)
        return created_at_ms + self.renew_after_ms(total_ms, jitter_seed)

    def backoff_ms(self, failure_count: int) -> int:
        """The pause after so many failures on end: doubled each time, up to the cap."""
        cap_ms = self.max_backoff_secs * 1000
        return min(cap_ms, BACKOFF_MS_MIN << min(max(0, failure_count - 1), 16))


def _jitter(seed: str) -> float:
    """From -1 to 1, the same for the same seed on every machine."""
    drawn = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "big")
    return drawn / 0x7FFFFFFF - 1 if drawn <= 0xFFFFFFFE else 1.0


class Belief(enum.StrEnum):
    HELD = "held"
    JEOPARDY = "jeopardy"
    OVER = "over"


class HolderLease:
    """One lease as its holder sees it, from the node's answers alone."""

    def __init__(
        self,
        lease_id: str,
        *,
        remaining_ms: int,
        sent_ms: int,
        now_ms: int | None = None,
        policy: RenewalPolicy | None = None,
        margin_ms: int = MARGIN_MS,
    ) -> None:
        """`remaining_ms` as answered to the request that was sent at `sent_ms`."""
        self.lease_id = lease_id
        self._policy = policy or RenewalPolicy()
        self._margin_ms = margin_ms
        self._now_ms = sent_ms if now_ms is None else now_ms
        self._last_renewal_ms = self._now_ms - sent_ms
        self._asked_ms: int | None = None
        self._failures = 0
        self._belief = Belief.HELD
        self._told: set[str] = set()
        self._stop_ms = sent_ms
        self._take(remaining_ms, sent_ms)

    @property
    def usable_until_ms(self) -> int:
        """The holder's own stop: at this instant it no longer uses the lease."""
        return self._stop_ms

    @property
    def renew_at_ms(self) -> int:
        """When the next renewal is due."""
        return self._renew_ms

    def belief(self, now_ms: int) -> Belief:
        return Belief.OVER if now_ms >= self._stop_ms else self._belief

    def usable(self, now_ms: int) -> bool:
        """Asked before an operation is sent, and again before its answer is believed."""
        return self.belief(now_ms) is not Belief.OVER

    def remaining_ms(self, now_ms: int) -> int:
        return max(0, self._stop_ms - now_ms) if self.usable(now_ms) else 0

    def renew_due(self, now_ms: int) -> bool:
        return self.usable(now_ms) and self._asked_ms is None and now_ms >= self._renew_ms

    def renewal_sent(self, now_ms: int) -> None:
        self._advance(now_ms)
        self._asked_ms = now_ms

    def renewed(self, remaining_ms: int, now_ms: int) -> None:
        """The node has answered the renewal that was sent last."""
        self._advance(now_ms)
        invariant(self._asked_ms is not None, "an answer follows a request")
        sent_ms, self._asked_ms = self._asked_ms or now_ms, None
        if not self.usable(now_ms):
            return
        self._last_renewal_ms = now_ms - sent_ms
        self._failures, self._belief = 0, Belief.HELD
        self._told.discard("degraded")
        self._take(remaining_ms, sent_ms)

    def renewal_failed(self, now_ms: int) -> None:
        """No answer, or a refusal that may pass: the stop has not moved."""
        self._advance(now_ms)
        self._asked_ms = None
        if not self.usable(now_ms):
            return
        self._failures += 1
        self._belief = Belief.JEOPARDY
        again_ms = now_ms + self._policy.backoff_ms(self._failures)
        # One more try before it is too late, even if the pause would last longer.
        self._renew_ms = min(again_ms, max(now_ms + BACKOFF_MS_MIN, self._latest_ms()))

    def ended(self) -> None:
        """Released, revoked or fenced: it is over whatever the time is. Nothing is told of it."""
        self._belief = Belief.OVER
        self._stop_ms = min(self._stop_ms, self._now_ms)
        self._told |= {"degraded", "expired"}

    def tick(self, now_ms: int) -> list[str]:
        """What the program should hear now, each once: `degraded`, then `expired`."""
        self._advance(now_ms)
        unanswered = self._asked_ms is not None and now_ms >= self._latest_ms()
        if self._belief is Belief.HELD and unanswered:
            self._belief = Belief.JEOPARDY
        told = []
        if self._belief is Belief.JEOPARDY:
            told.append("degraded")
        if now_ms >= self._stop_ms:
            told.append("expired")
        told = [what for what in told if what not in self._told]
        self._told.update(told)
        return told

    def timeout_ms(self, now_ms: int) -> int | None:
        """How long nothing will be due; None: it is over and that was told."""
        if "expired" in self._told:
            return None
        instants = [self._stop_ms]
        if self._asked_ms is None:
            instants.append(self._renew_ms)
        elif self._belief is Belief.HELD:
            instants.append(self._latest_ms())
        return max(0, min(instants) - now_ms)

    def _latest_ms(self) -> int:
        """The last instant at which a renewal still has time to be answered."""
        return self._stop_ms - max(3 * self._last_renewal_ms, GUARD_MS_MIN)

    def _take(self, remaining_ms: int, sent_ms: int) -> None:
        stop_ms = sent_ms + remaining_ms - rate_margin_ms(remaining_ms) - self._margin_ms
        self._stop_ms = max(self._stop_ms, stop_ms)
        due_ms = sent_ms + self._policy.renew_after_ms(remaining_ms, self.lease_id)
        self._renew_ms = max(sent_ms, min(due_ms, self._latest_ms()))

    def _advance(self, now_ms: int) -> None:
        invariant(now_ms >= self._now_ms, "boottime does not go back")
        self._now_ms = now_ms

    def check(self, now_ms: int) -> None:
        invariant(not self.usable(now_ms) or now_ms < self._stop_ms, "it stops at its stop")
        over_told = "expired" in self._told
        invariant(not over_told or not self.usable(now_ms), "what is told as expired is over")


@dataclass(frozen=True, slots=True)
class TickSummary:
    """What one tick of a renewal manager found; ids in the order in which they fell due."""

    due: tuple[str, ...] = ()
    """To be renewed now; told again, later and later, until the renewal is reported."""
    renewed: tuple[str, ...] = ()
    """Reported as renewed since the last tick."""
    failed: tuple[str, ...] = ()
    """Reported as failed since the last tick."""
    expired: tuple[str, ...] = ()
    """Ran out and were forgotten."""
    next_due_ms: int | None = None
    """On the clock that `tick` was given; None: nothing is registered."""


@dataclass(slots=True)
class _Renewal:
    expiry_ms: int
    policy: RenewalPolicy
    boot_expiry_ms: int | None = None
    attempts: int = 0


class RenewalManager:
    """Tells which of many leases are to be renewed. No thread, no clock: `tick` when you like.

    A renewal is due when the wall clock says so or boottime does, so that a wall clock that was
    stepped back hides none. Boottime alone, where it is known, says that a lease has run out.
    """

    def __init__(self) -> None:
        self._renewals: dict[str, _Renewal] = {}
        self._wall: Timers[str] = Timers()
        self._boot: Timers[str] = Timers()
        self._fresh: list[str] = []
        self._renewed: list[str] = []
        self._failed: list[str] = []

    def __len__(self) -> int:
        return len(self._renewals)

    def __contains__(self, lease_id: str) -> bool:
        return lease_id in self._renewals

    def register(
        self,
        lease_id: str,
        expiry_ms: int,
        policy: RenewalPolicy | None = None,
        *,
        now_ms: int | None = None,
        boot_ms: int | None = None,
    ) -> None:
        """Watch over a lease that ends at `expiry_ms`, wall clock. Registered again: renewed.

        `now_ms` and `boot_ms` are this moment on both clocks; without them the next tick is it.
        """
        invariant(lease_id in self or len(self) < LEASES_MAX, "leases are bounded")
        if lease_id in self:
            self._renewed.append(lease_id)
            self.forget(lease_id)
        self._renewals[lease_id] = _Renewal(expiry_ms, policy or RenewalPolicy())
        if now_ms is None:
            self._fresh.append(lease_id)
        else:
            self._begin(lease_id, now_ms, boot_ms)

    def forget(self, lease_id: str) -> None:
        """Released, or given to somebody else. Unknown leases are no error."""
        self._renewals.pop(lease_id, None)
        self._wall.cancel(lease_id)
        self._boot.cancel(lease_id)

    def renewed(
        self, lease_id: str, expiry_ms: int, *, now_ms: int, boot_ms: int | None = None
    ) -> None:
        """The renewal was answered."""
        known = self._renewals.get(lease_id)
        if known is not None:
            self.register(lease_id, expiry_ms, known.policy, now_ms=now_ms, boot_ms=boot_ms)

    def failed(self, lease_id: str) -> None:
        """The renewal was not answered, or refused for now; the pause was set when it fell due."""
        if lease_id in self._renewals:
            self._failed.append(lease_id)

    def tick(self, now_ms: int, boot_ms: int | None = None) -> TickSummary:
        """What is to be done now. Asked again in the same moment: nothing."""
        fresh, self._fresh = self._fresh, []
        for lease_id in fresh:
            if lease_id in self._renewals and lease_id not in self._wall:
                self._begin(lease_id, now_ms, boot_ms)
        woken = self._wall.due(now_ms) + (self._boot.due(boot_ms) if boot_ms is not None else [])
        due, expired = [], []
        for lease_id in dict.fromkeys(woken):
            if self._is_over(self._renewals[lease_id], now_ms, boot_ms):
                self.forget(lease_id)
                expired.append(lease_id)
            else:
                self._pause(lease_id, now_ms, boot_ms)
                due.append(lease_id)
        renewed, self._renewed = tuple(self._renewed), []
        failed, self._failed = tuple(self._failed), []
        return TickSummary(
            tuple(due), renewed, failed, tuple(expired), self._next_ms(now_ms, boot_ms)
        )

    def _begin(self, lease_id: str, now_ms: int, boot_ms: int | None) -> None:
        renewal = self._renewals[lease_id]
        total_ms = max(0, renewal.expiry_ms - now_ms)
        after_ms = renewal.policy.renew_after_ms(total_ms, lease_id)
        after_ms = max(0, min(after_ms, total_ms - rate_margin_ms(total_ms) - GUARD_MS_MIN))
        self._wall.set(lease_id, now_ms + after_ms)
        if boot_ms is not None:
            renewal.boot_expiry_ms = boot_ms + total_ms
            self._boot.set(lease_id, boot_ms + after_ms)

    def _is_over(self, renewal: _Renewal, now_ms: int, boot_ms: int | None) -> bool:
        if boot_ms is not None and renewal.boot_expiry_ms is not None:
            return boot_ms >= renewal.boot_expiry_ms
        return now_ms >= renewal.expiry_ms

    def _pause(self, lease_id: str, now_ms: int, boot_ms: int | None) -> None:
        """Ask again after a pause, and in any case look at the end."""
        renewal = self._renewals[lease_id]
        renewal.attempts += 1
        left_ms = renewal.expiry_ms - now_ms
        if boot_ms is not None and renewal.boot_expiry_ms is not None:
            left_ms = renewal.boot_expiry_ms - boot_ms
        pause_ms = min(renewal.policy.backoff_ms(renewal.attempts), max(left_ms, BACKOFF_MS_MIN))
        self._wall.set(lease_id, now_ms + pause_ms)
        if boot_ms is not None:
            self._boot.set(lease_id, boot_ms + pause_ms)

    def _next_ms(self, now_ms: int, boot_ms: int | None) -> int | None:
        instants = [self._wall.next_ms()]
        next_boot_ms = self._boot.next_ms()
        if boot_ms is not None and next_boot_ms is not None:
            instants.append(now_ms + next_boot_ms - boot_ms)
        known = [at_ms for at_ms in instants if at_ms is not None]
        return min(known) if known else None

    def check(self) -> None:
        self._wall.check()
        self._boot.check()
        waiting = set(self._fresh)
        for lease_id in self._renewals:
            invariant(lease_id in self._wall or lease_id in waiting, f"{lease_id} has its alarm")
        invariant(len(self._wall) <= len(self._renewals), "no alarm without a lease")
