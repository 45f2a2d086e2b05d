"""What a holder hears about its leases without having asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from grafos_core import failure
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


def notice_of(fields: dict[str, Any]) -> Notice:
    """As a node says it in JSON."""
    return Notice(
        lease_id=str(fields["lease_id"]),
        kind=str(fields.get("kind", "")),
        reason=str(fields.get("reason", "")),
        grace_ms=int(fields.get("grace_ms") or 0),
        failure=failure_of(fields.get("failure")),
    )


def failure_of(fields: Any) -> FabricError | None:
    """A failure in JSON; None where there is none."""
    if not isinstance(fields, dict):
        return None
    rest = dict(fields)
    return failure.from_fields(str(rest.pop("class", "")), rest)
