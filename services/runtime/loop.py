"""One owner of a service's state at a time, and the queue through which everybody else asks it.

Handlers of calls run in many threads and the cores know of none. So a core belongs to one owner
thread; others hand it functions to run and wait for what they return. Between them the owner ticks:
it tells the core the time, and is told when the time will next matter.

    call(f), post(f) ──► queue ──► owner: f(), f(), … then on_tick(now) ──► next timeout, wait

To wake a thread and to wait for it takes longer than most functions. So whoever finds the owner
idle and the queue empty borrows the right to the state and runs its function itself: `call`, `run`
and a batch do so, `post` never does. Order stays: only who finds nobody before him goes ahead.

Rules. Every queue is bounded; one that is full refuses with RATE at once. A function's exception
goes to who called it. What fails with nobody waiting, a posted function or the tick, has left the
state in doubt: the process halts and is recovered from what is durable. So does it on a broken
invariant, whoever waits.

A `Batcher` gathers what many callers want at the same time into one run of a handler, so that one
commit to disk serves them all: while the disk is busy with one batch, the next one gathers. A
handler that raises a failure has refused the whole batch and changed nothing.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Generic, TypeVar

from grafos_core import failure
from grafos_core.failure import FabricError, InvariantViolation, invariant
from services.runtime.clock import SYSTEM, Clock, Instant
from services.runtime.logs import Log

QUEUE_MAX: Final = 4_096
"""Functions that wait for the owner. One takes some 10 µs; a full queue is a stuck disk."""
TURN_MAX: Final = 256
"""Functions between two ticks: no flood of calls holds up a deadline."""
BATCH_MAX: Final = 256
BUSY_RETRY_MS: Final = 100
IDLE_MS_MAX: Final = 60_000
"""The owner looks at the clock at least this often, whatever the core said."""

AWAKE: Final = 1 << 62
"""As the instant until which the owner sleeps: whatever is wanted is wanted before it."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class _Slot:
    """Where one caller waits for one result."""

    __slots__ = ("_latch", "error", "result")

    def __init__(self) -> None:
        self._latch = threading.Lock()
        self._latch.acquire()
        self.result: Any = None
        self.error: BaseException | None = None

    def put(self, result: Any, error: BaseException | None = None) -> None:
        self.result, self.error = result, error
        self._latch.release()

    def take(self, timeout_ms: int | None) -> Any:
        if not self._latch.acquire(timeout=-1 if timeout_ms is None else max(0, timeout_ms) / 1000):
            raise failure.of("DEADLINE")
        if self.error is not None:
            raise self.error
        return self.result


class Loop:
    """The owner thread of one core. Nothing runs before `start`."""

    def __init__(
        self,
        name: str,
        *,
        on_tick: Callable[[Instant], int | None],
        log: Log,
        halt: Callable[[], None],
        clock: Clock = SYSTEM,
        queue_max: int = QUEUE_MAX,
        after: Callable[[], int | None] | None = None,
    ) -> None:
        """`on_tick(now)` does what is due and says in how many ms it wants to be asked again.

        `after()` ends a turn that was borrowed: it does what may not wait for the tick, and says in
        how many ms that is wanted. Without it, what was borrowed is followed by a tick at once.
        """
        self.name, self._on_tick, self._log, self._halt = name, on_tick, log, halt
        self._clock, self._queue_max, self._after = clock, queue_max, after
        self._right = threading.Lock()
        """To the state. Held by the owner for a turn, or by who borrows one."""
        self._holder: int | None = None
        """The thread that has the right."""
        self._mine: deque[tuple[Callable[[], Any], _Slot | None]] | None = None
        """What who borrows the right posts to itself; None: nobody borrows it."""
        self._sleeps_until_ms = AWAKE
        self._broken = False
        self._queue: deque[tuple[Callable[[], Any], _Slot | None]] = deque()
        self._changed = threading.Condition(threading.Lock())
        self._closed = False
        self._woken = False
        self._at_halt: list[Callable[[], None]] = []
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def call(self, function: Callable[[], _Result], timeout_ms: int | None = None) -> _Result:
        """Run `function` as the owner; give back what it returns, raise what it raises.

        DEADLINE after `timeout_ms`; whether the function has run is then not known. For the owner
        itself it runs at once.
        """
        if self.is_owner():
            return function()
        slot = _Slot()
        if not self._borrow(function, slot):
            self._submit(function, slot)
        result: _Result = slot.take(timeout_ms)
        return result

    def run(self, function: Callable[[], Any]) -> None:
        """As `post`, but in this thread and at once where nobody is before it."""
        if self.is_owner() or not self._borrow(function, None):
            self._submit(function, None)

    def post(self, function: Callable[[], Any]) -> None:
        """Run `function` in the owner thread, later; nobody waits for it."""
        self._submit(function, None)

    def wake(self) -> None:
        """Tick soon, since something has changed that the core will ask about."""
        with self._changed:
            self._woken = True
            self._changed.notify()

    def at_halt(self, abandon: Callable[[], None]) -> None:
        """Call `abandon()` when the owner has failed, so that nobody waits for it in vain."""
        self._at_halt.append(abandon)

    def is_owner(self) -> bool:
        """Whether this thread has the right to the state now."""
        return self._holder == threading.get_ident()

    def depth(self) -> int:
        """Functions that wait."""
        return len(self._queue)

    def stop(self, timeout_ms: int = 5_000) -> bool:
        """Run what is queued, then end the thread; False if it is still busy after the timeout."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout_ms / 1000)
        return not self._thread.is_alive()

    def _submit(self, function: Callable[[], Any], slot: _Slot | None) -> None:
        with self._changed:
            if self._closed:
                raise failure.of("RETRY_LATER")
            if len(self._queue) >= self._queue_max:
                raise failure.of("RATE", retry_after_ms=BUSY_RETRY_MS)
            if self._mine is not None and self.is_owner():
                self._mine.append((function, slot))
                return
            self._queue.append((function, slot))
            if len(self._queue) == 1:
                self._changed.notify()

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:
            self._failed(error)

    def _failed(self, error: BaseException) -> None:
        self._broken = True
        self._log.error("loop.failed", error, loop=self.name)
        self._give_up()
        self._halt()

    def _turn(self) -> bool:
        """Some of what is queued, one tick, one wait. False: this was the last turn."""
        with self._right:
            if self._broken:
                return False
            self._holder, self._sleeps_until_ms = threading.get_ident(), AWAKE
            try:
                for _ in range(TURN_MAX):
                    with self._changed:
                        if not self._queue:
                            break
                        function, slot = self._queue.popleft()
                    self._perform(function, slot)
                timeout_ms = self._on_tick(self._clock.instant())
            finally:
                self._holder = None
        with self._changed:
            if self._closed and not self._queue:
                return False
            if not self._queue and not self._woken:
                wait_ms = IDLE_MS_MAX if timeout_ms is None else min(timeout_ms, IDLE_MS_MAX)
                self._sleeps_until_ms = self._clock.boot_ms() + wait_ms
                self._changed.wait(max(0, wait_ms) / 1000)
            self._woken = False
        return True

    def _borrow(self, function: Callable[[], Any], slot: _Slot | None) -> bool:
        """Run it here, and what it posts, if the owner is idle and nobody waits."""
        if self._queue or not self._thread.is_alive() or not self._right.acquire(blocking=False):
            return False
        wanted_ms: int | None = 0
        try:
            with self._changed:
                if self._queue or self._closed:
                    return False
                self._holder, self._mine = threading.get_ident(), deque()
            self._perform(function, slot)
            if self._after is not None:
                wanted_ms = self._after()
                for _ in range(TURN_MAX):
                    if not self._mine:
                        break
                    self._perform(*self._mine.popleft())
                    wanted_ms = self._after()
        except BaseException as error:
            self._failed(error)
        finally:
            self._give_back(wanted_ms)
        return True

    def _give_back(self, wanted_ms: int | None) -> None:
        """Let the owner tick when that is wanted, and see to what has come in the meantime."""
        with self._changed:
            self._queue.extendleft(reversed(self._mine or ()))
            self._holder = self._mine = None
            due_ms = AWAKE if wanted_ms is None else self._clock.boot_ms() + wanted_ms
            if self._queue or self._closed or due_ms < self._sleeps_until_ms:
                self._woken = True
                self._changed.notify()
        self._right.release()

    def _perform(self, function: Callable[[], Any], slot: _Slot | None) -> None:
        if slot is None:
            function()
            return
        try:
            result = function()
        except InvariantViolation as error:
            slot.put(None, error)
            raise
        except Exception as error:
            slot.put(None, error)
        else:
            slot.put(result)

    def _give_up(self) -> None:
        with self._changed:
            self._closed = True
            waiting, self._queue = self._queue, deque()
        for _, slot in waiting:
            if slot is not None:
                slot.put(None, failure.of("RETRY_LATER"))
        for abandon in self._at_halt:
            abandon()


class Batcher(Generic[_Item, _Result]):
    """Callers hand in items; the owner thread handles them many at a time, in their order."""

    def __init__(
        self,
        loop: Loop,
        handler: Callable[[list[_Item]], Sequence[_Result | FabricError]],
        *,
        batch_max: int = BATCH_MAX,
        queue_max: int = QUEUE_MAX,
    ) -> None:
        """`handler(items)` answers each item, with a failure where that one is refused."""
        invariant(0 < batch_max <= queue_max, "a batch is at least one and at most the queue")
        self._loop, self._handler = loop, handler
        self._batch_max, self._queue_max = batch_max, queue_max
        self._waiting: deque[tuple[_Item, _Slot]] = deque()
        self._lock = threading.Lock()
        self._scheduled = False
        self._broken = False
        loop.at_halt(self._abandon)

    def submit(self, item: _Item, timeout_ms: int | None = None) -> _Result:
        """Block until the batch with `item` was handled; raise its failure if it got one."""
        return self.submit_all([item], timeout_ms)[0]

    def submit_all(self, items: Sequence[_Item], timeout_ms: int | None = None) -> list[_Result]:
        """All `items`, one after the other; the first failure among them is raised."""
        answers = self.outcomes(items, timeout_ms)
        for answer in answers:
            if isinstance(answer, FabricError):
                raise answer
        return [answer for answer in answers if not isinstance(answer, FabricError)]

    def outcomes(
        self, items: Sequence[_Item], timeout_ms: int | None = None
    ) -> list[_Result | FabricError]:
        """What became of each item, in their order. Not for the owner: it would wait for itself."""
        invariant(not self._loop.is_owner(), "the owner does not wait for a batch of its own")
        slots = [(item, _Slot()) for item in items]
        with self._lock:
            if self._broken:
                raise failure.of("RETRY_LATER")
            if len(self._waiting) + len(slots) > self._queue_max:
                raise failure.of("RATE", retry_after_ms=BUSY_RETRY_MS)
            self._waiting.extend(slots)
            needs_schedule, self._scheduled = not self._scheduled, True
        if needs_schedule:
            self._schedule(self._loop.run)
        return [_answer(slot, timeout_ms) for _, slot in slots]

    def _schedule(self, how: Callable[[Callable[[], Any]], None]) -> None:
        try:
            how(self._handle)
        except FabricError as refusal:
            with self._lock:
                self._scheduled = False
                refused, self._waiting = self._waiting, deque()
            for _, slot in refused:
                slot.put(refusal)

    def _handle(self) -> None:
        """One batch, in the owner thread; then another if more has gathered in the meantime."""
        with self._lock:
            count = min(len(self._waiting), self._batch_max)
            batch = [self._waiting.popleft() for _ in range(count)]
        try:
            answers: Sequence[Any] = self._handler([item for item, _ in batch])
            invariant(len(answers) == len(batch), "a batch's handler answers each item")
        except FabricError as refusal:
            answers = [refusal] * len(batch)
        except BaseException as error:
            for _, slot in batch:
                slot.put(None, error)
            raise
        for (_, slot), answer in zip(batch, answers, strict=True):
            slot.put(answer)
        with self._lock:
            again = self._scheduled = bool(self._waiting)
        if again:
            self._schedule(self._loop.post)

    def _abandon(self) -> None:
        with self._lock:
            self._broken = True
            rest, self._waiting = self._waiting, deque()
        for _, slot in rest:
            slot.put(failure.of("RETRY_LATER"))


def _answer(slot: _Slot, timeout_ms: int | None) -> Any:
    return slot.take(timeout_ms)
