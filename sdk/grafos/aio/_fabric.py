"""Connections that are awaited. See `grafos.aio`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from grafos import _connection, _local
from grafos._fences import Fence
from grafos._receipt import NodeKey
from grafos._revocation import Revocation
from grafos.aio import _lanes
from grafos.aio._builder import inside
from grafos.aio._lanes import Opening
from grafos.aio._twin import twin_of
from grafos_core import lease as core

if TYPE_CHECKING:
    from grafos_proto.wire.credentials import Credentials


@twin_of(_connection.Fabric)
class Fabric:
    def __init__(self, sync: _connection.Fabric) -> None:
        self.sync = sync
        self._before: list[Any] = []

    @property
    def identity(self) -> str:
        return self.sync.identity

    @property
    def holder_key(self) -> str:
        return self.sync.holder_key

    @property
    def tenant(self) -> str:
        return self.sync.tenant

    @property
    def endpoint(self) -> str:
        return self.sync.endpoint

    @property
    def closed(self) -> bool:
        return self.sync.closed

    async def poll(self) -> None:
        await _lanes.do(self.sync.poll)

    tick = poll

    async def start(self) -> None:
        await _lanes.do(self.sync.start)

    async def describe(self, lease_id: str) -> core.Lease:
        return await _lanes.do(lambda: self.sync.describe(lease_id))

    async def leases(
        self,
        *,
        kind: str | None = None,
        node: str = "",
        holder: str = "",
        state: str | None = None,
        prefix: str = "",
    ) -> AsyncIterator[core.Lease]:
        found = self.sync.leases(kind=kind, node=node, holder=holder, state=state, prefix=prefix)
        while (each := await _lanes.do(lambda: next(found, None))) is not None:
            yield each

    async def fences(self, *, node: str = "") -> list[Fence]:
        return await _lanes.do(lambda: self.sync.fences(node=node))

    async def keys(self, *, node: str = "") -> list[NodeKey]:
        return await _lanes.do(lambda: self.sync.keys(node=node))

    async def revoke(
        self,
        *lease_ids: str,
        reason: str = "",
        grace: float | timedelta = 0,
        tenant: str = "",
        holder: str = "",
        holder_prefix: str = "",
        node: str = "",
        kind: str | None = None,
        key: str = "",
    ) -> list[Revocation]:
        return await _lanes.do(
            lambda: self.sync.revoke(
                *lease_ids, reason=reason, grace=grace, tenant=tenant, holder=holder,
                holder_prefix=holder_prefix, node=node, kind=kind, key=key,
            )
        )  # fmt: skip

    async def close(self) -> None:
        await _lanes.finish(self.sync.close)

    async def __aenter__(self) -> Self:
        self._before.append(inside.get())
        inside.set(self.sync)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        inside.set(self._before.pop() if self._before else None)
        await self.close()

    def __reduce__(self) -> Any:
        return self.sync.__reduce__()

    def __repr__(self) -> str:
        return f"<aio {self.sync!r}>"


class LocalFabric:
    """A running fabric that belongs to this process; `sync` has all that can be done to it."""

    def __init__(self, sync: _local.LocalFabric) -> None:
        self.sync = sync
        self._before: Any = None

    @property
    def connection(self) -> Fabric:
        """This process's connection to it."""
        return Fabric(self.sync.connection)

    async def close(self) -> None:
        """Stop everything and remove it."""
        await _lanes.finish(self.sync.close)

    async def __aenter__(self) -> Self:
        self._before = inside.get()
        inside.set(await _lanes.do(lambda: self.sync.connection))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        inside.set(self._before)
        await self.close()


def connect(
    endpoint: str | None = None,
    *,
    tenant: str | None = None,
    identity: str | Path | Credentials | None = None,
    timeout: float | timedelta = _connection.CONNECT_S_DEFAULT,
) -> Opening[Fabric]:
    async def opened() -> Fabric:
        def call() -> _connection.Fabric:
            return _connection.connect(endpoint, tenant=tenant, identity=identity, timeout=timeout)

        return Fabric(await _lanes.ask(call, lambda made: made.close()))

    return Opening(opened)


def local_fabric(
    nodes: int = 1,
    *,
    memory_bytes: int = _local.MEMORY_BYTES_DEFAULT,
    block_bytes: int = _local.BLOCK_BYTES_DEFAULT,
    faults: Mapping[str, str] | None = None,
    tcp: bool = False,
    clear_proved_clean: bool = False,
) -> Opening[LocalFabric]:
    made = _local.local_fabric(
        nodes, memory_bytes=memory_bytes, block_bytes=block_bytes, faults=faults, tcp=tcp,
        clear_proved_clean=clear_proved_clean,
    )  # fmt: skip

    async def opened() -> LocalFabric:
        return LocalFabric(await _lanes.ask(made.start, lambda started: started.close()))

    return Opening(opened)


connect.__doc__ = _connection.connect.__doc__
local_fabric.__doc__ = _local.local_fabric.__doc__
