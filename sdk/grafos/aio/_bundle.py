"""Bundles whose `acquire` is awaited. See `grafos.aio`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import grafos
from grafos import _clock, _defaults
from grafos._receipt import TeardownReceipt
from grafos.aio import _lanes
from grafos.aio._builder import WAIT_PIECE_MS, Builder, inside
from grafos.aio._lanes import Opening
from grafos.aio._lease import BlockLease, Lease, MemLease
from grafos.aio._twin import an_option, twin_of
from grafos_core import failure
from grafos_core.failure import Degraded, RateLimited

if TYPE_CHECKING:
    from grafos.aio._builder import Source

TWIN_OF: Final[dict[str, type[Lease[Any]]]] = {"mem": MemLease, "block": BlockLease}


@twin_of(grafos.Bundle, an_option)
class Bundle:
    __slots__ = ("sync",)

    def __init__(self, *members: Builder[Any]) -> None:
        for index, member in enumerate(members):
            if not isinstance(member, Builder):
                raise failure.of("INVALID", f"member {index}: a builder")
        self.sync = grafos.Bundle(*(member.sync for member in members))

    @classmethod
    def new(cls) -> Self:
        return cls()

    def add(self, member: Builder[Any]) -> Self:
        sync: Any = getattr(member, "sync", member)
        return self._with(self.sync.add(sync))

    def wait(self, duration: float | timedelta) -> Self:
        return self._with(self.sync.wait(duration))

    def fabric(self, connection: Source) -> Self:
        sync: Any = getattr(connection, "sync", connection)
        return self._with(self.sync.fabric(sync))

    def acquire(self) -> Opening[BundleLease]:
        return Opening(self._acquired)

    def __len__(self) -> int:
        return len(self.sync)

    def __repr__(self) -> str:
        return f"<aio {self.sync!r}>"

    async def _acquired(self) -> BundleLease:
        """Piece by piece, so that no thread waits long for a task that is gone."""
        sync, wait_ms = self._here(), self.sync._wait_ms
        until_ms = _clock.boot_ms() + (wait_ms or 0)
        while True:
            left_ms = max(0, until_ms - _clock.boot_ms())
            piece = sync if wait_ms is None else sync.wait(min(left_ms, WAIT_PIECE_MS) / 1000)
            try:
                return BundleLease(await _lanes.ask(piece.acquire, grafos.BundleLease.release))
            except (RateLimited, Degraded) as refused:
                waits = refused.code in ("NO_CAPACITY", "QUOTA", "NODE_NOT_READY")
                if wait_ms is None or not waits or _clock.boot_ms() >= until_ms:
                    raise

    def _here(self) -> grafos.Bundle:
        """With its fabric said outright, as far as it is known without asking."""
        if any(x is not None for x in (self.sync._connection, *self._members_say())):
            return self.sync
        found = inside.get() or _defaults.innermost()
        return self.sync if found is None else self.sync.fabric(found)

    def _members_say(self) -> list[Any]:
        return [member._connection for member in self.sync._members]

    def _with(self, sync: grafos.Bundle) -> Self:
        made = type(self)()
        made.sync = sync
        return made


@twin_of(grafos.BundleLease)
class BundleLease(Sequence[Any]):
    __slots__ = ("leases", "sync")

    def __init__(self, sync: grafos.BundleLease) -> None:
        self.sync = sync
        self.leases = tuple(TWIN_OF[each.kind](each) for each in sync)

    def __len__(self) -> int:
        return len(self.leases)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.leases)

    def __getitem__(self, index: Any) -> Any:
        return self.leases[index]

    @property
    def lease_ids(self) -> tuple[str, ...]:
        return self.sync.lease_ids

    @property
    def valid(self) -> bool:
        return self.sync.valid

    def remaining_ms(self) -> int:
        return self.sync.remaining_ms()

    async def renew(self, ttl: float | timedelta | None = None) -> int:
        return await _lanes.do(lambda: self.sync.renew(ttl))

    async def release(self) -> tuple[TeardownReceipt, ...]:
        return await _lanes.finish(self.sync.release)

    drop = release

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await asyncio.shield(asyncio.to_thread(self.sync.__exit__, kind, error, trace))

    def __repr__(self) -> str:
        return f"<aio {self.sync!r}>"
