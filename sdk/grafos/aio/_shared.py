"""What was received, for those who await. See `grafos.aio`."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from grafos import _defaults, _share
from grafos.aio import _lanes
from grafos.aio._builder import inside
from grafos.aio._lanes import Opening
from grafos.aio._lease import FabricBlock, FabricMem
from grafos.aio._share import Share
from grafos.aio._twin import twin_of

if TYPE_CHECKING:
    from grafos.aio._builder import Source


@twin_of(_share.SharedLease)
class SharedLease:
    __slots__ = ("sync",)

    def __init__(self, sync: _share.SharedLease) -> None:
        self.sync = sync

    @property
    def share_id(self) -> str:
        return self.sync.share_id

    @property
    def lease_id(self) -> str:
        return self.sync.lease_id

    @property
    def node_id(self) -> str:
        return self.sync.node_id

    @property
    def epoch(self) -> int:
        return self.sync.epoch

    @property
    def kind(self) -> str:
        return self.sync.kind

    @property
    def ops(self) -> tuple[str, ...]:
        return self.sync.ops

    @property
    def expiry_ms(self) -> int:
        return self.sync.expiry_ms

    @property
    def valid(self) -> bool:
        return self.sync.valid

    def remaining_ms(self) -> int:
        return self.sync.remaining_ms()

    def mem(self) -> FabricMem:
        return FabricMem(self.sync.mem())

    def block(self) -> FabricBlock:
        return FabricBlock(self.sync.block())

    async def share(
        self,
        *,
        to: str,
        ops: Iterable[str] | None = None,
        offset: int = 0,
        length: int | None = None,
        ttl: float | timedelta | None = None,
    ) -> Share:
        call = functools.partial(
            self.sync.share, to=to, ops=ops, offset=offset, length=length, ttl=ttl
        )
        return Share(await _lanes.do(call))

    async def shares(self) -> list[_share.ShareView]:
        return await _lanes.do(self.sync.shares)

    async def end(self) -> None:
        await _lanes.finish(self.sync.end)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.sync.__exit__(kind, error, trace)

    def __reduce__(self) -> Any:
        self.sync.__reduce__()

    def __repr__(self) -> str:
        return f"<aio {self.sync!r}>"


def open_share(text: str, *, fabric: Source | None = None) -> Opening[SharedLease]:
    async def opened() -> SharedLease:
        source: Any = getattr(fabric, "sync", fabric) or inside.get() or _defaults.innermost()
        call = functools.partial(_share.open_share, text, fabric=source)
        return SharedLease(await _lanes.ask(call, lambda late: late.__exit__(None, None, None)))

    return Opening(opened)


open_share.__doc__ = _share.open_share.__doc__
