"""What the ledger counts for those who look from outside.

Rules. Leases are counted as events happen, so looking costs nothing that grows with their number.
Amounts of capacity come from the books themselves, in bytes where the kind has bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from grafos_core.commands import Event
from grafos_core.lease import BLOCK_BYTES, Kind, Lease, LeaseState
from grafos_core.lessor import Lessor
from services.runtime.telemetry import Metrics

Samples = Iterable[tuple[tuple[str, ...], float]]
Ask = Callable[[Callable[[Lessor, int], Any]], Any]


class Meters:
    """Made before the ledger; shown once there is one to ask."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._commit_seconds = metrics.histogram("grafos_ledger_commit_seconds")
        self._events = metrics.counter("grafos_ledger_events")
        self._states: dict[str, tuple[str, str]] = {}
        self._leases: Counter[tuple[str, str]] = Counter()
        self._fenced: dict[str, tuple[str, str, int]] = {}

    def committed(self, events: int, nanoseconds: int) -> None:
        """One batch. Its mean size is the events over the histogram's count."""
        self._commit_seconds.observe(nanoseconds / 1e9)
        self._events.inc(events)

    def happened(self, event: Event, lease: Lease | None) -> None:
        if lease is not None:
            self.note(lease)
        elif event.kind == "node.forgotten":
            self._metrics.counter("grafos_nodes_forgotten").inc()

    def note(self, lease: Lease) -> None:
        """Count this lease as what it is now."""
        before = self._states.pop(lease.lease_id, None)
        if before is not None:
            self._leases[before] -= 1
        self._fenced.pop(lease.lease_id, None)
        if lease.state is LeaseState.RELEASED:
            return
        state = "unconfirmed" if lease.unconfirmed else lease.state.value
        now = self._states[lease.lease_id] = (lease.kind.value, state)
        self._leases[now] += 1
        if lease.state is LeaseState.FENCED:
            fenced_at_ms = lease.fenced_at_ms or 0
            self._fenced[lease.lease_id] = (lease.kind.value, lease.fence_cause[:32], fenced_at_ms)

    def show(self, ask: Ask) -> None:
        """Answer whoever collects; `ask` runs a question in the ledger's own thread."""
        watch = self._metrics.watch
        watch("grafos_leases", lambda: ask(lambda lessor, now_ms: list(self._leases.items())))
        watch("grafos_fences", lambda: ask(self._fences))
        watch("grafos_fence_age_seconds_max", lambda: ask(self._fence_age))
        watch("grafos_capacity_bytes", lambda: ask(_capacity))
        watch("grafos_ledger_imbalance_bytes", lambda: ask(_imbalance))
        watch("grafos_teardown_obligations", lambda: ask(_obligations))

    def _fences(self, lessor: Lessor, now_ms: int) -> Samples:
        return list(Counter((kind, cause) for kind, cause, _ in self._fenced.values()).items())

    def _fence_age(self, lessor: Lessor, now_ms: int) -> Samples:
        oldest_ms = min((since for _, _, since in self._fenced.values()), default=now_ms)
        return [((), (now_ms - oldest_ms) / 1000)]


def _capacity(lessor: Lessor, now_ms: int) -> Samples:
    sums: Counter[tuple[str, str]] = Counter()
    for view in lessor.nodes(now_ms):
        for kind, book in view.books.items():
            for state in ("free", "leased", "ending", "fenced", "withheld"):
                sums[kind.value, state] += getattr(book, state) * _unit_bytes(kind)
    return list(sums.items())


def _imbalance(lessor: Lessor, now_ms: int) -> Samples:
    sums: Counter[tuple[str]] = Counter()
    for view in lessor.nodes(now_ms):
        for kind, book in view.books.items():
            parts = book.free + book.leased + book.ending + book.fenced + book.withheld
            sums[(kind.value,)] += (book.total - parts) * _unit_bytes(kind)
    return list(sums.items())


def _obligations(lessor: Lessor, now_ms: int) -> Samples:
    return [((), float(sum(len(node.owing) for node in lessor.state.nodes.values())))]


def _unit_bytes(kind: Kind) -> int:
    """Cores and bits per second are shown in their own unit."""
    return BLOCK_BYTES if kind is Kind.BLOCK else 1
