"""Several leases that are acquired all together or not at all.

    with Bundle(MemBuilder().min_bytes(4096), BlockBuilder().min_blocks(8)).acquire() as leases:
        memory, blocks = leases

Rules. The fabric grants all members in one step or none, so two programs that each want two things
never hold one each and wait for the other. Then each is bound at its node; where one bind fails all
are given back. Once acquired the leases are like any others: each can be used, renewed, shared and
released by itself. A failure names the member it is about, in `details["member"]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self

from grafos._builder import WAIT_MS_MAX, Builder
from grafos._lease import Lease, duration_ms
from grafos._receipt import TeardownReceipt
from grafos_core import bundle, failure
from grafos_core.failure import FabricError

if TYPE_CHECKING:
    from types import TracebackType

    from grafos._builder import Source
    from grafos._connection import Fabric


class Bundle:
    """Builders whose leases are acquired together. Never changes: each option gives a new one.

    Args:
        members: 1 to 16 builders, of any kinds. How long to wait is said of the bundle.
    """

    __slots__ = ("_connection", "_members", "_wait_ms")

    def __init__(self, *members: Builder[Any]) -> None:
        for index, member in enumerate(members):
            if not isinstance(member, Builder):
                raise failure.of("INVALID", f"member {index}: a builder")
            if member._request.wait_ms is not None:
                raise failure.of("INVALID", f"member {index}: the wait is said of the bundle")
        if len(members) > bundle.MEMBERS_MAX:
            raise failure.of("RANGE", f"members: at most {bundle.MEMBERS_MAX}")
        self._members = members
        self._wait_ms: int | None = None
        self._connection: Source | None = None

    @classmethod
    def new(cls) -> Self:
        """Without members, for those who add them one by one."""
        return cls()

    def add(self, member: Builder[Any]) -> Self:
        """With one member more, behind the others."""
        return self._with(members=(*self._members, member))

    def wait(self, duration: float | timedelta) -> Self:
        """How long `acquire` may wait for room for all of them; it holds nothing meanwhile.

        Args:
            duration: in seconds, or a timedelta; 0 to 600 s, as for a builder.
        """
        wait_ms = duration_ms(duration, "wait")
        if wait_ms > WAIT_MS_MAX:
            raise failure.of("RANGE", f"wait: at most {WAIT_MS_MAX // 1000} s")
        return self._with(wait_ms=wait_ms)

    def fabric(self, connection: Source) -> Self:
        """Ask this fabric and not the one in force."""
        return self._with(connection=connection)

    def acquire(self) -> BundleLease:
        """All leases, bound and ready.

        Raises:
            Incompatible: no members (EMPTY); they fit nowhere together (CAPACITY), or one matches
                no node (NO_MATCH).
            RateLimited: the capacity is in use (NO_CAPACITY) or the quota used up (QUOTA).
            Degraded: no node with fresh evidence of readiness (NODE_NOT_READY).
            Disconnected: the fabric, or the node of one member, cannot be reached.
        """
        bundle.check_count(len(self._members))
        for index, member in enumerate(self._members):
            if member._request.amount is None:
                with bundle.named(index, member.kind):
                    raise failure.of("MISSING_FIELD", member.amount_option)
        asked = [(member._request, member.lease_class) for member in self._members]
        return BundleLease(self._fabric()._acquire_bundle(asked, self._wait_ms))

    def __len__(self) -> int:
        return len(self._members)

    def __repr__(self) -> str:
        return f"<Bundle {' '.join(map(repr, self._members))}>"

    def _with(
        self,
        *,
        members: tuple[Builder[Any], ...] | None = None,
        wait_ms: int | None = None,
        connection: Source | None = None,
    ) -> Self:
        made = type(self)(*(self._members if members is None else members))
        made._wait_ms = self._wait_ms if wait_ms is None else wait_ms
        made._connection = self._connection if connection is None else connection
        return made

    def _fabric(self) -> Fabric:
        from grafos._connection import connection_of, default_fabric  # gRPC, when it is needed

        said = [self._connection] if self._connection is not None else []
        said += [x._connection for x in self._members if x._connection is not None]
        found = [connection_of(each) for each in said]
        if any(each is not found[0] for each in found):
            raise failure.of("INVALID", "the members of a bundle are of one fabric")
        return found[0] if found else default_fabric()


class BundleLease(Sequence[Any]):
    """The leases of a bundle, in the order of its members."""

    __slots__ = ("leases",)

    def __init__(self, leases: Sequence[Lease]) -> None:
        self.leases = tuple(leases)

    def __len__(self) -> int:
        return len(self.leases)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.leases)

    def __getitem__(self, index: Any) -> Any:
        return self.leases[index]

    @property
    def lease_ids(self) -> tuple[str, ...]:
        return tuple(each.lease_id for each in self.leases)

    @property
    def valid(self) -> bool:
        """Whether an operation may begin now on every one of them."""
        return all(each.valid for each in self.leases)

    def remaining_ms(self) -> int:
        """How long all of them may still be used."""
        return min(each.remaining_ms() for each in self.leases)

    def renew(self, ttl: float | timedelta | None = None) -> int:
        """Ask for more time for all of them; how many milliseconds there are now for each.

        Every member is asked for, also behind one that fails.

        Args:
            ttl: from now on, in seconds; by default as granted.

        Raises:
            Degraded, LeaseExpired, Revoked, Fenced: of the first member that was not renewed.
        """
        from grafos._together import renew_together  # loads gRPC, which the leases have loaded

        ttl_ms = 0 if ttl is None else duration_ms(ttl, "ttl")
        failed = renew_together(self.leases, ttl_ms)
        self._raise_first({index: each for index, each in enumerate(failed) if each is not None})
        return self.remaining_ms()

    def release(self) -> tuple[TeardownReceipt, ...]:
        """Give all of them back, the last one first; the receipts, in the order of the members.

        Once done, the same answer again.

        Raises:
            Fenced: of the first member whose teardown failed; the others are given back.
        """
        return tuple(reversed(self._each(Lease.release, self.leases[::-1])))

    drop = release

    def _each(self, work: Any, leases: Sequence[Lease]) -> list[Any]:
        """For all of them, whatever becomes of one; then the failure of the first in order."""
        found: list[Any] = []
        failed: dict[int, FabricError] = {}
        for lease in leases:
            try:
                found.append(work(lease))
            except FabricError as refused:
                failed[self.leases.index(lease)] = refused
        self._raise_first(failed)
        return found

    def _raise_first(self, failed: Mapping[int, FabricError]) -> None:
        if failed:
            index = min(failed)
            raise bundle.of_member(failed[index], index, self.leases[index].kind) from failed[index]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give back each as the end of its own block would; all of them, whatever fails."""
        failed: BaseException | None = None
        for each in reversed(self.leases):
            try:
                each.__exit__(kind, error, trace)
            except BaseException as raised:
                failed = failed or raised
        if failed is not None:
            raise failed

    def __repr__(self) -> str:
        return f"<BundleLease {' '.join(map(repr, self.leases))}>"
