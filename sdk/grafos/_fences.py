"""A slice whose teardown failed, as the one whose lease it was may see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from grafos_core import lease


@dataclass(frozen=True, slots=True)
class Fence:
    """Quarantined: not granted, not readable, charged to its node, until it is cleared."""

    lease_id: str
    kind: str
    node_id: str
    amount: int
    """In the kind's unit."""
    epoch: int
    cause: str
    """What failed."""
    evidence: Mapping[str, str]
    """What the node had measured by then."""
    since_ms: int
    """Wall clock of the ledger."""
    age_ms: int


def fence_of(found: lease.Lease, now_ms: int) -> Fence:
    since_ms = found.fenced_at_ms or now_ms
    return Fence(
        found.lease_id, found.kind.value, found.node_id, found.amount, found.epoch,
        found.fence_cause, {name: str(value) for name, value in found.fence_evidence.items()},
        since_ms, max(0, now_ms - since_ms),
    )  # fmt: skip
