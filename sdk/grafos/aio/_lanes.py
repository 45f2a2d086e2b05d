"""The threads in which the twin calls the SDK, and what becomes of a call that nobody awaits more.

    asking   acquire, attach, connect: may wait for room, so they must not stand in anyone's way
    doing    everything else: short, and what the others may be waiting for

Rules. Both are bounded; nothing is started before the first call. A task that is cancelled goes on
at once. Its call is taken back if it has not begun; else it ends in its thread, and what it gives
is handed to `undo`. What must happen (giving back) is never taken back.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Final, Generic, Protocol, TypeVar

from grafos_core.failure import FabricError

ASKING_THREADS_MAX: Final = 16
DOING_THREADS_MAX: Final = 8

ASKED_AT: Final[contextvars.ContextVar[str]] = contextvars.ContextVar("grafos_asked_at", default="")
"""Where in the program a lease was asked for; its thread cannot tell."""

T = TypeVar("T")


class Lane:
    """A few threads, started as they are needed. Thread-safe."""

    def __init__(self, name: str, threads_max: int) -> None:
        self._name, self._threads_max = name, threads_max
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def submit(self, call: Callable[[], T]) -> Future[T]:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._threads_max, f"grafos-{self._name}")
            return self._pool.submit(contextvars.copy_context().run, call)

    def forget(self) -> None:
        """In a forked child: its parent's threads are not there."""
        self._lock, self._pool = threading.Lock(), None


ASKING: Final = Lane("asking", ASKING_THREADS_MAX)
DOING: Final = Lane("doing", DOING_THREADS_MAX)


async def do(call: Callable[[], T]) -> T:
    """The result of a short call."""
    return await _awaited(DOING.submit(call))


async def finish(call: Callable[[], T]) -> T:
    """The result of a call that happens also if nobody waits for it any more."""
    return await asyncio.shield(asyncio.wrap_future(DOING.submit(call)))


async def ask(call: Callable[[], T], undo: Callable[[T], object]) -> T:
    """The result of a call that may take long; if it comes too late, `undo(result)` is called."""
    job = ASKING.submit(call)
    try:
        return await _awaited(job)
    except asyncio.CancelledError:
        if not job.cancel():
            job.add_done_callback(lambda done: _unwanted(done, undo))
        raise


async def _awaited(job: Future[T]) -> T:
    return await asyncio.wrap_future(job)


def _unwanted(job: Future[T], undo: Callable[[T], object]) -> None:
    """The call has ended, in whichever thread this is: what it gave is given back in another."""
    if job.cancelled() or job.exception() is not None:
        return
    result = job.result()

    def give_back() -> None:
        try:
            undo(result)
        except FabricError:  # its deadline takes it back
            pass

    DOING.submit(give_back)


class Entered(Protocol):
    """What can be the subject of `async with`."""

    async def __aenter__(self) -> Any: ...

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None: ...


E = TypeVar("E", bound=Entered)


class Opening(Generic[E], Awaitable[E]):
    """Something that is still to be opened: `await` it, or enter it with `async with`."""

    def __init__(self, opening: Callable[[], Coroutine[Any, Any, E]]) -> None:
        self._opening = opening
        self._opened: E | None = None

    def __await__(self) -> Generator[Any, Any, E]:
        return self._opening().__await__()

    async def __aenter__(self) -> E:
        self._opened = opened = await self._opening()
        await opened.__aenter__()
        return opened

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        assert self._opened is not None
        return await self._opened.__aexit__(kind, error, trace)


def _in_child() -> None:
    ASKING.forget()
    DOING.forget()


os.register_at_fork(after_in_child=_in_child)
