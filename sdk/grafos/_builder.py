"""How a lease is asked for: option by option, then `acquire()`.

Rules. A builder never changes: each option gives a new one, so that one can be kept and used many
times. An option is checked where it is given. One that a later version will have is refused by
name; none is silently ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, NoReturn, Self, TypeAlias, TypeVar

from grafos._lease import Lease, duration_ms, not_there_yet
from grafos_core import failure
from grafos_core.lease import (
    AMOUNT_MAX,
    RETURN_MS,
    TTL_MS_MAX,
    TTL_MS_MIN,
    OnDisconnect,
    check_lease_id,
)

if TYPE_CHECKING:
    from grafos._connection import Fabric
    from grafos._local import LocalFabric
    from grafos.testing import VirtualFabric

    Source: TypeAlias = Fabric | LocalFabric | VirtualFabric

RECONNECT_MS_MAX: Final = 600_000
WAIT_MS_MAX: Final = 600_000
LABELS_MAX: Final = 16
LATER: Final = frozenset(
    {
        "anti_affinity", "durable", "huge_pages", "isolation", "lifetime", "min_bandwidth",
        "min_cores", "min_vram", "numa_node", "priority", "reconnect", "scrub", "share",
        "stop_after", "to",
    }
)  # fmt: skip
"""Options of later versions."""

L = TypeVar("L", bound=Lease)


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for."""

    kind: str
    amount: int | None = None
    ttl_ms: int = 0
    """0: the fabric's default."""
    wait_ms: int | None = None
    where: Mapping[str, str] = field(default_factory=dict)
    keep: bool = False
    on_disconnect: str = ""
    """`release`, `keep` or `grace`; empty: the fabric's default."""
    reconnect_ms: int = 0
    auto_renew: bool = False


class _OnClassToo:
    """A method that also works on the class, on a builder without options."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.__doc__ = function.__doc__

    def __get__(self, builder: Any, owner: type[Any]) -> Callable[..., Any]:
        of = owner() if builder is None else builder
        return lambda lease_id: self._function(of, lease_id)


class Builder(Generic[L]):
    """What builders of all kinds have in common."""

    __slots__ = ("_connection", "_request")
    kind: ClassVar[str] = ""
    amount_option: ClassVar[str] = ""
    lease_class: type[L]

    def __init__(self) -> None:
        self._request = Request(self.kind)
        self._connection: Source | None = None

    @classmethod
    def new(cls) -> Self:
        """The same as calling the class, for those who translate line by line."""
        return cls()

    def lease_secs(self, seconds: float) -> Self:
        """How long the lease lives unless it is renewed: 1 s to 24 h."""
        return self.ttl(seconds)

    def ttl(self, duration: float | timedelta) -> Self:
        """As `lease_secs`; also takes a timedelta."""
        ttl_ms = duration_ms(duration, "ttl")
        if not TTL_MS_MIN <= ttl_ms <= TTL_MS_MAX:
            raise failure.of("RANGE", f"ttl: {TTL_MS_MIN / 1000:g} s to {TTL_MS_MAX // 1000} s")
        return self._with(ttl_ms=ttl_ms)

    def wait(self, duration: float | timedelta) -> Self:
        """How long `acquire` may wait for room; by default not at all.

        It waits for capacity and quota that are in use, and for a node that is coming up (which is
        waited for up to 3 s by default). What can never fit is refused at once all the same.

        Args:
            duration: in seconds, whole or not, or a timedelta; 0 to 600 s. It is kept in
                milliseconds; 0 also gives up the wait for a node.

        Raises:
            Incompatible: code RANGE, it is negative or longer than 600 s; code INVALID, it is
                neither a number nor a timedelta.
        """
        wait_ms = duration_ms(duration, "wait")
        if wait_ms > WAIT_MS_MAX:
            raise failure.of("RANGE", f"wait: at most {WAIT_MS_MAX // 1000} s")
        return self._with(wait_ms=wait_ms)

    def where(
        self, *, node: str | None = None, label: Mapping[str, str] | None = None, **labels: str
    ) -> Self:
        """Only on this node, or only on nodes with these labels: `where(zone="a")`."""
        asked = {**(label if label is not None else {}), **labels}
        if node is not None:
            asked["node"] = node
        for name, value in asked.items():
            if not (_is_text(name) and _is_text(value)):
                raise failure.of("INVALID", "where: names and values are texts")
        asked = {**self._request.where, **asked}
        if len(asked) > LABELS_MAX:
            raise failure.of("RANGE", f"where: at most {LABELS_MAX} labels")
        return self._with(where=asked)

    def keep(self) -> Self:
        """The lease outlives this process, to its deadline; `attach` can take it up."""
        return self._with(keep=True)

    def on_disconnect(self, what: str | float | timedelta) -> Self:
        """What follows when the node loses sight of this process though it may live.

        Args:
            what: `"release"`, the lease ends, as soon as it is certain; `"keep"`, it lives to its
                deadline; or how many seconds there are to come back, 1 to 600. By default it is
                5 s. The end of the process is another matter: see `keep()`.
        """
        if isinstance(what, str):
            if what not in (OnDisconnect.RELEASE, OnDisconnect.KEEP):
                raise failure.of("INVALID", "on_disconnect: 'release', 'keep', or seconds")
            return self._with(on_disconnect=what, reconnect_ms=0)
        grace_ms = duration_ms(what, "on_disconnect")
        if not RETURN_MS <= grace_ms <= RECONNECT_MS_MAX:
            raise failure.of("RANGE", f"on_disconnect: 1 to {RECONNECT_MS_MAX // 1000} s")
        return self._with(on_disconnect=OnDisconnect.GRACE.value, reconnect_ms=grace_ms)

    def auto_renew(self) -> Self:
        """Renew it in the background, from the SDK's one thread, as long as somebody holds it."""
        return self._with(auto_renew=True)

    def fabric(self, connection: Source) -> Self:
        """Ask this fabric and not the one in force."""
        made = self._with()
        made._connection = connection
        return made

    def acquire(self) -> L:
        """The lease, bound and ready.

        Raises:
            RateLimited: the capacity is in use (NO_CAPACITY) or the quota used up (QUOTA).
            Incompatible: no node has so much (CAPACITY), or none matches (NO_MATCH).
            Degraded: no node with fresh evidence of readiness (NODE_NOT_READY).
            Disconnected: the fabric cannot be reached.
        """
        if self._request.amount is None:
            raise failure.of("MISSING_FIELD", self.amount_option)
        return self._fabric()._acquire(self._request, self.lease_class)

    def _attach(self, lease_id: str) -> L:
        """Take up a live lease whose holder went away: same epoch, next generation.

        Raises:
            Denied: code NOT_FOUND; there is no such lease, or it is somebody else's.
            LeaseExpired, Revoked, Fenced: it is over.
        """
        return self._fabric()._attach(check_lease_id(lease_id), self._request, self.lease_class)

    attach = _OnClassToo(_attach)

    def __getattr__(self, name: str) -> Any:
        if name not in LATER:
            raise AttributeError(f"{type(self).__name__} has no option {name!r}")

        def refuse(*_: Any, **__: Any) -> NoReturn:
            raise not_there_yet(name)

        return refuse

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._request}>"

    def _with(self, **changes: Any) -> Self:
        made = type(self)()
        made._request = replace(self._request, **changes)
        made._connection = self._connection
        return made

    def _with_amount(self, count: int) -> Self:
        if isinstance(count, bool) or not isinstance(count, int):
            raise failure.of("INVALID", f"{self.amount_option}: a whole number")
        if not 1 <= count <= AMOUNT_MAX:
            raise failure.of("RANGE", f"{self.amount_option}: 1 to {AMOUNT_MAX}")
        return self._with(amount=count)

    def _fabric(self) -> Fabric:
        from grafos._connection import connection_of, default_fabric  # gRPC, when it is needed

        return default_fabric() if self._connection is None else connection_of(self._connection)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)
