"""What a test leaves behind, and where it was taken: leases, fences, registrations, deaf ears.

    assert_no_leaks(fabric)

Rules. A lease is left behind while the ledger charges it to somebody. A fence is, until it is
cleared. A registration is, while a `RenewalManager` or `auto_renew` still means to renew a lease
that is over. A failure is, when a lease ended or came in danger and the program never heard of it:
no operation raised it, no callback was told, nobody looked at its status.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grafos import leasekit
from grafos._connection import connection_of
from grafos_core.lease import HELD, Lease, LeaseState

if TYPE_CHECKING:
    from grafos.testing._fabric import VirtualFabric


class LeakFound(AssertionError):
    """Something was left behind; the message names it."""


@dataclass(frozen=True, slots=True)
class Leak:
    """One thing that was left behind."""

    what: str
    """`lease`, `fence`, `registration` or `failure`."""
    lease_id: str
    detail: str
    acquired_at: str = ""
    """File, line and function of the program; empty where that is not known."""

    def __str__(self) -> str:
        where = f", acquired at {self.acquired_at}" if self.acquired_at else ""
        return f"{self.what} {self.lease_id}: {self.detail}{where}"


def leaks(fabric: Any) -> list[Leak]:
    """What is left behind on a virtual fabric, a local one or a connection.

    Of a real fabric only leases and fences of this identity can be seen.
    """
    from grafos.testing._fabric import VirtualFabric  # loads gRPC, as whoever asks has done

    if isinstance(fabric, VirtualFabric):
        return _virtual(fabric)
    connection = connection_of(fabric)
    return [_of_lease(lease, "") for lease in connection.leases() if lease.state in HELD]


def assert_no_leaks(fabric: Any) -> None:
    """Raises `LeakFound`, which names what is left behind and where it was acquired."""
    found = leaks(fabric)
    if found:
        raise LeakFound(told(found))


def told(found: list[Leak]) -> str:
    lines = "\n".join(f"  {leak}" for leak in found)
    return f"{len(found)} left behind:\n{lines}"


def _virtual(fabric: VirtualFabric) -> list[Leak]:
    origins = {
        lease_id: where
        for connection in fabric.connections_ever
        for lease_id, where in connection.origins.items()
    }
    held = [lease for lease in fabric.leases() if lease.lease_id not in fabric.neighbours]
    found = [_of_lease(lease, origins.get(lease.lease_id, "")) for lease in held]
    live = {lease.lease_id for lease in held if lease.state is not LeaseState.FENCED}
    for lease_id in leasekit.registered():
        if lease_id in origins and lease_id not in live:
            detail = "a RenewalManager still means to renew it, and it is over"
            found.append(Leak("registration", lease_id, detail, origins[lease_id]))
    for connection in fabric.connections_ever:
        for lease_id, failed in connection.unread.items():
            detail = f"{failed.code}, and the program has not heard of it"
            found.append(Leak("failure", lease_id, detail, origins.get(lease_id, "")))
    return found


def _of_lease(lease: Lease, where: str) -> Leak:
    about = f"{lease.kind} {lease.amount} on {lease.node_id}"
    if lease.state is LeaseState.FENCED:
        return Leak("fence", lease.lease_id, f"{about}: {lease.fence_cause}", where)
    return Leak("lease", lease.lease_id, f"{about} is {lease.state}", where)
