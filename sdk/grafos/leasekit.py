"""Renewal without threads and timers: call `tick` from your own loop.

    manager = RenewalManager()
    manager.register(lease)              # or (lease_id, expiry_ms, RenewalPolicy.default())
    while working:
        summary = manager.tick(now_ms)   # wall clock, milliseconds

Rules. A tick asks for all renewals that are due in one call to admission, and each of its node; it
returns what became of them. It keeps boottime beside the wall clock: a renewal is due when either
says so, so a wall clock that was put back hides none. A failed renewal is tried again after a pause
that doubles; the lease's own deadline stands meanwhile. A manager holds no lease alive.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Self

from grafos import _clock
from grafos._lease import LIVE, Lease
from grafos_core import failure, holder
from grafos_core.failure import FabricError
from grafos_core.holder import TickSummary

__all__ = ["RenewalManager", "RenewalPolicy", "TickSummary"]


class RenewalPolicy(holder.RenewalPolicy):
    """When to renew: at 0.75 of the TTL, 0.10 of it earlier or later for each lease."""

    __slots__ = ()

    @classmethod
    def default(cls) -> Self:
        return cls()


class RenewalManager:
    """Renews the leases that were registered, whenever it is ticked. For one thread."""

    def __init__(self, renew: Callable[[str], int] | None = None) -> None:
        """
        Args:
            renew: how a lease is renewed: from its id to its new end, by the clock that `tick` is
                given. By default the leases of this process are asked themselves. With it, time is
                only what `tick` says: for tests, and for things that are not leases.
        """
        self._core = holder.RenewalManager()
        self._renew_by_hand = renew
        self._leases: weakref.WeakValueDictionary[str, Lease] = weakref.WeakValueDictionary()
        self._ids: set[str] = set()
        _managers.add(self)

    @classmethod
    def new(cls) -> Self:
        return cls()

    def __len__(self) -> int:
        return len(self._core)

    def __contains__(self, lease_id: str) -> bool:
        return lease_id in self._core

    def register(
        self,
        lease: str | Lease,
        expiry_ms: int | None = None,
        policy: holder.RenewalPolicy | None = None,
    ) -> None:
        """Renew this lease from now on.

        Args:
            lease: the lease, or its id.
            expiry_ms: its end by the wall clock; with a lease its own is taken.
            policy: when to renew.

        Raises:
            Denied: code NOT_FOUND; no lease of this process has that id.
        """
        if self._renew_by_hand is not None:
            if isinstance(lease, Lease) or expiry_ms is None:
                raise failure.of("INVALID", "with `renew` given: an id and its end")
            self._core.register(lease, expiry_ms, policy)
            return
        found = lease if isinstance(lease, Lease) else LIVE.get(lease)
        if found is None:
            raise failure.of("NOT_FOUND", "no lease of this process", lease_id=str(lease))
        self._leases[found.lease_id] = found
        self._ids.add(found.lease_id)
        self._core.register(
            found.lease_id,
            found.expiry_ms if expiry_ms is None else expiry_ms,
            policy,
            now_ms=_clock.wall_ms(),
            boot_ms=_clock.boot_ms(),
        )

    def forget(self, lease: str | Lease) -> None:
        """Renew it no more. It need not be known."""
        lease_id = lease.lease_id if isinstance(lease, Lease) else lease
        self._core.forget(lease_id)
        self._leases.pop(lease_id, None)
        self._ids.discard(lease_id)

    def tick(self, now_ms: int | None = None) -> TickSummary:
        """Renew what is due; what became of it, and when to come again.

        Args:
            now_ms: wall clock; None: the SDK's own.
        """
        now_ms = _clock.wall_ms() if now_ms is None else now_ms
        boot_ms = None if self._renew_by_hand is not None else _clock.boot_ms()
        gone = self._let_time_pass()
        found = self._core.tick(now_ms, boot_ms)
        if self._renew_by_hand is None:
            self._renew_leases(found.due)
        else:
            for lease_id in found.due:
                self._renew_one_by_hand(self._renew_by_hand, lease_id, now_ms)
        after = self._core.tick(now_ms, boot_ms)
        return TickSummary(
            due=found.due,
            renewed=found.renewed + after.renewed,
            failed=found.failed + after.failed,
            expired=(*gone, *found.expired, *after.expired),
            next_due_ms=after.next_due_ms,
        )

    def _let_time_pass(self) -> tuple[str, ...]:
        """Callbacks run here; leases that are over, or that nobody holds, are forgotten."""
        for fabric in {lease._fabric for lease in self._leases.values()}:
            fabric.poll()
        if self._renew_by_hand is not None:
            return ()
        over = tuple(
            lease_id
            for lease_id in self._ids
            if (lease := self._leases.get(lease_id)) is None or not lease.valid
        )
        for lease_id in over:
            self.forget(lease_id)
        return over

    def _renew_one_by_hand(self, renew: Callable[[str], int], lease_id: str, now_ms: int) -> None:
        try:
            self._core.renewed(lease_id, renew(lease_id), now_ms=now_ms)
        except FabricError:
            self._core.failed(lease_id)

    def _renew_leases(self, due: Sequence[str]) -> None:
        """All that are due in one call."""
        leases = [lease for each in due if (lease := self._leases.get(each)) is not None]
        if not leases:
            return
        from grafos._together import renew_together  # loads gRPC, which a lease has loaded

        for lease, failed in zip(leases, renew_together(leases), strict=True):
            if failed is not None:
                self._core.failed(lease.lease_id)
                continue
            self._core.renewed(
                lease.lease_id, lease.expiry_ms, now_ms=_clock.wall_ms(), boot_ms=_clock.boot_ms()
            )


def registered() -> set[str]:
    """Ids of all leases that any manager of this process means to renew."""
    return {lease_id for manager in list(_managers) for lease_id in manager._ids}


_managers: weakref.WeakSet[RenewalManager] = weakref.WeakSet()
