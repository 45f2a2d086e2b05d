"""The node's numbers: how long teardowns took, how late deadlines were, what is fenced and why."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable

from grafos_core.failure import FabricError
from grafos_core.lease import BLOCK_BYTES, Kind
from grafos_core.node_effects import ReceiptFacts
from grafos_core.node_lease import LeaseView
from grafos_core.receipt import Outcome
from services.runtime.telemetry import Metrics

_EPOCHS = frozenset({"EPOCH_STALE", "EPOCH_BURNT"})
Rows = Iterable[tuple[tuple[str, ...], float]]


class Meters:
    """Thread-safe. A receipt is counted once, however often it is sent."""

    def __init__(self, metrics: Metrics) -> None:
        self._teardowns = metrics.histogram("grafos_teardown_seconds")
        self._overruns = metrics.histogram("grafos_lease_deadline_overrun_seconds")
        self._rejects = metrics.counter("grafos_epoch_rejects")
        self._metrics = metrics
        self._lock = threading.Lock()
        self._counted: dict[str, str] = {}

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

    def closed(self, lease_id: str, kind: Kind) -> None:
        """The gate of a lease was closed: whatever is settled for it next is a new end."""
        with self._lock:
            self._counted.pop(lease_id, None)

    def settled(self, receipt: ReceiptFacts) -> None:
        with self._lock:
            if self._counted.get(receipt.lease_id) == receipt.outcome.value:
                return
            self._counted[receipt.lease_id] = receipt.outcome.value
            if len(self._counted) > 16_384:
                self._counted.pop(next(iter(self._counted)))
        if receipt.outcome is not Outcome.NOTHING_CREATED:
            result = receipt.outcome.value
            self._teardowns.labels(receipt.kind.value, result).observe(receipt.duration_us / 1e6)

    def overrun(self, kind: Kind, late_us: int) -> None:
        self._overruns.labels(kind.value).observe(late_us / 1e6)

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
