"""Leases and handles that are awaited. See `grafos.aio`."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, NoReturn, Self, TypeVar

import grafos
from grafos._lease import LeaseStatus
from grafos._notice import Notice
from grafos._receipt import TeardownReceipt
from grafos.aio import _lanes
from grafos.aio._share import Share
from grafos.aio._twin import twin_of

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

    from grafos._share import ShareView
    from grafos._view import FabricView

LISTEN_S: Final = 0.05
"""How often somebody who waits for notices asks whether there are any."""

S = TypeVar("S", bound=grafos.Lease)


@twin_of(grafos.Lease)
class Lease(Generic[S]):
    __slots__ = ("__weakref__", "sync")
    kind: ClassVar[str] = ""

    def __init__(self, sync: S) -> None:
        self.sync: S = sync

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
    def generation(self) -> int:
        return self.sync.generation

    @property
    def ttl_ms(self) -> int:
        return self.sync.ttl_ms

    @property
    def expiry_ms(self) -> int:
        return self.sync.expiry_ms

    @property
    def lifetime_end_ms(self) -> int | None:
        return self.sync.lifetime_end_ms

    @property
    def valid(self) -> bool:
        return self.sync.valid

    @property
    def status(self) -> LeaseStatus:
        return self.sync.status

    def remaining_ms(self) -> int:
        return self.sync.remaining_ms()

    def on_notice(self, callback: Callable[[Notice], None]) -> None:
        loop = asyncio.get_running_loop()
        self.sync.on_notice(lambda notice: _in_loop(loop, callback, notice))

    def notices(self) -> AsyncIterator[Notice]:
        """Whatever happens to this lease from now on without having been asked, until its end.

        Asks twenty times a second while it is awaited; what comes meanwhile is kept.
        """
        heard: asyncio.Queue[Notice] = asyncio.Queue()
        self.on_notice(heard.put_nowait)
        return self._told(heard)

    async def _told(self, heard: asyncio.Queue[Notice]) -> AsyncIterator[Notice]:
        while True:
            over = self.sync._end is not None
            await _lanes.do(self.sync._fabric.poll)
            await asyncio.sleep(0)  # what the poll has called back is in the queue now
            while not heard.empty():
                yield heard.get_nowait()
            if over:
                return
            try:
                yield await asyncio.wait_for(heard.get(), LISTEN_S)
            except TimeoutError:
                pass

    async def renew(self, ttl: float | timedelta | None = None) -> int:
        return await _lanes.do(lambda: self.sync.renew(ttl))

    async def checkpoint_done(self) -> TeardownReceipt:
        return await _lanes.finish(self.sync.checkpoint_done)

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

    async def shares(self) -> list[ShareView]:
        return await _lanes.do(self.sync.shares)

    async def release(self) -> TeardownReceipt:
        return await _lanes.finish(self.sync.release)

    drop = release

    async def detach(self) -> None:
        await _lanes.finish(self.sync.detach)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await _lanes.finish(lambda: self.sync.__exit__(kind, error, trace))

    def __reduce__(self) -> NoReturn:
        self.sync.__reduce__()

    def __repr__(self) -> str:
        return f"<aio {self.sync!r}>"


def _in_loop(
    loop: asyncio.AbstractEventLoop, callback: Callable[[Notice], None], notice: Notice
) -> None:
    """Callbacks run where the program does; a loop that is closed hears nothing more."""
    try:
        loop.call_soon_threadsafe(callback, notice)
    except RuntimeError:
        pass


@twin_of(grafos.MemLease)
class MemLease(Lease[grafos.MemLease]):
    __slots__ = ()
    kind: ClassVar[str] = "mem"

    def mem(self) -> FabricMem:
        return FabricMem(self.sync.mem())


@twin_of(grafos.BlockLease)
class BlockLease(Lease[grafos.BlockLease]):
    __slots__ = ()
    kind: ClassVar[str] = "block"

    def block(self) -> FabricBlock:
        return FabricBlock(self.sync.block())


@twin_of(grafos.FabricMem)
class FabricMem:
    __slots__ = ("sync",)

    def __init__(self, sync: grafos.FabricMem) -> None:
        self.sync = sync

    @property
    def arena_size(self) -> int:
        return self.sync.arena_size

    @property
    def path(self) -> str:
        return self.sync.path

    def map(self, offset: int = 0, length: int | None = None) -> FabricView:
        return self.sync.map(offset, length)

    async def read(self, offset: int, length: int) -> bytes:
        return await _lanes.do(lambda: self.sync.read(offset, length))

    async def readinto(self, offset: int, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        aside = bytearray(len(view))  # a thread must not write where nobody waits any more
        count = await _lanes.do(lambda: self.sync.readinto(offset, aside))
        view[:count] = aside[:count]
        return count

    async def write(self, offset: int, data: ReadableBuffer) -> None:
        await _lanes.do(lambda: self.sync.write(offset, data))

    async def read_many(self, parts: Sequence[tuple[int, int]]) -> list[bytes]:
        return await _lanes.do(lambda: self.sync.read_many(parts))

    async def write_many(self, parts: Sequence[tuple[int, ReadableBuffer]]) -> None:
        await _lanes.do(lambda: self.sync.write_many(parts))

    async def compare_and_swap(self, offset: int, expected: int, new: int) -> int:
        return await _lanes.do(lambda: self.sync.compare_and_swap(offset, expected, new))

    async def fetch_add(self, offset: int, n: int) -> int:
        return await _lanes.do(lambda: self.sync.fetch_add(offset, n))

    def __reduce__(self) -> Any:
        self.sync.__reduce__()


@twin_of(grafos.FabricBlock)
class FabricBlock:
    __slots__ = ("sync",)
    block_size = grafos.FabricBlock.block_size

    def __init__(self, sync: grafos.FabricBlock) -> None:
        self.sync = sync

    @property
    def num_blocks(self) -> int:
        return self.sync.num_blocks

    async def read_block(self, index: int) -> bytes:
        return await _lanes.do(lambda: self.sync.read_block(index))

    async def write_block(self, index: int, data: ReadableBuffer) -> None:
        await _lanes.do(lambda: self.sync.write_block(index, data))

    async def read_blocks(self, index: int, count: int) -> bytes:
        return await _lanes.do(lambda: self.sync.read_blocks(index, count))

    async def write_blocks(self, index: int, data: ReadableBuffer) -> None:
        await _lanes.do(lambda: self.sync.write_blocks(index, data))

    async def flush(self) -> None:
        await _lanes.do(self.sync.flush)

    def __reduce__(self) -> Any:
        self.sync.__reduce__()
