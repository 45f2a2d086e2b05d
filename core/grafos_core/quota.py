"""What each tenant may hold at most, and what it holds now.

The tenant's own book, apart from the node's: charged from grant until the lease's end, whatever
the node does afterwards. A node that hangs in a teardown holds its capacity, not a tenant's quota.
A quota below present use refuses new grants and makes nothing negative.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from grafos_core import failure
from grafos_core.lease import Kind, TenantId

UNLIMITED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Limit:
    """Of one tenant and kind. `amount` in the kind's unit, `count` in leases."""

    amount: int = UNLIMITED
    count: int = UNLIMITED


@dataclass(frozen=True, slots=True)
class Usage:
    amount: int = 0
    count: int = 0


_Key = tuple[TenantId, Kind]


class QuotaBook:
    def __init__(self, default: Limit | None = None) -> None:
        self._default = default or Limit()
        self._limits: dict[_Key, Limit] = {}
        self._usage: dict[_Key, Usage] = {}

    def limit(self, tenant: TenantId, kind: Kind) -> Limit:
        return self._limits.get((tenant, kind), self._default)

    def usage(self, tenant: TenantId, kind: Kind) -> Usage:
        return self._usage.get((tenant, kind), Usage())

    def set_limit(self, tenant: TenantId, kind: Kind, limit: Limit) -> None:
        if not (0 <= limit.amount <= UNLIMITED and 0 <= limit.count <= UNLIMITED):
            raise failure.of("RANGE", f"quota: 0 to {UNLIMITED}")
        self._limits[tenant, kind] = limit

    def check_charge(self, tenant: TenantId, kind: Kind, amount: int, count: int = 1) -> None:
        """Refuse with RateLimited QUOTA what would pass the limit; changes nothing."""
        limit, usage = self.limit(tenant, kind), self.usage(tenant, kind)
        if usage.count + count > limit.count:
            raise failure.of(
                "QUOTA", f"{kind}: {usage.count} of {limit.count} leases", retry_after_ms=1000
            )
        if usage.amount + amount > limit.amount:
            text = f"{kind}: {usage.amount} of {limit.amount} in use, {amount} asked"
            raise failure.of("QUOTA", text, retry_after_ms=1000)

    def charge(self, tenant: TenantId, kind: Kind, amount: int) -> None:
        used = self.usage(tenant, kind)
        self._usage[tenant, kind] = Usage(used.amount + amount, used.count + 1)

    def discharge(self, tenant: TenantId, kind: Kind, amount: int) -> None:
        used = self.usage(tenant, kind)
        failure.invariant(
            used.amount >= amount and used.count >= 1, f"{tenant} holds less {kind} than it returns"
        )
        self._usage[tenant, kind] = Usage(used.amount - amount, used.count - 1)

    def entries(self) -> Iterator[tuple[TenantId, Kind, Limit, Usage]]:
        for tenant, kind in sorted(self._limits.keys() | self._usage.keys()):
            yield tenant, kind, self.limit(tenant, kind), self.usage(tenant, kind)
