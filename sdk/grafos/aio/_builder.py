"""Builders whose `acquire` is awaited. See `grafos.aio`.

Which fabric a builder asks that was not told: the one of the innermost `async with` of its task,
then that of a plain `with` as for everybody else, then a process-wide `connect()`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, Self, TypeAlias, TypeVar

import grafos
from grafos import _clock, _defaults
from grafos._builder import Builder as SyncBuilder
from grafos.aio import _lanes
from grafos.aio._lanes import Opening
from grafos.aio._lease import BlockLease, Lease, MemLease
from grafos.aio._twin import an_option, twin_of
from grafos_core.failure import Degraded, RateLimited

if TYPE_CHECKING:
    from grafos._builder import Source as SyncSource
    from grafos.aio._fabric import Fabric, LocalFabric

    Source: TypeAlias = Fabric | LocalFabric | SyncSource

WAIT_PIECE_MS: Final = 2_000
"""A long wait is asked for piece by piece: so long a cancelled one may occupy its thread."""

inside: ContextVar[Any] = ContextVar("grafos_aio_fabric", default=None)
"""The connection of the innermost `async with` of this task, as the SDK has it."""

L = TypeVar("L", bound=Lease[Any])


@twin_of(SyncBuilder, an_option)
class Builder(Generic[L]):
    __slots__ = ("sync",)
    kind: ClassVar[str] = ""
    amount_option: ClassVar[str] = ""
    lease_class: type[L]
    _sync_class: ClassVar[type[SyncBuilder[Any]]]

    def __init__(self) -> None:
        self.sync: Any = self._sync_class()

    @classmethod
    def new(cls) -> Self:
        return cls()

    def lease_secs(self, seconds: float) -> Self:
        return self._with(self.sync.lease_secs(seconds))

    def ttl(self, duration: float | timedelta) -> Self:
        return self._with(self.sync.ttl(duration))

    def wait(self, duration: float | timedelta) -> Self:
        return self._with(self.sync.wait(duration))

    def where(
        self, *, node: str | None = None, label: Mapping[str, str] | None = None, **labels: str
    ) -> Self:
        return self._with(self.sync.where(node=node, label=label, **labels))

    def keep(self) -> Self:
        return self._with(self.sync.keep())

    def on_disconnect(self, what: str | float | timedelta) -> Self:
        return self._with(self.sync.on_disconnect(what))

    def auto_renew(self) -> Self:
        return self._with(self.sync.auto_renew())

    def fabric(self, connection: Source) -> Self:
        return self._with(self.sync.fabric(getattr(connection, "sync", connection)))

    def acquire(self) -> Opening[L]:
        caller = sys._getframe(1)
        code = caller.f_code
        where = f"{code.co_filename}:{caller.f_lineno} in {code.co_name}"
        return Opening(lambda: self._acquired(where))

    def _attach(self, lease_id: str) -> Opening[L]:
        async def attached() -> L:
            sync = self._here()
            found = await _lanes.ask(lambda: sync.attach(lease_id), lambda lease: lease.detach())
            return self.lease_class(found)

        return Opening(attached)

    class _OnClassToo:
        """As for the original: on the class it is a builder without options."""

        __doc__ = SyncBuilder._attach.__doc__

        def __get__(self, builder: Any, owner: type[Any]) -> Callable[[str], Opening[Any]]:
            return (owner() if builder is None else builder)._attach  # type: ignore[no-any-return]

    attach: Any = _OnClassToo()

    def __getattr__(self, name: str) -> Any:
        if name == "sync":
            raise AttributeError(name)
        return getattr(self.sync, name)

    def __repr__(self) -> str:
        return f"<aio {self.sync!r}>"

    async def _acquired(self, where: str) -> L:
        """Piece by piece, so that no thread waits long for a task that is gone."""
        _lanes.ASKED_AT.set(where)
        sync, wait_ms = self._here(), self.sync._request.wait_ms
        if wait_ms is None or wait_ms <= WAIT_PIECE_MS:
            return self.lease_class(await _lanes.ask(sync.acquire, _give_back))
        until_ms = _clock.boot_ms() + wait_ms
        while True:
            left_ms = max(0, until_ms - _clock.boot_ms())
            piece = sync.wait(min(left_ms, WAIT_PIECE_MS) / 1000)
            try:
                return self.lease_class(await _lanes.ask(piece.acquire, _give_back))
            except (RateLimited, Degraded) as refused:
                waits = refused.code in ("NO_CAPACITY", "QUOTA", "NODE_NOT_READY")
                if not waits or _clock.boot_ms() >= until_ms:
                    raise

    def _here(self) -> Any:
        """The builder with its fabric said outright, as far as it is known without asking."""
        if self.sync._connection is not None:
            return self.sync
        found = inside.get() or _defaults.innermost()
        return self.sync if found is None else self.sync.fabric(found)

    def _with(self, sync: Any) -> Self:
        made = type(self)()
        made.sync = sync
        return made


def _give_back(lease: grafos.Lease) -> None:
    """Nobody has it, and nobody will."""
    lease.release()


@twin_of(grafos.MemBuilder, an_option)
class MemBuilder(Builder[MemLease]):
    __slots__ = ()
    kind = "mem"
    lease_class = MemLease
    amount_option = "min_bytes"
    _sync_class = grafos.MemBuilder

    def min_bytes(self, count: int) -> MemBuilder:
        return self._with(self.sync.min_bytes(count))


@twin_of(grafos.BlockBuilder, an_option)
class BlockBuilder(Builder[BlockLease]):
    __slots__ = ()
    kind = "block"
    lease_class = BlockLease
    amount_option = "min_blocks"
    _sync_class = grafos.BlockBuilder

    def min_blocks(self, count: int) -> BlockBuilder:
        return self._with(self.sync.min_blocks(count))
