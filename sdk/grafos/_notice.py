"""What a holder hears about its leases without having asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from grafos_core.failure import FabricError


@dataclass(frozen=True, slots=True)
class Notice:
    """What happened to one lease."""

    lease_id: str
    kind: str
    """`degraded`, `revoke_warning`, `revoked`, `expired`, `fenced` or `released`."""
    reason: str = ""
    grace_ms: int = 0
    """With `revoke_warning`: how long the lease still works."""
    failure: FabricError | None = None
    """What the next use raises, if this notice is the end; else what is wrong."""


Tell = Callable[[Notice], None]
