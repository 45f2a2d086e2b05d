"""The node's numbers: how long teardowns took, how late deadlines were, what is fenced and why."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from grafos_core.failure import FabricError
from grafos_core.lease import BLOCK_BYTES, EndCause, Kind
from grafos_core.node_effects import ReceiptFacts
from grafos_core.node_lease import LeaseView
from grafos_core.receipt import Outcome
from services.runtime.telemetry import Metrics

_EPOCHS = frozenset({"EPOCH_STALE", "EPOCH_BURNT"})
Rows = Iterable[tuple[tuple[str, ...], float]]
AGENT: Final = "agent"
WARDEN: Final = "warden"
COUNTED_MAX: Final = 16_384
"""Leases that are remembered so that each is counted once."""


@dataclass(slots=True)
class _Late:
    """Of a lease that met its deadline: how soon after it nothing could be used, and by whom."""

    deadline_ns: int
    late_us: int | None = None
    by: str = AGENT


class Meters:
    """Thread-safe. A receipt is counted once, however often it is sent.

    A deadline is kept by two, and whoever is first has ended it: that is told once, when the lease
    is settled. Of memory it is the cut that counts, since a holder may have it by its descriptor;
    of blocks, which nobody reaches but through the gate, the closing of the gate.
    """

    def __init__(self, metrics: Metrics, boot_ns: Callable[[], int]) -> None:
        self._boot_ns = boot_ns
        self._teardowns = metrics.histogram("grafos_teardown_seconds")
        self._overruns = metrics.histogram("grafos_lease_deadline_overrun_seconds")
        self._rejects = metrics.counter("grafos_epoch_rejects")
        self._metrics = metrics
        self._lock = threading.Lock()
        self._counted: dict[str, str] = {}
        self._late: dict[str, _Late] = {}

    def watch(
        self,
        leases: Callable[[], tuple[LeaseView, ...]],
        capacities: dict[Kind, int],
        oldest_unsent_s: Callable[[], float],
    ) -> None:
        """Gauges that are read when somebody asks for them."""
        self._metrics.watch("grafos_leases", lambda: _by_state(leases()))
        self._metrics.watch("grafos_fences", lambda: _fences(leases()))
        self._metrics.watch("grafos_teardown_obligations", lambda: _obligations(leases()))
        self._metrics.watch("grafos_capacity_bytes", lambda: _capacity(leases(), capacities))
        self._metrics.watch("grafos_audit_head_lag_seconds", lambda: [((), oldest_unsent_s())])

    def closed(self, lease_id: str, kind: Kind, deadline_ns: int) -> None:
        """The gate of a lease was closed: whatever is settled for it next is a new end."""
        with self._lock:
            self._counted.pop(lease_id, None)
            known = self._late.setdefault(lease_id, _Late(deadline_ns))
            known.deadline_ns = deadline_ns
            if kind is Kind.BLOCK:
                self._ended(known, AGENT, self._since_us(deadline_ns))

    def erased(self, lease_id: str) -> None:
        """Its bytes are gone, by us."""
        with self._lock:
            known = self._late.get(lease_id)
            if known is not None:
                self._ended(known, AGENT, self._since_us(known.deadline_ns))

    def taken(self, lease_id: str, late_us: int) -> None:
        """The warden has taken it back at its deadline, and says how late that was."""
        with self._lock:
            since_ns = self._boot_ns() - late_us * 1000
            self._ended(self._late.setdefault(lease_id, _Late(since_ns)), WARDEN, late_us)
            if len(self._late) > COUNTED_MAX:
                self._late.pop(next(iter(self._late)))

    def _since_us(self, deadline_ns: int) -> int:
        return (self._boot_ns() - deadline_ns) // 1000

    def _ended(self, known: _Late, by: str, late_us: int) -> None:
        if known.late_us is None or late_us < known.late_us:
            known.late_us, known.by = late_us, by

    def settled(self, receipt: ReceiptFacts) -> None:
        with self._lock:
            late = self._late.pop(receipt.lease_id, None)
            if self._counted.get(receipt.lease_id) == receipt.outcome.value:
                return
            self._counted[receipt.lease_id] = receipt.outcome.value
            if len(self._counted) > COUNTED_MAX:
                self._counted.pop(next(iter(self._counted)))
            if receipt.cause is EndCause.EXPIRED and late is not None:
                late_us = self._since_us(late.deadline_ns) if late.late_us is None else late.late_us
                self._overruns.labels(receipt.kind.value, late.by).observe(max(0, late_us) / 1e6)
        if receipt.outcome is not Outcome.NOTHING_CREATED:
            result = receipt.outcome.value
            self._teardowns.labels(receipt.kind.value, result).observe(receipt.duration_us / 1e6)

    def rejected(self, kind: Kind, refusal: FabricError) -> None:
        if refusal.code in _EPOCHS:
            self._rejects.labels(kind.value).inc()


def _state_of(view: LeaseView) -> str:
    if view.stage in ("live", "fenced"):
        return view.stage
    return "starting" if view.stage in ("creating", "holding") else "ending"


def _by_state(views: tuple[LeaseView, ...]) -> Rows:
    counts = Counter((view.kind.value, _state_of(view)) for view in views)
    return [(labels, float(count)) for labels, count in counts.items()]


def _fences(views: tuple[LeaseView, ...]) -> Rows:
    """The cause is the step that failed: its words are for people, not for labels."""
    counts = Counter(
        (view.kind.value, view.fence_cause.partition(":")[0] or "unknown")
        for view in views
        if view.stage == "fenced"
    )
    return [(labels, float(count)) for labels, count in counts.items()]


def _obligations(views: tuple[LeaseView, ...]) -> Rows:
    return [((), float(sum(_state_of(view) == "ending" for view in views)))]


def _capacity(views: tuple[LeaseView, ...], capacities: dict[Kind, int]) -> Rows:
    rows: list[tuple[tuple[str, ...], float]] = []
    for kind, total in capacities.items():
        unit = BLOCK_BYTES if kind is Kind.BLOCK else 1
        used: Counter[str] = Counter()
        for view in views:
            if view.kind is kind:
                used[_state_of(view)] += view.amount
        rows += [((kind.value, state), float(amount * unit)) for state, amount in used.items()]
        rows.append(((kind.value, "free"), float((total - sum(used.values())) * unit)))
    return rows
